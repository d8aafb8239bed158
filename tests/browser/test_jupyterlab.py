"""A researcher's afternoon in a real JupyterLab: form, launch, watch, stop, restart, resume, compare.

The steps share one browser and one server, and stand in one test: each goes on where the one before ended.
"""

from __future__ import annotations

import re

import nbformat
import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
FAST = 90_000
OUTPUT = ".jp-OutputArea-output"


def command(page: Page, menu: str, item: str) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile(f"^{item}")).first.click()


def field(page: Page, key: str):
    """The input of a dotted key of the form."""
    row = f".lab-grid > .widget-html:has(span.lab-label[title='{key}']) + *"
    return page.locator(row).first.locator("input, select, textarea").first


def type_into(page: Page, key: str, text: str) -> None:
    field(page, key).fill(text)
    field(page, key).press("Tab")


def button(page: Page, name: str):
    return page.locator(f"{OUTPUT} button.jupyter-button", has_text=re.compile(rf"^\s*{name}…?\s*$")).last


def state(page: Page, word: str, timeout: int) -> None:
    expect(page.locator(".lab-live .widget-html-content").first).to_contain_text(word, timeout=timeout)


def curve(page: Page) -> str:
    """What the first panel draws."""
    return page.evaluate(
        "[...document.querySelectorAll('.lab-curves figure:first-of-type :is(path, polyline)')]"
        ".map((p) => p.getAttribute('d') || p.getAttribute('points')).join('|')"
    )


def opened(page: Page, address: str) -> None:
    """A notebook with its kernel at hand; JupyterLab may ask which kernel it should be."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook-cell")
    expect(page.get_by_text("| Idle").first).to_be_visible()
    page.wait_for_timeout(1000)


def run_notebook(lab, page: Page, name: str, code: str) -> None:
    """A notebook of one cell, opened and run: what somebody types who comes back."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, lab.folder / "notebooks" / name)
    opened(page, lab.address(name))
    command(page, "Run", "Run All Cells")


def pick(page: Page, recipe: str) -> None:
    """A recipe of the form's list."""
    select = page.locator(".lab-picker select")
    label = select.locator("option", has_text=recipe).first.inner_text()
    select.select_option(label=label)


def test_from_the_form_to_a_comparison(lab, screen):
    expect.set_options(timeout=FAST)
    page = screen.page
    page.add_locator_handler(
        page.locator(".jp-Dialog", has_text="Select Kernel"),
        lambda dialog: dialog.locator("button", has_text=re.compile("^Select$")).click(),
    )
    opened(page, lab.address("10_sft.ipynb"))

    # Run everything: the form is there, and the cells after it wait for Launch, quietly.
    command(page, "Run", "Run All Cells")
    page.wait_for_selector(".lab-form .lab-grid input")
    expect(page.locator(OUTPUT, has_text="Press Launch above").first).to_be_visible()
    expect(page.locator(".lab-form").first).to_contain_text("It fits")
    page.locator(".lab-form").first.scroll_into_view_if_needed()
    screen.shot("1-form")

    # Another recipe from the picker, and back.
    search = page.get_by_placeholder("Search recipes")
    search.fill("pre-training")
    # The list tells the kernel a place and no name: it must be the shorter one by then.
    expect(page.locator(".lab-picker option", has_text="grpo_tiny")).to_have_count(0)
    pick(page, "pretrain_tiny")
    expect(field(page, "data.train")).to_have_value(re.compile("ascent-tasks-text"))
    search.fill("")
    pick(page, "sft_tiny")
    expect(field(page, "data.train")).to_have_value(re.compile("ascent-tasks-sft"))

    # A mistake is told where it is made, and Launch waits.
    type_into(page, "schedule.steps", "many")
    expect(page.locator(".lab-form .lab-message").first).to_be_visible()
    expect(button(page, "Launch")).to_be_disabled()
    screen.shot("2-mistake")
    type_into(page, "schedule.steps", "40")
    type_into(page, "schedule.batch_tokens", "2048")
    expect(button(page, "Launch")).to_be_enabled()

    # What would run, and what differs from the named recipe.
    page.locator(".lab-form .lm-TabBar-tab", has_text="Script").click()
    expect(page.locator(".lab-script")).to_contain_text("torch.distributed.run")
    screen.shot("3-script")
    page.locator(".lab-form .lm-TabBar-tab", has_text="Changes").click()
    expect(page.locator(".lab-form .lab-page").nth(3)).to_contain_text("schedule.steps")

    # Launch: the live view appears, and the loss curve moves.
    button(page, "Launch").click()
    page.wait_for_selector(".lab-live")
    state(page, "running", 240_000)
    page.wait_for_function(
        "document.querySelectorAll('.lab-curves figure path, .lab-curves figure polyline').length > 0"
    )
    expect(button(page, "Stop after a checkpoint")).to_be_enabled()
    before = curve(page)
    page.wait_for_timeout(4000)
    assert curve(page) != before, "the loss curve moves"
    page.locator(".lab-live").first.scroll_into_view_if_needed()
    screen.shot("4-live")

    # Stop after a checkpoint; the kernel dies, the run is found again, and goes on to its end.
    button(page, "Stop after a checkpoint").click()
    state(page, "stopped", 240_000)
    screen.shot("5-stopped")
    command(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog button", has_text="Restart").click()
    page.wait_for_timeout(3000)
    run_notebook(lab, page, "again.ipynb", "from lab_utils import LiveView, attach\nLiveView(attach('last'))")
    expect(button(page, "Resume")).to_be_enabled(timeout=240_000)
    button(page, "Resume").click()
    expect(page.locator(".lab-live").last).to_contain_text("succeeded", timeout=480_000)
    page.locator(".lab-live").last.scroll_into_view_if_needed()
    screen.shot("6-resumed")

    # A fork beside it, and both compared in the table of runs.
    changes = {"optim.lr": 5e-4, "schedule.steps": 12, "schedule.warmup_steps": 2}
    code = f"from lab_utils import attach, launch\nlaunch(attach('last').fork({changes})).wait()\n'forked'"
    run_notebook(lab, page, "forked.ipynb", code)
    expect(page.locator(OUTPUT, has_text="'forked'").last).to_be_visible(timeout=480_000)
    opened(page, lab.address("50_runs.ipynb"))
    command(page, "Run", "Run All Cells")
    rows = page.locator(".lab-runs tbody tr")
    expect(rows).to_have_count(2)
    rows.nth(0).click()
    rows.nth(1).click()
    expect(button(page, "Compare")).to_be_enabled()
    button(page, "Compare").click()
    expect(page.locator(".lab-table .lab-diff")).to_contain_text("optim.lr")
    page.wait_for_selector(".lab-table .lab-curves figure path, .lab-table .lab-curves figure polyline")
    page.locator(".lab-table").scroll_into_view_if_needed()
    screen.shot("7-compared")

    assert screen.strangers == set(), "no request of the page leaves this machine"
    assert lab.strangers == set(), "nor any of the server, its kernels and their jobs"
