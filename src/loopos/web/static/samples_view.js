// Answers of a run by prompt, their steps side by side.
import { h, message } from "./dom.js";
import { read } from "./api.js";
import { number } from "./format.js";

const PAGE = 20;

export class SamplesView {
  /** @param {HTMLElement} view @param {any} state */
  constructor(view, state) {
    Object.assign(this, { view, state, offset: 0, key: "" });
  }

  show() {
    const runs = this.state.shown();
    if (!runs.length) return message(this.view, "Choose a run in the list.");
    const open = runs.find((run) => run.id === this.state.open);
    const chosen = open?.answers?.length ? open : (runs.find((run) => run.answers?.length) ?? open ?? runs[0]);
    const file = chosen.answers?.[0] ?? "samples";
    const options = (values, now) => values.map(([value, text]) => h("option", { value, selected: value === now }, text));
    const again = () => {
      this.offset = 0;
      this.load();
    };
    const input = (type, label, width) => h("input", { type, step: "any", "aria-label": label, placeholder: label, on: { change: again } });
    this.run = h("select", { "aria-label": "Run", on: { change: again } }, ...options(runs.map((run) => [run.id, run.name]), chosen.id));
    this.file = h("select", { "aria-label": "Answers", on: { change: again } }, ...options([["samples", "validation prompts"], ["rollouts", "training prompts"]], file));
    this.low = input("number", "reward from");
    this.high = input("number", "reward to");
    this.text = input("search", "contains");
    this.steps = h("select", { multiple: true, size: 3, "aria-label": "Steps, several with Ctrl", on: { change: again } });
    this.rows = h("div", { class: "samples", "aria-live": "polite" });
    this.view.replaceChildren(
      h("form", { class: "bar", on: { submit: (event) => event.preventDefault() } }, this.run, this.file, this.low, this.high, this.text, h("label", {}, "Steps ", this.steps)),
      this.rows,
    );
    return this.load();
  }

  update() {
    const version = this.state.runs.get(this.run?.value)?.version;
    if (version !== this.version) this.load();
  }

  async load() {
    this.version = this.state.runs.get(this.run.value)?.version;
    const step = [...this.steps.selectedOptions].map((option) => option.value);
    const query = { file: this.file.value, low: this.low.value, high: this.high.value, text: this.text.value, step, offset: this.offset, limit: PAGE };
    let found;
    try {
      found = await read(`/api/board/run/${this.run.value}/samples`, query);
    } catch (error) {
      return message(this.rows, error.message, "bad");
    }
    const all = found.all_steps.join(",");
    if (this.key !== `${this.run.value} ${this.file.value} ${all}`) {
      this.key = `${this.run.value} ${this.file.value} ${all}`;
      this.steps.replaceChildren(...found.all_steps.map((each) => h("option", { value: each, selected: found.steps.includes(each) }, each)));
    }
    if (!found.num_rows) return message(this.rows, found.all_steps.length ? "No answer passes the filter." : "This run has stored no such answers.");
    const more = (text, offset, isThere) => h("button", { type: "button", disabled: !isThere, on: { click: () => { this.offset = offset; this.load(); } } }, text);
    const pages = h("div", { class: "bar" },
      more("Previous", this.offset - PAGE, this.offset > 0),
      more("Next", this.offset + PAGE, this.offset + PAGE < found.num_rows),
      h("span", { class: "muted" }, `${this.offset + 1} to ${Math.min(this.offset + PAGE, found.num_rows)} of ${found.num_rows} prompts`));
    this.rows.replaceChildren(pages, ...found.rows.map((row) => rowOf(row, found.steps)));
    return undefined;
  }
}

function rowOf(row, steps) {
  const columns = steps.map((step) => {
    const answers = (row.answers[step] ?? []).map((each) => h("div", {}, h("pre", {}, each.text), h("p", { class: "muted" }, about(each))));
    return h("div", { class: "answer" }, h("h3", {}, `step ${step}`), ...(answers.length ? answers : [h("p", { class: "muted" }, "none")]));
  });
  const expected = row.expected && h("p", {}, h("span", { class: "muted" }, "expected "), h("span", {}, row.expected));
  return h("article", { class: "card" }, h("pre", {}, row.prompt), expected, h("div", { class: "answers" }, ...columns));
}

function about(each) {
  const parts = Object.entries(each.parts).map(([name, value]) => `${name} ${number(value)}`);
  const reward = each.reward === null ? [] : [`reward ${number(each.reward)}`];
  return [...reward, ...parts, each.finish_reason === "length" ? "cut at the limit" : each.finish_reason].filter(Boolean).join(" · ");
}
