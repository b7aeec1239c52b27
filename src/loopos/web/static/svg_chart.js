// Charts as SVG: the export of a chart of curves, and reward over KL.
import { svg } from "./dom.js";
import { number, onAxis } from "./format.js";

/** @typedef {{label: string, color: string, dash?: number[], x: number[], y: number[], faint?: boolean}} Curve */

const BOX = { left: 70, right: 16, top: 34, bottom: 44 };

/** Round numbers between two ends. @param {number} low @param {number} high @param {number} count */
export function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? 10 * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function ends(values) {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low === high) return [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
  return [low - (high - low) * 0.03, high + (high - low) * 0.03];
}

/** A frame with axes. `place` gives the position of a point. */
function frame(picture, xs, ys) {
  const { width, height, log } = picture;
  const scaled = log ? (y) => Math.log10(y) : (y) => y;
  const [left, right] = ends(xs);
  const [low, high] = ends(ys.filter((y) => !log || y > 0).map(scaled));
  const place = (x, y) => [
    BOX.left + ((x - left) / (right - left)) * (width - BOX.left - BOX.right),
    height - BOX.bottom - ((scaled(y) - low) / (high - low)) * (height - BOX.top - BOX.bottom),
  ];
  const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, "font-family": "system-ui, sans-serif", "font-size": 12, role: "img", "aria-label": picture.title });
  root.append(svg("rect", { width, height, fill: picture.background }), svg("text", { x: BOX.left, y: 20, fill: picture.text, "font-size": 14 }, picture.title));
  for (const x of ticks(left, right)) {
    const [at] = place(x, log ? 1 : 0);
    root.append(svg("line", { x1: at, x2: at, y1: BOX.top, y2: height - BOX.bottom, stroke: picture.grid }));
    root.append(svg("text", { x: at, y: height - BOX.bottom + 16, "text-anchor": "middle", fill: picture.text }, onAxis(x, picture.axis)));
  }
  for (const mark of ticks(low, high)) {
    const y = log ? 10 ** mark : mark;
    const [, at] = place(left, y);
    root.append(svg("line", { x1: BOX.left, x2: width - BOX.right, y1: at, y2: at, stroke: picture.grid }));
    root.append(svg("text", { x: BOX.left - 6, y: at + 4, "text-anchor": "end", fill: picture.text }, number(y)));
  }
  root.append(svg("text", { x: (width + BOX.left) / 2, y: height - 8, "text-anchor": "middle", fill: picture.text }, picture.axisTitle ?? picture.axis));
  return { root, place };
}

/** Curves as an SVG with a legend. @param {{title: string, axis: string, log: boolean, curves: Curve[], width: number, height: number, text: string, grid: string, background: string}} picture */
export function curvesSvg(picture) {
  const curves = picture.curves.filter((curve) => curve.x.length);
  const listed = curves.filter((curve) => !curve.faint);
  const { root, place } = frame(picture, curves.flatMap((curve) => curve.x), curves.flatMap((curve) => curve.y));
  for (const curve of curves) {
    const points = curve.x.map((x, index) => [x, curve.y[index]]).filter(([, y]) => !picture.log || y > 0);
    const path = points.map(([x, y]) => place(x, y).map((each) => each.toFixed(1)).join(",")).join(" ");
    root.append(svg("polyline", { points: path, fill: "none", stroke: curve.color, "stroke-width": curve.faint ? 1 : 1.8, "stroke-opacity": curve.faint ? 0.35 : 1, ...(curve.dash ? { "stroke-dasharray": curve.dash.join(" ") } : {}) }));
  }
  const height = picture.height + 18 * listed.length;
  root.setAttribute("viewBox", `0 0 ${picture.width} ${height}`);
  root.firstChild.setAttribute("height", String(height));
  listed.forEach((curve, index) => {
    const y = picture.height + 12 + 18 * index;
    root.append(svg("rect", { x: BOX.left, y: y - 6, width: 18, height: 4, fill: curve.color }), svg("text", { x: BOX.left + 26, y, fill: picture.text }, curve.label));
  });
  return root;
}

/** Reward over KL: each run's policy in order, and best of n. @param {{label: string, color: string, points: {step: number, kl: number, reward: number}[], best: {n: number, kl: number, reward: number}[]}[]} runs */
export function frontierSvg(runs, look) {
  const every = runs.flatMap((run) => [...run.points, ...run.best]);
  const picture = { ...look, width: 640, height: 360, title: "Reward over KL", axis: "KL", axisTitle: "KL to the reference, nats per response", log: false };
  const { root, place } = frame(picture, every.map((each) => each.kl), every.map((each) => each.reward));
  root.classList.add("frontier");
  for (const run of runs) {
    const path = run.points.map((each) => place(each.kl, each.reward).join(",")).join(" ");
    root.append(svg("polyline", { points: path, fill: "none", stroke: run.color, "stroke-width": 1.8 }));
    for (const each of run.points) {
      const [cx, cy] = place(each.kl, each.reward);
      root.append(svg("circle", { cx, cy, r: 3.5, fill: run.color }, svg("title", {}, `${run.label}, step ${each.step}: KL ${number(each.kl)}, reward ${number(each.reward)}`)));
    }
    for (const each of run.best) {
      const [x, y] = place(each.kl, each.reward);
      root.append(svg("path", { d: `M${x} ${y - 6}l6 6l-6 6l-6 -6z`, fill: "none", stroke: run.color, "stroke-width": 1.8 }, svg("title", {}, `${run.label}, best of ${each.n}: reward ${number(each.reward)}`)));
      root.append(svg("text", { x: x + 8, y: y - 4, fill: look.text, "font-size": 11 }, `best of ${each.n}`));
    }
  }
  return root;
}
