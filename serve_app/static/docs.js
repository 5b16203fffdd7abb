// The API reference, drawn from this server's own OpenAPI document.
import { h, shell } from "./dom.js";
import { t } from "./i18n.js";

let api = null;
const $ = (id) => document.getElementById(id);
const resolve = (schema) => (schema?.$ref ? resolve(api.components.schemas[schema.$ref.split("/").at(-1)]) : (schema ?? {}));
const name = (schema) => schema.$ref?.split("/").at(-1);
const variants = (schema) => (schema.anyOf ?? schema.oneOf ?? [schema]).filter((one) => one.type !== "null");

function typeOf(schema) {
  if (schema.$ref) return name(schema);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.anyOf || schema.oneOf) return [...new Set(variants(schema).map(typeOf))].join(" | ");
  if (schema.type === "array") return `${schema.items ? typeOf(schema.items) : "any"}[]`;
  return schema.type ?? "any";
}

function rules(schema) {
  const found = variants(schema)[0] ?? schema;
  const words = [];
  const low = found.minimum ?? found.exclusiveMinimum;
  const high = found.maximum ?? found.exclusiveMaximum;
  const sign = (exclusive) => (exclusive ? "<" : "≤");
  const size = (value) => (Math.abs(value) > 1e15 ? null : value);
  if (size(low ?? null) !== null && size(high ?? null) !== null) {
    words.push(`${low} ${sign("exclusiveMinimum" in found)} x ${sign("exclusiveMaximum" in found)} ${high}`);
  } else if (size(low ?? null) !== null) words.push(`${"exclusiveMinimum" in found ? ">" : "≥"} ${low}`);
  const least = found.minLength ?? found.minItems ?? found.minProperties;
  const most = found.maxLength ?? found.maxItems ?? found.maxProperties;
  if (least !== undefined || most !== undefined) {
    const unit = t(found.type === "string" ? "characters" : "items");
    words.push(most === undefined ? `≥ ${least} ${unit}` : `${least === undefined ? "≤" : `${least}–`}${least === undefined ? " " : ""}${most} ${unit}`);
  }
  if (found.pattern) words.push(`/${found.pattern}/`);
  if (schema.default !== undefined && schema.default !== null) words.push(`${t("default")} ${JSON.stringify(schema.default)}`);
  return words;
}

/** Rows of an object's fields; objects and lists of objects are opened one level. */
function rows(schema, level = 0, path = "") {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).flatMap(([field, inner]) => {
    const label = h("td", {}, h("code", {}, path + field));
    if (required.has(field)) label.append(h("span", { class: "must" }, t("required")));
    const about = h("td", {}, ...(inner.description ? [h("p", {}, inner.description)] : []),
      ...(rules(inner).length ? [h("p", { class: "small soft mono" }, rules(inner).join("  "))] : []));
    const row = h("tr", { class: level ? "nested" : "" }, label, h("td", { class: "soft small" }, typeOf(inner)), about);
    const deeper = variants(inner).flatMap((one) => {
      const item = one.type === "array" ? one.items : one;
      const found = resolve(item);
      return found.properties && level < 2 ? rows(found, level + 1, `${path}${field}${one.type === "array" ? "[]" : ""}.`) : [];
    });
    return [row, ...deeper];
  });
}

function table(title, body) {
  const head = h("thead", {}, h("tr", {}, ...["field", "type", "about"].map((word) => h("th", { scope: "col" }, t(word)))));
  return [h("h3", {}, title), h("div", { class: "table", tabIndex: 0, role: "group", "aria-label": title }, h("table", {}, head, h("tbody", {}, ...body)))];
}

const verb = (method) => h("span", { class: `verb ${method}` }, method.toUpperCase());

function operation({ id, path, method, found }) {
  const parts = [h("h2", {}, verb(method), path)];
  if (found.description || found.summary) parts.push(h("p", {}, (found.description ?? found.summary).split("\n\n").map((text) => text.replace(/\s+/g, " ")).join(" ")));
  const parameters = found.parameters ?? [];
  if (parameters.length) {
    parts.push(...table(t("parameters"), parameters.map((one) => h("tr", {}, h("td", {}, h("code", {}, one.name)),
      h("td", { class: "soft small" }, typeOf(one.schema)), h("td", {}, one.description ?? one.in)))));
  }
  const schema = found.requestBody?.content?.["application/json"]?.schema;
  if (schema) parts.push(...table(t("body"), rows(resolve(schema))));
  return h("section", { class: "operation", id }, ...parts);
}

function draw() {
  if (!api) return;
  const list = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, found]) => (
    { id: `${method}${path.replace(/[^\w]+/g, "-")}`, path, method, found }
  )));
  $("contents").replaceChildren(...list.map(({ id, path, method }) => h("a", { href: `#${id}` }, verb(method), path)));
  $("operations").replaceChildren(...list.map(operation));
  $("operations").setAttribute("aria-busy", "false");
}

shell(draw);
$("operations").append(h("div", { class: "wait" }), h("div", { class: "wait" }));
try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(String(answer.status));
  api = await answer.json();
  draw();
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
} catch {
  $("operations").replaceChildren(h("p", { class: "alert", role: "alert" }, t("noDocument")));
}
