// One reply over the network: asks, and when the connection breaks asks again for what is missing.
//
// Every attempt sends the same body under the same Idempotency-Key; Last-Event-ID says what has arrived. So a broken
// connection costs a pause, never a word, and never a second reply.

import { SseParser, stateOf } from "./sse.js";

const BACKOFF_S = [0.5, 1, 2, 4, 8];
const GIVE_UP_S = 120; // of attempts that brought nothing
const SILENCE_S = 35; // the server says something every 10 s; longer silence means a dead connection

/** Why there will be no (more) reply. `action` is what helps: "retry", "continue", "key" or null. */
export class ReplyError extends Error {
  constructor(message, action = "retry") {
    super(message);
    this.action = action;
  }
}

/**
 * The happenings of one reply, until it is complete:
 *   {connected: true}                       the server accepted this attempt
 *   {state, ahead?}                         where the request stands ("queued", "starting", "moved", "writing")
 *   {chunk, id}                             a chat.completion.chunk and the position after it
 *   {waiting: {why, message, until}}        nothing can be done before `until` (ms); why: "lost", "unreachable", "busy"
 *
 * `wake` is an EventTarget; its event "now" ends a wait early. Aborting `signal` ends everything with its AbortError.
 *
 * Throws ReplyError: the server refused, failed in the middle, or stayed away for two minutes.
 */
export async function* streamReply({ url, body, key, lastId = null, apiKey = "", signal, wake }) {
  let failures = 0;
  let failingSince = null;
  for (;;) {
    let trouble;
    let accepted = false;
    try {
      const response = await fetch(url, { method: "POST", headers: headers(key, lastId, apiKey), body, signal });
      if (response.ok) {
        accepted = true;
        yield { connected: true };
        for await (const event of events(response)) {
          if (event.data === "[DONE]") return;
          failingSince = null;
          if (event.data === undefined) {
            const state = stateOf(event.comment);
            if (state) yield state;
            continue;
          }
          const chunk = parse(event.data);
          if (chunk.error) {
            trouble = troubleOf(chunk.error, "The server failed.");
            break;
          }
          failures = 0;
          lastId = event.id ?? lastId;
          yield { chunk, id: lastId };
        }
        trouble ??= { why: "lost", message: "Connection lost, reconnecting…" };
      } else trouble = await refusal(response);
    } catch (error) {
      if (signal.aborted || error instanceof ReplyError) throw error;
      trouble =
        accepted || lastId !== null
          ? { why: "lost", message: "Connection lost, reconnecting…" }
          : { why: "unreachable", message: "The server cannot be reached, trying again…" };
    }
    failingSince ??= Date.now();
    if (Date.now() - failingSince > GIVE_UP_S * 1000) throw gaveUp(trouble);
    const seconds = trouble.retryAfter ?? BACKOFF_S[Math.min(failures, BACKOFF_S.length - 1)];
    failures += 1;
    yield { waiting: { why: trouble.why, message: trouble.message, until: Date.now() + seconds * 1000 } };
    await pause(seconds, signal, wake);
  }
}

function headers(key, lastId, apiKey) {
  const all = { "Content-Type": "application/json", "Idempotency-Key": key };
  if (lastId !== null) all["Last-Event-ID"] = lastId;
  if (apiKey) all.Authorization = `Bearer ${apiKey}`;
  return all;
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new SseParser();
  try {
    for (;;) {
      const { value, done } = await within(SILENCE_S, reader.read());
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already; what matters is that nothing stays open
  }
}

function within(seconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new TypeError("the connection fell silent")), seconds * 1000);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk && typeof chunk === "object") return chunk;
  } catch {
    /* told below */
  }
  throw new ReplyError(`The server sent something this page does not understand: ${data.slice(0, 80)}`);
}

/** What a status other than 200 means: a trouble that passes is returned, the rest is thrown. */
async function refusal(response) {
  const error = await response.json().then(
    (value) => value.error,
    () => null,
  );
  const header = Number.parseFloat(response.headers.get("Retry-After"));
  const retryAfter = header >= 0 ? header : undefined;
  switch (response.status) {
    case 401:
      throw new ReplyError(told(error, "The server asks for an API key."), "key");
    case 408: // our body came too slowly
    case 502: // a proxy in between has lost the server
    case 504:
      return { why: "lost", message: "Connection lost, reconnecting…", retryAfter };
    case 429:
      return { why: "busy", message: "Too many requests; trying again soon.", retryAfter };
    case 503:
      return { ...troubleOf({ code: error?.code === "starting" ? "starting" : "overloaded" }), retryAfter };
    default:
      return troubleOf(error, `The server answered ${response.status}.`);
  }
}

/** An error of the server's, before or within the stream: one that passes is returned, the rest is thrown. */
function troubleOf(error, otherwise) {
  const code = error?.code ?? error?.type;
  if (code === "starting") return { why: "busy", message: "Starting a replica; trying again soon." };
  if (code === "overloaded") return { why: "busy", message: "The server is full; trying again soon." };
  if (code === "model_changed") {
    const words = "The model was replaced while it was writing, so this reply cannot be continued.";
    throw new ReplyError(words, "regenerate");
  }
  throw new ReplyError(told(error, otherwise));
}

/** The server's words as a sentence: a capital first. */
function told(error, otherwise) {
  const words = error?.message || otherwise;
  return words.charAt(0).toUpperCase() + words.slice(1);
}

function gaveUp(trouble) {
  const words = {
    lost: "The connection was lost and did not come back; this reply is incomplete.",
    unreachable: "The server cannot be reached.",
    busy: "The server had no room for two minutes.",
  };
  return new ReplyError(words[trouble.why], "continue");
}

/** Wait; a wake-up call or the network coming back ends it early. */
function pause(seconds, signal, wake) {
  return new Promise((resolve, reject) => {
    const ending = new AbortController();
    const end = (settle, value) => {
      ending.abort();
      clearTimeout(timer);
      settle(value);
    };
    const timer = setTimeout(() => end(resolve), seconds * 1000);
    const listen = { signal: ending.signal };
    signal.addEventListener("abort", () => end(reject, signal.reason), listen);
    wake.addEventListener("now", () => end(resolve), listen);
    addEventListener("online", () => end(resolve), listen);
    if (signal.aborted) end(reject, signal.reason);
  });
}
