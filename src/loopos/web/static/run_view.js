// One run in full: how it goes, notes and tags, stop and resume, its events, and its numbers as files.
import { h, announce, message, setText } from "./dom.js";
import { address, read, write } from "./api.js";
import { bytes, duration, number, when } from "./format.js";

export class RunView {
  /** @param {HTMLElement} view @param {any} state */
  constructor(view, state) {
    Object.assign(this, { view, state, id: "" });
  }

  async show() {
    const run = this.state.runs.get(this.state.open) ?? this.state.shown()[0];
    if (!run) {
      this.id = "";
      return message(this.view, "Choose a run in the list.");
    }
    this.id = run.id;
    this.build(run);
    return this.update();
  }

  build(run) {
    this.facts = h("dl", { class: "facts" });
    this.events = h("div", {});
    this.printed = h("div", {});
    this.result = h("p", { role: "status" });
    this.note = h("textarea", { maxlength: 20000 }, run.note);
    this.tags = h("input", { type: "text", autocomplete: "off", value: run.tags.join(", ") });
    this.stop = h("button", { type: "button", on: { click: () => this.act("stop", "Stop this run after its step, with a checkpoint?", "stopping after the current step") } }, "Stop");
    this.resume = h("button", { type: "button", on: { click: () => this.act("resume", "Start a process that resumes this run?", "started") } }, "Resume");
    this.files = h("p", {});
    const form = h("form", { on: { submit: (event) => this.save(event) } },
      h("p", {}, h("label", {}, "Note ", this.note)), h("p", {}, h("label", {}, "Tags, with commas between ", this.tags)), h("button", { type: "submit" }, "Save note and tags"));
    this.view.replaceChildren(
      h("div", { class: "panel" }, h("h2", {}, run.name), this.facts, h("div", { class: "bar" }, this.stop, this.resume), this.result, this.files),
      h("div", { class: "panel" }, h("h2", {}, "Note"), form), this.printed, this.events);
  }

  async update() {
    const run = this.state.runs.get(this.id);
    if (!run) return this.show();
    let found;
    try {
      found = await read(`/api/board/run/${this.id}`);
    } catch (error) {
      setText(this.result, error.message);
      return undefined;
    }
    const facts = {
      state: found.status, ended: found.ended, outcome: found.verdict, exported: found.exported, problem: found.problem,
      folder: found.folder, method: found.method, steps: `${found.step}${found.total_steps ? ` of ${found.total_steps}` : ""}`,
      "time left": duration(found.eta_seconds), "seconds per step": number(found.seconds_per_step), host: found.host, memory: bytes(found.memory), began: when(found.began),
    };
    this.facts.replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    this.stop.disabled = found.state !== "running" || !found.is_local;
    this.resume.disabled = found.state === "running" || found.process?.is_active === true;
    this.files.replaceChildren("Numbers as CSV: ", ...Object.keys(found.names).flatMap((kind) => [h("a", { href: address(`/api/board/run/${this.id}/csv`, { kind }), download: "" }, kind), " "]));
    this.showEvents(found);
    this.showPrinted(found.process);
    return undefined;
  }

  showEvents(found) {
    const sessions = found.sessions.map((each) => h("tr", {}, h("td", {}, when(each.time)), h("td", {}, `step ${each.step}`), h("td", {}, each.resumed ? "resumed" : "began"), h("td", {}, [each.machine?.host, each.machine?.device, each.precision, ...(each.rows ?? [])].filter(Boolean).join(", "))));
    const marks = found.markers.filter((each) => each.kind !== "checkpoint" && each.kind !== "resume").map((each) => h("tr", {}, h("td", {}, each.kind), h("td", {}, `step ${each.step}`), h("td", { colspan: 2 }, each.text)));
    const changed = Object.entries(found.changed).map(([key, values]) => h("tr", {}, h("td", {}, "changed"), h("td", {}, key), h("td", { colspan: 2 }, values.map(([step, value]) => `from step ${step}: ${JSON.stringify(value)}`).join(", "))));
    this.events.replaceChildren(h("div", { class: "panel" }, h("h2", {}, "What happened"), h("table", {}, h("tbody", {}, ...sessions, ...marks, ...changed))));
  }

  showPrinted(process) {
    if (!process) return this.printed.replaceChildren();
    const state = process.is_active ? "running" : `ended with status ${process.status}`;
    return this.printed.replaceChildren(h("div", { class: "panel" }, h("h2", {}, `The resumed process: ${state}`), h("pre", {}, process.printed)));
  }

  async save(event) {
    event.preventDefault();
    const tags = this.tags.value.split(",").map((tag) => tag.trim()).filter(Boolean);
    await this.send("note", { note: this.note.value, tags }, "saved");
  }

  async act(what, question, done) {
    if (window.confirm(question)) await this.send(what, {}, done);
  }

  async send(what, content, done) {
    try {
      await write(`/api/board/run/${this.id}/${what}`, content);
      setText(this.result, done);
      this.result.className = "good";
    } catch (error) {
      setText(this.result, error.message);
      this.result.className = "bad";
    }
    announce(this.result.textContent);
    await this.update();
  }
}
