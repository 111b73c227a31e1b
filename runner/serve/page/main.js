// The page: what is open, what is being answered, and what every button does.

import { getJson, ServerError, setKey } from "./api.js";
import { ConsolePanel } from "./console.js";
import { ask, openSettings } from "./dialogs.js";
import { announce, byId, el } from "./dom.js";
import * as format from "./format.js";
import { fillReply, requestOf } from "./reply.js";
import { drawConversations, Drawers } from "./sidebar.js";
import { exported, imported, loadSettings, newConversation, openStore, saveSettings, titleFrom } from "./store.js";
import { fit, Thread } from "./thread.js";

const RECONNECT_MS = 2000;
const SAVE_MS = 1000; // between two savings of a reply that grows
const CURRENT = "moe-edge.current"; // the open conversation, of this tab

const input = byId("input");
const consolePanel = new ConsolePanel();
const drawers = new Drawers(consolePanel);
const thread = new Thread(byId("thread"), byId("scroller"), { retry, edit });

let store;
let settings = loadSettings();
let conversations = [];
let current = newConversation();
let running = null; // {conversation, controller}
let facts = null;
let needsKey = false;
let isConnecting = false;

// ---- the server

/** Ask until the server answers, and its key is right. */
async function connect() {
  if (isConnecting) return;
  isConnecting = true;
  try {
    while (true) {
      try {
        facts = await getJson("/moe-edge/facts");
        break;
      } catch (error) {
        if (error.status === 401) {
          if (!(await askKey())) return;
        } else {
          facts = null;
          drawFacts();
          showBanner(error.message);
          await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
        }
      }
    }
    showBanner(null);
    drawFacts();
    consolePanel.connected(facts);
  } finally {
    isConnecting = false;
  }
}

async function askKey() {
  needsKey = true;
  const key = await ask({
    title: "This server needs its key", text: "It is kept until this tab is closed.", yes: "Use it", value: "", secret: true,
  });
  if (key === null) {
    showBanner("This server needs its key.", { words: "Give the key", act: connect });
    return false;
  }
  setKey(key.trim());
  return true;
}

function showBanner(words, button = null) {
  const banner = byId("banner");
  banner.hidden = words === null;
  banner.replaceChildren(el("span", {}, words ?? ""),
    button ? el("button", { type: "button", onclick: button.act }, button.words) : "");
}

function drawFacts() {
  byId("model-name").textContent = facts?.name ?? "moe-edge";
  byId("model-facts").textContent = facts === null ? "" : [
    facts.n_params > 0 ? parameters(facts.n_params) : null, facts.quantization || null, format.bytes(facts.size_bytes),
    `${format.count(facts.n_ctx)} tokens of context`,
  ].filter(Boolean).join(" · ");
}

function parameters(n) {
  return n >= 1e9 ? `${format.figures(n / 1e9)} B parameters` : n >= 1e6 ? `${format.figures(n / 1e6)} M parameters` : `${n} parameters`;
}

// ---- conversations

async function begin() {
  drawTheme();
  store = await openStore();
  conversations = await store.all();
  if (!store.keeps) byId("kept").textContent = "This browser keeps nothing; export what you want to have again.";
  for (const each of conversations) settle(each);
  const last = conversations.find((each) => each.id === remembered());
  show(last ?? newConversation());
  connect();
}

/** A reply that was being written when the page was closed. */
function settle(conversation) {
  for (const message of conversation.messages) {
    if (!message.pending) continue;
    delete message.pending;
    message.stopped = true;
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(CURRENT) ?? localStorage.getItem(CURRENT);
  } catch {
    return null;
  }
}

function remember(id) {
  try {
    sessionStorage.setItem(CURRENT, id);
    localStorage.setItem(CURRENT, id);
  } catch {
    // A new conversation is open next time.
  }
}

function show(conversation) {
  current = conversation;
  remember(conversation.id);
  thread.show(conversation);
  draw();
}

/** Everything around the messages. */
function draw() {
  drawConversations(conversations, current.id, running?.conversation.id, { open, rename, remove });
  byId("empty").hidden = current.messages.length > 0;
  byId("stop").hidden = running === null;
  byId("send").hidden = running !== null;
  byId("send").disabled = input.value.trim() === "";
  byId("chosen").textContent = [
    settings.temperature !== null ? `temperature ${settings.temperature}` : null,
    settings.maxTokens !== null ? `at most ${format.count(settings.maxTokens)} tokens` : null,
    settings.think !== "auto" ? `thinking ${settings.think}` : null,
    current.system.trim() ? "system prompt" : null,
  ].filter(Boolean).join(", ");
  document.title = current.messages.length > 0 ? `${current.title} – moe-edge` : "moe-edge";
}

/** Keep it, and show it in the list, the latest first. */
async function keep(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.push(conversation);
  conversations.sort((a, b) => b.updated - a.updated);
  await save(conversation);
}

async function save(conversation) {
  try {
    await store.put(conversation);
  } catch (error) {
    showBanner(`The browser could not keep this conversation: ${error.message}`);
  }
}

function open(id) {
  const found = conversations.find((each) => each.id === id);
  if (!found) return;
  show(found);
  if (!drawers.closeAll()) input.focus();
}

function openNew() {
  if (current.messages.length > 0) show(newConversation());
  drawers.closeAll();
  input.focus();
}

async function rename(id) {
  const found = conversations.find((each) => each.id === id);
  const title = await ask({ title: "Rename the conversation", yes: "Rename", value: found.title });
  if (!title?.trim()) return;
  found.title = title.trim().slice(0, 200);
  found.named = true;
  await save(found);
  draw();
}

async function remove(id) {
  const found = conversations.find((each) => each.id === id);
  const isSure = await ask({ title: "Delete the conversation?", text: `“${found.title}” is then gone for good.`, yes: "Delete" });
  if (!isSure) return;
  if (running?.conversation === found) running.controller.abort();
  conversations = conversations.filter((each) => each !== found);
  await store.remove(id);
  if (current === found) show(newConversation());
  draw();
}

function exportAll() {
  const url = URL.createObjectURL(new Blob([exported(conversations)], { type: "application/json" }));
  el("a", { href: url, download: `moe-edge-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile(file) {
  try {
    const found = imported(await file.text());
    for (const each of found) {
      conversations.push(each);
      await store.put(each);
    }
    conversations.sort((a, b) => b.updated - a.updated);
    announce(`${found.length} conversations imported.`);
    showBanner(null);
  } catch (error) {
    showBanner(error.message, { words: "Close", act: () => showBanner(null) });
  }
  draw();
}

// ---- replies

async function send() {
  const text = input.value.trim();
  if (!text || running !== null) return;
  input.value = "";
  fit(input);
  await question(text);
}

/** Ask it as the next question of the open conversation. */
async function question(text) {
  current.messages.push({ role: "user", content: text });
  if (!current.named && current.messages.length === 1) current.title = titleFrom(text);
  await reply(current);
}

/** The last reply again. */
async function retry() {
  if (running !== null) return;
  while (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  if (current.messages.length > 0) await reply(current);
}

/** The last question, in other words, and what followed it is gone. */
async function edit(text) {
  if (running !== null) return;
  const at = current.messages.findLastIndex((message) => message.role === "user");
  current.messages.length = at;
  await question(text);
}

async function reply(conversation) {
  const message = { role: "assistant", content: "", pending: true };
  const body = requestOf(conversation, settings, facts?.name ?? "");
  conversation.messages.push(message);
  running = { conversation, controller: new AbortController() };
  thread.show(conversation);
  const kept = keep(conversation);
  draw();
  await kept;
  consolePanel.setWriting(true);
  let saved = performance.now();
  const failed = await fillReply(message, body, running.controller.signal, () => {
    if (current === conversation) thread.update(message);
    if (performance.now() - saved > SAVE_MS) {
      saved = performance.now();
      save(conversation);
    }
  });
  running = null;
  consolePanel.setWriting(false);
  if (conversations.includes(conversation)) await keep(conversation);
  if (current === conversation) thread.update(message);
  draw();
  announce(message.error ?? (message.stopped ? "The reply was stopped." : "The reply has ended."));
  if (failed instanceof ServerError && (failed.isLost || failed.status === 401)) connect();
}

function stop() {
  running?.controller.abort();
}

// ---- controls

const THEMES = { auto: "like the system", light: "light", dark: "dark" };

function drawTheme() {
  const words = `Colours: ${THEMES[window.moeEdgeTheme.choice]}`;
  byId("theme").setAttribute("aria-label", words);
  byId("theme").title = words;
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  window.moeEdgeTheme.set(names[(names.indexOf(window.moeEdgeTheme.choice) + 1) % names.length]);
});
addEventListener("themechange", () => {
  drawTheme();
  consolePanel.draw();
});

byId("open-settings").addEventListener("click", () => openSettings({
  settings, system: current.system, facts, needsKey,
  changed: async (next, system) => {
    settings = next;
    saveSettings(settings);
    if (system !== current.system) {
      current.system = system;
      if (conversations.includes(current)) await save(current);
    }
    draw();
    if (needsKey) connect();
  },
}));

byId("new-conversation").addEventListener("click", openNew);
byId("export").addEventListener("click", exportAll);
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) await importFile(file);
  event.target.value = "";
});

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", stop);
input.addEventListener("input", () => {
  fit(input);
  byId("send").disabled = input.value.trim() === "";
});
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!drawers.closeAll()) stop();
});

byId("scroller").addEventListener("scroll", () => {
  thread.following = thread.isAtEnd;
  byId("to-end").hidden = thread.following;
});
byId("to-end").addEventListener("click", () => thread.toEnd());

begin();
