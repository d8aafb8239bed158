"""The chat tokenizer: a ``tokenizers`` file with DeepSeek-V4's special tokens, ours or a real checkpoint's.

No token id is written down anywhere: ids come from the tokenizer's own table, so a real V4 ``tokenizer.json``
drops in. Markup and content are told apart: a user's text that happens to contain ``<｜User｜>`` is encoded
as the plain characters it is, never as the special token::

    tokenizer = load_tokenizer()                       # the shipped one
    tokenizer.encode("47 plus 38 makes 85.")           # plain text
    tokenizer.encode("<｜User｜>", special=True)         # markup
    ids, owner = tokenizer.encode_segments([("<｜User｜>", True), ("2+3?", False)])

Retraining the shipped file: ``python -m lab_utils.data.tokenizer train`` (see ``tokenizer_training.py``).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lab_utils.errors import DataError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, LATEST_REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
TASK_TOKENS = (
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜read_url｜>",
    "<｜title｜>",
)
REQUIRED = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
# Order of the shipped tokenizer: BOS is 0, EOS 1, as in V4. A foreign file may order them as it likes; it
# must have REQUIRED, and the others only if a message uses them.
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    *TASK_TOKENS,
    "<｜extracted_url｜>",
)
SHIPPED = Path(__file__).parent / "shipped_tokenizer"


class ChatTokenizer:
    """Text to ids and back, with markup kept apart from content.

    Args:
        definition: the parsed ``tokenizer.json``.
        source: where it came from, for messages.

    Raises:
        DataError: not a tokenizer, or a special token of the chat format is missing.
    """

    def __init__(self, definition: dict, source: str = "tokenizer.json"):
        self.source = source
        try:
            self.backend = Tokenizer.from_str(json.dumps(definition))
            # Content never meets the added tokens: this twin doesn't have them.
            self._plain = Tokenizer.from_str(
                json.dumps({**definition, "added_tokens": [], "post_processor": None})
            )
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{source}: not a tokenizers file ({str(error).splitlines()[0]}); give a tokenizer.json."
            ) from None
        self._definition = definition
        self._added = {t["content"]: int(t["id"]) for t in definition.get("added_tokens", [])}
        for token in REQUIRED:
            if token not in self._added:
                raise DataError(
                    f"{source}: the special token {token} is missing; use one of DeepSeek-V4's chat format."
                )
        longest_first = sorted(self._added, key=len, reverse=True)
        self._markup = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._names = {i: token for token, i in self._added.items()}
        self._special_ids = frozenset(self._names)

    # -- the table -------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int:
        return self.special_id(BOS)

    @property
    def eos_id(self) -> int:
        return self.special_id(EOS)

    @property
    def pad_id(self) -> int:
        """The pad token's id; a tokenizer without one pads with EOS."""
        return self._added.get(PAD, self.eos_id)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def special_id(self, token: str) -> int:
        """Id of one special token.

        Raises:
            DataError: this tokenizer doesn't have it.
        """
        if token not in self._added:
            raise DataError(
                f"{self.source}: the special token {token} is missing; use a tokenizer that has it."
            )
        return self._added[token]

    # -- text to ids -----------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is added in front or behind.

        Args:
            text: any Unicode text.
            special: True for markup (special tokens are recognised); False for content, in which the same
            strings
                are plain characters.
        """
        return self.encode_segments([(text, special)])[0]

    def encode_segments(self, segments: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids of a text given in pieces ``(text, is_markup)``, and for each id the piece that it starts in.

        Special tokens are recognised inside markup pieces only. Everything between two of them is encoded as
        one run, across piece boundaries, so the ids are those that the whole string gets from any other user
        of the same ``tokenizer.json`` (a server, say) as long as the content holds no markup.
        """
        ids: list[int] = []
        owner: list[int] = []
        run: list[tuple[str, int]] = []  # plain text since the last special token, with its piece

        def flush() -> None:
            if not run:
                return
            text = "".join(part for part, _ in run)
            encoding = self._plain.encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            if len(run) == 1:
                owner.extend([run[0][1]] * len(encoding.ids))
            else:
                ends, total = [], 0
                for part, index in run:
                    total += len(part)
                    ends.append((total, index))
                at = 0
                for start, _ in encoding.offsets:
                    while start >= ends[at][0] and at + 1 < len(ends):
                        at += 1
                    owner.append(ends[at][1])
            run.clear()

        for index, (text, markup) in enumerate(segments):
            if not markup:
                if text:
                    run.append((text, index))
                continue
            for position, part in enumerate(self._markup.split(text)):
                if position % 2:
                    flush()
                    ids.append(self._added[part])
                    owner.append(index)
                elif part:
                    run.append((part, index))
        flush()
        return ids, owner

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of many plain texts at once (pre-training data)."""
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ``ids``; special tokens are written out unless ``skip_special``."""
        pieces: list[str] = []
        run: list[int] = []
        names = self._names
        for i in [*(int(x) for x in ids), None]:
            if i is not None and i not in names:
                run.append(i)
                continue
            if run:
                pieces.append(self._plain.decode(run, skip_special_tokens=False))
                run = []
            if i is not None and not skip_special:
                pieces.append(names[i])
        return "".join(pieces)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' AutoTokenizer loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD if PAD in self._added else EOS,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1048576,
        }
        _write(folder / "tokenizer.json", json.dumps(self._definition, ensure_ascii=False, indent=1) + "\n")
        _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        return folder


def load_tokenizer(path: str | Path | None = None) -> ChatTokenizer:
    """The tokenizer of a folder or a ``tokenizer.json``; with no path, the shipped one.

    Raises:
        DataError: the file is missing, unreadable, or lacks a special token of the chat format.
    """
    file = Path(path) if path is not None else SHIPPED
    if file.is_dir():
        file = file / "tokenizer.json"
    try:
        definition = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such tokenizer; give a folder with a tokenizer.json.") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: not readable as JSON ({error}); give a tokenizers file (tokenizer.json)."
        ) from None
    if not isinstance(definition, dict):
        raise DataError(f"{file}: expected a tokenizers file (a JSON object); give a tokenizer.json.")
    return ChatTokenizer(definition, str(file))


def _write(path: Path, text: str) -> None:
    """Replace a file by rename, so that a reader never sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


if __name__ == "__main__":
    from lab_utils.data.tokenizer_training import main

    main()
