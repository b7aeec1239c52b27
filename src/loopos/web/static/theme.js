// Sets the theme before the first paint. "light", "dark", or the system's without a stored choice.
"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const stored = localStorage.getItem("loopos-theme");
    document.documentElement.dataset.theme = stored || (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  apply();
})();
