"""Teachers: loaded on demand, cut like the student, and asked for last hidden states; their heads are kept apart.

A teacher's distribution over the vocabulary is rebuilt from those states and its head, a chunk of tokens at a time, so
what is held of it is ``[T, E]``, never ``[T, V]``. One teacher is in memory at a time, and one head on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.engine.frozen import frozen, release
from lab_utils.engine.passes import Reader
from lab_utils.engine.reduce import MAX, all_reduce
from lab_utils.errors import RecipeError


class Heads(dict):
    """Heads of teachers by number, on the host; the one asked for is on the device until another one is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self._resident = device, (-1, None)

    def __getitem__(self, teacher: int) -> Tensor:
        if self._resident[0] != teacher:
            self._resident = (-1, None)  # the old one goes before the new one comes
            self._resident = (teacher, super().__getitem__(teacher).to(self.device))
        return self._resident[1]


class Teachers:
    """The teachers of a recipe.

    Args:
        engine: gives recipe, layout and device.

    Raises:
        RecipeError: two teachers of one domain.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.sections = engine, engine.recipe.objective.teachers
        self.by_samples = engine.recipe.objective.loss == "sampled_token"
        self.temperature = engine.recipe.rollout.temperature if engine.recipe.rollout else 1.0
        self.heads = Heads(engine.device)
        self._held: tuple[int, Reader | None] = (-1, None)
        self._domains: dict[str, int] = {}
        self._others: int | None = None
        for number, section in enumerate(self.sections):
            for domain in section.domains or (None,):
                taken = self._others if domain is None else self._domains.get(domain)
                if taken is not None:
                    what = domain or "what no other teaches"
                    raise RecipeError(
                        f"objective.teachers.{number}: {what} is taught by teacher {taken} already: give each domain "
                        "one teacher."
                    )
                if domain is None:
                    self._others = number
                else:
                    self._domains[domain] = number

    def of(self, *domains: str | None) -> int | None:
        """Number of the teacher of a text that belongs to these domains; None: nobody teaches it."""
        for domain in domains:
            if domain in self._domains:
                return self._domains[domain]
        return self._others

    def weight(self, teacher: int) -> float:
        return self.sections[teacher].weight

    def teach(self, micro: list[PackedRows]) -> list[PackedRows]:
        """The same micro-batches with ``teacher_hidden [B, T, E]`` (or, for samples alone, ``teacher_logps [B, T]``).

        A collective: every rank asks the same teachers, with equally many micro-batches.
        """
        found: list[Tensor | None] = [None] * len(micro)
        # The teacher that is in memory goes first.
        order = sorted(range(len(self.sections)), key=lambda number: number != self._held[0])
        for teacher in order:
            mine = [i for i, rows in enumerate(micro) if _has(rows, teacher)]
            most = int(all_reduce([float(len(mine))], self.engine.device, MAX)[0])
            if not most:
                continue
            empty = micro[0]._map(torch.zeros_like)
            empty = replace(empty, document_ids=torch.full_like(empty.document_ids, -1))
            batches = [_bare(micro[i]) for i in mine] + [_bare(empty)] * (most - len(mine))
            said = self._ask(teacher, batches)
            for i, values in zip(mine, said, strict=False):
                own = micro[i].side["teacher"] == teacher
                own = own if self.by_samples else own[..., None]
                found[i] = values.where(own, 0.0 if found[i] is None else found[i])
        name = "teacher_logps" if self.by_samples else "teacher_hidden"
        return [
            rows if values is None else replace(rows, side={**rows.side, name: values})
            for rows, values in zip(self._filled(micro, found), found, strict=True)
        ]

    def _filled(self, micro: list[PackedRows], found: list[Tensor | None]) -> list[PackedRows]:
        """A micro-batch of padding alone gets zeros, where this rank has states at all."""
        like = next((values for values in found if values is not None), None)
        for i, values in enumerate(found):
            if values is None and like is not None:
                found[i] = torch.zeros_like(like)
            elif values is None and (self.by_samples or self.engine.layout.last_stage):
                shape = micro[i].input_ids.shape
                found[i] = torch.zeros(shape if self.by_samples else (*shape, 1), device=self.engine.device)
        return micro

    def _ask(self, teacher: int, batches: list[PackedRows]) -> list[Tensor]:
        reader = self._load(teacher)
        return reader.token_logps(batches, self.temperature) if self.by_samples else reader.hidden(batches)

    def _load(self, teacher: int) -> Reader:
        if self._held[0] != teacher:
            if self._held[1] is not None:
                release(self._held[1])
            engine = self.engine
            reader = frozen(self.sections[teacher].source, engine.recipe, engine.layout, engine.device)
            self._held = (teacher, reader)
            if engine.layout.last_stage and teacher not in self.heads:
                self.heads[teacher] = reader.raw.head_weight.detach().cpu().clone()
        return self._held[1]


def _has(rows: PackedRows, teacher: int) -> bool:
    return bool(((rows.side["teacher"] == teacher) & (rows.document_ids >= 0)).any())


def _bare(rows: PackedRows) -> PackedRows:
    """Without side tensors: a teacher reads tokens alone."""
    return replace(rows, side={})
