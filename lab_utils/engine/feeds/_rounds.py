"""Rounds of samples: prompts, answers by the current weights, rows to learn from; the base of GRPO and distillation.

A round survives a kill at any moment. Tokens are in a write-ahead log before the next one is sampled; the rows of a
finished round are a file, since what its log-probabilities came from is gone after the first update. A resumed run
reads the one or goes on from the other, under any number of ranks: nothing is sampled twice.
"""

from __future__ import annotations

import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab_utils.data.rows import PackedRows
from lab_utils.engine import checkpoint
from lab_utils.engine.feeds import Feed
from lab_utils.engine.feeds._pack import Text, pack
from lab_utils.engine.reduce import MAX, all_reduce, from_first_stage, gather_objects
from lab_utils.engine.sampling import make_sampler
from lab_utils.errors import DataError
from lab_utils.models.generate import Request, Sample, Sampling
from lab_utils.runs.checks import check_rollouts
from lab_utils.telemetry.reductions import Max, Mean, Metric

SHOWN = 4  # answers of a round that go into samples.jsonl
_FILE = re.compile(r"round-(\d+)\.(\d+)-of-(\d+)\.pt")


@dataclass
class Group:
    """A prompt and the answers sampled for it.

    Attributes:
        number: place of the prompt in the endless sequence; with ``group_size`` it names the answers' noise.
    """

    number: int
    row: dict[str, Any]
    mode: str
    prompt: list[int]
    samples: list[Sample] = field(default_factory=list)


class Rounds(Feed, ABC):
    """Rows of this rank, a round of samples at a time; subclasses say what is learned from the samples."""

    part = "generate"
    names: tuple[str, ...] = ()  # side tensors that every rank's rows have

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        recipe = engine.recipe
        self.rollout, self.updates = recipe.rollout, recipe.objective.updates_per_rollout
        check_rollouts(recipe)
        self.folder = engine.run_dir.path / "rollouts"
        self.folder.mkdir(exist_ok=True)
        self.sampling = Sampling(
            self.rollout.temperature, self.rollout.top_p, self.rollout.top_k, recipe.seed
        )
        self.sampler = make_sampler(engine, self.folder)
        self.handed = False  # whether a server has had weights from this process
        self.round = self.update = 0
        self.rows: list[PackedRows] = []  # of the round, by update
        self.start = self.train.state_dict()  # of the prompts, at the round's beginning
        self.found: dict[str, Metric] = {}
        self.sampled, self.seconds = 0, 0.0  # tokens of the round's answers, and what they took

    # -- what subclasses do -------------------------------------------------------------------------------------------

    @abstractmethod
    def texts(self, groups: list[Group]) -> list[list[Text]]:
        """What this rank's samples teach, by update; may run models and other ranks' collectives."""

    def refine(self, micro: list[PackedRows]) -> list[PackedRows]:
        """Micro-batches of one update, on the device, before the round's first update: with what the weights that
        sampled say of them."""
        return micro

    def groups(self) -> list[Group]:
        """This rank's prompts of the round with their answers."""
        return self.sample(self.draw(self.rollout.prompts))

    # -- a step -------------------------------------------------------------------------------------------------------

    def next_step(self) -> PackedRows:
        if not self.rows:
            self._begin()
        rows = self.rows[self.update]
        self.found["rollout/staleness"] = Mean(float(self.update), 1.0)
        self.update += 1
        if self.update == len(self.rows):
            self.round, self.update, self.rows = self.round + 1, 0, []
            self.start = self.train.state_dict()
        return rows

    def metrics(self) -> dict[str, Metric]:
        found, self.found = self.found, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, "update": self.update, "prompts": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["round"] != self.round:
            self.rows = []
        self.round, self.update, self.start = state["round"], state["update"], state["prompts"]
        self.train.load_state_dict(self.start)
        if self.update and not self.rows:
            update = self.update
            self._begin()
            self.update = update

    # -- a round ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The rows of the round: read, or sampled and kept."""
        self._forget()
        self.update = 0
        if not self._read():
            self.train.load_state_dict(self.start)
            with self.evaluating():
                self._hand_over()
                self.sampler.begin(self.round)
                self.sampled, self.seconds = 0, 0.0
                parts = self.texts(self.groups())
                # Ranks sample side by side: what one does in its time, so many times.
                speed = Mean(float(self.sampled * self.engine.dp), self.seconds)
                self.found["rollout/tokens_per_s"] = speed
                self.rows = [self._refined(self._packed(part)) for part in parts]
                self.sampler.end()
            self._write()

    def _hand_over(self) -> None:
        """The weights of now to a server that samples: by a checkpoint, which it reads.

        The first round of a process always does so: the server may be another one than before a resume.
        """
        if self.rollout.source != "server" or (self.handed and self.round % self.rollout.reload_every):
            return
        engine = self.engine
        with engine.clock.part("weight_sync"):
            engine.save()
            engine.writer.finish()
            newest = engine.run_dir.checkpoints()[-1] / "model"
            # One rank tells the server; the others have to know the name that it goes by from now on.
            for first in (True, False):
                if (engine.rank == 0) == first and (first or not self.rollout.reload):
                    self.sampler.hand_over(str(newest))
                dist.barrier()
        self.handed = True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        model = self.engine.model
        model.eval()
        with torch.no_grad():
            yield
        model.train()

    def draw(self, count: int) -> list[Group]:
        """This rank's share of the next prompts of all ranks."""
        engine, first = self.engine, self.train.position
        drawn = self.train.take(count)
        share = list(enumerate(drawn, first))[engine.layout.dp_rank :: engine.dp]
        return [Group(number, prompt.row, prompt.mode, prompt.ids) for number, prompt in share]

    def sample(self, groups: list[Group]) -> list[Group]:
        """The groups with their answers; a collective of the ranks that share experts."""
        size, T = self.rollout.group_size, self.engine.recipe.data.row_tokens
        requests = []
        for group in groups:
            room = T - len(group.prompt)
            if room < 1:
                raise DataError(
                    f"A prompt has {len(group.prompt)} tokens, which leaves no room in rows of data.row_tokens={T}: "
                    f"set it to {len(group.prompt) + self.budget(group.mode)}."
                )
            budget = min(self.budget(group.mode), room)
            requests += [Request(group.prompt, group.number * size + i, budget) for i in range(size)]
        began = time.perf_counter()
        samples = self._of_stages(lambda: self.sampler.sample(requests, self.sampling))
        self.sampled += sum(len(sample.tokens) for sample in samples)
        self.seconds += time.perf_counter() - began
        for i, group in enumerate(groups):
            group.samples = samples[i * size : (i + 1) * size]
        return groups

    def ask(self, prompts: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
        """Replies of a judge, the same on all stages of a pipeline."""
        return self._of_stages(lambda: self.sampler.ask(prompts))

    def _of_stages(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """What a sampler says, the same on all stages of a pipeline: they ask together, or one of them does."""
        layout = self.engine.layout
        if self.sampler.together:
            return ask()
        return from_first_stage(ask() if layout.first_stage else [], layout)

    def budget(self, mode: str) -> int:
        return self.rollout.length_budgets.get(mode, self.rollout.max_new_tokens)

    def by_update(self, shares: list[Any]) -> list[list[Any]]:
        """What belongs to this rank's groups, by update: neighbours among the prompts, so that an update has the same
        groups whatever the number of ranks."""
        cuts = [round(i * len(shares) / self.updates) for i in range(self.updates + 1)]
        return [shares[start:stop] for start, stop in pairwise(cuts)]

    def _packed(self, texts: list[Text]) -> PackedRows:
        """Rows of one update: on every rank equally many, in micro-batches that the schedule takes."""
        engine = self.engine
        tokens, pad = engine.recipe.data.row_tokens, self.train.pad_id
        rows = pack(texts, tokens, pad_id=pad, fill={"kept": -1}, names=self.names)
        unit = engine.micro_rows * engine.layout.pp_size
        most = int(all_reduce([float(rows.rows)], engine.device, MAX)[0])
        return rows.with_rows(math.ceil(most / unit) * unit)

    def _refined(self, rows: PackedRows) -> PackedRows:
        engine = self.engine
        pieces = range(0, rows.rows, engine.micro_rows)
        micro = [rows.slice(i, i + engine.micro_rows).to(engine.device) for i in pieces]
        return PackedRows.joined([each.to("cpu") for each in self.refine(micro)])

    # -- the round on disk --------------------------------------------------------------------------------------------

    def _path(self) -> Path:
        engine = self.engine
        return self.folder / f"round-{self.round:06d}.{engine.layout.dp_rank}-of-{engine.dp}.pt"

    def _write(self) -> None:
        if self.engine.layout.first_stage:
            staged = self._path().with_suffix(f".{os.getpid()}")
            torch.save(
                {"rows": [rows.tensors() for rows in self.rows], "prompts": self.train.state_dict()}, staged
            )
            staged.rename(self._path())
        dist.barrier()

    def _read(self) -> bool:
        """The rows of a round that was finished by these or by other ranks, dealt out anew."""
        files = sorted(self.folder.glob(f"round-{self.round:06d}.*.pt"))
        by_world: dict[int, list[Path]] = {}
        for path in files:
            by_world.setdefault(int(_FILE.fullmatch(path.name)[3]), []).append(path)
        whole = [found for world, found in by_world.items() if len(found) == world]
        if not all(gather_objects(bool(whole))):
            return False
        found = [torch.load(path) for path in sorted(whole[0], key=lambda p: int(_FILE.fullmatch(p.name)[2]))]
        if len(found) == self.engine.dp:
            own = found[self.engine.layout.dp_rank]["rows"]
            self.rows = [PackedRows.from_tensors(tensors) for tensors in own]
        else:
            self.rows = [
                self._dealt([part["rows"][i] for part in found]) for i in range(len(found[0]["rows"]))
            ]
        self.train.load_state_dict(found[0]["prompts"])
        return True

    def _dealt(self, parts: list[dict[str, torch.Tensor]]) -> PackedRows:
        """This rank's share of the rows of all ranks of another layout, without their padding."""
        engine = self.engine
        rows = PackedRows.joined([PackedRows.from_tensors(part) for part in parts])
        used = (rows.document_ids >= 0).any(1).nonzero().flatten().tolist()
        mine = used[engine.layout.dp_rank :: engine.dp]
        unit = engine.micro_rows * engine.layout.pp_size
        most = math.ceil(len(used) / engine.dp)
        count = math.ceil(most / unit) * unit
        if not mine:
            empty = rows.slice(0, 1)
            empty = empty._map(torch.zeros_like)
            return empty.with_rows(count + 1).slice(1, count + 1)
        return rows._map(lambda tensor: tensor[mine]).with_rows(count)

    def _forget(self) -> None:
        """Files of rounds that no checkpoint can go back to."""
        oldest = self.round
        for path in self.engine.run_dir.checkpoints():
            oldest = min(oldest, checkpoint.read_state(path)["loader"].get("round", 0))
        if not self.engine.run_dir.checkpoints():
            oldest = 0
        if self.engine.rank == 0:
            for path in self.folder.glob("round-*.pt"):
                if int(_FILE.fullmatch(path.name)[1]) < oldest:
                    path.unlink(missing_ok=True)
        self.sampler.forget_before(oldest)

    # -- what is told of it -------------------------------------------------------------------------------------------

    def completions(self, groups: list[Group]) -> dict[str, Metric]:
        """Lengths of the answers, and how many were cut."""
        samples = [sample for group in groups for sample in group.samples]
        lengths = [float(len(sample.tokens)) for sample in samples]
        ended = [float(len(sample.tokens)) for sample in samples if sample.finished]
        return {
            "train/completions/mean_length": Mean(sum(lengths), len(lengths)),
            "train/completions/max_length": Max(max(lengths, default=0.0)),
            "train/completions/mean_terminated_length": Mean(sum(ended), len(ended)),
            "train/completions/clipped_ratio": Mean(float(len(lengths) - len(ended)), len(lengths)),
        }

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Some answers of the round, for a person, into samples.jsonl."""
        if self.engine.rank == 0:
            for row in rows[:SHOWN]:
                self.engine.run_dir.append("samples.jsonl", {"step": self.engine.progress.step + 1, **row})
