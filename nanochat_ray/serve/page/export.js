// Conversations as files: JSON to keep everything, Markdown to read.

import { download } from "./dom.js";
import { plainText } from "./markdown.js";
import { listChats, rawChat } from "./store.js";

/** Without what only serves to continue a reply. */
const kept = ({ messages, ...chat }) => ({ ...chat, messages: messages.map(({ request, ...message }) => message) });

export function chatsAsJson(chats) {
  return `${JSON.stringify({ format: "nanochat_ray conversations", version: 1, chats: chats.map(kept) }, null, 2)}\n`;
}

export function chatAsMarkdown(chat) {
  const turns = chat.messages.map(
    ({ role, parts }) => `**${role === "user" ? "You" : "Model"}**\n\n${plainText(parts).trim()}\n`,
  );
  const time = new Date(chat.time).toISOString().slice(0, 16).replace("T", " ");
  return `# ${chat.title}\n\n${time} UTC\n\n${turns.join("\n")}`;
}

const fileName = (chat) =>
  `nanochat-${
    chat.title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 40) || "chat"
  }`;

/** `format`: "json" or "md". */
export function exportChat(chat, format) {
  if (format === "json") download(`${fileName(chat)}.json`, "application/json", chatsAsJson([chat]));
  else download(`${fileName(chat)}.md`, "text/markdown", chatAsMarkdown(chat));
}

export function exportAll(format) {
  const { chats } = listChats();
  if (format === "json") download("nanochat-conversations.json", "application/json", chatsAsJson(chats));
  else download("nanochat-conversations.md", "text/markdown", chats.map(chatAsMarkdown).join("\n\n---\n\n"));
}

/** What is stored under these keys, as it is: for a person to mend by hand. */
export function exportUnreadable(keys) {
  download(
    "nanochat-unreadable.json",
    "application/json",
    `${JSON.stringify(Object.fromEntries(keys.map((key) => [key, rawChat(key)])), null, 2)}\n`,
  );
}
