"""Text is UTF-8: tokenizers and logs are full of it."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row

ORDER = 60
CODE = "import locale, sys; print(locale.getpreferredencoding(False), sys.getfilesystemencoding())"


def check(machine: Machine) -> list[Row]:
    code, out, error = machine.python(CODE, seconds=60)
    if code != 0:
        return [Row("locale", False, error[:200], "A fresh interpreter does not start: make clean setup.")]
    if any(word.lower().replace("-", "") != "utf8" for word in out.split()):
        return [
            Row("locale", False, out, "Set LANG=C.UTF-8 in your shell's profile, and PYTHONUTF8=1 in jobs.")
        ]
    return [Row("locale", True, "UTF-8")]
