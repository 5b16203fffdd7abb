// Building elements, icons, and the few things that every page has: copying, theme, language.
import { language, setLanguage, t, translate } from "./i18n.js";

/** An element. Properties are set as such; `on…` are listeners, `class`, `aria-…` are attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An icon of the sprite that `shell()` puts into the page. */
export function icon(name) {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  for (const d of PATHS[name]) {
    const path = document.createElementNS(ns, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

const PATHS = {
  attach: ["M15.5 9.5 9.8 15.2a3.6 3.6 0 0 1-5.1-5.1l6.2-6.2a2.4 2.4 0 0 1 3.4 3.4L8.2 13.4a1.2 1.2 0 0 1-1.7-1.7l5.5-5.5"],
  check: ["m4.5 10.5 3.6 3.6 7.4-8.2"],
  close: ["m5.5 5.5 9 9", "m14.5 5.5-9 9"],
  copy: ["M7.5 7.5h8v9h-8z", "M12.5 7.5v-4h-8v9h3"],
  down: ["M10 4v12", "m5 11 5 5 5-5"],
  edit: ["M4 16l.8-3.4L13.4 4 16 6.6l-8.6 8.6z"],
  eye: ["M2.5 10S5.3 5 10 5s7.5 5 7.5 5-2.8 5-7.5 5-7.5-5-7.5-5z", "M10 7.8a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4z"],
  file: ["M5.5 3h6l3.5 3.5V17h-9.5z", "M11.5 3v3.5H15"],
  key: ["M12.5 4a3.8 3.8 0 1 1-3.3 5.7L3.5 15.4V17H6v-1.7h1.7v-1.7h1.7l1.5-1.5", "M13.5 7.2h.01"],
  menu: ["M3.5 6h13", "M3.5 10h13", "M3.5 14h13"],
  moon: ["M16 11.7A6.5 6.5 0 0 1 8.3 4a6.5 6.5 0 1 0 7.7 7.7z"],
  plus: ["M10 4.5v11", "M4.5 10h11"],
  retry: ["M15.8 8.5A6 6 0 1 0 16 11.5", "M16.2 4.5v4h-4"],
  send: ["M10 16V4.5", "m5 9 5-5 5 5"],
  sliders: ["M3.5 6.5h7", "M14.5 6.5h2", "M12.5 4.5v4", "M3.5 13.5h2", "M9.5 13.5h7", "M7.5 11.5v4"],
  stop: ["M6 6h8v8H6z"],
  sun: ["M10 6.8a3.2 3.2 0 1 0 0 6.4 3.2 3.2 0 0 0 0-6.4z", "M10 2.5v1.5M10 16v1.5M2.5 10H4M16 10h1.5M4.7 4.7l1 1M14.3 14.3l1 1M4.7 15.3l1-1M14.3 5.7l1-1"],
  trash: ["M4 5.5h12", "M8 5.5V3.5h4v2", "m5.5 5.5.7 11h7.6l.7-11"],
};

export function iconButton(name, label, onclick, extra = {}) {
  return h("button", { type: "button", class: "icon-button", title: t(label), "aria-label": t(label), onclick, ...extra }, icon(name));
}

/** Copies text and shows a tick on the button for a moment. */
export async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https there is no clipboard API except on localhost.
    const area = h("textarea", { value: text, class: "visually-hidden" });
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  say(t("copied"));
  const before = [...button.childNodes];
  if (button.dataset.done) return;
  button.dataset.done = "1";
  button.replaceChildren(icon("check"), ...before.filter((node) => node.nodeName === "SPAN"));
  setTimeout(() => {
    button.replaceChildren(...before);
    delete button.dataset.done;
  }, 1400);
}

/** Tells screen readers. */
export function say(text) {
  const region = document.getElementById("status");
  region.textContent = "";
  setTimeout(() => { region.textContent = text; }, 50);
}

export function remember(name, value) {
  try {
    localStorage.setItem(`rayseek.${name}`, value);
  } catch {
    // storage may be full or forbidden: the choice then lasts as long as the page
  }
}

/** Fills `#switches` with language and theme buttons, and translates the page. */
export function shell(onlanguage = () => {}) {
  const dark = () => {
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const draw = () => {
    translate(document);
    const other = language() === "zh" ? "en" : "zh";
    const words = h("button", {
      type: "button", class: "text-button", lang: other,
      "aria-label": other === "zh" ? "切换到中文" : "Switch to English",
      onclick: () => { remember("language", other); setLanguage(other); draw(); onlanguage(); words.isConnected || document.querySelector("#switches .text-button").focus(); },
    }, other === "zh" ? "中文" : "English");
    const theme = iconButton(dark() ? "sun" : "moon", dark() ? "light" : "dark", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      remember("theme", document.documentElement.dataset.theme);
      draw();
      document.querySelector("#switches .icon-button").focus();
    });
    document.getElementById("switches").replaceChildren(words, theme);
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
