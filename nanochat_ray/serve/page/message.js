// One message on the page. A view keeps its node and changes only what has changed, so that selections and focus stay.

import { announce, copy, el, icon, iconButton } from "./dom.js";
import { GrowingMarkdown, plainText, renderParts } from "./markdown.js";

/** What a person wrote: plain text, as it was written. `acts` has edit(message, text). */
export class QuestionView {
  #message;
  #acts;

  constructor(message, acts) {
    this.#message = message;
    this.#acts = acts;
    this.node = el("article", { className: "msg user", attrs: { "aria-label": "You" } });
    this.#show();
  }

  update() {}

  edit() {
    const text = plainText(this.#message.parts);
    const area = el("textarea", {
      rows: Math.min(10, text.split("\n").length + 1),
      value: text,
      attrs: { "aria-label": "Edit message" },
    });
    const cancel = () => {
      this.#show();
      this.node.querySelector(".edit").focus();
    };
    const send = () => {
      if (area.value.trim()) this.#acts.edit(this.#message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    this.node.replaceChildren(
      el(
        "div",
        { className: "editor" },
        area,
        el(
          "div",
          { className: "row" },
          el("button", { type: "button", onclick: cancel }, "Cancel"),
          el("button", { type: "button", className: "main", onclick: send }, "Send"),
        ),
      ),
    );
    area.focus();
  }

  #show() {
    const text = plainText(this.#message.parts);
    const copyButton = iconButton("copy", "Copy message", () => copy(text, copyButton));
    this.node.replaceChildren(
      el("div", { className: "body" }, text),
      el(
        "div",
        { className: "acts" },
        iconButton("pen", "Edit message", () => this.edit(), { className: "edit" }),
        copyButton,
      ),
    );
  }
}

/** A reply. `acts` has regenerate(), proceed(message), askForKey() and tryNow(). */
export class ReplyView {
  #message;
  #acts;
  #body = el("div", { className: "body" });
  #foot = el("div", { className: "foot" });
  #growing = null;
  #stamp = null; // what the foot shows, so that it is built anew only when that changes
  #ticking = 0;

  constructor(message, acts) {
    this.#message = message;
    this.#acts = acts;
    this.node = el("article", { className: "msg assistant", attrs: { "aria-label": "Reply" } }, this.#body, this.#foot);
  }

  /** `writer` is set while this tab has the reply written; `last`: it is the newest message. */
  update({ writer, last }) {
    const message = this.#message;
    if (writer) {
      this.#growing ??= new GrowingMarkdown(this.#body, (text) => text && announce(text));
      this.#growing.update(message.parts);
    } else if (this.#growing) {
      this.#growing.finish(message.parts);
      this.#growing = null;
      announce(endWords(message));
    } else if (this.#stamp === null) this.#body.append(renderParts(message.parts));
    this.node.classList.toggle("writing", Boolean(writer) && writer.notice === null);
    this.node.setAttribute("aria-busy", String(Boolean(writer)));
    const stamp = JSON.stringify([writer?.notice, message.end, last, message.moved, message.resumed, Boolean(writer)]);
    if (stamp !== this.#stamp) {
      this.#stamp = stamp;
      this.#drawFoot(writer, last);
    }
  }

  #drawFoot(writer, last) {
    clearInterval(this.#ticking);
    this.#foot.replaceChildren();
    if (writer) {
      if (writer.notice) this.#foot.append(this.#notice(writer.notice));
      return;
    }
    const { end } = this.#message;
    if (end?.error) this.#foot.append(this.#error(end, last));
    const note = { length: "The reply reached its length limit.", stopped: "Stopped." }[end];
    if (note) this.#foot.append(el("div", { className: "note" }, note));
    const copyButton = iconButton("copy", "Copy message", () => copy(plainText(this.#message.parts), copyButton));
    this.#foot.append(
      el(
        "div",
        { className: "acts" },
        copyButton,
        last ? iconButton("again", "Regenerate", () => this.#acts.regenerate()) : null,
        this.#readOut(),
      ),
    );
  }

  #notice({ kind, text, until }) {
    announce(text);
    const left = el("span", { attrs: { "aria-hidden": "true" } }); // counting aloud would help nobody
    const tick = () => {
      left.textContent = `${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s`;
    };
    if (until) {
      tick();
      this.#ticking = setInterval(tick, 250);
    }
    return el(
      "div",
      { className: "notice", attrs: { "data-kind": kind } },
      el("i", { className: "spinner", attrs: { "aria-hidden": "true" } }),
      el("span", {}, text),
      until ? left : null,
      until ? el("button", { type: "button", onclick: () => this.#acts.tryNow() }, "Try now") : null,
    );
  }

  #error({ error, action }, last) {
    const help = {
      continue: ["Continue", () => this.#acts.proceed(this.#message)],
      key: ["Enter an API key", () => this.#acts.askForKey()],
      regenerate: ["Regenerate", () => this.#acts.regenerate()],
      retry: ["Retry", () => this.#acts.regenerate()],
    };
    const offered = !last ? [] : action === "continue" || action === "key" ? [action, "retry"] : [action ?? "retry"];
    return el(
      "div",
      { className: "note bad", attrs: { role: "alert" } },
      icon("alert"),
      el("span", {}, error),
      ...offered.map((name) => el("button", { type: "button", onclick: help[name][1] }, help[name][0])),
    );
  }

  /** Tokens, speed, time to the first token; and what the reply has been through. */
  #readOut() {
    const { stats, resumed, moved } = this.#message;
    const words = [];
    if (stats?.tokens) {
      words.push(`${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
      // The first token marks the beginning of the time measured, so it is not among those written in it.
      if (stats.writeMs > 20 && stats.tokens > 1) words.push(`${perSecond(stats)} tok/s`);
    }
    if (stats?.firstMs) words.push(`first after ${seconds(stats.firstMs)}`);
    if (moved) words.push("went on at another machine");
    if (resumed) words.push("resumed after a lost connection");
    if (!words.length) return null;
    const title = stats?.promptTokens ? `The model read ${stats.promptTokens} tokens` : "";
    return el("span", { className: "readout", title }, words.join(" · "));
  }
}

function perSecond({ tokens, writeMs }) {
  const rate = (tokens - 1) / (writeMs / 1000);
  return rate < 10 ? rate.toFixed(1) : String(Math.round(rate));
}

const seconds = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function endWords({ end }) {
  if (end === "stopped") return "Stopped";
  return end?.error ? "" : "The reply is complete"; // an error is an alert, which speaks for itself
}
