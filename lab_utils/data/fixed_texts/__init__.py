"""The long fixed texts of the chat format: instructions on tools, on Max effort, on a response format.

Shipped in our own wording (the text files of this folder), because the project's own base model has never
seen the official ones. A real checkpoint brings its own: ``FixedTexts.from_encoding_folder("…/encoding")``
reads the literals out of its Python file without running it.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

from lab_utils.errors import DataError

FILE = "encoding_dsv4.py"
TOKENS = {
    "dsml_token": "｜DSML｜",
    "thinking_start_token": "<think>",
    "thinking_end_token": "</think>",
}


@dataclass(frozen=True)
class FixedTexts:
    """What the encoder says of itself.

    Attributes:
        tools_head: before the tool schemas.
        tools_tail: after them.
        max_effort: first in the text at effort ``max``.
        response_format: before and after the schema of a response.
    """

    tools_head: str
    tools_tail: str
    max_effort: str
    response_format: tuple[str, str]

    @staticmethod
    @cache
    def shipped() -> FixedTexts:
        folder = Path(__file__).parent
        tools, effort, response = (
            (folder / f"{name}.txt").read_text(encoding="utf-8")
            for name in ("tools", "max_effort", "response_format")
        )
        return FixedTexts(
            *_around(tools, "tool_schemas", "tools.txt"),
            effort,
            _around(response, "schema", "response_format.txt"),
        )

    @staticmethod
    def from_encoding_folder(path: str | Path) -> FixedTexts:
        """The official texts, from the ``encoding/`` folder of a checkpoint, or its ``encoding_dsv4.py``.

        Only literals are read; nothing is executed.

        Raises:
            DataError: no such file, not Python, or a constant that is missing or not a plain text.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE
        try:
            tree = ast.parse(file.read_bytes(), filename=str(file))
        except FileNotFoundError:
            raise DataError(
                f"{file}: there is no such file; give the encoding/ folder of a DeepSeek-V4 checkpoint."
            ) from None
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{file}: not readable as Python ({error}); copy the folder again.") from None
        constants = {}
        for node in tree.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                if (
                    isinstance(target, ast.Name)
                    and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                ):
                    constants[target.id] = node.value.value
        for name in ("TOOLS_TEMPLATE", "REASONING_EFFORT_MAX", "response_format_template"):
            if name not in constants:
                raise DataError(
                    f"{file}: expected {name} as a literal text, found none; give the encoding/ folder as "
                    "released."
                )
        return FixedTexts(
            *_around(constants["TOOLS_TEMPLATE"], "tool_schemas", f"{file}: TOOLS_TEMPLATE"),
            constants["REASONING_EFFORT_MAX"],
            _around(constants["response_format_template"], "schema", f"{file}: response_format_template"),
        )

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def _around(template: str, hole: str, where: str) -> tuple[str, str]:
    """The text before and after the one ``{hole}``, with the names of tokens filled in."""
    parts = [""]
    for text, name, spec, conversion in Formatter().parse(template):
        parts[-1] += text
        if name == hole and not spec and not conversion:
            parts.append("")
        elif name is not None:
            if name not in TOKENS or spec or conversion:
                raise DataError(
                    f"{where}: unknown placeholder {{{name}}}; give the encoding/ folder as released."
                )
            parts[-1] += TOKENS[name]
    if len(parts) != 2:
        raise DataError(
            f"{where}: expected {{{hole}}} once, found it {len(parts) - 1} times; give the folder as "
            "released."
        )
    return parts[0], parts[1]
