// The table of runs: sorted by a click on a head, chosen by clicks on rows (Shift: a stretch). Rows come as they should
// be read; `sort` holds what a column is ordered by.

function render({ model, el }) {
  const root = tag("div", "lab-runs", el), table = tag("table", "", root), empty = tag("div", "lab-soft", root);
  let last = null;

  function ordered() {
    const [column, down] = model.get("order"), rows = [...model.get("rows")];
    const value = (row) => row.sort[column];
    const compare = (a, b) => (a === null) - (b === null) || (a < b ? -1 : a > b ? 1 : 0) * (a === null || !down ? 1 : -1);
    return rows.sort((a, b) => compare(value(a), value(b)));
  }

  function choose(rows, index, event) {
    const chosen = new Set(model.get("chosen")), name = rows[index].name;
    if (event.shiftKey && last !== null) {
      const from = rows.findIndex((row) => row.name === last);
      rows.slice(Math.min(from, index), Math.max(from, index) + 1).forEach((row) => chosen.add(row.name));
    } else if (chosen.has(name)) chosen.delete(name);
    else chosen.add(name);
    last = name;
    model.set("chosen", rows.map((row) => row.name).filter((each) => chosen.has(each)));
    model.save_changes();
  }

  function draw() {
    const rows = ordered(), [column, down] = model.get("order"), chosen = new Set(model.get("chosen"));
    table.replaceChildren();
    empty.textContent = rows.length ? "" : model.get("waiting");
    if (!rows.length) return;
    const head = tag("tr", "", tag("thead", "", table));
    tag("th", "", head);
    model.get("columns").forEach(({ title, right }, i) => {
      const cell = tag("th", right ? "lab-right" : "", head, title + (i === column ? (down ? " ▾" : " ▴") : ""));
      cell.onclick = () => {
        model.set("order", [i, i === column ? !down : !!right]);
        model.save_changes();
      };
    });
    const body = tag("tbody", "", table);
    rows.forEach((row, index) => {
      const line = tag("tr", chosen.has(row.name) ? "lab-chosen" : "", body);
      const mark = tag("input", "", tag("td", "", line));
      mark.type = "checkbox";
      mark.checked = chosen.has(row.name);
      mark.setAttribute("aria-label", row.name);
      row.cells.forEach((text, i) => {
        const { right, kind } = model.get("columns")[i], cell = tag("td", right ? "lab-right" : "", line);
        if (kind === "state") tag("span", `lab-state lab-${text}`, cell, text);
        else if (kind === "tags") text.split(" ").filter(Boolean).forEach((each) => tag("span", "lab-tag", cell, each));
        else cell.textContent = text;
      });
      line.title = row.about;
      line.onclick = (event) => choose(rows, index, event);
      line.onmousedown = (event) => event.shiftKey && event.preventDefault();
    });
  }

  const names = ["rows", "columns", "order", "chosen", "waiting"];
  for (const name of names) model.on(`change:${name}`, draw);
  watched(model, 1);
  draw();
  return () => {
    for (const name of names) model.off(`change:${name}`, draw);
    watched(model, -1);
  };
}

// Tells the kernel how many places show this, so that nobody reads the folder for a table that was cleared away.
function watched(model, change) {
  model.set("watched", Math.max(model.get("watched"), 0) + change);
  model.save_changes();
}

export default { render };
