// The list of conversations: found, opened, renamed, exported, deleted. On a phone it is a drawer.

import { $, el, icon, iconButton } from "./dom.js";
import { openMenu } from "./menu.js";
import { exportAll, exportChat, exportUnreadable } from "./export.js";
import { plainText } from "./markdown.js";
import { listChats } from "./store.js";

const DAY_MS = 24 * 3600 * 1000;

export class Sidebar {
  #acts;
  #current = null; // id of the open conversation
  #busy = () => false;
  #renaming = false;

  /** `acts`: open(id), begin(), rename(id, title), remove(id). `busy(id)`: is a reply being written there? */
  constructor(acts, busy) {
    this.#acts = acts;
    this.#busy = busy;
    $("new").prepend(icon("plus"));
    $("new").addEventListener("click", () => {
      this.close();
      acts.begin();
    });
    $("find-icon").append(icon("search"));
    $("find").addEventListener("input", () => this.draw());
    $("all").prepend(icon("export"));
    $("all").addEventListener("click", () =>
      openMenu($("all"), "Export all conversations", [
        { icon: "export", text: "All as Markdown", run: () => exportAll("md") },
        { icon: "export", text: "All as JSON", run: () => exportAll("json") },
      ]),
    );
    $("menu").append(icon("menu"));
    $("menu").addEventListener("click", () => this.#openDrawer());
    $("close").append(icon("x"));
    for (const id of ["close", "veil"]) $(id).addEventListener("click", () => this.close());
    $("side").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !document.body.classList.contains("drawer")) return;
      event.stopPropagation();
      this.close();
    });
    matchMedia("(max-width: 760px)").addEventListener("change", () => this.close());
  }

  show(id) {
    this.#current = id;
    this.draw();
  }

  draw() {
    if (this.#renaming) return; // what is being typed is not to be thrown away; drawn when it is done
    const { chats, unreadable } = listChats();
    const words = $("find").value.trim().toLowerCase();
    const found = words ? chats.filter((chat) => contains(chat, words)) : chats;
    const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
    const sections = new Map();
    for (const chat of found) {
      const when = dayOf(chat.time);
      sections.set(when, [...(sections.get(when) ?? []), this.#item(chat)]);
    }
    $("chats").replaceChildren(
      ...[...sections].map(([when, items]) => el("section", {}, el("h2", {}, when), el("ul", {}, items))),
    );
    if (!found.length)
      $("chats").append(el("p", { className: "none" }, words ? "Nothing found." : "No conversations yet."));
    if (unreadable.length) $("chats").append(this.#unreadable(unreadable));
    if (focused)
      $("chats")
        .querySelector(`li[data-id="${CSS.escape(focused)}"] .open`)
        ?.focus();
    $("find-box").hidden = chats.length < 2 && !words;
    $("all").hidden = chats.length === 0;
  }

  close() {
    if (!document.body.classList.contains("drawer")) return;
    document.body.classList.remove("drawer");
    $("main").inert = false;
    $("menu").setAttribute("aria-expanded", "false");
    $("menu").focus();
  }

  #openDrawer() {
    document.body.classList.add("drawer");
    $("main").inert = true; // behind the drawer: not to be reached with Tab
    $("menu").setAttribute("aria-expanded", "true");
    $("new").focus();
  }

  #item(chat) {
    const current = chat.id === this.#current;
    const title = chat.title || "Untitled";
    const open = el(
      "button",
      {
        type: "button",
        className: "open",
        title,
        onclick: () => {
          this.close();
          this.#acts.open(chat.id);
        },
      },
      title,
    );
    if (current) open.setAttribute("aria-current", "true");
    const more = iconButton("more", `More for ${title}`, () => this.#menu(more, chat, item), {
      className: "more",
      attrs: { "aria-haspopup": "menu", "aria-expanded": "false" },
    });
    const dot = this.#busy(chat.id)
      ? el("i", {
          className: "dot",
          title: "A reply is being written",
          attrs: { role: "img", "aria-label": "A reply is being written" },
        })
      : null;
    const item = el("li", { className: current ? "on" : "", attrs: { "data-id": chat.id } }, open, dot, more);
    return item;
  }

  #menu(button, chat, item) {
    openMenu(button, `Conversation ${chat.title}`, [
      { icon: "pen", text: "Rename", run: () => this.#rename(chat, item) },
      { icon: "export", text: "Export as Markdown", run: () => exportChat(chat, "md") },
      { icon: "export", text: "Export as JSON", run: () => exportChat(chat, "json") },
      { icon: "trash", text: "Delete", run: () => this.#acts.remove(chat.id) },
    ]);
  }

  #rename(chat, item) {
    const input = el("input", {
      className: "rename",
      value: chat.title,
      maxLength: 120,
      attrs: { "aria-label": "New title" },
    });
    const done = (keep) => {
      if (!this.#renaming) return;
      this.#renaming = false;
      const title = input.value.trim();
      if (keep && title && title !== chat.title) this.#acts.rename(chat.id, title);
      this.draw();
      $("chats")
        .querySelector(`li[data-id="${CSS.escape(chat.id)}"] .open`)
        ?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault();
        done(true);
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        done(false);
      }
    });
    input.addEventListener("blur", () => done(true));
    this.#renaming = true;
    item.replaceChildren(input);
    input.select();
  }

  #unreadable(keys) {
    const words =
      keys.length === 1
        ? "One conversation cannot be read. It is left as it is."
        : `${keys.length} conversations cannot be read. They are left as they are.`;
    return el(
      "p",
      { className: "none" },
      words,
      " ",
      el("button", { type: "button", className: "link", onclick: () => exportUnreadable(keys) }, "Save to a file"),
    );
  }
}

const contains = (chat, words) =>
  chat.title.toLowerCase().includes(words) ||
  chat.messages.some((message) => plainText(message.parts).toLowerCase().includes(words));

function dayOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY_MS) return "Yesterday";
  return time >= today - 7 * DAY_MS ? "Last seven days" : "Earlier";
}
