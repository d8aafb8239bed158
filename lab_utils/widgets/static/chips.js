// Chips as a heat strip: a row a node, the worst first; every node as one cell of a map. Eight bytes a chip, nodes in
// the order of `nodes`: use, memory and temperature (255: not said), health (a number in `healths`), power, index.

const CELL = 16, TALL = 15, GAP = 1, MAP = 11, NONE = 255, TREND = 24;
const SHOWN = [8, 32, 1e6];
const USE = [[0, [200, 76, 52]], [40, [233, 185, 92]], [75, [120, 170, 214]], [100, [38, 96, 196]]];

export function useColor(value) {
  if (value === null) return "none";
  const i = Math.max(1, USE.findIndex(([at]) => value <= at)), [low, a] = USE[i - 1], [high, b] = USE[i] ?? USE[3];
  const part = high > low ? (value - low) / (high - low) : 1;
  return `rgb(${a.map((from, k) => Math.round(from + part * (b[k] - from))).join(" ")})`;
}

export const memoryColor = (value) =>
  value === null ? "none" : value >= 97 ? "rgb(200 76 52)" : `rgb(128 86 184 / ${(0.1 + 0.009 * value).toFixed(2)})`;

export function decode(view, nodes, healths) {
  const said = (value, none = NONE) => (value === none ? null : value);
  let at = 0;
  return nodes.map((node) => ({ ...node, list: Array.from({ length: node.chips }, () => {
    const chip = { use: said(view.getUint8(at)), memory: said(view.getUint8(at + 1)), temp: said(view.getUint8(at + 2)),
      health: healths[view.getUint8(at + 3)], power: said(view.getUint16(at + 4, true), 65535),
      index: view.getUint16(at + 6, true), bad: node.bad.includes(view.getUint8(at + 3)) };
    at += 8;
    return chip;
  }) }));
}

const known = (list, key) => list.map((chip) => chip[key]).filter((value) => value !== null);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const span = (values, unit) => {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low === high ? `${low}${unit}` : `${low} to ${high}${unit}`;
};
const ago = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400
  ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

function words(chips) {
  const [use, memory, temp] = ["use", "memory", "temp"].map((key) => known(chips, key)), parts = [];
  if (use.length) parts.push(`use ${span(use, " %")}`);
  if (memory.length) parts.push(`memory ${span(memory, " %")}`);
  if (temp.length) parts.push(`${Math.max(...temp)} °C`);
  return parts.join(" · ");
}

function render({ model, el }) {
  const root = tag("div", "lab-chips", el), bar = tag("div", "lab-tools", root);
  const title = tag("b", "", bar, "Chips"), summary = tag("span", "lab-soft", bar), keys = tag("span", "lab-legend", bar);
  const rows = tag("div", "lab-rows", root), rest = tag("div", "lab-soft lab-rest", root);
  const map = make("svg", { class: "lab-map" }, root), tip = tag("div", "lab-tip", root);
  const pinned = new Set();
  let limit = 0, frame = 0, nodes = [];

  function legend() {
    keys.replaceChildren();
    const scale = (name, color) => {
      const svg = make("svg", { width: 84, height: 10 }, keys);
      for (let i = 0; i < 12; i++) make("rect", { x: 7 * i, width: 7, height: 10, fill: color((100 * i) / 11) }, svg);
      svg.before(`${name} 0 `);
      svg.after(" 100 % ");
    };
    scale("use", useColor);
    scale("memory", memoryColor);
  }

  function strip(parent, node, key, color) {
    const size = Math.max(4, Math.min(CELL, Math.floor(260 / Math.max(node.list.length, 1))));
    const svg = make("svg", { width: node.list.length * size, height: TALL, opacity: node.silent ? 0.35 : 1 }, parent);
    node.list.forEach((chip, i) => make("rect", { x: i * size, width: size - GAP, height: TALL,
      class: chip.bad && key === "use" ? "lab-sick" : "lab-cell", fill: color(chip[key]), "data-node": node.number,
      "data-chip": i }, svg));
  }

  function trend(parent, node) {
    const svg = make("svg", { width: 72, height: TALL }, parent), values = node.trend.filter((v) => v !== NONE);
    if (values.length > 1)
      make("polyline", { class: "lab-trend", points: values.map((v, i) =>
        `${(72 * (i + TREND - values.length)) / (TREND - 1)},${(TALL - 1 - (TALL - 2) * (v / 100)).toFixed(1)}`).join(" ") }, svg);
  }

  function row(node) {
    const line = tag("div", "lab-row", rows);
    tag("span", "lab-name", line, model.get("nodes").length > 1 ? `node ${node.number}` : "");
    strip(line, node, "use", useColor);
    if (known(node.list, "memory").length) strip(line, node, "memory", memoryColor);
    trend(line, node);
    const sick = node.list.filter((chip) => chip.bad).map((chip) => `chip ${chip.index}: ${chip.health}`);
    if (node.silent) tag("span", "lab-bad", line, `silent for ${ago(node.age)}`);
    if (sick.length) tag("span", "lab-bad", line, sick.slice(0, 2).join(", ") + (sick.length > 2 ? ` and ${sick.length - 2} more` : ""));
    tag("span", "lab-soft", line, words(node.list));
  }

  function draw() {
    frame = 0;
    const view = model.get("cells"), trends = model.get("trends");
    nodes = decode(view, model.get("nodes"), model.get("healths"));
    nodes.forEach((node, i) => {
      node.trend = Array.from({ length: TREND }, (_, k) => trends.getUint8(i * TREND + k));
    });
    rows.replaceChildren();
    map.replaceChildren();
    rest.replaceChildren();
    const chips = nodes.flatMap((node) => node.list);
    keys.style.display = chips.length ? "" : "none";
    title.textContent = chips.length ? `${chips.length.toLocaleString("en")} chips` : "Chips";
    if (!chips.length) {
      summary.textContent = model.get("waiting");
      map.style.display = "none";
      return;
    }
    const use = known(chips, "use"), sick = chips.filter((chip) => chip.bad).length;
    const silent = nodes.filter((node) => node.silent).length;
    summary.textContent = [model.get("product"), nodes.length > 1 ? `${nodes.length} nodes` : "",
      use.length ? `mean use ${mean(use).toFixed(0)} %` : "", sick ? `${sick} in bad health` : "",
      silent ? `${silent} ${silent > 1 ? "nodes" : "node"} silent` : ""].filter(Boolean).join(" · ");
    const chosen = nodes.filter((node, i) => i < SHOWN[limit] || pinned.has(node.number));
    chosen.forEach(row);
    const others = nodes.filter((node) => !chosen.includes(node));
    if (nodes.length > SHOWN[0]) {
      rest.append(others.length ? `worst first; ${others.length} other nodes: ${words(others.flatMap((n) => n.list))} ` : "worst first ");
      const next = (limit + 1) % SHOWN.length, button = tag("button", "", rest,
        SHOWN[next] > 1e5 ? "show all" : `show ${SHOWN[next]}`);
      button.onclick = () => { limit = next; schedule(); };
    }
    map.style.display = nodes.length > 1 ? "" : "none";
    const most = Math.max(8, Math.floor((root.clientWidth || 800) / MAP));
    const across = Math.ceil(nodes.length / Math.ceil(nodes.length / most));
    const byNumber = [...nodes].sort((a, b) => a.number - b.number);
    map.setAttribute("height", Math.ceil(nodes.length / across) * MAP);
    byNumber.forEach((node, i) => {
      const used = known(node.list, "use"), sick = node.silent || node.list.some((chip) => chip.bad);
      make("rect", { x: (i % across) * MAP, y: Math.floor(i / across) * MAP, width: MAP - 1, height: MAP - 1,
        class: sick ? "lab-sick" : "lab-cell", opacity: node.silent ? 0.35 : 1,
        fill: useColor(used.length ? mean(used) : null), "data-node": node.number }, map);
    });
  }

  function explain(event) {
    const { node: number, chip: index } = event.target.dataset ?? {};
    const node = nodes.find((each) => String(each.number) === number);
    tip.style.display = node ? "block" : "none";
    if (!node) return;
    tip.replaceChildren();
    const chip = node.list[index], lines = chip
      ? [`node ${node.number}, chip ${chip.index}`, words([chip]),
        [chip.power === null ? "" : `${chip.power} W`, chip.health ? `health: ${chip.health}` : ""].filter(Boolean).join(" · ")]
      : [`node ${node.number}, ${node.list.length} chips`, words(node.list), "press to keep it above"];
    lines.push(`read ${ago(node.age)} ago`);
    for (const line of lines.filter(Boolean)) tag("div", "", tip, line);
    const box = root.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
  }

  const schedule = () => { frame ||= requestAnimationFrame(draw); };
  root.addEventListener("pointermove", explain);
  root.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  map.addEventListener("click", (event) => {
    const number = Number(event.target.dataset.node);
    if (Number.isNaN(number)) return;
    if (!pinned.delete(number)) pinned.add(number);
    schedule();
  });
  model.on("change", schedule);
  const resized = new ResizeObserver(schedule);
  resized.observe(root);
  legend();
  draw();
  return () => { model.off("change", schedule); resized.disconnect(); cancelAnimationFrame(frame); };
}

export default { render };
