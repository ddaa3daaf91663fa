// The light in the header: is there a server, and can it answer.

import { $, el } from "./dom.js";

const CALM_MS = 30_000;
const ANXIOUS_MS = 3_000;

let timer = 0;
let shown = "";

/** Ask now, and again from time to time. */
export async function checkHealth() {
  clearTimeout(timer);
  let level = "lost";
  let words = "server unreachable";
  let model = null;
  try {
    const answer = await fetch("health", { cache: "no-store" });
    const body = await answer.json();
    level = answer.ok ? "ok" : "waiting";
    words = answer.ok ? "ready" : String(body.status ?? "not ready");
    model = body.model ? String(body.model) : null;
  } catch {
    /* shown as unreachable */
  }
  show(level, words, model);
  timer = setTimeout(checkHealth, level === "ok" ? CALM_MS : ANXIOUS_MS);
}

function show(level, words, model) {
  const now = JSON.stringify([level, words, model]);
  if (now === shown) return; // the same words again would be read out again
  shown = now;
  $("status").dataset.level = level;
  $("status-text").replaceChildren(
    model && level !== "lost" ? el("b", {}, model) : "",
    el("span", {}, level === "ok" ? el("span", { className: "unseen" }, " is ready") : words),
  );
}

/** A tab that was in the background may have slept through its timer. */
export function watchHealth() {
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) checkHealth();
  });
  addEventListener("online", checkHealth);
  addEventListener("offline", checkHealth);
  checkHealth();
}
