/** An adapter's report, base beside adapter, and its loss curve. A report is somebody's file: nothing of it is trusted. */

import { el, svg } from "./dom.js";

const METRICS = { perplexity: "Perplexity", eos_rate: "EOS rate", format_rate: "Format rate" };
const MORE = {
  ...METRICS, style_rate: "Taken for the voice", mean_tokens: "Mean tokens", distinct_2: "Distinct pairs",
  overlap_rate: "Eight words copied", copy_rate: "Copies",
};
const PROMPTS = { test: "Held-out texts", heldout_authors: "Unseen authors" };
const NOT_A_NUMBER = "–";

const number = (value) => (typeof value === "object" && value !== null ? number(value.value) : Number.isFinite(value) ? value : null);
const list = (value) => (Array.isArray(value) ? value : []);

function shown(metric, value) {
  if (value === null) return NOT_A_NUMBER;
  if (metric.endsWith("_rate")) return `${(100 * value).toFixed(value === 0 || value === 1 ? 0 : 1)} %`;
  return value >= 100 ? value.toFixed(0) : value < 1 ? value.toFixed(2) : value.toFixed(1);
}

function cell(metric, row, side, most) {
  const value = number(row[side]);
  const bar = el("i", { class: `amount ${side}` });
  bar.style.inlineSize = `${Math.max(0, Math.min(100, (100 * (value ?? 0)) / most))}%`;
  const { low, high } = row[side] ?? {};
  const range = Number.isFinite(low) && Number.isFinite(high) ? `${shown(metric, low)} to ${shown(metric, high)}` : null;
  return el("td", { title: range }, shown(metric, value), el("span", { class: "track", "aria-hidden": true }, bar));
}

/** `more`: the rows that are not for the first look. */
function table(report, prompts, more) {
  const plain = (row) => (row.metric in METRICS || row.metric === "style_rate") && row.form !== "bare";
  const own = (row) => row?.prompts === prompts && row.metric in MORE && plain(row) !== more;
  const body = list(report.rows).filter(own).map((row) => {
    const [base, adapter] = [number(row.base) ?? 0, number(row.adapter) ?? 0];
    const most = row.metric.endsWith("_rate") ? 1 : Math.max(base, adapter, 1e-9);
    const form = row.form === "bare" ? el("small", {}, " bare prompt") : "";
    const meaning = report.metrics?.[row.metric];
    const head = el("th", { scope: "row", title: typeof meaning === "string" ? meaning : null }, MORE[row.metric], form);
    return el("tr", {}, head, cell(row.metric, row, "base", most), cell(row.metric, row, "adapter", most));
  });
  const titles = [PROMPTS[prompts] ?? prompts, "Base", "Adapter"];
  const head = el("tr", {}, ...titles.map((title) => el("th", { scope: "col" }, title)));
  return body.length ? el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)) : null;
}

/** Round values between `low` and `high`, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** The validation loss over the training steps; null if there are fewer than two points. */
export function curve(points) {
  const path = list(points).filter((p) => Array.isArray(p) && Number.isFinite(p[0]) && Number.isFinite(p[1]));
  if (path.length < 2) return null;
  const [width, height, left, right, top, bottom] = [320, 140, 34, 12, 12, 24];
  const steps = path.map(([step]) => step);
  const losses = path.map(([, loss]) => loss);
  const [first, last, low, high] = [Math.min(...steps), Math.max(...steps), Math.min(...losses), Math.max(...losses)];
  const [above, below] = [0.08, 0.24].map((share) => share * (high - low || 1)); // the lowest has its label below
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - right);
  const y = (loss) => top + ((high + above - loss) / (high - low + above + below)) * (height - top - bottom);
  const at = ([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`;
  const best = path[losses.indexOf(low)];
  const end = path[path.length - 1];
  const label = `Validation loss: ${path[0][1].toFixed(2)} at step ${path[0][0]}, lowest ${low.toFixed(2)} at step ${best[0]}, ${end[1].toFixed(2)} at the end, step ${end[0]}`;
  const parts = [svg("title", {}, label)];
  for (const loss of ticks(low - below, high + above, 3)) {
    parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(loss), y2: y(loss) }));
    parts.push(svg("text", { x: left - 6, y: y(loss) + 3.5, "text-anchor": "end" }, String(loss)));
  }
  for (const step of ticks(first, last, 4)) {
    parts.push(svg("text", { x: x(step), y: height - 8, "text-anchor": "middle" }, String(step)));
  }
  parts.push(svg("polyline", { class: "line", points: path.map(at).join(" ") }));
  parts.push(...path.map(([step, loss]) => svg("circle", { class: "point", cx: x(step), cy: y(loss), r: 1.8 })));
  parts.push(svg("circle", { class: "best", cx: x(best[0]), cy: y(best[1]), r: 4 }));
  const aside = x(best[0]) > width - 70 ? "end" : "start";
  const beside = x(best[0]) + (aside === "end" ? 4 : -4);
  parts.push(svg("text", { class: "best-label", x: beside, y: y(best[1]) + 15, "text-anchor": aside }, `lowest ${low.toFixed(2)}`));
  return svg("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);
}

/** A prompt of the kind that the adapter was trained for, or null. */
export function ownPrompt(report) {
  const prompt = list(report?.samples).find((sample) => typeof sample?.prompt === "string")?.prompt;
  return prompt && prompt.length < 80 ? prompt : null;
}

/** The report as elements. */
export function reportView(record) {
  const report = record.report;
  if (typeof report !== "object" || report === null) return [el("p", { class: "note" }, "It came without a report.")];
  const kinds = [...new Set(list(report.rows).map((row) => row?.prompts))].filter((kind) => typeof kind === "string");
  kinds.sort((a, b) => (a === "test" ? -1 : b === "test" ? 1 : a < b ? -1 : 1));
  const tables = (more) => kinds.map((kind) => table(report, kind, more)).filter(Boolean);
  const drawn = curve(report.training?.valid_loss);
  const template = report.config?.template;
  const facts = [
    ["Trained on", typeof template === "string" ? el("code", {}, template) : null],
    ["Rank, alpha", record.rank ? `${record.rank}, ${record.alpha ?? NOT_A_NUMBER}` : null],
    ["On", list(record.targets).filter((target) => typeof target === "string").join(", ") || null],
    ["Digest", record.digest ? el("code", { class: "digest" }, record.digest) : null],
  ].filter(([, value]) => value !== null);
  const more = tables(true);
  return [
    ...tables(false),
    drawn && el("figure", {}, el("figcaption", {}, "Validation loss over training steps"), drawn),
    el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    more.length ? el("details", {}, el("summary", {}, "More figures"), ...more) : null,
  ].filter(Boolean);
}
