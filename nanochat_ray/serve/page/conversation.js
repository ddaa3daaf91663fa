// The open conversation: one view per message, kept in step with the data, and a scroll position that follows.

import { $ } from "./dom.js";
import { QuestionView, ReplyView } from "./message.js";

const NEAR_END_PX = 60;
const SHARE_FOR_RENDERING = 0.25; // of the main thread, at most; the rest is for scrolling, typing and the network

export class Conversation {
  #acts;
  #views = new Map(); // message -> view
  #shown = { chat: null, writer: null };
  #pinned = true; // the view follows the reply until the reader scrolls up
  #scheduled = false;
  #notBefore = 0;

  constructor(acts) {
    this.#acts = acts;
    $("scroll").addEventListener("scroll", () => this.#scrolled(), { passive: true });
    $("latest").addEventListener("click", () => this.toEnd());
    // The box below grows with what is typed, the window with the keyboard of a phone: the end stays in sight.
    new ResizeObserver(() => this.#follow()).observe($("scroll"));
  }

  /** Show `chat` (or nothing) as it now is; `writer` writes its last reply, if this tab does. */
  show(chat, writer) {
    const other = chat !== this.#shown.chat;
    this.#shown = { chat, writer };
    const messages = chat?.messages ?? [];
    $("empty").hidden = messages.length > 0;
    $("log").hidden = messages.length === 0;
    const views = new Map(messages.map((message) => [message, this.#views.get(message) ?? this.#view(message)]));
    this.#views = views;
    messages.forEach((message, place) => {
      const view = views.get(message);
      view.update(this.#context(place));
      // Moving a node that stands right already would lose its focus and scroll position.
      if ($("log").children[place] !== view.node) $("log").insertBefore(view.node, $("log").children[place] ?? null);
    });
    while ($("log").children.length > messages.length) $("log").lastElementChild.remove();
    if (other) this.toEnd();
    else this.#follow();
  }

  /** The reply has grown: draw it with the next frame, or later when drawing is becoming expensive. */
  grow() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setTimeout(() => requestAnimationFrame(() => this.#draw()), Math.max(0, this.#notBefore - performance.now()));
  }

  /** Edit the newest message of the person's. */
  editLast() {
    const message = this.#shown.chat?.messages.findLast(({ role }) => role === "user");
    if (message) this.#views.get(message).edit();
  }

  toEnd() {
    this.#pinned = true;
    this.#follow();
  }

  #draw() {
    this.#scheduled = false;
    const { chat, writer } = this.#shown;
    if (!writer) return; // it has ended meanwhile and is drawn
    const began = performance.now();
    this.#views.get(writer.reply)?.update(this.#context(chat.messages.length - 1));
    this.#follow();
    const ended = performance.now();
    this.#notBefore = ended + (ended - began) * (1 / SHARE_FOR_RENDERING - 1);
  }

  #context(place) {
    const { chat, writer } = this.#shown;
    const last = place === chat.messages.length - 1;
    return { last, writer: last ? writer : null };
  }

  #view(message) {
    return message.role === "user" ? new QuestionView(message, this.#acts) : new ReplyView(message, this.#acts);
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    this.#pinned = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    $("latest").hidden = this.#pinned;
  }

  #follow() {
    if (this.#pinned) $("scroll").scrollTop = $("scroll").scrollHeight;
    this.#scrolled();
  }
}
