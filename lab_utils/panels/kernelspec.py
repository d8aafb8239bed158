"""``lab kernelspec install | show | remove``: a notebook kernel for the login node.

It imports what a notebook shows and launches with, and nothing that computes: torch_npu is never loaded, no device is
visible to it, the hub and W&B are offline. What a notebook launches sees the devices again
(``accelerators/_hidden.py``). The template is ``kernels/jupyter``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from lab_utils.console import emit
from lab_utils.errors import RunError

NAME = "ascent"
WRAPPER = "with_cann.sh"
# Of the environment that installs it: where this site keeps things. They go along, since a server may be started
# from anywhere.
PASSED_ON = ("ASCENT_RUNS", "ASCENT_MANIFESTS", "ASCENT_CACHE", "ASCENT_SITE", "HF_HOME")

app = typer.Typer(help="The notebook kernel of a login node.", no_args_is_help=True)


def spec(
    name: str = NAME,
    *,
    python: str | None = None,
    env: dict[str, str] | None = None,
    cann: str | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """The content of kernel.json.

    Args:
        name: of the kernel; another than the usual one is shown beside the title.
        python: interpreter; absent: this one. Made absolute, since a server has a PATH of its own.
        env: variables beside, or instead of, the template's. A value may use ``${NAME}`` of the server's environment.
        cann: CANN's set_env.sh, sourced before the kernel starts.
        folder: where the wrapper that does so is; needed with ``cann``.
    """
    text = (resources.files("kernels") / "jupyter" / "kernel.json").read_text(encoding="utf-8")
    # Not resolved: the python of a virtual environment is a link, and its place tells it which environment it is of.
    interpreter = os.path.abspath(python or sys.executable)
    title = "Ascent (login node)" + (f" {name}" if name != NAME else "")
    found = json.loads(text)
    found["argv"] = [interpreter if word == "@PYTHON@" else word for word in found["argv"]]
    found["display_name"] = title
    here = {key: os.path.abspath(value) for key in PASSED_ON if (value := os.environ.get(key))}
    if "ASCENT_MANIFESTS" in here:  # several folders
        parts = os.environ["ASCENT_MANIFESTS"].split(os.pathsep)
        here["ASCENT_MANIFESTS"] = os.pathsep.join(os.path.abspath(part) for part in parts if part)
    found["env"] |= here | (env or {})
    if cann:
        assert folder is not None
        found["argv"] = ["/bin/bash", str(folder / WRAPPER), os.path.abspath(cann), *found["argv"]]
    return found


def folder_of(name: str, *, user: bool = False, prefix: str | None = None) -> Path:
    """Where a kernel is installed: for the user, in a prefix, or (neither) in this interpreter's environment.

    Raises:
        RunError: a name that Jupyter doesn't take, or both places at once.
    """
    from jupyter_client.kernelspec import _is_valid_kernel_name
    from jupyter_core.paths import jupyter_data_dir

    if user and prefix:
        raise RunError("--user and --prefix exclude each other: give one of them.")
    if not _is_valid_kernel_name(name):
        raise RunError(f"--name {name}: expected letters, digits, dots, dashes and underscores.")
    data = Path(jupyter_data_dir()) if user else Path(prefix or sys.prefix).absolute() / "share" / "jupyter"
    return data / "kernels" / name.lower()


def install(
    name: str = NAME,
    *,
    user: bool = False,
    prefix: str | None = None,
    env: dict[str, str] | None = None,
    cann: str | None = None,
) -> Path:
    """Install the kernel, in place of one of the same name that is ours; returns its folder.

    Raises:
        RunError: the place cannot be written, holds somebody else's kernel, or ``cann`` is no file.
    """
    folder = folder_of(name, user=user, prefix=prefix)
    if cann and not Path(cann).is_file():
        raise RunError(f"--cann {cann}: there is no such file; CANN's is …/Ascend/cann/set_env.sh.")
    if (folder / "kernel.json").exists() and not ours(folder):
        raise RunError(f"{folder} holds another kernel: choose a name by --name, or remove that one first.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wrapper = folder / WRAPPER
        if cann:
            wrapper.write_bytes((resources.files("kernels") / "jupyter" / WRAPPER).read_bytes())
            wrapper.chmod(0o755)
        else:
            wrapper.unlink(missing_ok=True)
        text = json.dumps(spec(name, env=env, cann=cann, folder=folder), indent=1) + "\n"
        (folder / "kernel.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror or error}): install it with --user, or --prefix FOLDER."
        ) from None
    return folder


def ours(folder: Path) -> bool:
    """Whether the kernel in a folder was installed by this module."""
    try:
        return bool(json.loads((folder / "kernel.json").read_text(encoding="utf-8"))["metadata"]["ascent"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def installed() -> dict[str, Path]:
    """Our kernels among those that a server started here would find, by name."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().find_kernel_specs()
    return {name: Path(folder) for name, folder in sorted(found.items()) if ours(Path(folder))}


# -- commands ------------------------------------------------------------------------------------------------

USER = typer.Option(False, "--user", help="In the user's own Jupyter folder.")
PREFIX = typer.Option(None, "--prefix", help="In PREFIX/share/jupyter, as a site's shared environment.")
SYS_PREFIX = typer.Option(
    False, "--sys-prefix", help="In this interpreter's environment (what happens anyway)."
)
KERNEL = typer.Option(NAME, "--name", help="Name of the kernel.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("install")
def install_command(
    user: bool = USER,
    prefix: str = PREFIX,
    sys_prefix: bool = SYS_PREFIX,
    name: str = KERNEL,
    env: list[str] = typer.Option(
        [], "--env", help="A variable of the kernel, as in --env ASCENT_RUNS=/data/runs."
    ),
    cann: str = typer.Option(None, "--cann", help="CANN's set_env.sh, for notebooks that call its tools."),
    as_json: bool = JSON,
) -> None:
    """Install the kernel that notebooks on a login node use."""
    if sys_prefix and (user or prefix):
        raise RunError("--sys-prefix excludes --user and --prefix: give one of them.")
    for pair in env:
        if "=" not in pair:
            raise RunError(f"--env {pair}: expected KEY=VALUE, as in --env ASCENT_RUNS=/data/runs.")
    variables = dict(pair.split("=", 1) for pair in env)
    folder = install(name, user=user, prefix=prefix, env=variables, cann=cann)
    emit({"kernel": name, "path": str(folder), **_content(folder)}, as_json, lambda: print(folder))


@app.command("show")
def show_command(
    name: str = typer.Option(None, "--name", help="One kernel; absent: all."), as_json: bool = JSON
) -> None:
    """What is installed, and with which interpreter and variables it starts."""
    found = [
        {"kernel": kernel, "path": str(folder), **_content(folder)}
        for kernel, folder in installed().items()
        if name in (None, kernel)
    ]
    if not found:
        raise RunError(
            f"No kernel{f' {name}' if name else ''} of ours is installed here: lab kernelspec install."
        )

    def render() -> None:
        for each in found:
            print(f"{each['kernel']}  {each['path']}\n  {' '.join(each['argv'])}")
            for key, value in each["env"].items():
                print(f"  {key}={value}")

    emit(found, as_json, render)


@app.command("remove")
def remove_command(user: bool = USER, prefix: str = PREFIX, name: str = KERNEL, as_json: bool = JSON) -> None:
    """Remove the kernel again."""
    folder = folder_of(name, user=user, prefix=prefix)
    if not ours(folder):
        raise RunError(
            f"{folder} holds no kernel of ours: lab kernelspec show lists those that are installed."
        )
    shutil.rmtree(folder)
    emit({"kernel": name, "path": str(folder), "removed": True}, as_json, lambda: print(f"removed {folder}"))


def _content(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("display_name", "argv", "env")}
