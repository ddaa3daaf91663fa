// A short word at the edge of the page, with at most one thing to do about it.

import { $, announce, el } from "./dom.js";

/** Shown for a while; longer while pointed at or focused, so that nobody has to hurry. */
export function toast(text, { action = null, onAction = () => {}, seconds = 8 } = {}) {
  const node = el("div", { className: "toast" }, el("span", {}, text));
  const remove = () => node.remove();
  let timer = setTimeout(remove, seconds * 1000);
  const hold = () => clearTimeout(timer);
  const release = () => {
    hold();
    timer = setTimeout(remove, seconds * 1000);
  };
  for (const event of ["pointerenter", "focusin"]) node.addEventListener(event, hold);
  for (const event of ["pointerleave", "focusout"]) node.addEventListener(event, release);
  if (action)
    node.append(
      el(
        "button",
        {
          type: "button",
          onclick: () => {
            remove();
            onAction();
          },
        },
        action,
      ),
    );
  announce(text);
  $("toasts").append(node);
}
