// Making nodes. Text is always text: nothing here, and nothing else on the page, parses markup.

/**
 * A node: el("button", {class: "quiet", onclick: f}, "Stop").
 * Properties that begin with "on" are listeners; true is an empty attribute; false, null and undefined are left out.
 */
export function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the icons that index.html defines. Decoration: the button around it carries the words. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon alone; words: what it does, for those who hear it and as a tooltip. */
export function iconButton(name, words, onclick, properties = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": words, title: words, onclick, ...properties },
    icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Put a text into the clipboard; false where the browser does not let us. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** The way of pages that came by plain http from another machine, which have no navigator.clipboard. */
function copyBySelection(text) {
  const field = el("textarea", { class: "offscreen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

/** Say something to those who hear the page. */
export function announce(words) {
  byId("announcer").textContent = words;
}
