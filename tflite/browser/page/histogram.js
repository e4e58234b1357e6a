// Latencies as a small SVG histogram: bars, the median as a line, and minimum, median and maximum in milliseconds.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320;
const HEIGHT = 96;
const BASE = 78; // the bars' foot; labels below
const BINS = 24;

export function summarize(seconds) {
  const sorted = [...seconds].sort((a, b) => a - b);
  const at = (share) => {
    const position = share * (sorted.length - 1);
    const low = Math.floor(position);
    return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (position - low);
  };
  return { min: sorted[0], median: at(0.5), p90: at(0.9), max: sorted[sorted.length - 1] };
}

export function milliseconds(seconds) {
  const value = seconds * 1000;
  return value >= 100
    ? value.toFixed(0)
    : value >= 10
      ? value.toFixed(1)
      : value >= 1
        ? value.toFixed(2)
        : value.toFixed(3);
}

// Replaces the content of `svg`. Bars end at the 98th percentile, so that one slow run does not squeeze the others.
export function drawHistogram(svg, seconds) {
  const { min, median } = summarize(seconds);
  const sorted = [...seconds].sort((a, b) => a - b);
  const top = sorted[Math.floor(0.98 * (sorted.length - 1))];
  const span = top > min ? top - min : min * 0.1 || 1e-6;
  const counts = new Array(BINS).fill(0);
  let beyond = 0;
  for (const value of sorted) {
    if (value > min + span) beyond++;
    else counts[Math.min(BINS - 1, Math.floor(((value - min) / span) * BINS))]++;
  }
  const highest = Math.max(...counts);
  const step = WIDTH / BINS;
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Histogram of ${seconds.length} latencies, median ${milliseconds(median)} ms`);
  svg.replaceChildren();
  counts.forEach((count, bin) => {
    const height = count ? Math.max(2, ((BASE - 8) * count) / highest) : 0;
    add(svg, "rect", { class: "bar", x: bin * step + 0.75, y: BASE - height, width: step - 1.5, height, rx: 1 });
  });
  const x = Math.min(WIDTH - 1, (WIDTH * (median - min)) / span);
  add(svg, "line", { class: "axis", x1: 0, x2: WIDTH, y1: BASE, y2: BASE });
  add(svg, "line", { class: "median", x1: x, x2: x, y1: 2, y2: BASE });
  add(svg, "text", { x: 0, y: HEIGHT - 3, "text-anchor": "start" }, milliseconds(min));
  const right = milliseconds(min + span) + " ms" + (beyond ? `, ${beyond} beyond` : "");
  add(svg, "text", { x: WIDTH, y: HEIGHT - 3, "text-anchor": "end" }, right);
}

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  parent.append(element);
}
