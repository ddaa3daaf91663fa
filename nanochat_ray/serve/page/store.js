// What this browser keeps: conversations, settings, and for this tab alone the API key.
//
// Each conversation has its own key, so that two tabs do not overwrite each other's.
//
// chat     {id, time, title, messages}
// message  {role, parts, end, request, stats, moved, resumed}
//   parts    [{text} | {expression, result}]; result is null while the model is still writing the call
//   end      replies: "stop", "length", "stopped" or {error, action}; absent while the reply is being written
//   request  replies not yet complete: {key, lastId, at, parameters, system}; all that is needed to go on with it
//   stats    replies: {tokens, promptTokens, firstMs, writeMs}

const CHAT = "nanochat_ray/chat/";
const SETTINGS = "nanochat_ray/settings";
const API_KEY = "nanochat_ray/api-key";

export const DEFAULTS = Object.freeze({
  temperature: 0.6,
  top_k: 50,
  top_p: null,
  max_tokens: 512,
  seed: null,
  system: "",
  theme: "light dark",
});

/** Dispatches "problem" (detail: words, or null when it has passed) when a conversation could not be kept. */
export const storage = new EventTarget();

const parsed = new Map(); // storage key -> {raw, chat}; listing must not parse every conversation again

const unkept = new Map(); // storage key -> what there was no room for: it lives as long as this page

function read(key) {
  if (unkept.has(key)) return unkept.get(key);
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // the browser keeps nothing for this page; said when something is to be kept
  }
}

function write(key, raw) {
  let problem = null;
  try {
    localStorage.setItem(key, raw);
    unkept.delete(key);
  } catch (error) {
    unkept.set(key, raw);
    problem =
      error.name === "QuotaExceededError"
        ? "This browser has no room left. Export what is new or delete other conversations before closing this page."
        : "This browser keeps nothing for this page. Export your conversations before you close it.";
  }
  if (problem || !unkept.size) report(problem);
}

const report = (problem) => storage.dispatchEvent(new CustomEvent("problem", { detail: problem }));

/** True while closing the page would lose something. */
export const isSomethingUnkept = () => unkept.size > 0;

const isPart = (part) =>
  typeof part?.text === "string" ||
  (typeof part?.expression === "string" && (part.result === null || typeof part.result === "string"));
const isMessage = (message) =>
  ["user", "assistant"].includes(message?.role) && Array.isArray(message.parts) && message.parts.every(isPart);
const isChat = (chat, id) =>
  chat?.id === id &&
  typeof chat.title === "string" &&
  Number.isFinite(chat.time) &&
  Array.isArray(chat.messages) &&
  chat.messages.every(isMessage);

function parseChat(key, raw) {
  try {
    const chat = JSON.parse(raw);
    return isChat(chat, key.slice(CHAT.length)) ? chat : null;
  } catch {
    return null;
  }
}

function keys() {
  try {
    return [...new Set([...Object.keys(localStorage), ...unkept.keys()])].filter((key) => key.startsWith(CHAT));
  } catch {
    return [...unkept.keys()].filter((key) => key.startsWith(CHAT));
  }
}

/** {chats: all that can be read, newest first, not to be changed; unreadable: keys of the others, left as they are}. */
export function listChats() {
  const chats = [];
  const unreadable = [];
  for (const key of keys()) {
    const raw = read(key);
    if (raw === null) continue; // another tab has removed it meanwhile
    if (parsed.get(key)?.raw !== raw) parsed.set(key, { raw, chat: parseChat(key, raw) });
    const { chat } = parsed.get(key);
    if (chat) chats.push(chat);
    else unreadable.push(key);
  }
  return { chats: chats.sort((a, b) => b.time - a.time), unreadable };
}

/** A conversation of its own for the caller to change, or null. */
export function loadChat(id) {
  const raw = read(CHAT + id);
  return raw === null ? null : parseChat(CHAT + id, raw);
}

export const saveChat = (chat) => write(CHAT + chat.id, JSON.stringify(chat));
export const rawChat = (key) => read(key);

export function removeChat(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    /* nothing is kept, so there is nothing to remove */
  }
  parsed.delete(CHAT + id);
  unkept.delete(CHAT + id);
  for (const [key, raw] of [...unkept]) write(key, raw); // there may be room now
  if (!unkept.size) report(null);
}

/** `change(id)` when another tab has written or removed a conversation; `id` is null when all storage was cleared. */
export function onOtherTab(change) {
  addEventListener("storage", (event) => {
    if (event.key === null) change(null);
    else if (event.key.startsWith(CHAT)) change(event.key.slice(CHAT.length));
  });
}

export function loadSettings() {
  let kept = null;
  try {
    kept = JSON.parse(read(SETTINGS));
  } catch {
    /* unreadable settings are replaced by the usual ones when they are next saved */
  }
  const settings = { ...DEFAULTS };
  for (const [name, value] of Object.entries(kept ?? {})) if (name in DEFAULTS) settings[name] = value;
  return settings;
}

export const saveSettings = (settings) => write(SETTINGS, JSON.stringify(settings));

/** The API key is a secret: it lives as long as this tab, and is never written with the conversations. */
export function apiKey() {
  try {
    return sessionStorage.getItem(API_KEY) ?? "";
  } catch {
    return "";
  }
}

export function setApiKey(value) {
  try {
    if (value) sessionStorage.setItem(API_KEY, value);
    else sessionStorage.removeItem(API_KEY);
    return true;
  } catch {
    return false;
  }
}

/** crypto.randomUUID exists only on https and localhost. */
export function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
