"""Resolve the pins of pyproject.toml in this interpreter's environment and write requirements.lock.

Run by ``make lock`` in a fresh virtual environment that already holds torch, so that the resolver keeps the build
that the site chose (the CPU one on a machine without an accelerator).
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Made by `make lock` from pyproject.toml: the whole set, so it installs with --no-deps.
# colossalai stands here with its dependencies left out on purpose; pyproject.toml says why.
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "install", "--quiet", *project["project"]["dependencies"], *groups["dev"]], check=True
    )
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *groups["engine"]], check=True)
    frozen = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    lines = [line.split("+")[0] for line in frozen.splitlines() if not line.startswith(("pip==", "-e "))]
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(sorted(lines, key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
