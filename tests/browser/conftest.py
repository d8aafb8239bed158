"""A real JupyterLab, a real Chromium (Debian's), and a watch on who is talked to.

Screenshots of each step go to ``ASCENT_SHOTS``, else to a folder of the test; the one that failed is kept beside them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from system_packages import installed

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SECONDS = 240_000  # the longest that a step may take, in ms: a slow machine trains meanwhile


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@dataclass
class Lab:
    """A running server.

    Attributes:
        url: its address; the token is apart, as people paste it.
        runs: folder of runs of its kernels.
        strangers: addresses beyond this machine that it, its kernels or their jobs have talked to.
    """

    url: str
    token: str
    folder: Path
    runs: Path
    process: subprocess.Popen
    strangers: set[str] = field(default_factory=set)

    def address(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/{notebook}?token={self.token}&reset"

    def watch(self) -> None:
        """Note every connection of the server's whole family that leaves this machine."""
        while self.process.poll() is None:
            try:
                family = [psutil.Process(self.process.pid)]
                family += family[0].children(recursive=True)
            except psutil.Error:
                return
            for each in family:
                try:
                    found = [c for c in each.net_connections("inet") if c.raddr]
                    self.strangers |= {
                        f"{each.name()} to {c.raddr.ip}"
                        for c in found
                        if not c.raddr.ip.startswith(("127.", "::1", "::ffff:127."))
                    }
                except psutil.Error:
                    continue
            time.sleep(0.3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    settings = folder / ".jupyter/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false"}'
    )  # or it asks whether it may
    port, token = free_port(), secrets.token_hex(16)
    options = [
        *(
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--allow-root",
            f"--IdentityProvider.token={token}",
        ),
        *("--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
        *("--LabApp.extension_manager=readonly", f"--notebook-dir={folder / 'notebooks'}"),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JPY_", "ASCENT_"))}
    environment |= {"HOME": str(folder), "ASCENT_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("jupyter-lab"), *options],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Lab(f"http://127.0.0.1:{port}", token, folder, folder / "runs", process)
    until = time.monotonic() + 120
    while not _answers(f"{server.url}/api?token={token}"):
        assert process.poll() is None and time.monotonic() < until, (folder / "server.log").read_text()[
            -3000:
        ]
        time.sleep(0.2)
    threading.Thread(target=server.watch, daemon=True).start()
    yield server
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
    for each in family:
        if each.is_running():
            each.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@dataclass
class Screen:
    """The page, and where its pictures go."""

    page: object
    shots: Path
    requests: list[str]

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png")

    @property
    def strangers(self) -> set[str]:
        """Hosts beyond this machine that the page asked for anything."""
        hosts = {urlsplit(url).hostname for url in self.requests if url.startswith(("http", "ws"))}
        return {host for host in hosts if host and host != "127.0.0.1"}


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    from playwright.sync_api import sync_playwright

    browser_path = installed(("chromium",), ("chromium",))["chromium"]
    shots = Path(os.environ.get("ASCENT_SHOTS") or tmp_path / "shots")
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])],
        )
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(SECONDS)
        screen = Screen(page, shots, [])
        page.on("request", lambda request: screen.requests.append(request.url))
        page.on("websocket", lambda socket: screen.requests.append(socket.url))
        try:
            yield screen
        finally:
            screen.shot("last")
            browser.close()
