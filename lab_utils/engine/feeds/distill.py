"""Rows of distillation: the student's samples, or given texts, with their teachers' last hidden states."""

from __future__ import annotations

from typing import Any

import torch

from lab_utils.data.columns import family_of
from lab_utils.data.rows import PackedRows
from lab_utils.engine.feeds import Feed
from lab_utils.engine.feeds._pack import Text
from lab_utils.engine.feeds._rounds import Group, Rounds
from lab_utils.engine.teachers import Teachers
from lab_utils.errors import DataError


class Taught:
    """What both feeds do with their micro-batches."""

    engine: Any

    def employ(self) -> None:
        self.teachers = Teachers(self.engine)
        self.engine.parts.objective.heads = self.teachers.heads

    def complete(self, micro: list[PackedRows]) -> list[PackedRows]:
        return self.teachers.teach(micro)


class OnPolicy(Taught, Rounds):
    """Samples of the student, each with the teacher of its domain; texts of one teacher share rows with no other's, so
    that their heads come and go once a step."""

    names = ("teacher", "teacher_weight")

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.employ()

    def texts(self, groups: list[Group]) -> list[list[Text]]:
        self.found = self.completions(groups)
        tokenizer = self.train.tokenizer
        self.show(
            [
                {
                    "prompt": group.row["messages"][-1]["content"],
                    "mode": group.mode,
                    "completion": tokenizer.decode(group.samples[0].tokens),
                }
                for group in groups
            ]
        )
        return [
            [self._text(group, sample) for group in part for sample in group.samples if sample.tokens]
            for part in self.by_update(groups)
        ]

    def _text(self, group: Group, sample: Any) -> Text:
        family = family_of(group.row)
        teacher = self.teachers.of(family, group.row.get("manifest"))
        if teacher is None:
            raise DataError(
                f"A prompt of the family {family} has no teacher: add it to a teacher's domains in objective.teachers, "
                "or leave one teacher without domains for all others."
            )
        side = {"teacher": float(teacher), "teacher_weight": self.teachers.weight(teacher)}
        return Text(group.prompt + sample.tokens, len(group.prompt), side, kind=teacher)


class OffPolicy(Taught, Feed):
    """Texts of ``data.train``; a teacher's domains are names of manifests."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.employ()
        self.by_source = []
        for source in engine.recipe.data.train:
            teacher = self.teachers.of(source.manifest)
            if teacher is None:
                raise DataError(
                    f"The texts of {source.manifest} have no teacher: add it to a teacher's domains in "
                    "objective.teachers, or leave one teacher without domains for all others."
                )
            self.by_source.append(teacher)

    def complete(self, micro: list[PackedRows]) -> list[PackedRows]:
        """Validation's texts go to the teachers that sources of their names in training have."""
        teachers = torch.tensor(self.by_source, device=self.engine.device)
        weights = torch.tensor(
            [self.teachers.weight(teacher) for teacher in self.by_source], device=self.engine.device
        )
        for rows in micro:
            source = rows.side.pop("source").long()
            rows.side["teacher"], rows.side["teacher_weight"] = teachers[source], weights[source]
        return super().complete(micro)


def feed(engine: Any) -> Feed:
    return OnPolicy(engine) if engine.recipe.objective.on_policy else OffPolicy(engine)


FEED = feed
