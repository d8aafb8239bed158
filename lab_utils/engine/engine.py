"""The training loop, from top to bottom: load, forward-backward, step, log, evaluate, save.

``Engine(recipe, accelerator, run_dir).fit()`` in every rank of a job. The run directory is all its state: a checkpoint
found there is where it goes on. Nothing below knows how many ranks or micro-batches a batch is cut into, but for the
two sums that make the loss a mean over the whole batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lab_utils.accelerators import Accelerator
from lab_utils.engine import checkpoint, colossal, facts
from lab_utils.engine.clock import StepClock
from lab_utils.engine.control import Stop, StopRequests
from lab_utils.engine.feeds import feed_of
from lab_utils.engine.parts import Parts, build_parts
from lab_utils.engine.passes import Passes, Shares
from lab_utils.engine.reduce import all_reduce, gather_objects, over_ranks
from lab_utils.engine.window import Window
from lab_utils.engine.writer import Writer
from lab_utils.errors import RunError
from lab_utils.optim.schedules import learning_rate
from lab_utils.recipe import Recipe
from lab_utils.telemetry.reductions import Metric, to_values


@dataclass(frozen=True)
class Progress:
    """How far a run is; saved in every checkpoint."""

    step: int = 0  # finished steps
    num_tokens: int = 0
    skipped: int = 0  # steps dropped because a number was not finite
    skipped_in_a_row: int = 0


class Engine:
    """One rank of a training run.

    Args:
        recipe: what to do.
        accelerator: the device kind of this process.
        run_dir: a ``RunDirectory``; metrics, status and checkpoints go there.
        build: makes the parts of a rank; another than the recipe's own for trials of the engine alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        run_dir: Any,
        build: Callable[..., Parts] = build_parts,
    ) -> None:
        self.recipe, self.accelerator, self.run_dir = recipe, accelerator, run_dir
        self._build: Callable[..., Parts] = build
        self.parts: Parts | None = None
        self.requests = StopRequests(run_dir)
        self.progress = Progress()
        self.stop = Stop.NO

    def fit(self) -> str:
        """Train to the end of the schedule, or to a request to stop; returns the state that the run ends in.

        Raises:
            LabError: the run cannot go on; the last good checkpoint is in place.
        """
        self.open()
        schedule = self.recipe.schedule
        with self.requests.listening():
            while self.progress.step < schedule.steps:
                self.clock.restart()
                micro_batches = self.load(self.requests.pending())
                if self.stop:
                    break
                metrics = self.forward_backward(micro_batches)
                self.update(metrics)
                self.log(metrics)
                last = self.progress.step == schedule.steps
                if last or _due(self.progress.step, schedule.eval_every):
                    self.evaluate()
                if last or _due(self.progress.step, schedule.save_every):
                    self.save()
        return self.close()

    # -- before -------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Join the other ranks, build everything, and go on from the newest whole checkpoint if there is one."""
        recipe = self.recipe
        self.device = self.accelerator.setup(*_place(recipe.cluster.threads))
        self.rank, self.world = colossal.start(self.accelerator, recipe.seed)
        _make_deterministic()
        self.dp, self.micro_rows, self.accumulation = recipe.layout(self.world)
        self.layout = colossal.plugin(recipe.parallel, self.micro_rows)
        self.checkpoints = self.run_dir.path / "checkpoints"
        if self.rank == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_partial(self.checkpoints)
        self.writer = Writer(
            self.checkpoints,
            rank=self.rank,
            ranks=self.world,
            keep_last=recipe.schedule.keep_last,
            completed=lambda path: self.parts.telemetry.event("checkpoint", str(path)),
        )
        found, broken = checkpoint.newest(self.checkpoints, rank=self.rank, world=self.world)
        source = str(found / "model") if found else None
        self.assemble(source)
        self.accelerator.seed(recipe.seed * 1_000_003 + self.rank)
        self.clock = StepClock(self.accelerator.synchronize)
        self.saved_step = None
        peak = self.accelerator.peak(recipe.model.dtype) if self.rank == 0 else None
        self.peak = gather_objects(peak)[0]  # measured by one rank while the others wait
        self.window = Window(self.device, self.world, self.peak.flops)
        if self._tells:
            self.parts.telemetry.open(self.run_dir, recipe, self.accelerator, self.peak)
        if self.rank == 0:
            for problem in broken:
                self.parts.telemetry.event("checkpoint_skipped", problem)
        self.feed = feed_of(self)
        if found:
            self._resume(found)
            if self.rank == 0:
                self.parts.telemetry.event("resumed", f"from {found.name}")
        facts.record(self)
        self._status(state="running", world_size=self.world)

    def assemble(self, source: str | None) -> None:
        """The parts of this rank in its layout: model cut, filled (from ``source``, where given) and wrapped, optimizer
        made."""
        self.parts = self._build(
            self.recipe,
            self.accelerator,
            self.run_dir,
            rank=self.layout.data_rank,
            world=self.dp,
            device=self.device,
            source=source,
        )
        booster, self.model, self.optimizer = colossal.boost(
            self.parts.model, lambda: self.parts.optimizer(self.recipe.optim), self.layout
        )
        self.passes = Passes(self.parts, booster, self.model, self.optimizer, self.layout)
        self.model.train()

    # -- one step -----------------------------------------------------------------------------------------------------

    def load(self, request: Stop) -> list[Any]:
        """This rank's micro-batches of the next step; settles what the loss is divided by, and whether to go on."""
        self._before = (self.progress, self.feed.state_dict(), self.accelerator.rng_state())
        with self.clock.part(self.feed.part):
            if self.feed.part != "data" and self._stopped(request):
                return []  # a round of samples is not begun
            rows = self.feed.next_step()
            pieces = range(0, rows.rows, self.micro_rows)
            micro = [rows.slice(i, i + self.micro_rows).to(self.device) for i in pieces]
            micro = self.feed.complete(micro)
            self._settle(request, micro)
        if self.stop:
            self.feed.load_state_dict(self._before[1])  # as if the batch had not been drawn
            return []
        flops = self.parts.model.flops_per_token
        # The ranks of a pipeline see the same rows, and those that share rows too: each counts its share of them.
        share = 1.0 / (self.layout.pp_size * self.recipe.parallel.cp)
        self.local_flops = share * sum(flops(m.document_lengths()) * m.tokens for m in micro if m.tokens)
        self.local_positions = share * sum(m.input_ids.numel() for m in micro)
        return micro

    def _stopped(self, request: Stop) -> bool:
        """Whether any rank has been asked to stop; settles ``stop`` if so."""
        now, later = all_reduce(
            [float(request == Stop.NOW), float(request == Stop.AFTER_CHECKPOINT)], self.device
        )
        self.stop = Stop.AFTER_CHECKPOINT if later else Stop.NOW if now else Stop.NO
        return bool(self.stop)

    def _settle(self, request: Stop, micro: list[Any]) -> None:
        """One small all-reduce a step: requests to stop, whether a checkpoint under way has failed, and the counts that
        the global batch's means are over."""
        auxiliary = self.passes.auxiliary_counts(micro)
        own = [request == Stop.NOW, request == Stop.AFTER_CHECKPOINT, self.writer.failed]
        counts = [
            sum(map(self.parts.objective.denominator, micro)),
            sum(m.tokens for m in micro),
            *auxiliary.values(),
        ]
        # The other stages of a pipeline, and who shares these rows, have the same ones.
        own += counts if self.layout.tells_rows else [0.0] * len(counts)
        now, later, failed, count, tokens, *sums = all_reduce([float(value) for value in own], self.device)
        if failed:
            self.writer.finish()  # raises
        self.writer.look()
        self.stop = Stop.AFTER_CHECKPOINT if later else Stop.NOW if now else Stop.NO
        self.shares = Shares(count or 1.0, tokens or 1.0, dict(zip(auxiliary, sums, strict=True)))

    def forward_backward(self, micro_batches: list[Any]) -> dict[str, Metric]:
        """Gradients of the mean loss over the global batch."""
        with self.clock.part("forward_backward"):
            return {**self.passes.train(micro_batches, self.shares), **self.feed.metrics()}

    def update(self, metrics: dict[str, Metric]) -> None:
        """Clip and step; a step with a number that is not finite is dropped on every rank, and counted."""
        recipe, progress = self.recipe, self.progress
        with self.clock.part("optimizer"):
            loss = metrics.get("train/loss")  # of the last stage
            bad = loss is not None and not math.isfinite(float(loss.total))
            self.norm = self.optimizer.gradient_norm(bad)
            finite = math.isfinite(self.norm)
            self.rate = learning_rate(progress.step, recipe.schedule, recipe.optim.lr)
            if finite:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate
                clip = recipe.optim.clip_norm
                self.optimizer.step(min(1.0, clip / (self.norm + 1e-6)) if clip else 1.0)
            self.optimizer.zero_grad()
            if finish := getattr(self.parts.model, "finish_step", None):
                metrics |= finish(self.layout.sum_over_data, finite)
        self.progress = replace(
            progress,
            step=progress.step + 1,
            num_tokens=progress.num_tokens + int(self.shares.tokens),
            skipped=progress.skipped + (not finite),
            skipped_in_a_row=0 if finite else progress.skipped_in_a_row + 1,
        )
        if not finite:
            metrics.clear()  # its numbers would spoil the means of the logged line
            self._skipped()

    def _skipped(self) -> None:
        progress, limit = self.progress, self.recipe.schedule.max_skipped
        if progress.skipped_in_a_row == 1:
            self._last_good = self._before
        message = f"step {progress.step}: loss or gradient is not finite; the step was not applied"
        if self.rank == 0:
            self.parts.telemetry.event("skipped_step", message)
        if progress.skipped_in_a_row < limit:
            return
        self.progress, loader, generators = self._last_good
        self.feed.load_state_dict(loader)
        self.accelerator.set_rng_state(generators)
        self.save()
        self.writer.finish()
        raise RunError(
            f"Loss or gradient was not finite in {limit} steps in a row (schedule.max_skipped), up to step "
            f"{progress.step}; the last good state is saved as "
            f"{checkpoint.folder(self.checkpoints, self.progress.step).name}: "
            f"lower optim.lr or look at the data of these steps, then start a new run."
        )

    # -- between steps ------------------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, Metric]) -> None:
        """One line every ``tracking.log_every`` steps, over all steps since the last line and all ranks."""
        self.window.add(
            {**metrics, **self.clock.metrics()},
            tokens=self.shares.tokens,
            positions=self.local_positions,
            flops=self.local_flops,
            memory=self.accelerator.memory(),
        )
        step, last = self.progress.step, self.progress.step == self.recipe.schedule.steps
        if not (last or _due(step, self.recipe.tracking.log_every)):
            return
        values = self.window.close()
        if self._tells:
            self.parts.telemetry.log(step, {**values, **self._standing()})
            self._status()

    @property
    def _tells(self) -> bool:
        """Whether this rank has anything to tell: the run's first rank, and the first of another node of its chips."""
        return self.rank == 0 or self.parts.telemetry.node > 0

    def _standing(self) -> dict[str, float]:
        return {
            "train/grad_norm": self.norm,
            "train/learning_rate": self.rate,
            "train/skipped_steps": float(self.progress.skipped),
            "train/num_tokens": float(self.progress.num_tokens),
            "train/epoch": self.feed.epoch,
        }

    @torch.no_grad()
    def evaluate(self) -> None:
        """Metrics on the held-out data, as means over all of it and all ranks."""
        self.model.eval()
        found = self.feed.evaluate()
        self.model.train()
        reduced = over_ranks(found, self.device)
        if reduced and self.rank == 0:
            self.parts.telemetry.log(self.progress.step, to_values(reduced))

    def save(self) -> None:
        """A checkpoint of this step, unless there is one already; it is complete when ``writer`` says so.

        Raises:
            CheckpointError: on every rank, if any could not write this one or, in the background, the one before.
        """
        if self.saved_step == self.progress.step:
            return
        self._status()
        with self.clock.part("checkpoint"):
            self.writer.start(
                self.progress.step,
                model=self.parts.model,
                writes=self.layout.writes,
                optimizer_state=self.optimizer.named_state(),
                write_config=self.parts.write_config,
                state=self._state(),
            )
            if not self.recipe.schedule.async_save:
                self.writer.finish()
        self.saved_step = self.progress.step

    def _state(self) -> dict[str, Any]:
        """What ``state.json`` holds."""
        return {
            **asdict(self.progress),
            "loader": self.feed.state_dict(),
            "rng": gather_objects(self.accelerator.rng_state()),
            "layout": {
                "world_size": self.world,
                "dp": self.dp,
                "cp": self.recipe.parallel.cp,
                "ep": self.layout.ep_size,
                "pp": self.layout.pp_size,
                "zero": self.recipe.parallel.zero,
            },
            "dtype": self.recipe.model.dtype,
            "recipe": self.recipe.hash,
        }

    def _resume(self, found: Any) -> None:
        """Take up everything that a checkpoint holds; with the same ranks, the next step is as if never stopped."""
        checkpoint.load_optimizer(found, self.optimizer)
        state = checkpoint.read_state(found)
        self.progress = Progress(**{key: state[key] for key in asdict(self.progress)})
        self.saved_step = self.progress.step
        self.feed.load_state_dict(state["loader"])
        if len(state["rng"]) == self.world:
            self.accelerator.set_rng_state(state["rng"][self.rank])
        else:  # there is no rank of old whose generators these would be
            self.accelerator.seed(self.recipe.seed * 1_000_003 + self.rank + (self.progress.step << 20))

    # -- after --------------------------------------------------------------------------------------------------------

    def close(self) -> str:
        """Leave the run in its final state."""
        if self.stop == Stop.AFTER_CHECKPOINT:
            self.save()
        self.writer.finish()
        state = "stopped" if self.stop else "succeeded"
        self._status(state=state)
        if self._tells:
            self.parts.telemetry.close(state)
        return state

    def fail(self, sentence: str) -> None:
        """Close the sinks of a run that ends by an exception."""
        if self.parts is not None:
            self.writer.leave()
            self.parts.telemetry.event("failed", sentence)
            self.parts.telemetry.close("failed")

    def tell(self, sentence: str, kind: str = "note") -> None:
        """Something that takes a while, on the console and in the log."""
        if self.rank == 0:
            self.parts.telemetry.event(kind, sentence)

    def _status(self, **changes: Any) -> None:
        if self.rank == 0:
            self.run_dir.write_status(
                **changes, step=self.progress.step, total_steps=self.recipe.schedule.steps
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _place(threads: int | None) -> tuple[int, int | None, int]:
    """Arguments of ``Accelerator.setup``, from torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", 0)), threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _make_deterministic() -> None:
    """Same bits for the same recipe and layout, where the device has such kernels; elsewhere torch warns by name."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it only costs: nothing reads uninitialised memory
    )
