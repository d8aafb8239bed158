// The end of the log, and what the model answered.

function render({ model, el }) {
  const root = tag("div", "lab-journal", el);
  const columns = tag("div", "lab-columns", root), left = tag("div", "", columns), right = tag("div", "", columns);
  const file = tag("div", "lab-caption", left), log = tag("pre", "", left);
  const caption = tag("div", "lab-caption", right), samples = tag("div", "lab-samples", right);

  function drawLog() {
    const { name, lines } = model.get("tail"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    file.textContent = name ? `End of ${name}` : "Log";
    log.textContent = lines?.length ? lines.join("\n") : model.get("waiting");
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
  function drawSamples() {
    samples.replaceChildren();
    const rows = model.get("samples");
    right.style.display = rows.length ? "" : "none";
    columns.classList.toggle("lab-two", rows.length > 0);
    caption.textContent = "Newest answers";
    for (const row of rows) {
      const card = tag("article", "", samples), head = tag("div", "lab-soft", card);
      head.textContent = row.head;
      tag("div", "lab-prompt", card, row.prompt);
      tag("div", "lab-answer", card, row.completion);
    }
  }
  const parts = { tail: drawLog, waiting: drawLog, samples: drawSamples };
  for (const [name, draw] of Object.entries(parts)) {
    draw();
    model.on(`change:${name}`, draw);
  }
  requestAnimationFrame(() => { log.scrollTop = log.scrollHeight; });
  return () => { for (const [name, draw] of Object.entries(parts)) model.off(`change:${name}`, draw); };
}

export default { render };
