"""A stand-in for CANN, built here and now from what the torch_npu wheel itself asks for.

Every function that torch_npu expects of CANN's libraries is answered with success and nothing done, but for the few of
``stand_in.c`` that must say something: how many devices, which chip, how much memory; memory is the host's. That is
enough to import torch_npu, for fake tensors on device ``npu``, and for process groups up to the first byte. It computes
nothing: an operator launched on a real tensor of this device succeeds and leaves its output as it was.

Nothing built is ever shipped; a child process that shall see it gets ``environment``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab_utils.ascend import elf, wheel
from lab_utils.ascend.wheel import NotPossibleHere

ANSWERS = Path(__file__).with_name("stand_in.c")
# One library under all names that the wheel asks for; the loader is content with the first.
LIBRARY = "libascendcl.so"
# What CANN's C interfaces are called. Operators of aclnn are looked up when launched on a chip, never before.
NAMES = rb"(?:acl(?!nn)[A-Za-z]|Hccl[A-Z]|hccl[A-Z]|rt[A-Z]|Msprof[A-Z])[A-Za-z0-9_]+"
DEVICES = 16  # dies of one Atlas 800T A3 node
SOC = "Ascend910_9391"  # a 910C; ASCENT_STAND_IN_SOC answers otherwise


def build(folder: Path) -> None:
    """Make the stand-in's libraries in ``folder``; does nothing where they are already.

    Raises:
        NotPossibleHere: no Linux, no C compiler, or no wheel.
    """
    if sys.platform != "linux":
        raise NotPossibleHere(
            f"The stand-in CANN needs Linux and this is {sys.platform}: run it in a container."
        )
    place = wheel.required()
    made_of, done = _fingerprint(place), folder / "made-of"
    if (folder / LIBRARY).is_file() and done.is_file() and done.read_text() == made_of:
        return
    wanted = _names_of_libraries(place)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # processes may build beside each other
        made = Path(scratch) / LIBRARY
        (Path(scratch) / "stand_in.c").write_text(_source(_functions(place)))
        (Path(scratch) / "made-of").write_text(made_of)
        _compile(Path(scratch) / "stand_in.c", made)
        for name in wanted:
            link = Path(scratch) / f"link-{name}"
            link.symlink_to(LIBRARY)
            os.replace(link, folder / name) if name != LIBRARY else link.unlink()
        os.replace(made, folder / LIBRARY)
        os.replace(Path(scratch) / "stand_in.c", folder / "stand_in.c")
        os.replace(Path(scratch) / "made-of", done)  # last: it says that the rest is there


def environment(folder: Path) -> dict[str, str]:
    """All variables of a child process that shall import torch_npu with the stand-in of ``folder``.

    Devices of other kinds are hidden, since torch_npu refuses to be beside them; nothing is loaded before the child
    imports torch_npu itself.

    Raises:
        NotPossibleHere: no wheel.
    """
    place = wheel.required()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND_", "HCCL_"))}

    def before(name: str, first: Path) -> str:
        return os.pathsep.join([str(first.resolve()), *filter(None, [kept.get(name)])])

    return {
        **kept,
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", folder),
        "PYTHONPATH": before("PYTHONPATH", place),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "ASCEND_GLOBAL_LOG_LEVEL": "3",
    }


def _fingerprint(place: Path) -> str:
    """Of everything that a build depends on."""
    digest = hashlib.sha256(ANSWERS.read_bytes() + Path(__file__).read_bytes())
    for file in wheel.libraries(place):
        digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns} {platform.machine()}".encode())
    return digest.hexdigest()


def _functions(place: Path) -> set[str]:
    """Names of CANN's functions that the wheel's libraries link or look up at run time."""
    name = re.compile(NAMES.decode())
    found: set[str] = set()
    for file in wheel.libraries(place):
        found |= {symbol for symbol in elf.undefined(file) if name.fullmatch(symbol)}
        found |= elf.texts(file, NAMES)
    return found


def _names_of_libraries(place: Path) -> list[str]:
    """Libraries that the wheel's own need and that neither it, torch, nor the system has: CANN's."""
    ours = {file.name for file in wheel.libraries(place)}
    needed = {name for file in wheel.libraries(place) for name in elf.needed(file)}
    cann = {
        name for name in needed - ours if re.fullmatch(r"lib(hccl|ascendcl|acl_\w+|ge_\w+|graph)\.so", name)
    }
    return sorted(cann | {LIBRARY})


def _source(functions: set[str]) -> str:
    """The C file: the answers of ``stand_in.c``, and success for every other function."""
    answers = ANSWERS.read_text()
    answered = set(re.findall(r"^\w[\w *]*?\b(\w+)\([^;]*\)\s*\{", answers, re.MULTILINE))
    rest = "\n".join(f"long {name}(void) {{ return 0; }}" for name in sorted(functions - answered))
    head = f'#define DEVICES {DEVICES}\n#define SOC "{SOC}"\n'
    return f"{head}{answers}\n{rest}\n"


def _compile(source: Path, library: Path) -> None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotPossibleHere(
            "The stand-in CANN is compiled on the spot and this machine has no C compiler: install gcc and libc6-dev."
        )
    words = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        "-o",
        str(library),
        str(source),
        f"-Wl,-soname,{LIBRARY}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise NotPossibleHere(f"{compiler} can't build the stand-in CANN on {platform.machine()}: {last}.")
