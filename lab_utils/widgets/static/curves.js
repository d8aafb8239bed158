// Curves of runs as SVG. The kernel keeps at most a few hundred points a metric and sends only the pieces that changed:
// little-endian float32 [bucket][key][mean, smallest, largest], NaN where nothing was logged.

const COLORS = ["#2f6fde", "#e4572e", "#3aa17e", "#9a6fc0", "#c9a227", "#6b7f93", "#d16ba5", "#7a5c3e"];
const MARGIN = { left: 50, right: 12, top: 8, bottom: 22 };
const FEW = 60; // so many points are drawn as dots too, where each of them counts

export function label(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e12 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return `${+(value / (unit === 1e4 ? 1e3 : unit)).toPrecision(4)}${letter}`;
  return String(+value.toPrecision(4));
}

export function ticks(low, high, count) {
  if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.floor(low / size + 1e-9); i <= Math.ceil(high / size - 1e-9); i++)
    found.push(+(i * size).toPrecision(12));
  return found;
}

export function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
  const factors = high < 6 * low ? [1, 1.5, 2, 3, 4, 5, 7] : last - first <= 2 ? [1, 2, 5] : [1];
  for (let power = first; power <= last; power++)
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
    }
  return found.length >= 2 ? found : [low, high];
}

// Exponential smoothing without the pull towards zero at the start.
export function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// The points of a metric: mean, range and steps of each bucket that has any.
export function points(pieces, buffers, table, keys, key) {
  const column = keys.indexOf(key), found = { x: [], y: [], low: [], high: [], from: [], to: [] };
  if (column < 0) return found;
  pieces.forEach(([owner, , count], slot) => {
    const buffer = buffers[slot];
    if (owner !== table || !buffer) return;
    for (let i = 0; i < count; i++) {
      const at = (i * keys.length + column) * 3, step = i * keys.length * 3;
      if (Number.isNaN(buffer[at])) continue;
      found.x.push(buffer[step]); found.from.push(buffer[step + 1]); found.to.push(buffer[step + 2]);
      found.y.push(buffer[at]); found.low.push(buffer[at + 1]); found.high.push(buffer[at + 2]);
    }
  });
  return found;
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}

class Panel {
  constructor(spec, parent, onHover) {
    this.spec = spec;
    this.figure = tag("figure", spec.wide ? "lab-wide" : "", parent);
    const head = tag("figcaption", "", this.figure);
    tag("b", "", head, spec.title);
    tag("span", "lab-unit", head, spec.unit);
    this.now = tag("div", "lab-now", this.figure);
    this.svg = make("svg", { role: "img", "aria-label": spec.title }, this.figure);
    this.tip = tag("div", "lab-tip", this.figure);
    this.svg.addEventListener("pointermove", (event) => onHover(this, this.stepAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => onHover(null, null));
  }

  stepAt(pixel) {
    const { x0, x1, width } = this.scale ?? {};
    return width ? x0 + ((pixel - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (x1 - x0) : null;
  }

  // All lines of all tables, scaled; stacked where the panel is an area.
  collect(state) {
    const { spec } = this, several = state.tables.length > 1;
    this.lines = [];
    state.tables.forEach((table, number) => {
      const base = spec.kind === "area" ? new Map() : null;
      spec.lines.forEach((line, place) => {
        const found = points(state.pieces, state.buffers, number, state.keys, line.key);
        if (!found.x.length) return;
        for (const part of ["y", "low", "high"]) found[part] = found[part].map((v) => v * spec.scale);
        const color = COLORS[(several ? number : place) % COLORS.length];
        const name = several ? (spec.lines.length > 1 ? `${table.label} · ${line.label}` : table.label) : line.label;
        if (base) {
          found.base = found.x.map((x) => base.get(x) ?? 0);
          found.top = found.y.map((y, i) => found.base[i] + y);
          found.x.forEach((x, i) => base.set(x, found.top[i]));
        }
        const smooth = state.smoothing > 0 && found.x.length > 40 && !line.dots && !base && spec.kind !== "exact";
        found.shown = smooth ? smoothed(found.y, state.smoothing) : found.y;
        this.lines.push({ ...found, color, name, smooth, dots: line.dots, dashed: several && place > 0, run: several,
          label: line.label });
      });
    });
    // A part that never took any time is no part.
    if (spec.kind === "area") {
      const used = this.lines.filter((line) => line.y.some((y) => y > 0));
      if (used.length) this.lines = used;
    }
  }

  draw(state) {
    this.collect(state);
    const { svg, spec, lines } = this;
    const width = this.figure.clientWidth || 320, height = spec.wide ? 220 : 160;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    this.cross = null;
    if (!lines.length) {
      this.scale = null;
      this.now.textContent = "";
      const words = (spec.note || state.waiting).split("\n");
      words.forEach((text, i) => make("text", { class: "lab-wait", x: width / 2,
        y: height / 2 + (i - (words.length - 1) / 2) * 16, "text-anchor": "middle" }, svg, text));
      return;
    }
    const all = lines.flatMap((l) => (l.base ? l.top : [...l.shown, ...(l.smooth ? [] : l.y)]));
    const raw = lines.flatMap((l) => (l.base ? l.top : l.y));
    const log = spec.kind === "log" && Math.min(...raw) > 0 && Math.max(...raw) > 2 * Math.min(...raw);
    let low = Math.min(...raw), high = Math.max(...raw, ...all);
    if (!log && low >= 0) low = 0;
    if (!log && high === 0 && low === 0) high = 1;
    const rows = log ? logTicks(low, high) : ticks(low, high, height > 200 ? 5 : 4);
    [low, high] = [Math.min(low, rows[0]), Math.max(high, rows[rows.length - 1])];
    const x0 = Math.min(...lines.map((l) => l.from[0])), last = Math.max(...lines.map((l) => l.to[l.to.length - 1]));
    const x1 = last > x0 ? last : x0 + 1;
    const X = (x) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * (x - x0)) / (x1 - x0);
    const part = log ? (y) => Math.log(Math.max(y, low) / low) / Math.log(high / low) : (y) => (y - low) / (high - low);
    const Y = (y) => MARGIN.top + (height - MARGIN.top - MARGIN.bottom) * (1 - Math.min(Math.max(part(y), 0), 1));
    this.scale = { x0, x1, width, height, X, Y };
    for (const row of rows) {
      const y = Y(row);
      make("line", { class: "lab-rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }, svg);
      make("text", { class: "lab-tick", x: MARGIN.left - 6, y: y + 3.5, "text-anchor": "end" }, svg, label(row));
    }
    const columns = ticks(x0, x1, Math.max(3, Math.floor(width / 80))).filter((t) => t >= x0 && t <= x1 && t % 1 === 0);
    for (const column of columns)
      if (X(column) < width - 46) make("text", { class: "lab-tick", x: X(column), y: height - 7,
        "text-anchor": "middle" }, svg, column >= 1e6 ? label(column) : column.toLocaleString("en"));
    make("text", { class: "lab-tick", x: width - MARGIN.right, y: height - 7, "text-anchor": "end" }, svg, "step");
    for (const line of lines) this.trace(line, X, Y);
    this.head(null);
  }

  trace(line, X, Y) {
    const { svg } = this, way = (ys) => line.x.map((x, i) => `${X(x).toFixed(1)},${Y(ys[i]).toFixed(1)}`).join(" ");
    const band = (top, bottom) => `${way(top)} ${way(bottom).split(" ").reverse().join(" ")}`;
    if (line.base) {
      make("polygon", { points: band(line.top, line.base), fill: line.color, "fill-opacity": 0.75 }, svg);
      return;
    }
    if (!line.dots && line.to.some((to, i) => to > line.from[i]))
      make("polygon", { points: band(line.high, line.low), fill: line.color, "fill-opacity": 0.13 }, svg);
    const style = { fill: "none", stroke: line.color, "stroke-linejoin": "round" };
    if (line.smooth) make("polyline", { ...style, points: way(line.y), "stroke-opacity": 0.35 }, svg);
    make("polyline", { ...style, points: way(line.shown), "stroke-width": 1.8,
      "stroke-dasharray": line.dashed ? "5 3" : "none" }, svg);
    if ((line.dots && line.x.length <= FEW) || line.x.length === 1)
      line.x.forEach((x, i) => make("circle", { cx: X(x), cy: Y(line.y[i]), r: 2.6, fill: line.color }, svg));
  }

  // The newest values beside the title, or those at a step.
  head(step) {
    this.now.replaceChildren();
    for (const line of this.lines.filter((each) => !each.dashed)) {
      const at = step === null ? line.x.length - 1 : nearest(line.x, step);
      const item = tag("span", "lab-key", this.now);
      if (this.lines.length > 1) tag("i", "", item).style.background = line.color;
      const value = label(line.shown === line.y || step === null ? line.y[at] : line.shown[at]);
      item.append(this.lines.length > 1 && !line.run ? `${line.name} ${value}` : value);
    }
    const dashed = this.lines.find((line) => line.dashed);
    if (dashed) tag("span", "lab-unit", this.now, `${this.spec.lines[0].label}; dashed: ${dashed.label}`);
  }

  hover(step, here) {
    if (!this.lines) return; // folded away
    this.cross?.remove();
    this.tip.style.display = "none";
    if (!this.scale) return;
    const inside = step !== null && step >= this.scale.x0 && step <= this.scale.x1;
    this.head(inside ? step : null);
    if (!inside) return;
    const { X, width, height } = this.scale, longest = this.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    const at = nearest(longest.x, step), x = X(longest.x[at]);
    this.cross = make("line", { class: "lab-cross", x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom }, this.svg);
    if (!here) return;
    this.tip.replaceChildren();
    const [from, to] = [longest.from[at], longest.to[at]].map((n) => n.toLocaleString("en"));
    tag("div", "lab-soft", this.tip, from === to ? `step ${from}` : `steps ${from} to ${to}`);
    for (const line of this.lines) {
      const i = nearest(line.x, longest.x[at]), row = tag("div", "", this.tip);
      tag("i", "", row).style.background = line.color;
      const range = line.to[i] > line.from[i] ? ` (${label(line.low[i])} to ${label(line.high[i])})` : "";
      const smooth = line.smooth ? `, smoothed ${label(line.shown[i])}` : "";
      row.append(`${line.name}  ${label(line.y[i])}${range}${smooth}`);
    }
    this.tip.style.display = "block";
    this.tip.style.left = x < width / 2 ? `${x + 12}px` : "auto";
    this.tip.style.right = x < width / 2 ? "auto" : `${width - x + 12}px`;
  }
}

function render({ model, el }) {
  const root = tag("div", "lab-curves", el), bar = tag("div", "lab-tools", root), grid = tag("div", "lab-panels", root);
  const more = tag("details", "", root), count = tag("summary", "lab-soft", more), folded = tag("div", "lab-panels", more);
  const slider = tag("input", "", null), shown = tag("output", "", null), buffers = [], views = [];
  Object.assign(slider, { type: "range", min: 0, max: 0.98, step: 0.02 });
  slider.setAttribute("aria-label", "smoothing");
  const runs = tag("span", "lab-runs-key", bar);
  bar.append("smoothing", slider, shown);
  let panels = [], spec = "", frame = 0, smoothing = model.get("smoothing");

  const state = () => ({ tables: model.get("tables"), keys: model.get("columns"), pieces: model.get("pieces"), buffers,
    waiting: model.get("waiting"), smoothing });
  function draw() {
    frame = 0;
    const wanted = JSON.stringify(model.get("panels"));
    if (wanted !== spec) {
      spec = wanted;
      grid.replaceChildren();
      folded.replaceChildren();
      panels = model.get("panels").map((each) => new Panel(each, each.more ? folded : grid, hover));
      more.style.display = folded.children.length ? "" : "none";
      count.textContent = `${folded.children.length} more curves`;
    }
    model.get("pieces").forEach((_, slot) => {
      const view = model.get(`piece${slot}`);
      if (view !== views[slot]) {
        views[slot] = view;
        const end = view.byteOffset + view.byteLength;
        buffers[slot] = new Float32Array(view.buffer.slice(view.byteOffset, end));
      }
    });
    shown.textContent = smoothing.toFixed(2);
    slider.value = smoothing;
    const now = state();
    runs.replaceChildren();
    if (now.tables.length > 1)
      now.tables.forEach((table, i) => {
        const key = tag("span", "lab-key", runs);
        tag("i", "", key).style.background = COLORS[i % COLORS.length];
        key.append(table.label);
      });
    for (const panel of panels) if (!panel.spec.more || more.open) panel.draw(now);
  }
  const schedule = () => { frame ||= requestAnimationFrame(draw); };
  const hover = (panel, step) => { for (const each of panels) each.hover(step, each === panel); };
  const follow = () => { smoothing = model.get("smoothing"); schedule(); };
  slider.addEventListener("input", () => { smoothing = Number(slider.value); schedule(); });
  slider.addEventListener("change", () => { model.set("smoothing", smoothing); model.save_changes(); });
  more.addEventListener("toggle", schedule);
  model.on("change:smoothing", follow);
  model.on("change", schedule);
  const resized = new ResizeObserver(schedule);
  resized.observe(grid);
  watched(model, 1);
  draw();
  return () => {
    model.off("change:smoothing", follow);
    model.off("change", schedule);
    resized.disconnect();
    cancelAnimationFrame(frame);
    watched(model, -1);
  };
}

// Tells the kernel how many places show this, so that nobody works for a view that was cleared away.
function watched(model, change) {
  model.set("watched", Math.max(model.get("watched"), 0) + change);
  model.save_changes();
}

export default { render };
