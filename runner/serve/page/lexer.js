// Takes Markdown apart into blocks and inline pieces. Plain data comes out, no node and no HTML: markdown.js shows it.
// It reads what models write: headings, paragraphs, lists, tables, quotes, code, emphasis and links.

const DEEPEST = 12; // quotes and lists within each other; what lies deeper is text
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]{1,4})(?=\S)|[ \t]*$|[ \t])/;
const TASK = /^\[([ xX])\][ \t]+/;
const COLUMNS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The blocks of a text, each with `raw`, the lines it was made of. */
export function blocksOf(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    block.raw = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fencedCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", depth: heading[1].length, tokens: inlinesOf(heading[2] ?? "") }, at + 1];
  if (RULE.test(line)) return [{ type: "hr" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  if (/^ {4}/.test(line)) return indentedCode(lines, at);
  return paragraph(lines, at);
}

function fencedCode(lines, at, [, fence, word]) {
  const indent = lines[at].length - lines[at].trimStart().length;
  const end = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let next = at + 1;
  while (next < lines.length && !end.test(lines[next])) next += 1;
  const dedent = new RegExp(`^ {0,${indent}}`);
  const code = lines.slice(at + 1, next).map((each) => each.replace(dedent, "")).join("\n");
  return [{ type: "code", text: code, lang: word.trim() }, Math.min(lines.length, next + 1)];
}

function indentedCode(lines, at) {
  let next = at;
  while (next < lines.length && (/^ {4}/.test(lines[next]) || lines[next].trim() === "")) next += 1;
  const code = lines.slice(at, next).map((each) => each.slice(4)).join("\n").trimEnd();
  return [{ type: "code", text: code, lang: "" }, next];
}

function quote(lines, at, depth) {
  let next = at;
  while (next < lines.length && lines[next].trim() !== "" && (QUOTE.test(lines[next]) || goesOn(lines, next))) next += 1;
  const inner = lines.slice(at, next).map((each) => each.replace(QUOTE, "")).join("\n");
  return [{ type: "blockquote", tokens: blocksOf(inner, depth + 1) }, next];
}

/** Whether a line can only be more of the paragraph above it. */
function goesOn(lines, at) {
  const line = lines[at];
  const begins = [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
  return line.trim() !== "" && !begins;
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const mark = first[2];
  const kind = kindOf(first);
  const found = { type: "list", ordered: /\d/.test(mark), start: parseInt(mark, 10) || 0, items: [] };
  let next = at;
  let isLoose = false;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || RULE.test(lines[next]) || kindOf(item) !== kind) break;
    const width = item[1].length + item[2].length + (item[3]?.length ?? 1);
    const inner = [lines[next].slice(width)];
    next += 1;
    let blank = 0;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      if (line.trim() === "") {
        blank += 1;
        inner.push("");
      } else if (line.startsWith(" ".repeat(Math.min(width, 2))) && line.search(/\S/) >= Math.min(width, 2)) {
        isLoose ||= blank > 0 && !ITEM.test(line.slice(Math.min(width, line.search(/\S/))));
        blank = 0;
        inner.push(line.slice(Math.min(width, line.search(/\S/))));
      } else if (blank === 0 && goesOn(lines, next)) {
        inner.push(line);
      } else {
        break;
      }
    }
    isLoose ||= blank > 0 && next < lines.length && kindOf(ITEM.exec(lines[next])) === kind;
    found.items.push(listItem(inner, depth));
    if (blank > 1) break;
  }
  if (!isLoose) for (const item of found.items) item.tokens.forEach(tighten);
  while (next > at && lines[next - 1].trim() === "") next -= 1;
  return [found, next];
}

/** What tells a list from the next: its bullet, or what stands behind its numbers. */
function kindOf(item) {
  if (!item) return "";
  return /\d/.test(item[2]) ? item[2].at(-1) : item[2];
}

function listItem(inner, depth) {
  const task = TASK.exec(inner[0]);
  if (task) inner[0] = inner[0].slice(task[0].length);
  const tokens = blocksOf(inner.join("\n"), depth + 1);
  if (task) tokens.unshift({ type: "checkbox", checked: task[1] !== " " });
  return { task: Boolean(task), tokens };
}

function tighten(token) {
  if (token.type === "paragraph") token.type = "text";
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") &&
    COLUMNS.test(lines[at + 1]) && cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length;
}

function table(lines, at) {
  const align = cellsOf(lines[at + 1]).map((each) => {
    if (each.endsWith(":")) return each.startsWith(":") ? "center" : "right";
    return each.startsWith(":") ? "left" : null;
  });
  const row = (line) => {
    const cells = cellsOf(line);
    return align.map((each, column) => ({ align: each, tokens: inlinesOf(cells[column] ?? "") }));
  };
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|") && lines[next].trim() !== "") next += 1;
  return [{ type: "table", header: row(lines[at]), rows: lines.slice(at + 2, next).map(row) }, next];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  const cells = [""];
  let inCode = false;
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "`") inCode = !inCode;
    if (inner[at] === "\\" && inner[at + 1] === "|") {
      cells[cells.length - 1] += "|";
      at += 1;
    } else if (inner[at] === "|" && !(inCode && inner.indexOf("`", at) > 0)) {
      cells.push("");
    } else {
      cells[cells.length - 1] += inner[at];
    }
  }
  return cells.map((each) => each.trim());
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && goesOn(lines, next) && !isTable(lines, next)) next += 1;
  return [{ type: "paragraph", tokens: inlinesOf(lines.slice(at, next).map((each) => each.trim()).join("\n")) }, next];
}

// ---- within a block

const SPECIAL = /[\\`*_~![<\n]|https?:\/\//g;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const CODE = /(`+)([^]{1,5000}?)(?<!`)\1(?!`)/y;
const ADDRESS = /<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>/y;
const BARE = /https?:\/\/[^\s<>"]+/y;
const TARGET = /\(\s*<?((?:[^\s()<>]|\([^\s()<>]*\))*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
// Bounded, so that a text full of stars takes no longer than another.
const BOTH = /\*\*\*(?=[^\s*])([^*]{1,2000}?[^\s*]?)\*\*\*(?!\*)/y;
const EMPHASIS = [
  ["strong", /\*\*(?=[^\s*])([^]{1,2000}?[^\s])\*\*(?!\*)/y], ["strong", /__(?=[^\s_])([^]{1,2000}?[^\s])__(?!\w)/y],
  ["strong", /\*\*([^\s*])\*\*/y], ["del", /~~(\S|\S[^]{0,2000}?\S)~~/y],
  ["em", /\*(?=[^\s*])((?:[^*]|\*\*[^*]+\*\*){1,2000}?)(?<!\s)\*(?!\*)/y], ["em", /_(?=[^\s_])([^_]{1,2000}?)(?<!\s)_(?!\w)/y],
];

/** The pieces of a line or a paragraph. */
export function inlinesOf(text, depth = 0) {
  const tokens = [];
  let at = 0;
  let plain = "";
  const flush = () => {
    if (plain) tokens.push({ type: "text", text: plain });
    plain = "";
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    const stop = special ? special.index : text.length;
    plain += text.slice(at, stop);
    at = stop;
    if (at === text.length) break;
    const found = depth < DEEPEST ? inlineAt(text, at, depth) : null;
    if (found) {
      flush();
      tokens.push(found[0]);
      at = found[1];
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return tokens;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function inlineAt(text, at, depth) {
  if (text[at] === "\n") return [{ type: "br" }, at + 1];
  let found;
  if ((found = match(ESCAPE, text, at))) return [{ type: "escape", text: found[1] }, at + 2];
  if ((found = match(CODE, text, at))) {
    const code = found[2].replace(/\n/g, " ");
    const trimmed = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
    return [{ type: "codespan", text: trimmed }, at + found[0].length];
  }
  if ((found = match(ADDRESS, text, at))) return [linkTo(found[1], found[1]), at + found[0].length];
  if (text[at] === "h" && /^$|[\s(*_:]/.test(text.slice(Math.max(0, at - 1), at)) && (found = match(BARE, text, at))) {
    const address = found[0].replace(/[.,;:!?'*_~)\]]+$/, "");
    return [linkTo(address, address), at + address.length];
  }
  if (text[at] === "[" || text.startsWith("![", at)) return bracket(text, at, depth);
  if (text[at] === "_" && at > 0 && /\w/.test(text[at - 1])) return null;
  if ((found = match(BOTH, text, at))) {
    return [{ type: "strong", tokens: [{ type: "em", tokens: inlinesOf(found[1], depth + 1) }] }, at + found[0].length];
  }
  for (const [type, pattern] of EMPHASIS) {
    if ((found = match(pattern, text, at))) return [{ type, tokens: inlinesOf(found[1], depth + 1) }, at + found[0].length];
  }
  return null;
}

function linkTo(href, text) {
  return { type: "link", href, tokens: [{ type: "text", text }] };
}

function bracket(text, at, depth) {
  const isImage = text[at] === "!";
  const start = at + (isImage ? 2 : 1);
  let open = 1;
  let end = start;
  for (; end < text.length && end - start < 2000; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") open += 1;
    else if (text[end] === "]" && (open -= 1) === 0) break;
  }
  const target = open === 0 ? match(TARGET, text, end + 1) : null;
  if (!target) return null;
  const label = text.slice(start, end);
  const next = end + 1 + target[0].length;
  if (isImage) return [{ type: "image", href: target[1], text: label }, next];
  return [{ type: "link", href: target[1], tokens: inlinesOf(label, depth + 1) }, next];
}
