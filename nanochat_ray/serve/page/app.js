// The page as a whole: which conversation is open, which replies are being written, and what people can do.

import { isOpen, newChat, newReply, close, titleOf } from "./chat.js";
import { COMMANDS } from "./commands.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { $, el, icon } from "./dom.js";
import { exportAll, exportChat } from "./export.js";
import { checkHealth, watchHealth } from "./health.js";
import { change, initSettings, openSettings, problemWith, settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { isSomethingUnkept, listChats, loadChat, onOtherTab, removeChat, saveChat, storage } from "./store.js";
import { toast } from "./toast.js";
import { Writer } from "./writer.js";

const RESUME_WITHIN_MS = 10 * 60 * 1000; // an older reply is continued only when someone asks for it
const IDEAS = [
  ["Who are you?", "what it was told about itself"],
  ["What is 17 * 23?", "it calls a calculator"],
  ["What does textwrap.dedent do?", "from the documentation it read"],
  ["How many r are in the word strawberry?", "letters, counted with the tool"],
];

let chat = null; // the open conversation; null is a new one, of which nothing is kept yet
const writers = new Map(); // chat id -> the writer of its last reply

const app = {
  begin() {
    open(null);
  },

  send(text) {
    if (chat && writers.has(chat.id)) return;
    chat ??= newChat();
    chat.title ||= titleOf(text);
    chat.messages.push({ role: "user", parts: [{ text }] });
    answer();
  },

  edit(message, text) {
    if (writers.has(chat.id)) return toast("Stop the reply first.");
    const [{ id, title }, before] = [chat, chat.messages];
    chat.messages = before.slice(0, before.indexOf(message));
    if (!chat.messages.length) chat.title = "";
    app.send(text);
    composer.focus();
    if (before.length - before.indexOf(message) <= 2) return; // only the reply, which is being written anew
    toast("The messages after it are gone.", {
      action: "Undo",
      onAction() {
        const now = chat?.id === id ? chat : loadChat(id);
        if (!now) return; // deleted since
        writers.get(id)?.discard();
        writers.delete(id);
        const restored = { ...now, title, messages: before };
        saveChat(restored);
        if (chat?.id === id) chat = restored;
        sidebar.draw();
        draw();
      },
    });
  },

  regenerate() {
    const last = chat?.messages.at(-1);
    if (!last || writers.has(chat.id)) return last ? "Stop the reply first." : "There is nothing to write again yet.";
    if (last.role === "assistant") chat.messages.pop();
    answer();
    return null;
  },

  /** Go on with a reply that was given up. */
  proceed(message) {
    if (writers.has(chat.id)) return;
    delete message.end;
    write(chat);
  },

  stop() {
    writers.get(chat?.id)?.stop();
  },
  tryNow() {
    writers.get(chat?.id)?.tryNow();
  },
  askForKey() {
    openSettings(null, "key");
  },
  editLast() {
    if (!writers.has(chat?.id)) conversation.editLast();
  },

  command({ run }, argument) {
    const words = run(argument, app);
    if (words) toast(words);
  },

  unknown(name) {
    toast(`There is no command /${name}. /help lists them; a second slash sends it as a message.`);
  },

  set(name, value) {
    const problem = value === null ? null : problemWith(name, value);
    if (problem) return problem;
    change({ [name]: value });
    const words = {
      temperature: "Temperature",
      top_k: "Top-k",
      top_p: "Top-p",
      max_tokens: "Longest reply",
      seed: "Seed",
    }[name];
    return `${words}: ${value ?? (name === "seed" ? "random" : "the server's choice")}, from the next reply on.`;
  },

  system(text) {
    change({ system: text });
    drawSystem();
    return text ? "The system prompt is set, from the next reply on." : "There is no system prompt any more.";
  },

  export(format) {
    if (!["md", "json"].includes(format)) return "/export md or /export json";
    if (!chat) return "There is nothing to export yet.";
    exportChat(chat, format);
    return null;
  },

  help() {
    $("help").showModal();
  },

  open(id) {
    open(id);
  },

  rename(id, title) {
    const renamed = chat?.id === id ? chat : (writers.get(id)?.chat ?? loadChat(id));
    if (!renamed) return;
    renamed.title = title;
    saveChat(renamed);
    if (renamed === chat) drawTitle();
  },

  remove(id) {
    const removed = writers.get(id)?.chat ?? loadChat(id);
    const wasOpen = chat?.id === id;
    writers.get(id)?.discard();
    writers.delete(id);
    removeChat(id);
    if (wasOpen) open(null);
    else sidebar.draw();
    toast(`Deleted “${removed?.title ?? "conversation"}”.`, {
      action: "Undo",
      onAction: () => {
        if (!removed) return;
        saveChat(removed);
        if (wasOpen && chat === null) open(id);
        else sidebar.draw();
      },
    });
  },
};

const conversation = new Conversation(app);
const composer = new Composer(app);
const sidebar = new Sidebar(app, (id) => writers.has(id));

function answer() {
  chat.time = Date.now();
  chat.messages.push(newReply(settings));
  saveChat(chat);
  setAddress(chat.id);
  sidebar.show(chat.id);
  write(chat);
  conversation.toEnd();
}

/** Have the last reply of a conversation written, from where it is. */
function write(of) {
  const writer = new Writer(of, of.messages.at(-1), (which, what) => {
    const shown = chat === of;
    if (what === "text") {
      if (shown) conversation.grow();
      return;
    }
    if (what === "end") {
      if (writers.get(of.id) === which) writers.delete(of.id);
      if (which.reply?.end?.error) checkHealth();
      sidebar.draw();
    }
    if (shown) draw();
  });
  writers.set(of.id, writer);
  sidebar.draw();
  if (chat === of) draw();
  writer.run();
}

function draw() {
  const writer = writers.get(chat?.id) ?? null;
  conversation.show(chat, writer);
  composer.set(!writer ? "ready" : writer.elsewhere ? "elsewhere" : "writing");
  drawTitle();
}

function drawTitle() {
  document.title = chat?.title ? `${chat.title} · nanochat_ray` : "nanochat_ray";
}

function drawSystem() {
  $("system").hidden = !settings.system;
  $("system-text").textContent = settings.system;
}

const addressed = () => (location.hash.startsWith("#/") ? location.hash.slice(2) : null);

function setAddress(id) {
  if (addressed() !== id) history.pushState(null, "", id ? `#/${id}` : location.pathname + location.search);
}

function open(id) {
  chat = id ? (writers.get(id)?.chat ?? loadChat(id)) : null;
  if (id && !chat) toast("That conversation is not in this browser, or cannot be read.");
  setAddress(chat?.id ?? null);
  resume(chat);
  sidebar.show(chat?.id ?? null);
  draw();
  composer.focus();
}

/** A reply that was being written when its page went away is gone on with; one that cannot be is closed. */
function resume(which) {
  const last = which?.messages.at(-1);
  if (!isOpen(last) || writers.has(which.id)) return;
  if (last.request && Date.now() - last.request.at < RESUME_WITHIN_MS) return write(which);
  close(last, {
    error: "The page was closed while this reply was being written.",
    action: last.request ? "continue" : "retry",
  });
  saveChat(which);
}

function start() {
  for (const [question, what] of IDEAS) {
    $("ideas").append(
      el("button", { type: "button", onclick: () => app.send(question) }, question, el("small", {}, what)),
    );
  }
  for (const { name, argument, help } of COMMANDS) {
    $("help-commands").append(el("dt", {}, `/${name}`, argument ? ` ${argument}` : ""), el("dd", {}, help));
  }
  $("latest").append(icon("down"));
  $("help-button").append(icon("help"));
  $("help-button").addEventListener("click", app.help);
  $("system").addEventListener("click", () => openSettings(null, "system"));
  initSettings(drawSystem);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) app.stop();
    if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k") {
      event.preventDefault(); // the browser's own search
      if (!document.querySelector("dialog[open]")) {
        sidebar.close();
        app.begin();
      }
    }
  });
  storage.addEventListener("problem", ({ detail }) => {
    $("storage").hidden = detail === null;
    $("storage-text").textContent = detail ?? "";
  });
  $("storage-export").addEventListener("click", () => exportAll("json"));
  addEventListener("beforeunload", (event) => {
    if (isSomethingUnkept()) event.preventDefault();
  });
  onOtherTab(changedElsewhere);
  addEventListener("popstate", () => open(addressed()));
  $("skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("text").focus();
  });
  addEventListener("pagehide", () => {
    for (const writer of writers.values()) writer.save();
  });
  drawSystem();
  open(addressed());
  for (const { id, messages } of listChats().chats) {
    const last = messages.at(-1);
    if (isOpen(last) && last.request && !writers.has(id) && Date.now() - last.request.at < RESUME_WITHIN_MS)
      resume(loadChat(id));
  }
  watchHealth();
}

/** Another tab has written (or removed) a conversation. What this tab writes itself it knows better. */
function changedElsewhere(id) {
  sidebar.draw();
  const writer = writers.get(id);
  if (writer && !writer.elsewhere) {
    if (!loadChat(id)) writer.discard();
  } else if (writer) writer.refresh();
  if (!chat || (id !== null && id !== chat.id)) return;
  const fresh = loadChat(chat.id);
  if (!fresh) {
    open(null);
    toast("This conversation was deleted in another tab.");
  } else if (!writer) {
    chat = fresh;
    resume(chat);
    draw();
  } else draw();
}

start();
