// Colours for code: comments, strings, numbers and the words that a language keeps for itself. No grammar of any
// language is here, so now and then a word is coloured that should not be; the text itself is never touched.

const LONGEST = 50_000; // characters; a longer text stays plain, since colouring it would hold up the page

const C_WORDS = "break case char const continue default do double else enum extern float for goto if inline int long return " +
  "short signed sizeof static struct switch typedef union unsigned void volatile while true false NULL";
const JS_WORDS = "async await break case catch class const continue debugger default delete do else export extends false " +
  "finally for from function if import in instanceof let new null of return static super switch this throw true try " +
  "typeof undefined var void while yield";
const WORDS = {
  bash: "if then else elif fi for in do done case esac while until function return local export exit echo cd set unset read source",
  c: C_WORDS,
  cpp: C_WORDS + " auto bool catch class constexpr delete explicit friend namespace new noexcept nullptr operator override " +
    "private protected public template this throw try typename using virtual",
  css: "important inherit initial unset auto none var calc",
  go: "break case chan const continue default defer else fallthrough for func go goto if import interface map package range " +
    "return select struct switch type var true false nil string int error",
  java: "abstract boolean break byte case catch char class const continue default do double else enum extends final finally " +
    "float for if implements import instanceof int interface long new null package private protected public return short " +
    "static super switch this throw throws true false try var void while",
  javascript: JS_WORDS,
  json: "true false null",
  python: "False None True and as assert async await break class continue def del elif else except finally for from global " +
    "if import in is lambda match nonlocal not or pass raise return try while with yield self",
  rust: "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut " +
    "pub ref return self Self static struct super trait true type unsafe use where while",
  sql: "select from where insert into values update set delete create table drop alter add primary key foreign references " +
    "join left right inner outer on group by order having limit offset union all distinct as and or not null is in like " +
    "between case when then else end exists index view with",
  typescript: JS_WORDS + " abstract any as boolean declare enum implements interface keyof namespace never number private " +
    "protected public readonly string type unknown",
  yaml: "true false null yes no",
};
const ALIASES = {
  sh: "bash", shell: "bash", zsh: "bash", console: "bash", h: "c", "c++": "cpp", cc: "cpp", hpp: "cpp", patch: "diff",
  golang: "go", toml: "ini", js: "javascript", jsx: "javascript", mjs: "javascript", py: "python", python3: "python",
  rs: "rust", ts: "typescript", tsx: "typescript", html: "xml", svg: "xml", yml: "yaml",
};
const HASH = "#[^\\n]*";
const SLASHES = "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
const COMMENTS = {
  bash: "(?<![^\\s])#[^\\n]*", c: SLASHES, cpp: SLASHES, css: "/\\*[^]*?(?:\\*/|$)", go: SLASHES, ini: "[#;][^\\n]*",
  java: SLASHES, javascript: SLASHES, json: "(?!)", python: HASH, rust: SLASHES, sql: "--[^\\n]*|/\\*[^]*?(?:\\*/|$)",
  typescript: SLASHES, xml: "<!--[^]*?(?:-->|$)", yaml: HASH,
};
const STRING = "\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?";
const STRINGS = {
  python: "\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|" + STRING, javascript: STRING + "|`(?:[^`\\\\]|\\\\.)*`?",
  typescript: STRING + "|`(?:[^`\\\\]|\\\\.)*`?", go: STRING + "|`[^`]*`?", rust: "\"(?:[^\"\\\\]|\\\\.)*\"?|'(?:[^'\\\\]|\\\\.)'",
};
const NUMBER = "\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";
const NAME = "[A-Za-z_$][\\w$]*";
const LANGUAGES = [...Object.keys(WORDS), "diff", "ini", "xml"];
const patterns = new Map();

/** The name of a language for the word after ```; null: none that is known. */
export function languageOf(word) {
  const name = word.trim().toLowerCase().split(/[\s,{]/)[0];
  const known = ALIASES[name] ?? name;
  return LANGUAGES.includes(known) ? known : null;
}

/** Fill `target`, which holds the code, with the same code in coloured pieces. */
export function highlightInto(target, code, word) {
  const language = languageOf(word);
  if (language === null || code.length > LONGEST) return;
  target.replaceChildren(...piecesOf(code, language).map(([kind, text]) => (kind ? coloured(kind, text) : text)));
}

/** [kind or "", text] of each piece, in order; together they are the code. */
export function piecesOf(code, language) {
  if (language === "diff") return code.split(/(?<=\n)/).map((line) => [diffKind(line), line]);
  const pattern = patternOf(language);
  const words = new Set((WORDS[language] ?? "").split(" "));
  const pieces = [];
  let at = 0;
  for (const found of code.matchAll(pattern)) {
    const kind = kindOf(found, words, language);
    if (!kind) continue;
    if (found.index > at) pieces.push(["", code.slice(at, found.index)]);
    pieces.push([kind, found[0]]);
    at = found.index + found[0].length;
  }
  if (at < code.length) pieces.push(["", code.slice(at)]);
  return pieces;
}

function patternOf(language) {
  if (!patterns.has(language)) {
    const parts = [`(?<comment>${COMMENTS[language]})`];
    if (language === "xml") parts.push("(?<tag></?[A-Za-z][\\w:.-]*|/?>)");
    if (language === "ini" || language === "yaml") parts.push("(?<key>^[ \\t]*-?[ \\t]*[\\w.-]+(?=[ \\t]*[:=]))");
    if (language === "json") parts.push("(?<key>\"(?:[^\"\\\\\\n]|\\\\.)*\"(?=\\s*:))");
    parts.push(`(?<string>${STRINGS[language] ?? STRING})`, `(?<number>${NUMBER})`, `(?<name>${NAME})`);
    patterns.set(language, new RegExp(parts.join("|"), "gm"));
  }
  return patterns.get(language);
}

function kindOf({ groups, 0: text, index, input }, words, language) {
  for (const kind of ["comment", "tag", "key", "string", "number"]) {
    if (groups[kind] !== undefined) return kind;
  }
  if (words.has(language === "sql" ? text.toLowerCase() : text)) return "keyword";
  return input[index + text.length] === "(" ? "call" : "";
}

function diffKind(line) {
  if (line.startsWith("+")) return "added";
  if (line.startsWith("-")) return "removed";
  return line.startsWith("@@") ? "comment" : "";
}

function coloured(kind, text) {
  const span = document.createElement("span");
  span.className = `code-${kind}`;
  span.textContent = text;
  return span;
}
