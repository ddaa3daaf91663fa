// Runs before the first paint, so that a page with a chosen theme never flashes in the other. Not a module: those wait.
"use strict";
try {
  const { theme } = JSON.parse(localStorage.getItem("nanochat_ray/settings")) ?? {};
  if (["light dark", "light", "dark"].includes(theme)) document.documentElement.style.colorScheme = theme;
} catch {
  /* no readable settings: the system's theme */
}
