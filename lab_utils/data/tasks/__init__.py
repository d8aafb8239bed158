"""Verifiable tasks: one module a family, found by ``lab_utils.registry``; no list to edit when one is added.

A family module offers

    generate(rng) -> Example          a question, its gold answer and how to verify an answer
    verify(example, answer) -> bool   exact, tolerant of surrounding whitespace (and a final full stop)
    reject(example, rng) -> message   an assistant message that fails ``verify``: wrong, bad form, unsafe
    text(rng) -> str                  running text of the same world, for pre-training; no held-out fact

and everybody else uses ``families()``, ``verify_row(row, answer)`` and the generators of
``lab_utils.data.generated``.
"""

from lab_utils.data.tasks._base import Example, families, family, split_of, verify_row
from lab_utils.data.tasks._rng import Rng

__all__ = ["Example", "Rng", "families", "family", "split_of", "verify_row"]
