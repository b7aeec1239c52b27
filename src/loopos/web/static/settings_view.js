// Settings that differ between the chosen runs; of one run, all settings.
import { h, message } from "./dom.js";
import { read } from "./api.js";

export class SettingsView {
  /** @param {HTMLElement} view @param {any} state */
  constructor(view, state) {
    Object.assign(this, { view, state });
  }

  async show() {
    const runs = this.state.shown();
    if (!runs.length) return message(this.view, "Choose a run in the list.");
    let found;
    try {
      found = await read("/api/board/settings", { run: runs.map((run) => run.id) });
    } catch (error) {
      return message(this.view, error.message, "bad");
    }
    const keys = Object.keys(found.settings);
    const title = runs.length > 1 ? `${keys.length} settings differ` : `${keys.length} settings`;
    const head = h("tr", {}, h("th", { scope: "col" }, "setting"), ...runs.map((run) => h("th", { scope: "col" }, run.name)));
    const rows = keys.map((key) => h("tr", {}, h("th", { scope: "row" }, key), ...found.settings[key].map((value) => h("td", { class: "value" }, shown(value)))));
    this.view.replaceChildren(h("h2", {}, title), h("div", { class: "panel wide-table", tabindex: 0, role: "region", "aria-label": title }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))));
    this.ids = runs.map((run) => run.id).join();
    return undefined;
  }

  update() {
    if (this.ids !== this.state.shown().map((run) => run.id).join()) this.show();
  }
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}
