// Numbers, times and sizes as short text; colors of runs.

const LIGHT = ["#1d6fb8", "#c2410c", "#15803d", "#b91c1c", "#7e22ce", "#854d0e", "#be185d", "#4d7c0f", "#0e7490", "#4338ca", "#525252", "#9a3412"];
const DARK = ["#60a5fa", "#fb923c", "#4ade80", "#f87171", "#c084fc", "#d6b370", "#f472b6", "#a3e635", "#22d3ee", "#a5b4fc", "#d4d4d4", "#facc15"];

/** @returns {boolean} */
export function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

/** The color of a run, by its number; the second dozen is dashed. @param {number} number */
export function color(number) {
  return (isDark() ? DARK : LIGHT)[number % LIGHT.length];
}

/** @param {number} number @returns {number[] | undefined} */
export function dash(number) {
  return number >= LIGHT.length ? [8, 4] : undefined;
}

/** A number with four significant digits. @param {unknown} value */
export function number(value) {
  if (typeof value === "string") return value;
  if (typeof value !== "number") return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(3).replace(/\.?0+e/, "e");
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** A duration. @param {number | null | undefined} seconds */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

/** Bytes. @param {number | null | undefined} value */
export function bytes(value) {
  if (!value) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (value >= 1024 && index < units.length - 1) [value, index] = [value / 1024, index + 1];
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${units[index]}`;
}

/** How long ago. @param {number | null | undefined} time seconds since 1970 */
export function ago(time) {
  return time ? `${duration(Math.max(0, Date.now() / 1000 - time))} ago` : "";
}

/** A date and time. @param {number | null | undefined} time seconds since 1970 */
export function when(time) {
  return time ? new Date(time * 1000).toLocaleString() : "";
}

/** A value of the axis. @param {number} value @param {string} axis */
export function onAxis(value, axis) {
  if (axis === "time") return duration(value);
  return value >= 1e6 ? `${Number((value / 1e6).toPrecision(4))}M` : number(value);
}
