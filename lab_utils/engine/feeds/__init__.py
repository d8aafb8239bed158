"""What a step trains on: one file an objective kind whose rows need more than the loader gives; others take ``Feed``.

A feed belongs to the engine: it may run the model to sample, and other models to be compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab_utils.data.rows import PackedRows
from lab_utils.registry import load, members
from lab_utils.telemetry.reductions import Metric, reduce_metrics

if TYPE_CHECKING:
    from lab_utils.engine.engine import Engine


class Feed:
    """Rows of the loader as they are; the base of all feeds.

    Attributes:
        part: the part of a step's time (``StepClock``) that making rows belongs to.
    """

    part = "data"

    def __init__(self, engine: Engine) -> None:
        self.engine, self.train, self.validation = engine, engine.parts.train, engine.parts.validation

    def next_step(self) -> PackedRows:
        """This rank's rows of the next step, on the host; equally many micro-batches on every rank."""
        return self.train.next_step()

    def complete(self, micro: list[PackedRows]) -> list[PackedRows]:
        """The same micro-batches, on the device, with what the objective needs besides."""
        return micro

    def metrics(self) -> dict[str, Metric]:
        """Of this rank, on how the rows of the last step came about."""
        return {}

    def evaluate(self) -> dict[str, Metric]:
        """This rank's ``eval/…`` on the held-out data, by the current weights."""
        engine, found = self.engine, []
        if self.validation is not None:
            batches = [rows.to(engine.device) for rows in self.validation.batches(engine.micro_rows)]
            found = [
                {key.replace("train/", "eval/", 1): metric for key, metric in part.items()}
                for part in engine.passes.look(self.complete(batches))
            ]
        return reduce_metrics([*found, *self._answers()])

    def _answers(self) -> list[dict[str, Metric]]:
        """Metrics of the answers to this rank's share of the held-out prompts."""
        engine, questions = self.engine, self.engine.parts.questions
        if not questions:
            return []
        from lab_utils.engine.sampling import lockstep
        from lab_utils.evaluation.answering import evaluate_model

        rollout = engine.recipe.rollout
        return [
            evaluate_model(
                engine.parts.model,
                engine.parts.encoding,
                questions[engine.layout.dp_rank :: engine.layout.dp_size],
                families=sorted({row["verify"]["family"] for row in questions}),
                mode=engine.recipe.data.mode,
                budget=rollout.max_new_tokens if rollout else 96,
                lockstep=lockstep(engine),
            )
        ]

    @property
    def epoch(self) -> float:
        return float(self.train.epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.train.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train.load_state_dict(state)


def feed_of(engine: Engine) -> Feed:
    """The feed of an engine's objective."""
    kind = engine.recipe.objective.kind
    return (load(__name__, kind).FEED if kind in members(__name__) else Feed)(engine)
