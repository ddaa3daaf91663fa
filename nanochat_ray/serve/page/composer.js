// The box at the bottom: what is typed, the list of commands above it, and the button that sends or stops.

import { $, announce, el, icon, setLabel } from "./dom.js";
import { parseCommand, suggestions } from "./commands.js";

export class Composer {
  #acts;
  #state = "ready"; // "ready", "writing" (the button stops), or "elsewhere" (another tab writes: wait)
  #shown = []; // commands in the list
  #chosen = 0;

  /** `acts`: send(text), stop(), command(command, argument), unknown(name), editLast(). */
  constructor(acts) {
    this.#acts = acts;
    const box = $("text");
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#state === "writing") acts.stop();
      else this.submit();
    });
    box.addEventListener("input", () => this.#edited());
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("blur", () => this.#suggest([]));
    this.set("ready");
  }

  /** No keyboard over half a phone. */
  focus() {
    if (matchMedia("(pointer: fine)").matches) $("text").focus();
  }

  get text() {
    return $("text").value;
  }

  set text(value) {
    $("text").value = value;
    this.#edited();
  }

  set(state) {
    this.#state = state;
    const stop = state === "writing";
    if ($("send").dataset.stop !== String(stop)) {
      $("send").dataset.stop = stop;
      $("send").replaceChildren(icon(stop ? "stop" : "up"));
      setLabel($("send"), stop ? "Stop" : "Send");
    }
    this.#drawSend();
  }

  submit() {
    const text = this.text;
    const parsed = parseCommand(text);
    if (parsed?.unknown) return this.#acts.unknown(parsed.unknown);
    if (!parsed && (this.#state !== "ready" || !text.trim())) return; // the text stays for when the reply is over
    this.text = "";
    if (parsed) this.#acts.command(parsed.command, parsed.argument);
    else this.#acts.send(text.startsWith("//") ? text.slice(1) : text);
  }

  #edited() {
    const box = $("text");
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight}px`;
    this.#drawSend();
    this.#suggest(document.activeElement === box ? suggestions(box.value) : []);
  }

  #drawSend() {
    const command = parseCommand(this.text) !== null;
    $("send").disabled = this.#state !== "writing" && (!this.text.trim() || (this.#state === "elsewhere" && !command));
  }

  #key(event) {
    if (event.isComposing) return;
    if (this.#shown.length && this.#keyInList(event)) {
      event.preventDefault();
      event.stopPropagation();
      return;
    }
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && !this.text) {
      event.preventDefault();
      this.#acts.editLast();
    }
  }

  #keyInList(event) {
    if (event.key === "Tab" && event.shiftKey) {
      this.#suggest([]); // before the focus moves on, or it would move into a list that closes
      return false;
    }
    const count = this.#shown.length;
    const { name, argument } = this.#shown[this.#chosen];
    if (event.key === "ArrowDown") this.#choose((this.#chosen + 1) % count);
    else if (event.key === "ArrowUp") this.#choose((this.#chosen + count - 1) % count);
    else if (event.key === "Escape") this.#suggest([]);
    else if (
      event.key === "Tab" ||
      (event.key === "Enter" && !event.shiftKey && (argument || this.text !== `/${name}`))
    ) {
      this.text = `/${name}${argument ? " " : ""}`;
      if (event.key === "Enter" && !argument) this.submit();
    } else return false;
    return true;
  }

  #suggest(commands) {
    const before = this.#shown.length;
    this.#shown = commands;
    $("commands").hidden = commands.length === 0;
    $("commands").replaceChildren(
      ...commands.map((command, place) =>
        el(
          "li",
          {
            id: `command-${command.name}`,
            attrs: { role: "option" },
            // Not a click: that would come after the box has lost its focus, and the list with it.
            onpointerdown: (event) => {
              event.preventDefault();
              this.#take(place);
            },
          },
          el("b", {}, `/${command.name}`),
          command.argument ? el("kbd", {}, command.argument) : null,
          el("span", {}, command.help),
        ),
      ),
    );
    if (commands.length) {
      this.#choose(0);
      if (!before) announce(`${commands.length} commands; arrow keys choose`);
    } else $("text").removeAttribute("aria-activedescendant");
  }

  #take(place) {
    const { name, argument } = this.#shown[place];
    this.text = `/${name}${argument ? " " : ""}`;
    if (!argument) this.submit();
  }

  #choose(place) {
    this.#chosen = place;
    [...$("commands").children].forEach((item, at) => item.setAttribute("aria-selected", String(at === place)));
    const item = $("commands").children[place];
    $("text").setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
  }
}
