"""card.md: the sheet as Markdown that reads well as plain text, in a repository or a review."""

from __future__ import annotations

from lab_utils.runs.card._parts import Part, Sheet, Table, columns_of


def markdown(sheet: Sheet) -> str:
    head = [f"# {sheet.title}", "", sheet.lead, "", _table(Table(("", ""), list(sheet.headline)))]
    return "\n".join([*head, *(line for part in sheet.parts for line in _part(part))]) + "\n"


def _part(part: Part) -> list[str]:
    lines = ["", f"## {part.title}"]
    lines += ["", *(f"- {label}: {_inline(value)}" for label, value in part.lines)] if part.lines else []
    for table in part.tables:
        if table.folded:
            lines += ["", f"<details><summary>{table.folded}</summary>", "", _table(table), "", "</details>"]
        else:
            lines += ["", _table(table)]
    if part.commands:
        lines += ["", "```bash", *part.commands, "```"]
    if part.source:
        lines += [
            "",
            "<details><summary>recipe.yaml</summary>",
            "",
            "```yaml",
            part.source.rstrip(),
            "```",
            "",
            "</details>",
        ]
    return lines


def _table(table: Table) -> str:
    head = "| " + " | ".join(title for title, _ in columns_of(table)) + " |"
    rule = "|" + "|".join("--:" if right else "---" for _, right in columns_of(table)) + "|"
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join([head, rule, *rows])


def _cell(value: str) -> str:
    return _inline(value).replace("|", "\\|")


def _inline(value: str) -> str:
    """One line, whatever a name or a message holds."""
    return " ".join(value.split())
