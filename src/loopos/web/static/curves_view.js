// Curves of the chosen runs: a panel per metric, loaded when it is in view and again when its runs have changed.
import { at, h, save, fileName, setText } from "./dom.js";
import { read } from "./api.js";
import { ChartView, MARKS, numbersTable } from "./chart.js";
import { color, dash } from "./format.js";
import { curvesSvg, frontierSvg } from "./svg_chart.js";

const GROUPS = [
  ["Rewards and policy", ["reward", "reward_std", /^score_/, "judge", "win_rate", "reward_win_rate", "kl", "entropy", "clip_share", /^clip_share/, "value_clip_share", "approximate_kl", "explained_variance", "response_length", "eos_rate", "no_signal", /^no_signal/, "repetition", "distinct_2", "ratio", /^ratio_/, "kl_coefficient", "logprob_mismatch", "policy_loss", "value_loss", "kl_loss"]],
  ["Training", ["loss", "learning_rate", "gradient_norm", "skipped"]],
  ["Validation", [/accuracy/, /f1/, "perplexity", "ece"]],
];
const LAST_GROUPS = [["Speed", ["tokens_per_second", /seconds$/]], ["Progress", ["epoch", "rows", "tokens", "iteration"]]];
const KIND_NAMES = { step: "", rollout: "rollout", validation: "validation" };
const LETTERS = { resume: "resumed", "non-finite": "not finite", alert: "alert", note: "note", checkpoint: "checkpoint", best: "best validation" };
const REFRESH_MS = 300;

export class CurvesView {
  constructor(state) {
    this.state = state;
    this.host = at("panels");
    /** @type {Map<string, any>} */ this.panels = new Map();
    /** @type {Map<string, any>} run id → its details */ this.details = new Map();
    /** @type {Map<string, any>} run and options → curves by name */ this.loaded = new Map();
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) this.panels.get(entry.target.dataset.metric).isVisible = entry.isIntersecting;
      this.load();
    }, { rootMargin: "300px" });
    this.options();
    new MutationObserver(() => this.redraw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    setText(at("mark-legend"), Object.entries(MARKS).map(([kind, letter]) => `${letter} ${LETTERS[kind]}`).join("   "));
  }

  options() {
    const { state } = this;
    at("curve-options").addEventListener("submit", (event) => event.preventDefault());
    const bind = (id, name, property, redo) => {
      at(id)[property] = property === "checked" ? state[name] : String(state[name]);
      at(id).addEventListener("input", () => {
        state[name] = name === "window" ? Number(at(id).value) : at(id)[property];
        if (name === "axis") state.low = state.high = null;
        state.keep();
        redo();
      });
    };
    bind("axis", "axis", "value", () => this.show());
    bind("window", "window", "value", () => this.load());
    bind("log", "log", "checked", () => this.redraw());
    bind("marks", "marks", "checked", () => this.redraw());
    bind("metric-filter", "find", "value", () => this.arrange());
    at("reset-zoom").addEventListener("click", () => this.zoom(null, null));
  }

  /** Shows the chosen runs, from the beginning. */
  async show() {
    this.details.clear();
    await this.refresh();
  }

  /** Loads what changed, and again what changed meanwhile. */
  async update() {
    this.isDue = true;
    if (this.isBusy) return;
    this.isBusy = true;
    while (this.isDue) {
      this.isDue = false;
      await this.refresh();
      await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
    }
    this.isBusy = false;
  }

  async refresh() {
    const shown = this.state.shown();
    await Promise.all(shown.map(async (run) => {
      if (this.details.get(run.id)?.version === run.version) return;
      const found = await read(`/api/board/run/${run.id}`, { axis: this.state.axis }).catch(() => null);
      if (found) this.details.set(run.id, found);
    }));
    this.arrange();
    await this.load();
  }

  /** The panels of the chosen runs' metrics, in groups. */
  arrange() {
    const names = new Set();
    for (const run of this.state.shown()) {
      for (const found of Object.values(this.details.get(run.id)?.names ?? {})) found.forEach((name) => names.add(name));
    }
    const wished = this.state.find.toLowerCase();
    const groups = grouped([...names].filter((name) => name.toLowerCase().includes(wished)));
    const key = JSON.stringify(groups);
    if (key !== this.arranged) {
      this.arranged = key;
      this.host.replaceChildren(...groups.map(([title, metrics]) => {
        const grid = h("div", { class: "grid" }, ...metrics.map((name) => this.panel(name).figure));
        return h("section", { "aria-label": title }, h("h2", {}, title), grid);
      }));
      if (!groups.length) this.host.append(h("p", { class: "muted" }, this.state.chosen.size ? "No numbers yet." : "Choose a run in the list."));
    }
    this.drawFrontier();
  }

  panel(name) {
    if (this.panels.has(name)) return this.panels.get(name);
    const element = h("div", { class: "chart" });
    const legend = h("ul", { class: "legend" });
    const figure = h("figure", { class: "card", "data-metric": name });
    const panel = { name, figure, view: new ChartView(element, legend), isVisible: false, numbers: null };
    const button = (label, title, act) => h("button", { type: "button", title, "aria-label": `${title}: ${name}`, on: { click: act } }, label);
    const tools = h("span", { class: "tools" },
      button("PNG", "Save as PNG", () => this.savePng(panel)),
      button("SVG", "Save as SVG", () => this.saveSvg(panel)),
      button("123", "Show the numbers", () => this.toggleNumbers(panel)),
      button("⤢", "Wide", () => figure.classList.toggle("wide")));
    figure.append(h("figcaption", {}, h("h3", {}, name), tools), element, legend);
    element.addEventListener("keydown", (event) => {
      if (event.key === "v") this.toggleNumbers(panel);
    });
    this.panels.set(name, panel);
    this.observer.observe(figure);
    return panel;
  }

  zoom(low, high) {
    Object.assign(this.state, { low, high });
    this.load();
  }

  /** Loads the curves of the panels in view that are missing or old, a request per run, and draws them. */
  async load() {
    const visible = [...this.panels.values()].filter((panel) => panel.isVisible && panel.figure.isConnected);
    const { axis, window, low, high } = this.state;
    await Promise.all(this.state.shown().map(async (run) => {
      const details = this.details.get(run.id);
      if (!details) return;
      const key = JSON.stringify([run.id, details.version, axis, window, low, high]);
      if (this.loaded.get(run.id)?.key !== key) this.loaded.set(run.id, { key, curves: { ...(this.loaded.get(run.id)?.curves ?? {}) }, fresh: new Set() });
      const entry = this.loaded.get(run.id);
      const names = visible.flatMap((panel) => kindsOf(details, panel.name).map((kind) => `${kind}/${panel.name}`)).filter((name) => !entry.fresh.has(name));
      names.forEach((name) => entry.fresh.add(name));
      for (let start = 0; start < names.length; start += 100) {
        const found = await read(`/api/board/run/${run.id}/curves`, { name: names.slice(start, start + 100), axis, window, low, high, points: 800 }).catch(() => ({ curves: {} }));
        if (this.loaded.get(run.id) === entry) Object.assign(entry.curves, found.curves);
      }
    }));
    visible.forEach((panel) => this.draw(panel));
  }

  redraw() {
    for (const panel of this.panels.values()) if (panel.isVisible && panel.figure.isConnected) this.draw(panel);
    this.drawFrontier();
  }

  draw(panel) {
    const { axis, log, low, high } = this.state;
    const chart = { title: panel.name, curves: this.curvesOf(panel.name), markers: this.state.marks ? this.markers(panel.name) : [], axis, log, low, high, zoom: (from, to) => this.zoom(from, to) };
    panel.view.draw(chart);
    if (panel.numbers) this.showNumbers(panel);
  }

  curvesOf(name) {
    const curves = [];
    for (const run of this.state.shown()) {
      const details = this.details.get(run.id);
      if (!details) continue;
      for (const kind of kindsOf(details, name)) {
        const found = this.loaded.get(run.id)?.curves[`${kind}/${name}`];
        if (!found) continue;
        const label = [run.name, KIND_NAMES[kind]].filter(Boolean).join(", ");
        const look = { label, color: color(run.color), dash: kind === "validation" ? [2, 3] : dash(run.color), dots: kind === "validation" };
        const isSmooth = found.smooth_x && kind !== "validation";
        curves.push({ ...look, x: found.x, y: found.y, faint: isSmooth });
        if (isSmooth) curves.push({ ...look, x: found.smooth_x, y: found.smooth_y });
      }
    }
    return curves;
  }

  /** The markers of the runs that have this metric. */
  markers(name) {
    const runs = this.state.shown().filter((run) => kindsOf(this.details.get(run.id) ?? { names: {} }, name).length);
    return runs.flatMap((run) => (this.details.get(run.id)?.markers ?? []).map((mark) => ({ ...mark, run: run.name, color: color(run.color) })));
  }

  drawFrontier() {
    const runs = this.state.shown().map((run) => ({ run, found: this.details.get(run.id)?.frontier })).filter(({ found }) => found?.points.length > 1);
    this.frontier?.remove();
    if (!runs.length || !this.host.firstChild) return;
    const picture = frontierSvg(runs.map(({ run, found }) => ({ label: run.name, color: color(run.color), points: found.points, best: found.best_of_n })), look());
    const source = runs.every(({ found }) => found.source === "validation") ? "Policy and best of n answer the same validation prompts." : "Without validation, a point is measured on the training prompts of its iteration.";
    const tool = h("button", { type: "button", on: { click: () => saveSvg("reward_over_kl", picture) } }, "SVG");
    this.frontier = h("figure", { class: "card" }, h("figcaption", {}, h("h3", {}, "Reward over KL"), h("span", { class: "tools" }, tool)), picture, h("p", { class: "muted" }, source));
    this.host.querySelector(".grid")?.append(this.frontier);
  }

  toggleNumbers(panel) {
    if (panel.numbers) {
      panel.numbers.remove();
      panel.numbers = null;
    } else this.showNumbers(panel);
  }

  showNumbers(panel) {
    const table = numbersTable(panel.view.chart);
    panel.numbers?.replaceWith(table);
    if (!panel.numbers) panel.figure.append(table);
    panel.numbers = table;
  }

  savePng(panel) {
    if (panel.view.plot) panel.view.canvas().toBlob((blob) => save(`${fileName(panel.name)}.png`, blob), "image/png");
  }

  saveSvg(panel) {
    if (!panel.view.plot) return;
    saveSvg(panel.name, curvesSvg({ ...look(), title: panel.name, axis: this.state.axis, log: this.state.log, curves: panel.view.chart.curves, width: 900, height: 420 }));
  }
}

function saveSvg(name, element) {
  save(`${fileName(name)}.svg`, new Blob([new XMLSerializer().serializeToString(element)], { type: "image/svg+xml" }));
}

function look() {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return { text: style("--text"), grid: style("--grid"), background: style("--card") };
}

function kindsOf(details, name) {
  return Object.keys(details.names).filter((kind) => details.names[kind].includes(name));
}

/** Metrics in groups: those of known groups in their order, then all others, then speed and progress. */
export function grouped(names) {
  const left = new Set(names);
  const take = ([title, patterns]) => {
    const found = patterns.flatMap((pattern) => [...left].filter((name) => (typeof pattern === "string" ? name === pattern : pattern.test(name))).filter((name) => left.delete(name)));
    return [title, found];
  };
  const first = GROUPS.map(take);
  const last = LAST_GROUPS.map(take);
  return [...first, ["More", [...left].sort()], ...last].filter(([, found]) => found.length);
}
