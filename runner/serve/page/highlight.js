// Colours for code. A language's grammar is loaded from this server when its first block is shown.

import hljs from "./vendor/highlight/core.js";

const LANGUAGES = ["bash", "c", "cpp", "css", "diff", "go", "ini", "java", "javascript", "json", "markdown", "python",
  "rust", "sql", "typescript", "xml", "yaml"];
const ALIASES = {
  sh: "bash", shell: "bash", zsh: "bash", console: "bash", h: "c", "c++": "cpp", cc: "cpp", hpp: "cpp", patch: "diff",
  golang: "go", toml: "ini", js: "javascript", jsx: "javascript", mjs: "javascript", md: "markdown", py: "python",
  python3: "python", rs: "rust", ts: "typescript", tsx: "typescript", html: "xml", svg: "xml", yml: "yaml",
};
const LONGEST = 50_000; // characters; a longer text stays plain, since colouring it would hold up the page
const loading = new Map();

/** The name of a grammar for the word after ```; null: none. */
export function grammarOf(word) {
  const name = word.trim().toLowerCase().split(/[\s,{]/)[0];
  const known = ALIASES[name] ?? name;
  return LANGUAGES.includes(known) ? known : null;
}

/** Fill `target` with the code, coloured; plain where its language is not known. */
export async function highlightInto(target, code, word) {
  const grammar = grammarOf(word);
  if (grammar === null || code.length > LONGEST) return;
  if (!loading.has(grammar)) {
    loading.set(grammar, import(`./vendor/highlight/${grammar}.js`).then((module) => {
      hljs.registerLanguage(grammar, module.default);
    }));
  }
  try {
    await loading.get(grammar);
  } catch {
    loading.delete(grammar); // the server was gone; the next block tries again
    return;
  }
  if (target.textContent === code) target.replaceChildren(nodesOf(hljs.highlight(code, { language: grammar }).value));
}

const PIECE = /<span class="([^"]*)">|<\/span>|([^<]+)/g;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'" };

/** Nodes for what highlight.js gives, which is nothing but spans with a class, and escaped text. */
function nodesOf(value) {
  const root = document.createDocumentFragment();
  const open = [root];
  for (const [piece, name, text] of value.matchAll(PIECE)) {
    const inner = open[open.length - 1];
    if (text !== undefined) {
      inner.append(text.replace(/&(?:amp|lt|gt|quot|#x27);/g, (entity) => ENTITIES[entity]));
    } else if (piece === "</span>") {
      if (open.length > 1) open.pop();
    } else {
      const span = document.createElement("span");
      span.className = name;
      inner.append(span);
      open.push(span);
    }
  }
  return root;
}
