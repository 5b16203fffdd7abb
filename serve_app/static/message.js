// How one message of a conversation looks. Acting on it is the chat's business, told by callbacks.
import { copy, h, icon, iconButton } from "./dom.js";
import { number, t } from "./i18n.js";
import { render } from "./markdown.js";

const FAILURES = {
  key: "failedKey", forbidden: "failedForbidden", rate: "failedRate", busy: "failedBusy", network: "failedNetwork",
  cut: "failedCut", request: "failedRequest", server: "failedServer",
};

export function fileChip(file, onremove = null) {
  const name = h("span", { title: file.name }, file.name);
  const close = onremove && iconButton("close", "remove", onremove, { "aria-label": t("detach", { name: file.name }) });
  return h("span", { class: "chip" }, icon("file"), name, close);
}

export function userMessage(message, { onedit }) {
  const article = h("article", { class: "message user", "aria-label": t("you") });
  const draw = () => {
    const copying = iconButton("copy", "copy", () => copy(copying, message.text));
    article.classList.remove("editing");
    article.replaceChildren(
      ...[message.files.length ? h("div", { class: "chips" }, ...message.files.map((file) => fileChip(file))) : null,
        message.text ? h("div", { class: "bubble" }, message.text) : null,
        h("div", { class: "under" }, copying, iconButton("edit", "edit", () => edit()))].filter(Boolean),
    );
  };
  const edit = () => {
    const area = h("textarea", { value: message.text, rows: 2, "aria-label": t("edit") });
    const send = () => (area.value.trim() || message.files.length) && onedit(message, area.value);
    const cancel = () => { draw(); article.querySelector(".under .icon-button:last-child").focus(); };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    });
    article.classList.add("editing");
    article.replaceChildren(h("div", { class: "editor" }, area, h("div", { class: "row" },
      h("span", { class: "small soft grow" }, t("editWhy")),
      h("button", { type: "button", class: "button", onclick: cancel }, t("cancel")),
      h("button", { type: "button", class: "button primary", onclick: send }, t("send")))));
    area.focus();
  };
  article.edit = edit;
  draw();
  return article;
}

/** The element has `refresh()`, for while the answer grows. */
export function assistantMessage(message, { running, last, onretry, onkey, onresults }) {
  const prose = h("div", { class: "prose" });
  const rest = h("div", { class: "message" });
  const article = h("article", { class: "message assistant", "aria-label": "DeepSeek" }, prose, rest);
  article.refresh = (live) => {
    prose.replaceChildren(render(message.text));
    prose.hidden = !message.text;
    const parts = message.calls.map((call) => callCard(call));
    if (live) {
      if (!message.text && !message.calls.length) {
        parts.push(h("div", { class: "waiting", role: "img", "aria-label": t("thinking") }, h("i"), h("i"), h("i")));
      }
    } else {
      if (message.failure) parts.push(trouble(message.failure, last ? onretry : null, onkey));
      if (last && message.end === "tool_calls" && message.calls.length) parts.push(resultForm(message.calls, onresults));
      parts.push(under(message, last ? onretry : null));
    }
    rest.replaceChildren(...parts);
  };
  article.refresh(running);
  return article;
}

export function toolMessage(message) {
  const name = h("span", { class: "small soft" }, t("toolResult", { name: message.name }));
  return h("article", { class: "message result" }, name, h("pre", { tabIndex: 0 }, message.text));
}

function callCard(call) {
  const head = h("div", { class: "call-name" }, h("span", { class: "soft small" }, t("callsTool")), h("code", {}, call.name));
  return h("div", { class: "call" }, head, h("pre", { tabIndex: 0 }, pretty(call.arguments)));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet, or not JSON at all
  }
}

function resultForm(calls, onresults) {
  const fields = calls.map((call) =>
    h("textarea", { rows: 2, placeholder: t("toolResultHint"), "aria-label": t("toolResult", { name: call.name }) }));
  const form = h("form", { class: "call", onsubmit: (event) => { event.preventDefault(); onresults(calls, fields.map((field) => field.value)); } },
    ...calls.flatMap((call, index) => [h("span", { class: "small" }, t("toolResult", { name: call.name })), fields[index]]),
    h("div", { class: "row end" }, h("button", { class: "button primary" }, t("sendResults"))));
  return form;
}

function trouble(failure, onretry, onkey) {
  const wait = failure.retryAfter ? t("failedWait", { n: number(failure.retryAfter) }) : "";
  const box = h("div", { class: "trouble", role: "alert" }, h("b", {}, t(FAILURES[failure.kind] ?? "failedServer")),
    ...[failure.detail, wait].filter(Boolean).map((text) => h("p", { class: "small" }, text)));
  const buttons = [];
  if (failure.kind === "key") buttons.push(h("button", { type: "button", class: "button", onclick: onkey }, icon("key"), t("enterKey")));
  if (onretry) buttons.push(h("button", { type: "button", class: "button", onclick: onretry }, icon("retry"), t("retry")));
  box.append(h("div", { class: "row" }, ...buttons));
  return box;
}

function under(message, onretry) {
  const line = h("div", { class: "under" });
  if (message.text) {
    const copying = iconButton("copy", "copy", () => copy(copying, message.text));
    line.append(copying);
  }
  if (onretry && !message.failure) line.append(iconButton("retry", "retry", onretry));
  const notes = [];
  if (message.end === "stopped") notes.push(t("stopped"));
  if (message.end === "length") notes.push(t("lengthEnd"));
  const usage = message.usage;
  if (usage) {
    const cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
    notes.push(t("usage", { prompt: number(usage.prompt_tokens), cached: number(cached), output: number(usage.completion_tokens) }));
    if (message.seconds > 0.3 && usage.completion_tokens > 1) {
      notes.push(t("speed", { n: number(Math.round(usage.completion_tokens / message.seconds)) }));
    }
  }
  if (notes.length) line.append(h("span", { class: "small", title: usage ? t("usageWhy") : "" }, notes.join(" · ")));
  return line;
}
