// Server-sent events out of text that arrives in arbitrary portions. Pure.

const STATE = "state ";

/**
 * Follows the event stream format of the HTML standard for `data` and `id`, and also hands out comments, in which our
 * server reports its state. An event that is unfinished when the stream ends is dropped, as the standard says:
 * its id must not count as seen.
 */
export class SseParser {
  #carry = "";
  #data = [];
  #id = null;
  #begun = false;

  /** Everything complete with this portion: {data, id} (id is null where the event has none) or {comment}. */
  push(portion) {
    let text = this.#carry + portion;
    if (!this.#begun && text) {
      if (text.startsWith("\uFEFF")) text = text.slice(1);
      this.#begun = true;
    }
    // A CR at the very end may be half of a CRLF, so it waits.
    const lines = text.split(/\r\n|\n|\r(?!$)/);
    this.#carry = lines.pop();
    return lines.flatMap((line) => this.#line(line));
  }

  #line(line) {
    if (line === "") {
      const event = { data: this.#data.join("\n"), id: this.#id };
      const complete = this.#data.length > 0;
      this.#data = [];
      this.#id = null;
      return complete ? [event] : [];
    }
    if (line.startsWith(":")) return [{ comment: line.slice(1).trimStart() }];
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "id" && !value.includes("\0")) this.#id = value;
    return [];
  }
}

/** What a comment says about the server: {state, ahead?}, or null for a keep-alive or anything unknown. */
export function stateOf(comment) {
  if (!comment.startsWith(STATE)) return null;
  try {
    const value = JSON.parse(comment.slice(STATE.length));
    return typeof value?.state === "string" ? value : null;
  } catch {
    return null;
  }
}
