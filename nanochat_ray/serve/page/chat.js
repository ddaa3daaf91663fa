// A conversation as data: beginning a reply, what of it the model has to read, taking in what arrives.
// Pure; the shapes are in store.js.

import { newId } from "./store.js";

const TITLE_CHARS = 60;

export const newChat = () => ({ id: newId(), time: Date.now(), title: "", messages: [] });

export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > TITLE_CHARS ? `${line.slice(0, TITLE_CHARS - 1)}…` : line;
}

/**
 * A reply yet to be written. Its request is kept with it until it is complete: with the same key and the same
 * parameters it can be continued after a lost connection, and even after the page was loaded again.
 */
export function newReply(settings) {
  const { theme, system, ...parameters } = settings;
  const given = Object.fromEntries(Object.entries(parameters).filter(([, value]) => value !== null));
  return {
    role: "assistant",
    parts: [],
    request: { key: newId(), lastId: null, at: Date.now(), parameters: given, system },
    stats: { tokens: null, promptTokens: null, firstMs: null, writeMs: 0 },
  };
}

export const isOpen = (message) => message?.role === "assistant" && message.end === undefined;

/** The body of the request for `reply`, the same to the byte however often it is made. */
export function requestBody(chat, reply) {
  const { parameters, system } = reply.request;
  const before = requestMessages(chat.messages.slice(0, chat.messages.indexOf(reply)));
  const messages = system ? [{ role: "system", content: system }, ...before] : before;
  return JSON.stringify({ messages, stream: true, stream_options: { include_usage: true }, ...parameters });
}

/** What the model has to read. Questions that got no answer are left out; calls go back in their place. */
export function requestMessages(messages) {
  const out = [];
  for (const message of messages) {
    const parts = message.parts.filter((part) => part.text || (part.result != null && part.expression));
    if (!parts.length) {
      out.pop();
      continue;
    }
    const content = parts.flatMap((part) =>
      part.text !== undefined
        ? [{ type: "text", text: part.text }]
        : [
            { type: "python", text: part.expression },
            { type: "python_output", text: part.result },
          ],
    );
    const plain = content.every((part) => part.type === "text");
    out.push({ role: message.role, content: plain ? parts.map((part) => part.text).join("") : content });
  }
  return out;
}

/** One chunk into the reply. True when it brought something to read. */
export function receive(reply, { choices, usage }) {
  if (usage) {
    reply.stats.tokens = usage.completion_tokens;
    reply.stats.promptTokens = usage.prompt_tokens;
  }
  const choice = choices?.[0];
  if (!choice) return false;
  const { delta = {}, finish_reason: finish } = choice;
  const last = reply.parts.at(-1);
  if (delta.content) {
    if (last?.text !== undefined) last.text += delta.content;
    else reply.parts.push({ text: delta.content });
  }
  if (delta.tool) {
    const { expression = "", result = null } = delta.tool;
    if (last?.result === null) Object.assign(last, { expression, result });
    else reply.parts.push({ expression, result });
  }
  if (finish) reply.finish = finish;
  return Boolean(delta.content || delta.tool);
}

/** Nothing more will come. A call that was cut off has no result and is dropped. */
export function close(reply, end) {
  reply.parts = reply.parts.filter((part) => part.result !== null);
  reply.end = end;
  delete reply.finish;
  if (end?.action !== "continue") delete reply.request;
}
