// A reply's Markdown as nodes. lexer.js takes the text apart; the nodes are made here, one kind at a time, so that HTML
// in a reply is shown as the text it is, and no picture is ever fetched.

import { copyText, el, icon } from "./dom.js";
import { highlightInto } from "./highlight.js";
import { blocksOf } from "./lexer.js";

const SAFE_LINK = /^(?:https?:|mailto:)/i;
const ENTITY = /&(amp|lt|gt|quot|#39|apos|nbsp|hellip|ndash|mdash|rarr|larr|times|le|ge|ne|copy|deg|middot);/g;
const CHARACTERS = {
  amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", apos: "'", nbsp: "\u00a0", hellip: "…", ndash: "–", mdash: "—",
  rarr: "→", larr: "←", times: "×", le: "≤", ge: "≥", ne: "≠", copy: "©", deg: "°", middot: "·",
};

/**
 * Show `text` in `target`. Called again and again while a reply grows: blocks that have not changed keep their nodes,
 * and with them what the reader has selected or scrolled.
 */
export function renderMarkdown(target, text) {
  const tokens = blocksOf(text);
  const shown = target.renderedBlocks ?? [];
  let same = 0;
  while (same < tokens.length && same < shown.length && isSame(shown[same], tokens[same])) same += 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const token of tokens.slice(same)) target.append(block(token));
  target.renderedBlocks = tokens.map((token) => ({ type: token.type, raw: token.raw }));
}

function isSame(shown, token) {
  return shown.type === token.type && shown.raw === token.raw;
}

function blocks(tokens) {
  return tokens.map(block);
}

function block(token) {
  switch (token.type) {
    case "heading":
      return el(`h${Math.min(6, token.depth + 2)}`, { class: `heading-${token.depth}` }, ...inlines(token.tokens));
    case "paragraph":
      return el("p", {}, ...inlines(token.tokens));
    case "code":
      return codeBlock(token.text, token.lang ?? "");
    case "blockquote":
      return el("blockquote", {}, ...blocks(token.tokens));
    case "list":
      return list(token);
    case "table":
      return table(token);
    case "hr":
      return el("hr");
    default: // within a list item: a checkbox, or a line without a paragraph of its own
      return el("span", {}, ...(token.tokens ? inlines(token.tokens) : [plain(token)]));
  }
}

function list(token) {
  const start = token.ordered && token.start !== 1 ? token.start : null;
  const items = token.items.map((item) => el("li", { class: item.task ? "task" : null }, ...blocks(item.tokens)));
  return el(token.ordered ? "ol" : "ul", { start }, ...items);
}

function table(token) {
  const cell = (name) => (each) =>
    el(name, { class: each.align ? `align-${each.align}` : null, scope: name === "th" ? "col" : null },
      ...inlines(each.tokens));
  const head = el("thead", {}, el("tr", {}, ...token.header.map(cell("th"))));
  const body = el("tbody", {}, ...token.rows.map((row) => el("tr", {}, ...row.map(cell("td")))));
  return el("div", { class: "table-frame", tabindex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, head, body));
}

function codeBlock(code, word) {
  const text = el("code", {}, code);
  const label = el("span", {}, "Copy");
  const button = el("button", { type: "button", class: "copy", onclick: copy }, icon("copy"), label);
  async function copy() {
    label.textContent = (await copyText(code)) ? "Copied" : "Not allowed";
    setTimeout(() => (label.textContent = "Copy"), 1500);
  }
  highlightInto(text, code, word);
  const language = word.trim().split(/\s/)[0].slice(0, 30);
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", { class: "language" }, language || "text"), button),
    el("pre", { tabindex: 0 }, text));
}

function inlines(tokens) {
  return tokens.map(inline);
}

function inline(token) {
  switch (token.type) {
    case "strong":
      return el("strong", {}, ...inlines(token.tokens));
    case "em":
      return el("em", {}, ...inlines(token.tokens));
    case "del":
      return el("del", {}, ...inlines(token.tokens));
    case "codespan":
      return el("code", {}, token.text);
    case "br":
      return el("br");
    case "link":
      return link(token.href, inlines(token.tokens));
    case "image":
      return link(token.href, [`[picture: ${token.text || token.href}]`]);
    case "escape":
      return token.text;
    default:
      return plain(token);
  }
}

function plain(token) {
  if (token.type === "checkbox") return checkbox(token.checked);
  return (token.text ?? token.raw).replace(ENTITY, (_, name) => CHARACTERS[name]);
}

function checkbox(checked) {
  return el("span", { class: "checkbox", role: "img", "aria-label": checked ? "done" : "not done" }, checked ? "☑ " : "☐ ");
}

/** A link is followed only when somebody clicks it; anything but http and mail stays text. */
function link(href, children) {
  if (!SAFE_LINK.test(href)) return el("span", { class: "no-link", title: href }, ...children);
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
