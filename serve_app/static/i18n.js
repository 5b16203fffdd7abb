// Words in two languages. HTML names them: data-t (text), data-t-label, -title, -placeholder.
import { WORDS } from "./words.js";

export const language = () => (document.documentElement.lang === "zh" ? "zh" : "en");

export function setLanguage(name) {
  document.documentElement.lang = name;
}

/** The words for `name`, with `{placeholders}` filled in. */
export function t(name, values = {}) {
  const text = WORDS[name][language() === "zh" ? 1 : 0];
  return text.replace(/\{(\w+)\}/g, (_, found) => values[found] ?? "");
}

const ATTRIBUTES = { tLabel: "aria-label", tTitle: "title", tPlaceholder: "placeholder" };

export function translate(root) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const [name, attribute] of Object.entries(ATTRIBUTES)) {
    const selector = `[data-${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}]`;
    for (const element of root.querySelectorAll(selector)) {
      element.setAttribute(attribute, t(element.dataset[name]));
    }
  }
}

export const number = (value) => value.toLocaleString(language() === "zh" ? "zh-CN" : "en-US");
