// The board: the list of runs, what of it is shown, and the tabs. Its state is in the address, so a reload keeps it.
import { at, isTyping, setText } from "./dom.js";
import { follow } from "./api.js";
import { RunsTable } from "./runs_table.js";
import { CurvesView } from "./curves_view.js";
import { SamplesView } from "./samples_view.js";
import { SettingsView } from "./settings_view.js";
import { RunView } from "./run_view.js";

const TABS = ["curves", "samples", "settings", "run"];
const MOST_SHOWN = 24;

/** What is shown: the runs by id, those chosen, the run in detail, and the options of the curves. */
export class State {
  constructor() {
    /** @type {Map<string, any>} */ this.runs = new Map();
    const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
    this.chosen = new Set((query.get("runs") ?? "").split(",").filter(Boolean));
    this.hasChosen = query.has("runs");
    this.open = query.get("run") ?? "";
    this.tab = TABS.includes(query.get("tab")) ? query.get("tab") : "curves";
    this.axis = ["step", "tokens", "time"].includes(query.get("axis")) ? query.get("axis") : "step";
    this.window = Number(query.get("mean")) || 1;
    this.log = query.get("log") === "1";
    this.marks = query.get("marks") !== "0";
    this.find = query.get("find") ?? "";
    /** @type {number | null} */ this.low = null;
    /** @type {number | null} */ this.high = null;
  }

  /** Writes the state to the address, without a new entry in the history. */
  keep() {
    const query = new URLSearchParams({ runs: [...this.chosen].join(","), tab: this.tab, axis: this.axis, mean: String(this.window) });
    if (this.open) query.set("run", this.open);
    if (this.log) query.set("log", "1");
    if (!this.marks) query.set("marks", "0");
    if (this.find) query.set("find", this.find);
    history.replaceState(null, "", `#board?${query}`);
  }

  /** The chosen runs that exist, oldest first. */
  shown() {
    return [...this.chosen].map((id) => this.runs.get(id)).filter(Boolean).sort((a, b) => (a.began ?? 0) - (b.began ?? 0));
  }
}

/** @param {HTMLElement} section */
export async function start(section) {
  const state = new State();
  const views = {
    curves: new CurvesView(state),
    samples: new SamplesView(at("view-samples"), state),
    settings: new SettingsView(at("view-settings"), state),
    run: new RunView(at("view-run"), state),
  };
  const change = (what) => {
    state.keep();
    table.refresh();
    if (what === "choice" || what === "tab") views[state.tab].show();
  };
  const choose = (id, isChosen) => {
    if (isChosen && state.chosen.size < MOST_SHOWN) state.chosen.add(id);
    else state.chosen.delete(id);
    if (isChosen || state.open === id) state.open = isChosen ? id : (state.shown()[0]?.id ?? "");
    change("choice");
  };
  const open = (id) => {
    state.open = id;
    state.chosen.add(id);
    select("run", false);
  };
  const table = new RunsTable(state, choose, open);
  const select = (tab, focuses) => {
    state.tab = tab;
    for (const each of TABS) {
      const button = at(`tab-${each}`);
      button.setAttribute("aria-selected", String(each === tab));
      button.tabIndex = each === tab ? 0 : -1;
      at(`view-${each}`).hidden = each !== tab;
      if (each === tab && focuses) button.focus();
    }
    change("tab");
  };
  startTabs(select);
  document.addEventListener("keydown", (event) => keys(event, section, select));
  select(state.tab, false);
  const receive = ({ runs, gone }) => {
    const before = state.open && state.runs.get(state.open);
    for (const id of gone) state.runs.delete(id);
    for (const run of runs) state.runs.set(run.id, run);
    if (!state.hasChosen && state.runs.size) chooseFirst(state);
    table.refresh();
    const ids = new Set([...gone, ...runs.map((run) => run.id)]);
    if ([...state.chosen].some((id) => ids.has(id)) || before !== state.runs.get(state.open)) views[state.tab].update();
  };
  const lost = { open: "", lost: "Connection lost; trying again", refused: "No access: open the link that loopos ui printed" };
  follow("/api/board/stream", receive, (now) => {
    setText(at("connection"), lost[now]);
    at("connection").className = now === "open" ? "" : "bad";
  });
}

/** Without a choice in the address: what runs now, or the newest run. */
function chooseFirst(state) {
  state.hasChosen = true;
  const newest = [...state.runs.values()].sort((a, b) => (b.last_event ?? 0) - (a.last_event ?? 0));
  const running = newest.filter((run) => run.state === "running").slice(0, 10);
  for (const run of running.length ? running : newest.slice(0, 1)) state.chosen.add(run.id);
  state.open ||= state.shown()[0]?.id ?? "";
  state.keep();
}

function startTabs(select) {
  for (const [index, tab] of TABS.entries()) {
    at(`tab-${tab}`).addEventListener("click", () => select(tab, false));
    at(`tab-${tab}`).addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: TABS.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      select(TABS[(moves[event.key] + TABS.length) % TABS.length], true);
    });
  }
}

function keys(event, section, select) {
  if (section.hidden || isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") at("run-filter").focus();
  else if (["1", "2", "3", "4"].includes(event.key)) select(TABS[Number(event.key) - 1], true);
  else return;
  event.preventDefault();
}
