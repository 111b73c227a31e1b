// One reply at a time: what is sent, what comes back into the message, and how it ends.

import { ServerError, streamChat } from "./api.js";

/** The conversation in OpenAI's form, up to the reply that is wanted. */
export function requestOf(conversation, settings, model) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const { role, content, pending } of conversation.messages) {
    if (pending || !content) continue; // a reply that was stopped before its first word
    const last = messages[messages.length - 1];
    if (last?.role === role) last.content += `\n\n${content}`; // templates want the two to take turns
    else messages.push({ role, content });
  }
  const body = { model, messages };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
  if (settings.think !== "auto") body.think = settings.think === "on";
  return body;
}

/**
 * Stream a reply into `message`; grown() is called after each piece. Ends when the reply does, with what happened written
 * into the message: nothing, `stopped`, `cut` (the limit of tokens) or `error`. Returns the ServerError, or null.
 */
export async function fillReply(message, body, signal, grown) {
  const started = performance.now();
  let ttft = null;
  let timings = null;
  let usage = null;
  const add = (field) => (text) => {
    ttft ??= (performance.now() - started) / 1000;
    message[field] = (message[field] ?? "") + text;
    grown();
  };
  let failed = null;
  try {
    const finish = await streamChat(body, {
      text: add("content"), reasoning: add("reasoning"),
      timings: (value) => (timings = value), usage: (value) => (usage = value),
    }, signal);
    if (finish === "length") message.cut = true;
  } catch (error) {
    if (error.name === "AbortError") {
      message.stopped = true;
    } else {
      failed = error instanceof ServerError ? error : new ServerError(`The page failed: ${error.message}`, 500);
      message.error = failed.message;
    }
  }
  if (usage) message.stats = statsOf(ttft, timings, usage);
  delete message.pending;
  return failed;
}

/** ttft: seconds from sending to the first piece, the queue included: what the reader has waited. */
function statsOf(ttft, timings, usage) {
  return {
    ttft, tokensPerSecond: timings?.predicted_per_second ?? 0, tokens: usage.completion_tokens,
    promptTokens: usage.prompt_tokens, traded: usage.moe_edge ?? null,
  };
}
