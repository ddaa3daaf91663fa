// A reply that this tab is having written: from the first request until it is complete, whatever happens in between.

import { close, isOpen, receive, requestBody } from "./chat.js";
import { ReplyError, streamReply } from "./reply_stream.js";
import { apiKey, loadChat, saveChat } from "./store.js";

const SAVE_EVERY_MS = 1000;
const URL_OF_REPLIES = "v1/chat/completions";

export class Writer {
  chat;
  reply;
  /** What keeps the reply from going on, or null: {kind, text, until?}. */
  notice = null;
  elsewhere = false; // another tab has this reply written

  #abort = new AbortController();
  #wake = new EventTarget();
  #changed;
  #saving = 0;
  #discarded = false;
  #begunAt = performance.now();
  #chunkAt = null; // when this connection last brought something, for the speed
  #waited = false;

  /** `changed(writer, what)` is called with "text", "state" or "end". */
  constructor(chat, reply, changed) {
    this.chat = chat;
    this.reply = reply;
    this.#changed = changed;
  }

  /** Returns when the reply is closed. Only one tab at a time writes a reply; when that tab goes, the next goes on. */
  async run() {
    if (!navigator.locks) return this.#write();
    const name = `nanochat_ray/reply/${this.reply.request.key}`;
    const done = await navigator.locks.request(
      name,
      { ifAvailable: true },
      async (lock) => lock && (await this.#write(), true),
    );
    if (done) return;
    this.elsewhere = true;
    this.#note("elsewhere", "Another tab is writing this reply.");
    try {
      await navigator.locks.request(name, { signal: this.#abort.signal }, async () => {
        this.elsewhere = false;
        this.refresh();
        if (isOpen(this.reply)) await this.#write();
        else this.#end();
      });
    } catch (error) {
      if (!this.#abort.signal.aborted) throw error;
      this.#end(); // without keeping anything: the other tab does
    }
  }

  stop() {
    this.#abort.abort();
  }
  tryNow() {
    this.#wake.dispatchEvent(new Event("now"));
  }

  /** Stop, and do not keep what was written: the conversation was deleted. */
  discard() {
    this.#discarded = true;
    this.stop();
  }

  /** Keep what has arrived, now. */
  save() {
    clearTimeout(this.#saving);
    this.#saving = 0;
    if (!this.#discarded && !this.elsewhere) saveChat(this.chat);
  }

  /** Another tab has written into this conversation. */
  refresh() {
    const fresh = loadChat(this.chat.id);
    if (!fresh) return this.discard();
    Object.assign(this.chat, fresh);
    this.reply = this.chat.messages.at(-1);
  }

  async #write() {
    let end;
    try {
      const { key, lastId } = this.reply.request;
      if (lastId === null) this.reply.parts = []; // nothing can be continued without a position
      const stream = streamReply({
        url: URL_OF_REPLIES,
        body: requestBody(this.chat, this.reply),
        key,
        lastId,
        apiKey: apiKey(),
        signal: this.#abort.signal,
        wake: this.#wake,
      });
      if (lastId !== null) this.#waited = true;
      for await (const event of stream) this.#take(event);
      end = this.reply.finish ?? "stop";
    } catch (error) {
      if (this.#abort.signal.aborted) end = "stopped";
      else if (error instanceof ReplyError) end = { error: error.message, action: error.action };
      else {
        console.error(error);
        end = { error: `This page failed: ${error.message}`, action: "retry" };
      }
    }
    close(this.reply, end);
    this.save();
    this.#end();
  }

  #end() {
    this.notice = null;
    this.#changed(this, "end");
  }

  #take(event) {
    if (event.waiting) {
      this.#waited = true;
      this.#chunkAt = null;
      this.#note(event.waiting.why, event.waiting.message, event.waiting.until);
    } else if (event.connected) {
      if (this.#waited && this.reply.request.lastId !== null) this.reply.resumed = (this.reply.resumed ?? 0) + 1;
      else if (this.reply.parts.length) this.reply.parts = []; // the whole reply comes again
      this.#waited = false;
      this.#note();
    } else if (event.state) this.#state(event);
    else this.#chunk(event);
  }

  #state({ state, ahead }) {
    this.#chunkAt = null;
    const place = ahead > 0 ? `${ahead} ahead of you` : "you are next";
    if (state === "queued") this.#note("queued", `Waiting for a free place: ${place}.`);
    else if (state === "starting") this.#note("starting", "Starting a replica of the model; this can take a while.");
    else if (state === "moved") {
      this.reply.moved = (this.reply.moved ?? 0) + 1;
      this.#note("moved", "The machine was lost, another one goes on…");
    } else this.#note();
  }

  #chunk({ chunk, id }) {
    const now = performance.now();
    const { stats } = this.reply;
    if (receive(this.reply, chunk)) {
      stats.firstMs ??= now - this.#begunAt;
      if (this.#chunkAt !== null) stats.writeMs += now - this.#chunkAt;
      this.#chunkAt = now;
    }
    this.reply.request.lastId = id; // together with the text, so that what is saved fits together
    if (this.notice) this.#note();
    this.#saving ||= setTimeout(() => this.save(), SAVE_EVERY_MS);
    this.#changed(this, "text");
  }

  #note(kind = null, text = "", until = null) {
    this.notice = kind && { kind, text, until };
    this.#changed(this, "state");
  }
}
