// A conversation as the API's request, and the chunks of the answer put together again.

/** DeepSeek's template for files: their blocks, and the question at the very end. */
export function fileText(files, question) {
  const blocks = files.map(
    ({ name, content }) => `[file name]: ${name}\n[file content begin]\n${content}\n[file content end]\n`,
  );
  return blocks.join("") + question;
}

/** The functions of a JSON list, bare or wrapped as tools. Throws an Error that says what is wrong. */
export function parseTools(text) {
  const list = JSON.parse(text);
  if (!Array.isArray(list)) throw new Error("[ … ]");
  return list.map((item) => {
    const made = item?.type === "function" ? item : { type: "function", function: item };
    if (typeof made.function?.name !== "string") throw new Error("name?");
    return made;
  });
}

function wire(message) {
  if (message.role === "user") return { role: "user", content: fileText(message.files, message.text) };
  if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.text };
  const calls = message.calls.map(({ id, name, arguments: words }) => (
    { id, type: "function", function: { name, arguments: words } }
  ));
  return { role: "assistant", content: message.text, ...(calls.length ? { tool_calls: calls } : {}) };
}

export function requestOf(chat, model) {
  const system = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  // An answer that failed before its first word says nothing and would be refused.
  const said = chat.messages.filter((m) => m.role !== "assistant" || m.text || m.calls.length);
  const tools = chat.tools.on && chat.tools.text.trim() ? parseTools(chat.tools.text) : [];
  return {
    model,
    messages: [...system, ...said.map(wire)],
    temperature: chat.temperature,
    ...(chat.maxTokens ? { max_tokens: chat.maxTokens } : {}),
    ...(chat.json ? { response_format: { type: "json_object" } } : {}),
    ...(tools.length ? { tools } : {}),
  };
}

/** Adds one chunk to an assistant message. */
export function absorb(message, chunk) {
  const choice = chunk.choices?.[0];
  message.text += choice?.delta?.content ?? "";
  for (const part of choice?.delta?.tool_calls ?? []) {
    const call = (message.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice?.finish_reason) message.end = choice.finish_reason;
  if (chunk.usage) message.usage = chunk.usage;
}

/** The model's temperature for the API's, by the rule of the V3-0324 card. */
export function modelTemperature(api, mapping) {
  if (mapping !== "deepseek") return api;
  return api <= 1 ? api * 0.3 : api - 0.7;
}
