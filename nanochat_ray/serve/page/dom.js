// Building nodes, icons, and telling a screen reader. No state of the conversation lives here.

export const $ = (id) => document.getElementById(id);

/** A new element. Text goes in as text nodes, never as markup; `label` is its accessible name and its tooltip. */
export function el(tag, props = {}, ...children) {
  const { className, label, attrs = {}, ...rest } = props;
  const node = Object.assign(document.createElement(tag), rest);
  if (className) node.className = className;
  if (label) setLabel(node, label);
  for (const [name, value] of Object.entries(attrs)) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function setLabel(node, label) {
  node.setAttribute("aria-label", label);
  node.title = label;
}

const PATHS = {
  again: "M20 12a8 8 0 1 1-2.5-5.8M20 3v5h-5",
  alert: "M12 4 2.8 20h18.4zM12 10v4M12 17h.01",
  chat: "M4 5h16v11H10l-5 4v-4H4z",
  check: "M5 12.5l4.5 4.5L19 7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  down: "M12 5v14M5 12l7 7 7-7",
  export: "M12 3v12M7 8l5-5 5 5M4 15v5h16v-5",
  gear: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5a2 2 0 1 0 0 4 2 2 0 0 0 0-4M9 15a2 2 0 1 0 0 4 2 2 0 0 0 0-4",
  help: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M9.5 9.5a2.5 2.5 0 1 1 3.4 2.3c-.6.3-.9.8-.9 1.5v.4M12 17h.01",
  menu: "M4 7h16M4 12h16M4 17h16",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  pen: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M16 16l4.5 4.5",
  stop: "M7 7h10v10H7z",
  sum: "M5 3h14v18H5zM8 7h8M8 12h.01M12 12h.01M16 12h.01M8 16h.01M12 16h.01M16 16h.01",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  up: "M12 19V5M5 12l7-7 7 7",
  x: "M6 6l12 12M18 6L6 18",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with only an icon. */
export const iconButton = (name, label, onclick, props = {}) =>
  el("button", { type: "button", label, onclick, ...props }, icon(name));

/**
 * Say something to a screen reader, after what it is saying now. The words are removed a little later, so that
 * nobody finds them again when browsing or searching the page.
 */
export function announce(text) {
  const line = el("p", {}, text);
  $("announcer").append(line);
  setTimeout(() => line.remove(), 15_000);
}

/** Copy, and say so on the button for a moment. */
export async function copy(
  text,
  button,
  say = (words) => {
    button.title = words;
  },
) {
  const before = button.title;
  let words = "Copied";
  try {
    await navigator.clipboard.writeText(text);
    button.classList.add("done");
  } catch {
    words = "The browser refused to copy";
  }
  say(words);
  announce(words);
  setTimeout(() => {
    button.classList.remove("done");
    say(before);
  }, 1600);
}

/** Save text as a file of the person's. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
