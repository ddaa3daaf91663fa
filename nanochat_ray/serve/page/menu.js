// A menu that opens from a button. The browser's popover closes it on Escape or a click elsewhere.

import { el, icon } from "./dom.js";

/** `items`: [{icon, text, run}]. */
export function openMenu(button, label, items) {
  const menu = el(
    "div",
    { className: "menu", popover: "auto", attrs: { role: "menu", "aria-label": label } },
    ...items.map(({ icon: name, text, run }) =>
      el(
        "button",
        {
          type: "button",
          attrs: { role: "menuitem", tabindex: "-1" },
          onclick: () => {
            menu.hidePopover();
            run();
          },
        },
        icon(name),
        text,
      ),
    ),
  );
  menu.addEventListener("keydown", (event) => {
    const buttons = [...menu.children];
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") menu.hidePopover();
    if (to === undefined) return;
    event.preventDefault();
    buttons.at(to % buttons.length).focus();
  });
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    button.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) button.focus();
    menu.remove();
  });
  document.body.append(menu);
  menu.showPopover();
  button.setAttribute("aria-expanded", "true");
  place(menu, button.getBoundingClientRect());
  menu.firstElementChild.focus();
}

/** Below the button, or above it where there is no room; always inside the window. */
function place(menu, { left, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = menu;
  const y = bottom + height + 8 > innerHeight ? top - height - 4 : bottom + 4;
  menu.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  menu.style.top = `${Math.max(8, y)}px`;
}
