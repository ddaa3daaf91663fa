// A reply's parts as nodes: marked makes markup, sanitize.js makes it safe nodes, calculator calls go in their place.

import { codeBlock } from "./code.js";
import { el, icon } from "./dom.js";
import { sanitizeProse } from "./sanitize.js";
import { Marked } from "./vendor/marked.js";

const HTML = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => HTML[character]);

const marked = new Marked({
  gfm: true,
  breaks: true, // a small model ends its lines where it means to
  // Markup in a reply is words about markup: shown, not obeyed and not lost. Without these two it is plain text.
  tokenizer: { html() {}, tag() {} },
  renderer: {
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2); // the page's own headings come first
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code: ({ text, lang }) =>
      `<pre><code lang="${escape((lang ?? "").trim().split(/\s/)[0])}">${escape(text)}</code></pre>`,
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || "image")}</a>`, // nothing is fetched
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// A call stands in the source as its number between two private-use characters, which text itself may not contain.
const [OPEN, CLOSE] = ["\uE000", "\uE001"];
const MARK = /\uE000(\d+)\uE001/;
const MARKS = /\uE000(\d+)\uE001/g;
const clean = (text) => text.replace(/[\uE000\uE001]/g, "\uFFFD").replace(/\r\n?/g, "\n");

function sourceOf(parts) {
  const tools = [];
  const source = parts.map((part) =>
    part.text === undefined ? OPEN + (tools.push(part) - 1) + CLOSE : clean(part.text),
  );
  return { source: source.join(""), tools };
}

const callText = (tool) => `${tool.expression} = ${tool.result ?? "…"}`;

/** What people read and copy: the text, with calls as "expression = result". */
export const plainText = (parts) => parts.map((part) => part.text ?? callText(part)).join("");

/** A calculator call: what was asked and what came out, or that it is being worked out. */
export function chip(tool) {
  const open = tool.result === null;
  const failed = !open && tool.result.startsWith("error");
  const value = open ? "calculating…" : failed ? tool.result : `= ${tool.result}`;
  const className = ["chip", open && "open", failed && "failed"].filter(Boolean).join(" ");
  const title = failed ? "The calculator could not work this out" : "The model used its calculator";
  return el(
    "span",
    { className, title },
    icon("sum"),
    tool.expression ? `${tool.expression} ` : null,
    el("b", {}, value),
  );
}

/** Nodes of some of marked's tokens. Calls whose mark got lost, for instance in a link's address, stand at the end. */
function render(tokens, tools) {
  const fragment = sanitizeProse(marked.parser(tokens));
  const placed = new Set();
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code") ?? pre;
    const text = code.textContent.replace(MARKS, (_, number) => {
      placed.add(Number(number));
      return `[${callText(tools[number])}]`;
    });
    pre.replaceWith(codeBlock(text, code.getAttribute("lang") ?? ""));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { className: "table", tabIndex: 0, attrs: { role: "region", "aria-label": "Table" } });
    table.replaceWith(frame);
    frame.append(table);
  }
  placeChips(fragment, tools, placed);
  const source = tokens.map((token) => token.raw).join("");
  for (const [, number] of source.matchAll(MARKS)) {
    if (!placed.has(Number(number))) fragment.append(el("p", {}, chip(tools[number])));
  }
  return fragment;
}

function placeChips(fragment, tools, placed) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (MARK.test(walker.currentNode.data)) texts.push(walker.currentNode);
  for (const text of texts) {
    // Splitting at a pattern with one group leaves text at even places and the numbers at odd ones.
    text.replaceWith(
      ...text.data.split(MARK).map((piece, place) => {
        if (place % 2 === 0) return piece;
        placed.add(Number(piece));
        return chip(tools[piece]);
      }),
    );
  }
}

/** All of a reply at once. */
export function renderParts(parts) {
  const { source, tools } = sourceOf(parts);
  return render(marked.lexer(source), tools);
}

/** What a screen reader should say of some nodes: no buttons and labels of ours. */
const spoken = (nodes) =>
  nodes
    .map((node) => (node.querySelector?.("pre") ?? node).textContent)
    .join("\n")
    .trim();

/**
 * A reply that grows. Blocks that are followed by another one cannot change any more: they are rendered once and stay.
 * Only the last block is rendered again, so the work per update does not grow with the reply.
 */
export class GrowingMarkdown {
  #body;
  #onBlock;
  #fixed = ""; // the source whose nodes are final
  #tail = []; // nodes of the rest

  /** `onBlock(text)` is told of each block when it is final. */
  constructor(body, onBlock = () => {}) {
    this.#body = body;
    this.#onBlock = onBlock;
  }

  update(parts) {
    const { source, tools } = sourceOf(parts);
    if (source.startsWith(this.#fixed)) for (const node of this.#tail) node.remove();
    else {
      // the reply began again from nothing
      this.#body.replaceChildren();
      this.#fixed = "";
    }
    const rest = source.slice(this.#fixed.length);
    const tokens = marked.lexer(rest);
    const last = Math.max(
      0,
      tokens.findLastIndex((token) => token.type !== "space"),
    );
    const final = tokens.slice(0, last);
    const finalSource = final.map((token) => token.raw).join("");
    // Were marked to rewrite the source, lengths would mean nothing; then all of the rest stays open.
    const cut = rest.startsWith(finalSource) ? last : 0;
    if (cut > 0) {
      const nodes = render(final, tools);
      this.#onBlock(spoken([...nodes.childNodes]));
      this.#body.append(nodes);
      this.#fixed += finalSource;
    }
    const tail = render(tokens.slice(cut), tools);
    this.#tail = [...tail.childNodes];
    this.#body.append(tail);
  }

  /** The reply is complete. Rendered once more as a whole: a link's address may have come after the link. */
  finish(parts) {
    this.update(parts);
    this.#onBlock(spoken(this.#tail));
    const whole = [...renderParts(parts).childNodes];
    const now = [...this.#body.childNodes];
    const same = whole.length === now.length && whole.every((node, place) => node.isEqualNode(now[place]));
    if (!same) this.#body.replaceChildren(...whole); // what is the same keeps the reader's selection
  }
}
