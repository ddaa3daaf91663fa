// Code: the block with its copy button, and highlighting, which is loaded when the first code of a language appears.

import { copy, el, icon } from "./dom.js";
import { sanitizeHighlighted } from "./sanitize.js";

/** File in vendor/languages -> what to call it, and the other names people write behind the three backticks. */
const LANGUAGES = {
  bash: ["Bash", "sh", "shell", "zsh", "console"],
  c: ["C", "h"],
  cpp: ["C++", "c++", "cc", "hpp", "cuda", "cu"],
  css: ["CSS"],
  diff: ["Diff", "patch"],
  go: ["Go", "golang"],
  java: ["Java"],
  javascript: ["JavaScript", "js", "jsx", "mjs"],
  json: ["JSON", "jsonc"],
  markdown: ["Markdown", "md"],
  python: ["Python", "py", "python3", "pycon"],
  rust: ["Rust", "rs"],
  sql: ["SQL"],
  typescript: ["TypeScript", "ts", "tsx"],
  xml: ["XML", "html", "svg"],
  yaml: ["YAML", "yml"],
};
const FILES = new Map(
  Object.entries(LANGUAGES).flatMap(([file, [, ...others]]) => [file, ...others].map((name) => [name, file])),
);
const LONGEST_HIGHLIGHTED = 30_000; // characters; beyond, colours cost more than they help

let hljs = null;
const loading = new Map(); // file -> promise that it is registered

/** Load the grammar in `file`; it is there when the promise resolves. Rejects when the server does not answer. */
function load(file) {
  if (!loading.has(file)) {
    const both = Promise.all([import("./vendor/highlight.js"), import(`./vendor/languages/${file}.js`)]);
    loading.set(
      file,
      both.then(([core, grammar]) => {
        hljs = core.default;
        hljs.registerLanguage(file, grammar.default);
      }),
    );
  }
  return loading.get(file);
}

function highlight(code, text, file) {
  code.replaceChildren(sanitizeHighlighted(hljs.highlight(text, { language: file, ignoreIllegals: true }).value));
}

/** A block of code. A language we do not know, or none, stays plain: guessing is slow and often wrong. */
export function codeBlock(text, language) {
  const code = el("code", {}, text);
  const file = FILES.get(language.toLowerCase());
  if (file && text.length <= LONGEST_HIGHLIGHTED) {
    if (hljs?.getLanguage(file)) highlight(code, text, file);
    else
      load(file).then(
        () => highlight(code, text, file),
        () => {},
      ); // without its grammar, code is still code
  }
  const name = file ? LANGUAGES[file][0] : language || "Code";
  const words = el("span", {}, "Copy");
  const button = el(
    "button",
    {
      type: "button",
      className: "copy-code",
      title: "Copy this code",
      onclick: () =>
        copy(text, button, (said) => {
          words.textContent = said === "Copy this code" ? "Copy" : said;
        }),
    },
    icon("copy"),
    words,
  );
  const pre = el("pre", { tabIndex: 0, attrs: { role: "group", "aria-label": `${name}, code` } }, code);
  return el("div", { className: "code" }, el("div", { className: "code-head" }, el("span", {}, name), button), pre);
}
