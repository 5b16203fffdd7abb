// The service overview: state, addresses, key, examples.
import { Failure, info, keepKey, key, takeKeyFromAddress, tryKey } from "./api.js";
import { copy, h, icon, iconButton, shell } from "./dom.js";
import { number, t } from "./i18n.js";
import { colour } from "./markdown.js";

const STATE_EVERY_MS = 15_000;
const $ = (id) => document.getElementById(id);
const base = new URL(".", location.href).href.replace(/\/$/, "");
let service = null;
let shown = false; // the whole key is on the screen
let sample = "curl";
let state = null; // {name, age, why}

// The samples of the product page that this service stands in for, with its values filled in.
const SAMPLES = {
  curl: (key) => `curl -X POST ${base}/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer ${key}" \\
  -d '{
    "model": "${service.model}",
    "messages": [
      {
        "role": "user",
        "content": "Write a letter to my daughter from the future year 2035, telling her to study technology well, become the master of technology, and promote technological and economic development; she is currently in 3rd grade"
      }
    ]
  }'`,
  python: (key) => `from openai import OpenAI

##### API Configuration #####
openai_api_key = "${key}"
openai_api_base = "${base}/v1"

client = OpenAI(
    api_key=openai_api_key,
    base_url=openai_api_base,
)

models = client.models.list()
model = models.data[0].id
print(model)


def main():
    stream = True

    chat_completion = client.chat.completions.create(
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "text",
                        "text": "Hello, please introduce yourself in as much detail as possible.",
                    }
                ],
            }
        ],
        model=model,
        max_completion_tokens=1024,
        stream=stream,
    )

    if stream:
        for chunk in chat_completion:
            print(chunk.choices[0].delta.content, end="")
    else:
        result = chat_completion.choices[0].message.content
        print(result)


if __name__ == "__main__":
    main()`,
};

const masked = (value) => `${value.slice(0, 3)}${"•".repeat(12)}${value.length >= 12 ? value.slice(-4) : ""}`;
const usable = () => (service.signed_in || service.local ? key() : null);

function fact(name, value, note = "") {
  const button = iconButton("copy", "copy", () => copy(button, value));
  button.setAttribute("aria-label", `${t("copy")}: ${name}`);
  return h("div", {}, h("dt", {}, name, ...(note ? [h("br"), h("span", {}, note)] : [])), h("dd", { class: "value" }, h("code", {}, value), button));
}

function draw() {
  drawState();
  if (!service) return;
  document.title = `${service.model} · Rayseek`;
  $("model").textContent = service.model;
  const facts = [fact(t("address"), `${base}/v1`, t("addressHere"))];
  if (service.public_url) facts.push(fact(t("addressPublic"), `${service.public_url.replace(/\/$/, "")}/v1`));
  facts.push(fact(t("modelName"), service.model));
  for (const alias of service.aliases) facts.push(fact(t("modelAlias"), alias));
  $("facts").replaceChildren(...facts);
  const limit = (name, value) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, value));
  $("limit-list").replaceChildren(
    limit("context", t("tokens", { n: number(service.context_length) })),
    limit("output", t("tokens", { n: number(service.max_output_tokens) })),
    limit("temperature", t(service.temperature_mapping === "deepseek" ? "mapped" : "unmapped")),
  );
  $("dashboard").hidden = !service.dashboard_url;
  if (service.dashboard_url) $("dashboard").href = service.dashboard_url;
  drawKey();
  drawSample();
}

function drawKey() {
  const value = usable();
  $("key").hidden = !value;
  $("sign-in").hidden = Boolean(value);
  $("key-why").textContent = t(value ? (service.local && !service.signed_in ? "keyLocal" : "keyYours") : "keyHidden");
  if (!value) {
    shown = false;
    $("key-text").textContent = "";
    return;
  }
  $("key-text").textContent = shown ? value : masked(value);
  const copying = iconButton("copy", "copy", () => copy(copying, value));
  copying.setAttribute("aria-label", `${t("copy")}: ${t("apiKey")}`);
  const look = iconButton("eye", shown ? "hide" : "show", () => {
    shown = !shown;
    drawKey();
    drawSample();
    $("key-buttons").querySelector("[aria-pressed]").focus();
  }, { "aria-pressed": String(shown) });
  const leave = service.signed_in
    ? h("button", { type: "button", class: "text-button", onclick: () => { keepKey(null); load(); } }, t("signOut"))
    : null;
  $("key-buttons").replaceChildren(...[leave, look, copying].filter(Boolean));
}

function drawSample() {
  const value = usable();
  const make = SAMPLES[sample];
  for (const name of Object.keys(SAMPLES)) {
    $(`tab-${name}`).setAttribute("aria-selected", String(name === sample));
    $(`tab-${name}`).tabIndex = name === sample ? 0 : -1;
  }
  $("sample").setAttribute("aria-labelledby", `tab-${sample}`);
  $("sample-name").textContent = sample === "curl" ? "bash" : "python";
  $("sample-code").replaceChildren(colour(make(value ? (shown ? value : masked(value)) : "YOUR_API_KEY"), sample === "curl" ? "bash" : "python"));
  const button = h("button", { type: "button", class: "text-button", onclick: () => copy(button, make(value ?? "YOUR_API_KEY")) }, icon("copy"), h("span", {}, t("copy")));
  $("sample-copy").replaceChildren(button);
  $("sample-why").textContent = t(value ? "examplesWhy" : "examplesKey");
}

function drawState() {
  if (!state) return;
  const words = { ready: "stateReady", down: "stateDown", gone: "stateGone" };
  $("state").dataset.state = state.name;
  $("state-text").textContent = t(words[state.name]);
  if (state.age !== undefined) {
    const age = t("seconds", { n: number(Math.round(state.age)) });
    $("state-text").append(h("span", { class: "aside" }, ` · ${state.age < 1 ? t("stateNow") : t("stateFresh", { age })}`));
  }
  const why = state.name === "gone" ? t("stateGoneWhy") : (state.why ?? "");
  $("state-why").textContent = why;
  $("state-why").hidden = !why;
}

/** Ready says that tokens come; if even health is silent, the server is gone. */
async function watch() {
  if (document.hidden) return;
  try {
    const answer = await fetch("ready", { cache: "no-store" });
    const found = await answer.json();
    state = found.ready ? { name: "ready", age: found.last_token_age_s ?? undefined } : { name: "down", why: found.reason };
  } catch {
    const alive = await fetch("health", { cache: "no-store" }).then((answer) => answer.ok, () => false);
    state = { name: alive ? "down" : "gone" };
  }
  drawState();
}

async function load() {
  try {
    service = await info();
    draw();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    setTimeout(load, 5000);
  }
}

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = $("key-input").value.trim();
  $("key-submit").disabled = true;
  $("key-error").textContent = "";
  try {
    await tryKey(value);
    keepKey(value, $("key-keep").checked);
    $("key-input").value = "";
    await load();
    $("key-buttons").querySelector("[aria-pressed]").focus();
  } catch (error) {
    $("key-error").textContent = t(error.kind === "key" ? "keyWrong" : `failed${error.kind[0].toUpperCase()}${error.kind.slice(1)}`);
  } finally {
    $("key-submit").disabled = false;
  }
});

for (const name of Object.keys(SAMPLES)) {
  $(`tab-${name}`).addEventListener("click", () => { sample = name; if (service) drawSample(); });
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    sample = name === "curl" ? "python" : "curl";
    if (service) drawSample();
    $(`tab-${sample}`).focus();
  });
}
takeKeyFromAddress();
shell(draw);
load();
watch();
setInterval(watch, STATE_EVERY_MS);
document.addEventListener("visibilitychange", watch);
