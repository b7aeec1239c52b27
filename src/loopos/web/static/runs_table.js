// The list of runs. Rows stay the same elements, so that focus and selection survive each update.
import { at, h, setText } from "./dom.js";
import { ago, bytes, color, dash, duration, number } from "./format.js";

const STATE_CLASS = { running: "good running", finished: "", interrupted: "warn", killed: "bad", failed: "bad", unknown: "muted" };

export class RunsTable {
  /**
   * @param {any} state
   * @param {(id: string, isChosen: boolean) => void} choose
   * @param {(id: string) => void} open
   */
  constructor(state, choose, open) {
    Object.assign(this, { state, choose, open });
    /** @type {Map<string, any>} */ this.rows = new Map();
    this.body = document.querySelector("#runs tbody");
    this.filter = at("run-filter");
    this.filter.addEventListener("input", () => this.refresh());
    setInterval(() => this.refresh(), 10000);
  }

  refresh() {
    const wished = this.filter.value.toLowerCase();
    const runs = [...this.state.runs.values()].sort((a, b) => (b.began ?? 0) - (a.began ?? 0) || a.name.localeCompare(b.name));
    for (const [id, row] of this.rows) {
      if (!this.state.runs.has(id)) {
        row.element.remove();
        this.rows.delete(id);
      }
    }
    let shown = 0;
    runs.forEach((run, index) => {
      if (!this.rows.has(run.id)) this.rows.set(run.id, this.row(run));
      const row = this.rows.get(run.id);
      if (this.body.children[index] !== row.element) this.body.insertBefore(row.element, this.body.children[index] ?? null);
      const text = `${run.name} ${run.method} ${run.state} ${run.tags.join(" ")} ${run.note}`.toLowerCase();
      row.element.hidden = !text.includes(wished);
      shown += row.element.hidden ? 0 : 1;
      this.fill(row, run);
    });
    at("no-runs").hidden = runs.length > 0;
    setText(at("run-count"), `${shown} of ${runs.length}`);
  }

  row(run) {
    const box = h("input", { type: "checkbox", "aria-label": `Show ${run.name}`, on: { change: () => this.choose(run.id, box.checked) } });
    const swatch = h("span", { class: "swatch" });
    const name = h("button", { class: "link", type: "button", on: { click: () => this.open(run.id) } }, run.name);
    const cell = (label, kind = "") => h("td", { "data-label": label, class: kind });
    const bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of ${run.name}` });
    const steps = h("span", { class: "muted" });
    const cells = {
      method: cell("method"), state: cell("state"), progress: h("td", { "data-label": "" }, bar, " ", steps),
      left: cell("left", "number"), speed: cell("tokens/s", "number"), memory: cell("memory", "number"),
      metric: cell("", "number"), tags: cell("tags"), last: cell("last event", "number"),
    };
    const element = h("tr", {}, h("td", {}, box), h("td", {}, swatch, name), ...Object.values(cells));
    return { element, box, swatch, bar, steps, ...cells };
  }

  fill(row, run) {
    row.box.checked = this.state.chosen.has(run.id);
    row.swatch.style.borderTopColor = color(run.color);
    row.swatch.classList.toggle("dashed", dash(run.color) !== undefined);
    setText(row.method, run.method);
    setText(row.state, run.problem ? "unreadable" : run.read < 1 && run.size ? "reading" : run.status);
    row.state.title = run.problem || run.ended || "";
    row.state.className = run.problem ? "bad" : (STATE_CLASS[run.state] ?? "");
    row.bar.hidden = !run.total_steps;
    row.bar.value = run.total_steps ? Math.min(1, run.step / run.total_steps) : 0;
    setText(row.steps, `${run.step.toLocaleString("en")}${run.total_steps ? ` / ${run.total_steps.toLocaleString("en")}` : ""}${run.read < 1 ? ` (${Math.round(run.read * 100)}% read)` : ""}`);
    setText(row.left, duration(run.eta_seconds));
    setText(row.speed, run.tokens_per_second ? number(Math.round(run.tokens_per_second)) : "");
    setText(row.memory, bytes(run.memory));
    setText(row.metric, run.headline ? `${run.headline.name} ${number(run.headline.value)}` : "");
    const tags = run.tags.join("\n");
    if (row.tags.dataset.tags !== tags) {
      row.tags.dataset.tags = tags;
      row.tags.replaceChildren(...run.tags.map((tag) => h("span", { class: "tag" }, tag)));
    }
    setText(row.last, ago(run.last_event));
  }
}
