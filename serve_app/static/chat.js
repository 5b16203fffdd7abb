// The chat application: what is shown, what is sent, and what the keyboard does.
import { Failure, chunks, info, keepKey, key, takeKeyFromAddress, tryKey } from "./api.js";
import { h, icon, iconButton, say, shell } from "./dom.js";
import { number, t } from "./i18n.js";
import { assistantMessage, fileChip, toolMessage, userMessage } from "./message.js";
import { absorb, modelTemperature, parseTools, requestOf } from "./request.js";
import { chats as stored, newChat, remove, save, whenChangedElsewhere } from "./store.js";

const FILE_LIMIT_KB = 512;
const SAVE_EVERY_MS = 2000;
const PRESETS = [[0, "preset0"], [1, "preset1"], [1.3, "preset13"], [1.5, "preset15"]];
const EXAMPLE_TOOLS = JSON.stringify([{
  name: "get_weather",
  description: "The weather in a city now",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
}], null, 2);
const $ = (id) => document.getElementById(id);

let service = { model: "", system_prompt: "", temperature_mapping: "deepseek", default_output_tokens: 0 };
let all = stored();
let chat = newChat("");
let files = []; // attached to the message that is being written
let running = null; // {chat, message, element, abort}
let pinned = true; // the newest words stay in view

// ---- conversation list ----

function drawList() {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const groups = [["today", all.filter((c) => c.updated >= midnight)], ["earlier", all.filter((c) => c.updated < midnight)]];
  const parts = groups.flatMap(([name, list]) => (list.length ? [h("h2", {}, t(name)), h("ul", {}, ...list.map(entry))] : []));
  $("list").replaceChildren(...(parts.length ? parts : [h("p", { class: "small soft" }, t("chatsNone"))]));
}

function entry(item) {
  const current = item.id === chat.id;
  const open = h("button", { type: "button", title: item.title, onclick: () => show(item) }, item.title);
  if (current) open.setAttribute("aria-current", "true");
  const row = h("li", { class: current ? "entry current" : "entry" }, open,
    iconButton("edit", "rename", () => rename(item, row), { "aria-label": `${t("rename")}: ${item.title}` }),
    iconButton("trash", "remove", () => drop(item), { "aria-label": `${t("remove")}: ${item.title}` }));
  return row;
}

function rename(item, row) {
  const field = h("input", { type: "text", value: item.title, maxLength: 120, "aria-label": t("rename") });
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    if (keep && field.value.trim()) item.title = field.value.trim();
    keepChat(item);
    draw();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" && (event.key !== "Enter" || event.isComposing)) return;
    event.stopPropagation();
    finish(event.key === "Enter");
    $("input").focus(); // the field had it, and is gone
  });
  field.addEventListener("blur", () => finish(true));
  row.replaceChildren(field);
  field.select();
}

function drop(item) {
  if (running?.chat === item) running.abort.abort();
  remove(item);
  all = all.filter((other) => other !== item);
  if (chat === item) show(newChat(service.system_prompt ?? ""), false);
  drawList();
  toast(t("removed"), t("undo"), () => { keepChat(item); all = [item, ...all].sort((a, b) => b.updated - a.updated); show(item); });
}

function keepChat(item) {
  if (!save(item)) toast(t("storageFull"));
}

function show(item, focus = true) {
  chat = item;
  closeSide();
  pinned = true;
  draw();
  if (focus) $("input").focus({ preventScroll: matchMedia("(hover: none)").matches });
}

// ---- the conversation ----

function draw() {
  drawList();
  $("title").textContent = chat.title || t("newChat");
  document.title = `${chat.title || t("newChat")} · ${service.model || "Rayseek"}`;
  $("model").textContent = service.model;
  drawHello();
  const last = chat.messages.length - 1;
  $("talk").replaceChildren(...chat.messages.map((message, index) => view(message, index === last)));
  drawComposer();
  drawSettings();
  follow();
}

function view(message, last) {
  if (message.role === "user") return userMessage(message, { onedit });
  if (message.role === "tool") return toolMessage(message);
  const live = running?.message === message;
  const element = assistantMessage(message, { running: live, last, onretry, onkey: () => askKey(onretry), onresults });
  if (live) running.element = element;
  return element;
}

function drawHello() {
  $("hello").hidden = chat.messages.length > 0;
  $("talk").hidden = chat.messages.length === 0;
  const idea = (n) => h("button", { type: "button", class: "idea", onclick: () => { $("input").value = t(`idea${n}Text`); drawComposer(); $("input").focus(); } },
    h("b", {}, t(`idea${n}`)), h("span", { class: "soft small" }, t(`idea${n}Text`)));
  $("hello").replaceChildren(h("h2", {}, t("hello")), h("p", { class: "soft" }, t("helloWhy", { model: service.model || "DeepSeek" })),
    h("div", { class: "ideas" }, idea(1), idea(2), idea(3), idea(4)));
}

/** Keeps the newest words in view, unless the reader has scrolled up. */
function follow() {
  if (pinned) $("scroll").scrollTop = $("scroll").scrollHeight;
  $("to-end").hidden = pinned || chat.messages.length === 0;
}

function onedit(message, text) {
  if (running?.chat === chat) running.abort.abort();
  chat.messages.length = chat.messages.indexOf(message);
  ask({ ...message, text });
}

function onretry() {
  if (running?.chat === chat) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  answer();
}

function onresults(calls, texts) {
  calls.forEach((call, index) => chat.messages.push({ role: "tool", id: call.id, name: call.name, text: texts[index] }));
  answer();
}

function ask(message) {
  chat.messages.push(message);
  chat.title ||= (message.text.trim() || message.files[0].name).replace(/\s+/g, " ").slice(0, 60);
  answer();
}

/** Asks for the next answer of the conversation and shows it as it comes. */
async function answer() {
  running?.abort.abort();
  const own = chat;
  if (!all.includes(own)) all.unshift(own);
  const message = { role: "assistant", text: "", calls: [], usage: null, seconds: 0, end: null, failure: null };
  const turn = { chat: own, message, element: null, abort: new AbortController() };
  running = turn;
  let body = null;
  if (!service.model) await loading;
  try {
    body = requestOf(own, service.model);
  } catch (error) {
    message.failure = { kind: "request", detail: t("toolsBad", { why: error.message }), retryAfter: null };
  }
  own.messages.push(message);
  own.updated = Date.now();
  all.sort((a, b) => b.updated - a.updated);
  keepChat(own);
  pinned = true;
  if (chat === own) draw();
  say(t("answering"));
  try {
    if (body) await receive(turn, body);
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else {
      const known = error instanceof Failure ? error : new Failure("server", String(error));
      message.failure = { kind: known.kind, detail: known.kind === "key" ? "" : known.detail, retryAfter: known.retryAfter };
    }
  }
  if (running === turn) running = null;
  if (all.includes(own)) keepChat(own);
  if (chat === own) draw();
  if (!message.failure) say(message.end === "stopped" ? t("stopped") : t("answered"));
  if (message.failure?.kind === "key" && chat === own) askKey(onretry);
}

async function receive(turn, body) {
  const { message } = turn;
  let saved = Date.now();
  let first = 0;
  let pending = false;
  const paint = () => {
    const began = performance.now();
    if (running === turn && chat === turn.chat) {
      turn.element.refresh(true);
      follow();
    }
    // A long answer takes long to draw: leave the browser twice that time for the rest.
    setTimeout(() => { if (pending) { pending = false; requestAnimationFrame(paint); } else painting = false; },
      Math.max(40, 2 * (performance.now() - began)));
  };
  let painting = false;
  for await (const chunk of chunks(body, turn.abort.signal)) {
    absorb(message, chunk);
    first ||= performance.now();
    message.seconds = (performance.now() - first) / 1000;
    if (painting) pending = true;
    else { painting = true; requestAnimationFrame(paint); }
    if (Date.now() - saved > SAVE_EVERY_MS) {
      saved = Date.now();
      save(turn.chat);
    }
  }
}

function stop() {
  running?.abort.abort();
}

// ---- composer ----

function drawComposer() {
  const busy = running?.chat === chat;
  const empty = !$("input").value.trim() && files.length === 0;
  $("send").classList.toggle("stop", busy);
  $("send").replaceChildren(icon(busy ? "stop" : "send"));
  $("send").setAttribute("aria-label", t(busy ? "stop" : "send"));
  $("send").title = t(busy ? "stop" : "send");
  $("send").disabled = !busy && empty;
  $("files").hidden = files.length === 0;
  $("files").replaceChildren(...files.map((file) => fileChip(file, () => {
    files = files.filter((other) => other !== file);
    drawComposer();
    $("input").focus();
  })));
  $("json").setAttribute("aria-pressed", String(chat.json));
  $("tools").setAttribute("aria-pressed", String(chat.tools.on));
  const model = modelTemperature(chat.temperature, service.temperature_mapping);
  $("warmth").textContent = `${t("temperature")} ${number(chat.temperature)} → ${number(model)}`;
}

async function addFiles(list) {
  for (const file of list) {
    if (file.size > FILE_LIMIT_KB * 1024) {
      toast(t("fileBig", { name: file.name, limit: number(FILE_LIMIT_KB) }));
      continue;
    }
    try {
      const content = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (content.includes("\0")) throw new TypeError("binary");
      files.push({ name: file.name, content });
    } catch {
      toast(t("fileBinary", { name: file.name }));
    }
  }
  drawComposer();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running?.chat === chat) return stop();
  const text = $("input").value.trim();
  if (!text && !files.length) return;
  const message = { role: "user", text, files };
  files = [];
  $("input").value = "";
  ask(message);
});
$("input").addEventListener("input", drawComposer);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (running?.chat !== chat) $("composer").requestSubmit();
  }
  if (event.key === "ArrowUp" && !$("input").value) {
    event.preventDefault();
    [...$("talk").querySelectorAll(".message.user")].at(-1)?.edit();
  }
});
$("input").addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); addFiles(event.clipboardData.files); }
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if ($("side").classList.contains("open")) closeSide();
  else stop();
});
$("picker").addEventListener("change", async () => { await addFiles($("picker").files); $("picker").value = ""; $("input").focus(); });
$("composer").addEventListener("dragover", (event) => { event.preventDefault(); $("composer").classList.add("drop"); });
$("composer").addEventListener("dragleave", () => $("composer").classList.remove("drop"));
$("composer").addEventListener("drop", (event) => { event.preventDefault(); $("composer").classList.remove("drop"); addFiles(event.dataTransfer.files); });
$("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  pinned = scrollHeight - scrollTop - clientHeight < 60;
  $("to-end").hidden = pinned || chat.messages.length === 0;
});
$("to-end").addEventListener("click", () => { pinned = true; follow(); $("input").focus(); });

// ---- settings ----

function drawSettings() {
  if (document.activeElement !== $("system")) $("system").value = chat.system;
  $("system-reset").hidden = !service.system_prompt || chat.system === service.system_prompt;
  $("temperature").value = chat.temperature;
  const model = modelTemperature(chat.temperature, service.temperature_mapping).toFixed(2);
  const shown = t("temperatureValue", { api: chat.temperature.toFixed(1), model });
  $("temperature-value").textContent = shown;
  $("temperature").setAttribute("aria-valuetext", shown);
  $("presets").replaceChildren(...PRESETS.map(([value, name]) => h("button", {
    type: "button", class: "pill", "aria-pressed": String(chat.temperature === value),
    onclick: () => { set({ temperature: value }); $("presets").children[PRESETS.findIndex(([v]) => v === value)].focus(); },
  }, t(name))));
  if (document.activeElement !== $("max-tokens")) $("max-tokens").value = chat.maxTokens ?? "";
  $("max-tokens").max = service.max_output_tokens ?? "";
  $("max-tokens").placeholder = t("maxTokensHint", { n: number(service.default_output_tokens) });
  $("json-check").checked = chat.json;
  $("tools-check").checked = chat.tools.on;
  $("tools-field").hidden = !chat.tools.on;
  if (document.activeElement !== $("tools-text")) $("tools-text").value = chat.tools.text;
  $("tools-error").textContent = toolsProblem();
}

function toolsProblem() {
  if (!chat.tools.on || !chat.tools.text.trim()) return "";
  try {
    parseTools(chat.tools.text);
    return "";
  } catch (error) {
    return t("toolsBad", { why: error.message });
  }
}

function set(changes) {
  Object.assign(chat, changes);
  if (chat.messages.length) keepChat(chat);
  drawSettings();
  drawComposer();
}

function toggleTools() {
  const on = !chat.tools.on;
  set({ tools: { on, text: chat.tools.text || EXAMPLE_TOOLS } });
  if (on && !$("settings").open) { $("settings").showModal(); $("tools-text").setSelectionRange(0, 0); $("tools-text").focus(); }
}

$("system").addEventListener("input", () => set({ system: $("system").value }));
$("system-reset").addEventListener("click", () => { set({ system: service.system_prompt }); $("system").value = chat.system; $("system").focus(); });
$("temperature").addEventListener("input", () => set({ temperature: Number($("temperature").value) }));
$("max-tokens").addEventListener("input", () => set({ maxTokens: $("max-tokens").valueAsNumber > 0 ? Math.floor($("max-tokens").valueAsNumber) : null }));
$("json-check").addEventListener("change", () => set({ json: $("json-check").checked }));
$("tools-check").addEventListener("change", toggleTools);
$("tools-text").addEventListener("input", () => set({ tools: { on: true, text: $("tools-text").value } }));
$("json").addEventListener("click", () => set({ json: !chat.json }));
$("tools").addEventListener("click", toggleTools);
$("warmth").addEventListener("click", () => { $("settings").showModal(); $("temperature").focus(); });
$("settings").addEventListener("click", (event) => { if (event.target === $("settings") && event.offsetX < 0) $("settings").close(); });

// ---- key, side list, messages to the user ----

let afterKey = null;

function askKey(then = null) {
  afterKey = then;
  $("key-error").textContent = "";
  if (!$("ask-key").open) $("ask-key").showModal();
  $("key-input").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("key-submit").disabled = true;
  $("key-submit").textContent = t("checking");
  try {
    const value = $("key-input").value.trim();
    await tryKey(value);
    keepKey(value, $("key-keep").checked);
    $("key-input").value = "";
    $("ask-key").close();
    await load();
    afterKey?.();
  } catch (error) {
    $("key-error").textContent = t(error.kind === "key" ? "keyWrong" : `failed${error.kind[0].toUpperCase()}${error.kind.slice(1)}`);
  } finally {
    $("key-submit").disabled = false;
    $("key-submit").textContent = t("signIn");
  }
});
$("key-cancel").addEventListener("click", () => $("ask-key").close());

function closeSide() {
  $("side").classList.remove("open");
  $("veil").hidden = true;
  $("menu").firstChild?.setAttribute("aria-expanded", "false");
}

function openSide() {
  $("side").classList.add("open");
  $("veil").hidden = false;
  $("menu").firstChild.setAttribute("aria-expanded", "true");
  $("new").focus();
}

$("veil").addEventListener("click", closeSide);
$("new").addEventListener("click", () => show(newChat(service.system_prompt ?? "")));

let toastEnds = 0;
function toast(text, action = null, onaction = null) {
  const button = action && h("button", { type: "button", class: "text-button", onclick: () => { $("toast").hidden = true; onaction(); } }, action);
  $("toast").replaceChildren(...[h("span", {}, text), button].filter(Boolean));
  $("toast").hidden = false;
  clearTimeout(toastEnds);
  toastEnds = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

function drawFrame() {
  $("new").replaceChildren(icon("plus"), h("span", {}, t("newChat")));
  $("menu").replaceChildren(iconButton("menu", "openList", openSide, { "aria-expanded": "false", "aria-controls": "side" }));
  $("side-close").replaceChildren(iconButton("close", "closeList", () => { closeSide(); $("menu").firstChild.focus(); }));
  $("open-settings").replaceChildren(iconButton("sliders", "settings", () => $("settings").showModal()));
  $("close-settings").replaceChildren(iconButton("close", "close", () => $("settings").close()));
  $("attach").replaceChildren(iconButton("attach", "attach", () => $("picker").click()));
  $("to-end").replaceChildren(icon("down"));
  $("to-end").setAttribute("aria-label", t("toEnd"));
  $("account").replaceChildren(service.signed_in
    ? h("button", { type: "button", class: "text-button", onclick: () => { keepKey(null); load(); } }, t("signOut"))
    : h("button", { type: "button", class: "text-button", hidden: service.local, onclick: () => askKey() }, icon("key"), h("span", {}, t("signIn"))));
  draw();
}

async function load() {
  try {
    const before = service.system_prompt ?? "";
    service = await info();
    if (!chat.messages.length && chat.system === before) chat.system = service.system_prompt ?? "";
    drawFrame();
    if (!key()) askKey();
  } catch (error) {
    toast(t(error.kind === "network" ? "failedNetwork" : "failedServer"), t("retry"), load);
  }
}

whenChangedElsewhere(() => {
  if (running) return; // what is being written here wins
  all = stored();
  chat = all.find((item) => item.id === chat.id) ?? (chat.messages.length ? newChat(service.system_prompt ?? "") : chat);
  draw();
});
takeKeyFromAddress();
shell(drawFrame);
drawFrame();
const loading = load();
$("input").focus();
