// Conversations and settings, kept in this browser and nowhere else: IndexedDB for the one, localStorage for the other.
//
// A conversation: {id, title, named, created, updated, system, messages}.
// A message: {role: "user" | "assistant", content, reasoning?, stats?, error?, stopped?}.

const DATABASE = "moe-edge";
const CONVERSATIONS = "conversations";
const SETTINGS = "moe-edge.settings";
export const DEFAULTS = { temperature: null, maxTokens: null, think: "auto" };
export const FORMAT = "moe-edge conversations";

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Opens the store; one that forgets when the page is closed where the browser keeps nothing (`keeps` is false). */
export async function openStore() {
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
    return new Store(await asPromise(request));
  } catch {
    return new Store(null);
  }
}

class Store {
  constructor(database) {
    this.database = database;
    this.forgetful = new Map();
  }

  get keeps() {
    return this.database !== null;
  }

  objects(mode) {
    return this.database.transaction(CONVERSATIONS, mode).objectStore(CONVERSATIONS);
  }

  /** Every conversation, the one changed last first. */
  async all() {
    const found = this.keeps ? await asPromise(this.objects("readonly").getAll()) : [...this.forgetful.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  async put(conversation) {
    const copy = structuredClone(conversation);
    if (this.keeps) await asPromise(this.objects("readwrite").put(copy));
    else this.forgetful.set(copy.id, copy);
  }

  async remove(id) {
    if (this.keeps) await asPromise(this.objects("readwrite").delete(id));
    else this.forgetful.delete(id);
  }
}

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "New conversation", named: false, created: now, updated: now, system: "", messages: [] };
}

/** crypto.randomUUID needs https or this machine; getRandomValues does not. */
function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((each) => each.toString(16).padStart(2, "0")).join("");
}

/** The beginning of the first question, where it breaks between words. */
export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  if (line.length <= 48) return line || "New conversation";
  const cut = line.slice(0, 48);
  return `${cut.slice(0, Math.max(24, cut.lastIndexOf(" ")))}…`;
}

export function loadSettings() {
  try {
    return checkedSettings(JSON.parse(localStorage.getItem(SETTINGS)) ?? {});
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold until the page is closed.
  }
}

function checkedSettings(found) {
  const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
  return {
    temperature: number(found.temperature),
    maxTokens: number(found.maxTokens),
    think: ["auto", "on", "off"].includes(found.think) ? found.think : "auto",
  };
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of an exported file, under new ids. Raises Error with a sentence. */
export function imported(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("This file is no JSON, so it cannot be an export of conversations.");
  }
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) {
    throw new Error("This file is JSON, but no export of conversations of this page.");
  }
  return found.conversations.map((each, index) => checkedConversation(each, index));
}

function checkedConversation(each, index) {
  const wrong = new Error(`Conversation ${index + 1} of this file is damaged; nothing was imported.`);
  if (typeof each?.title !== "string" || !Array.isArray(each.messages)) throw wrong;
  const messages = each.messages.map((message) => {
    if (!["user", "assistant"].includes(message?.role) || typeof message.content !== "string") throw wrong;
    const kept = { role: message.role, content: message.content };
    if (typeof message.reasoning === "string") kept.reasoning = message.reasoning;
    return kept;
  });
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  return {
    ...newConversation(), title: each.title.slice(0, 200), named: true, created: time(each.created),
    updated: time(each.updated), system: typeof each.system === "string" ? each.system : "", messages,
  };
}
