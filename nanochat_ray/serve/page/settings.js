// The settings and their dialog. Commands change the same settings within the same limits.

import { $, icon } from "./dom.js";
import { DEFAULTS, apiKey, loadSettings, saveSettings, setApiKey } from "./store.js";

/** Numbers: [least, most, whole, what to call it]. */
const LIMITS = {
  temperature: [0, 10, false, "temperature"],
  top_k: [1, 1_000_000, true, "top-k"],
  top_p: [0.01, 1, false, "top-p"],
  max_tokens: [1, 1_000_000, true, "longest reply"],
  seed: [0, Number.MAX_SAFE_INTEGER, true, "seed"],
};

export const settings = loadSettings();

/** null when `value` is fine for the setting, else a sentence. */
export function problemWith(name, value) {
  const [least, most, whole, words] = LIMITS[name];
  if (typeof value === "number" && value >= least && value <= most && (!whole || Number.isInteger(value))) return null;
  return `The ${words} must be ${whole ? "a whole number" : "a number"} from ${least} to ${most}.`;
}

/** Takes effect with the next reply. */
export function change(changes) {
  Object.assign(settings, changes);
  saveSettings(settings);
  document.documentElement.style.colorScheme = settings.theme;
}

const fields = () => [...$("options").querySelectorAll("[name]")];

function fill(values, key) {
  for (const field of fields()) {
    field.value = field.name === "key" ? key : (values[field.name] ?? "");
    field.setCustomValidity("");
  }
}

/** `changed()` is called after the dialog has changed something. */
export function initSettings(changed) {
  const dialog = $("options");
  for (const field of fields()) {
    const limits = LIMITS[field.name];
    if (!limits) continue;
    [field.min, field.max] = limits;
    field.step = limits[2] ? 1 : "any";
    field.addEventListener("input", () => {
      const value = field.value === "" ? null : Number(field.value);
      field.setCustomValidity(value === null && !field.required ? "" : (problemWith(field.name, value) ?? ""));
    });
  }
  $("settings").append(icon("gear"));
  $("settings").addEventListener("click", openSettings);
  $("defaults").addEventListener("click", () =>
    fill({ ...DEFAULTS, system: $("options").querySelector("[name=system]").value }, apiKey()),
  );
  $("cancel").addEventListener("click", () => dialog.close()); // no submit button, or Enter would press it
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    const values = {};
    for (const { name, value } of fields()) {
      if (name === "key") setApiKey(value.trim());
      else if (name in LIMITS) values[name] = value === "" ? null : Number(value);
      else values[name] = name === "system" ? value.trim() : value;
    }
    change(values);
    changed();
  });
}

export function openSettings(_event, focus = null) {
  const dialog = $("options");
  fill(settings, apiKey());
  dialog.returnValue = "";
  dialog.showModal();
  if (focus) dialog.querySelector(`[name=${focus}]`).focus();
}
