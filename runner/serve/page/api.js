// Asking the server: JSON, and a reply as it comes. Nothing else is ever asked.

const KEY = "moe-edge.key";
let key = null;

/** The key is kept as long as the tab, not longer. */
export function setKey(value) {
  key = value || null;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // It holds until the page is closed.
  }
}

export function getKey() {
  if (key === null) {
    try {
      key = sessionStorage.getItem(KEY);
    } catch {
      key = null;
    }
  }
  return key;
}

/** What the server said went wrong, in its own sentence. status 0: it was not reached, or the connection broke. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }

  get isLost() {
    return this.status === 0;
  }
}

const UNREACHED = "The server cannot be reached. Is moe-edge serve still running?";
const BROKEN = "The connection was lost before the reply had ended.";

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (getKey()) headers.authorization = `Bearer ${getKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHED);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let said = "";
  try {
    const body = await response.json();
    said = typeof body.error === "string" ? body.error : (body.error?.message ?? "");
  } catch {
    // No JSON: the status has to do.
  }
  return new ServerError(said || `The server answered with status ${response.status}.`, response.status);
}

/** An answer in one piece. Raises ServerError. */
export async function getJson(path, signal) {
  const response = await ask(path, { signal });
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHED);
  }
}

/**
 * A reply, streamed. on.text, on.reasoning: called with each piece; on.timings, on.usage: at its end.
 * Returns the finish reason. Raises ServerError, and AbortError when `signal` aborts.
 */
export async function streamChat(body, on, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finish = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return finish;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? "The server failed.", 500);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) on.reasoning(choice.delta.reasoning_content);
    if (choice?.delta?.content) on.text(choice.delta.content);
    if (choice?.finish_reason) finish = choice.finish_reason;
    if (chunk.timings) on.timings(chunk.timings);
    if (chunk.usage) on.usage(chunk.usage);
  }
  throw new ServerError(BROKEN);
}

/** The data of each server-sent event. Comments, which keep the connection alive, are passed over. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(BROKEN);
  }
}
