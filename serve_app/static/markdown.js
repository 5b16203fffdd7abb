// Markdown of a model's answer to nodes. What a model writes is not to be trusted:
// its HTML is shown as text, images become links, and DOMPurify has the last word.
import DOMPurify from "./vendor/dompurify.js";
import highlighter from "./vendor/highlight.js";
import { Marked } from "./vendor/marked.js";
import { copy, h, icon } from "./dom.js";
import { t } from "./i18n.js";

const escape = (text) =>
  text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

function highlighted(code, lang) {
  const known = lang && highlighter.getLanguage(lang) && code.length < 50_000;
  return known ? highlighter.highlight(code, { language: lang, ignoreIllegals: true }).value : escape(code);
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    code({ text, lang }) {
      const name = (lang ?? "").match(/^[\w+#.-]*/)[0].toLowerCase();
      return `<pre><code class="language-${escape(name)}">${highlighted(text, name)}</code></pre>`;
    },
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

const purifier = DOMPurify(window);
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  if (node.hasAttribute("class") && !/^(hljs-[\w-]+_?|language-[\w+#.-]*)( [\w-]+_?)*$/.test(node.className)) {
    node.removeAttribute("class");
  }
  if (node.nodeName === "INPUT" && node.getAttribute("type") !== "checkbox") node.remove();
});
const RULES = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr input li ol p pre span strong table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ADD_URI_SAFE_ATTR: ["align", "checked", "disabled", "start", "type"], // these hold no addresses
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** A fragment that is safe to insert, with a head on every code block and tables that scroll. */
export function render(text) {
  const nodes = purifier.sanitize(marked.parse(text), RULES);
  for (const pre of nodes.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const name = code?.className.replace(/^language-/, "") ?? "";
    const button = h("button", { type: "button", class: "text-button", onclick: () => copy(button, code.textContent) },
      icon("copy"), h("span", {}, t("copy")));
    const frame = h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, name || t("code")), button));
    pre.tabIndex = 0; // so that the keyboard can scroll it
    pre.replaceWith(frame);
    frame.append(pre);
  }
  for (const table of nodes.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabIndex: 0, role: "group" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return nodes;
}

/** Code of ours with colours, as a fragment. */
export const colour = (code, lang) => purifier.sanitize(highlighted(code, lang), RULES);
