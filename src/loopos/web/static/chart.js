// One chart of curves on a canvas, by uPlot: crosshair shared with all charts, zoom, markers, keys, numbers as text.
import { h, announce, setText } from "./dom.js";
import { number, onAxis } from "./format.js";

/**
 * @typedef {{label: string, color: string, dash?: number[], x: number[], y: number[], faint?: boolean, dots?: boolean}} Curve
 * @typedef {{kind: string, x: number, text: string, run: string, color: string}} Marker
 * @typedef {{title: string, curves: Curve[], markers: Marker[], log: boolean, axis: string, low: number | null,
 *   high: number | null, zoom: (low: number | null, high: number | null) => void}} Chart
 */

/** Letters of the markers, drawn at their lines and explained above the charts. */
export const MARKS = { resume: "R", "non-finite": "!", alert: "A", note: "N", checkpoint: "·", best: "B" };

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A chart in an element, which it fills. */
export class ChartView {
  /** @param {HTMLElement} element @param {HTMLElement} legend a list */
  constructor(element, legend) {
    this.element = element;
    this.legend = legend;
    this.values = [];
    /** @type {any} */ this.plot = null;
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-roledescription", "chart");
    element.setAttribute("aria-label", "Not loaded yet");
    element.addEventListener("keydown", (event) => this.keys(event));
    new ResizeObserver(() => this.resize()).observe(element);
  }

  /** @param {Chart} chart */
  draw(chart) {
    const kept = this.plot?.cursor?.left ?? -10;
    this.chart = chart;
    this.plot?.destroy();
    this.element.replaceChildren();
    const shown = chart.curves.filter((curve) => curve.x.length);
    this.shown = shown;
    this.element.setAttribute("aria-label", describe(chart));
    this.fillLegend(chart.curves);
    if (!shown.length) {
      this.plot = null;
      this.element.append(h("p", { class: "muted" }, "No numbers yet."));
      return;
    }
    const positive = (value) => (chart.log && value <= 0 ? null : value);
    const data = window.uPlot.join(shown.map((curve) => [curve.x, curve.y.map(positive)]));
    this.plot = new window.uPlot(this.options(chart, shown), data, this.element);
    if (kept > 0) this.plot.setCursor({ left: kept, top: 10 }, true, false);
  }

  options(chart, shown) {
    const axis = { stroke: style("--muted"), grid: { stroke: style("--grid"), width: 1 }, ticks: { stroke: style("--line") } };
    const fixed = chart.low !== null && chart.high !== null;
    return {
      width: Math.max(60, this.element.clientWidth),
      height: Math.max(60, this.element.clientHeight),
      legend: { show: false },
      cursor: {
        sync: { key: "board" },
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        bind: { dblclick: () => () => chart.zoom(null, null) },
      },
      scales: {
        x: { time: false, ...(fixed ? { range: [chart.low, chart.high] } : {}) },
        y: chart.log ? { distr: 3 } : {},
      },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((tick) => onAxis(tick, chart.axis)) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) },
      ],
      series: [
        {},
        ...shown.map((curve) => ({
          stroke: curve.faint ? `${curve.color}55` : curve.color,
          width: curve.faint ? 1 : 2,
          dash: curve.dash,
          spanGaps: true,
          points: { show: curve.dots || curve.x.length < 3, size: 6 },
        })),
      ],
      hooks: {
        draw: [(plot) => drawMarkers(plot, chart.markers)],
        setCursor: [(plot) => this.showValues(plot)],
        setSelect: [
          (plot) => {
            if (plot.select.width < 4) return;
            const [low, high] = [plot.select.left, plot.select.left + plot.select.width].map((left) => plot.posToVal(left, "x"));
            plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
            chart.zoom(low, high);
          },
        ],
      },
    };
  }

  fillLegend(curves) {
    const listed = curves.filter((curve) => !curve.faint);
    this.values = listed.map(() => h("span", { class: "number" }));
    this.listed = listed;
    this.legend.replaceChildren(
      ...listed.map((curve, index) => {
        const swatch = h("span", { class: curve.dash ? "swatch dashed" : "swatch" });
        swatch.style.borderTopColor = curve.color;
        return h("li", {}, swatch, h("span", { class: "name", title: curve.label }, curve.label), this.values[index]);
      }),
    );
    this.showValues(null);
  }

  /** The values at the crosshair, or the last ones. */
  showValues(plot) {
    const x = plot && plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null;
    this.listed.forEach((curve, index) => {
      const found = x === null ? curve.y.length - 1 : nearest(curve.x, x);
      setText(this.values[index], found < 0 ? "" : `${number(curve.y[found])}${x === null ? "" : ` at ${onAxis(curve.x[found], this.chart.axis)}`}`);
    });
  }

  resize() {
    if (this.plot && this.element.clientWidth > 60) {
      this.plot.setSize({ width: this.element.clientWidth, height: this.element.clientHeight });
    }
  }

  keys(event) {
    if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const xs = this.plot.data[0];
    const { min, max } = this.plot.scales.x;
    const now = this.plot.cursor.left >= 0 ? this.plot.posToVal(this.plot.cursor.left, "x") : max;
    const index = nearest(xs, now);
    const stride = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: index - stride, ArrowRight: index + stride, Home: 0, End: xs.length - 1 };
    if (event.key in moves) this.moveTo(xs[Math.min(xs.length - 1, Math.max(0, moves[event.key]))]);
    else if (event.key === "+" || event.key === "=") this.chart.zoom(now - (max - min) / 4, now + (max - min) / 4);
    else if (event.key === "-") this.chart.zoom(min - (max - min) / 2, max + (max - min) / 2);
    else if (event.key === "0" || event.key === "Escape") this.chart.zoom(null, null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  moveTo(x) {
    this.plot.setCursor({ left: this.plot.valToPos(x, "x"), top: 10 }, true, true);
    const values = this.listed.map((curve, index) => `${curve.label} ${this.values[index].textContent}`);
    announce(`${this.chart.axis} ${onAxis(x, this.chart.axis)}: ${values.join(", ")}`);
  }

  /** The picture with title and legend, as a canvas. */
  canvas() {
    const source = this.plot.ctx.canvas;
    const scale = window.devicePixelRatio || 1;
    const line = 18 * scale;
    const made = document.createElement("canvas");
    made.width = source.width;
    made.height = source.height + line * (1.5 + this.listed.length);
    const context = made.getContext("2d");
    context.fillStyle = style("--card");
    context.fillRect(0, 0, made.width, made.height);
    context.font = `${13 * scale}px system-ui, sans-serif`;
    context.fillStyle = style("--text");
    context.fillText(this.chart.title, 8 * scale, line);
    context.drawImage(source, 0, line * 1.3);
    this.listed.forEach((curve, index) => {
      const y = source.height + line * (2 + index);
      context.fillStyle = curve.color;
      context.fillRect(8 * scale, y - 5 * scale, 18 * scale, 4 * scale);
      context.fillStyle = style("--text");
      context.fillText(curve.label, 32 * scale, y);
    });
    return made;
  }
}

/** @param {number[]} xs growing @param {number} x */
export function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function drawMarkers(plot, markers) {
  const { left, top, width, height } = plot.bbox;
  const { min, max } = plot.scales.x;
  const scale = window.devicePixelRatio || 1;
  plot.ctx.save();
  plot.ctx.font = `bold ${11 * scale}px system-ui, sans-serif`;
  for (const mark of markers) {
    if (mark.x < min || mark.x > max) continue;
    const x = left + ((mark.x - min) / (max - min || 1)) * width;
    plot.ctx.strokeStyle = plot.ctx.fillStyle = mark.kind === "non-finite" || mark.kind === "alert" ? style("--bad") : mark.color;
    plot.ctx.lineWidth = scale;
    plot.ctx.setLineDash(mark.kind === "checkpoint" ? [] : [3 * scale, 3 * scale]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, mark.kind === "checkpoint" ? top + height - 6 * scale : top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
    if (mark.kind !== "checkpoint") plot.ctx.fillText(MARKS[mark.kind] ?? "?", x + 2 * scale, top + 10 * scale);
  }
  plot.ctx.restore();
}

function describe(chart) {
  const lines = chart.curves.filter((curve) => !curve.faint && curve.y.length).map((curve) => {
    const low = curve.y.reduce((a, b) => Math.min(a, b));
    const high = curve.y.reduce((a, b) => Math.max(a, b));
    return `${curve.label}: last ${number(curve.y[curve.y.length - 1])}, from ${number(low)} to ${number(high)}`;
  });
  return `${chart.title} by ${chart.axis}. ${lines.join("; ") || "no numbers"}. Arrow keys move the crosshair, plus and minus zoom.`;
}

/** The numbers of a chart as a table. @param {Chart} chart */
export function numbersTable(chart) {
  const rows = chart.curves.filter((curve) => !curve.faint).flatMap((curve) => curve.x.map((x, index) => [curve.label, x, curve.y[index]]));
  const body = rows.slice(0, 2000).map(([label, x, y]) => h("tr", {}, h("td", {}, label), h("td", { class: "number" }, onAxis(x, chart.axis)), h("td", { class: "number" }, number(y))));
  const head = h("tr", {}, h("th", { scope: "col" }, "curve"), h("th", { scope: "col", class: "number" }, chart.axis), h("th", { scope: "col", class: "number" }, chart.title));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Numbers of ${chart.title}` }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...body)));
}

