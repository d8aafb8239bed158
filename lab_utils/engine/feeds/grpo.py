"""Rows of GRPO: answers with their advantages, and what the sampling weights, sampler and reference say of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lab_utils.data.rows import PackedRows
from lab_utils.engine.feeds._pack import Text
from lab_utils.engine.feeds._rounds import Group, Rounds
from lab_utils.engine.frozen import frozen
from lab_utils.engine.reduce import all_reduce
from lab_utils.rollouts.advantages import Spread, advantages, length_penalties, reward_metrics, total_rewards
from lab_utils.rollouts.rewards import Answer, load_rewards


class GrpoFeed(Rounds):
    """Rounds of scored answers."""

    names = ("advantages", "sampler_logps")

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        section = engine.recipe.objective
        self.section = section
        self.rewards = load_rewards(section.rewards, ask=self.ask)
        self.reference = None
        if section.kl_weight:
            source = section.reference_source or engine.recipe.model.source
            self.reference = frozen(source, engine.recipe, engine.layout, engine.device)

    # -- sampling and scoring -----------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Prompts with answers; more of them, for as many rounds as the recipe allows, while groups teach nothing."""
        groups = super().groups()
        scored = self._score(groups)
        for _ in range(self.section.dynamic_sampling):
            own = sum(not uniform for uniform in scored.uniform_groups) * self.engine.layout.first_stage
            missing = self.rollout.prompts - int(all_reduce([float(own)], self.engine.device)[0])
            if missing <= 0:
                break
            unit = self.engine.dp
            more = self.sample(self.draw(-(-missing // unit) * unit))
            groups = groups + more
            scored = self._score(groups)
        self.scored = scored
        return groups

    def _score(self, groups: list[Group]) -> _Scored:
        """Rewards of all answers of these groups."""
        answers = [
            Answer.of(sample, group.mode, self.train.tokenizer)
            for group in groups
            for sample in group.samples
        ]
        rows = [group.row for group in groups for _ in group.samples]
        owner = [i for i, group in enumerate(groups) for _ in group.samples]
        scores = {name: reward.score(rows, answers) for name, (reward, _) in self.rewards.items()}
        weights = {name: weight for name, (_, weight) in self.rewards.items()}
        modes = [group.mode for group in groups for _ in group.samples]
        penalties = length_penalties([len(answer.tokens) for answer in answers], modes, self.rollout)
        totals = total_rewards(scores, weights, penalties)
        return _Scored(answers, rows, owner, scores, penalties, totals)

    # -- what is learned ----------------------------------------------------------------------------------------------

    def texts(self, groups: list[Group]) -> list[list[Text]]:
        section, scored = self.section, self.scored
        batch = None
        if section.scale == "batch":
            # The stages of a pipeline have the same answers: they count once.
            own = Spread.of(scored.totals if self.engine.layout.first_stage else [])
            batch = Spread(*all_reduce([own.count, own.total, own.squares], self.engine.device))
        found = advantages(
            scored.totals, scored.owner, baseline=section.baseline, scale=section.scale, batch=batch
        )
        metrics = reward_metrics(scored.totals, scored.owner, scored.scores, scored.penalties)
        self.found = {f"train/{leaf}": metric for leaf, metric in metrics.items()} | self.completions(groups)
        self._show(groups)
        by_group: list[list[Text]] = [[] for _ in groups]
        samples = [sample for group in groups for sample in group.samples]
        for owner, sample, value, uniform in zip(
            scored.owner, samples, found.values, found.uniform, strict=True
        ):
            if not (uniform and section.drop_uniform_groups) and sample.tokens:
                by_group[owner].append(self._text(groups[owner].prompt, sample, float(value)))
        return [[text for texts in part for text in texts] for part in self.by_update(by_group)]

    def _text(self, prompt: list[int], sample: Any, advantage: float) -> Text:
        ids = prompt + sample.tokens
        logps = np.zeros(len(ids), np.float32)
        logps[len(prompt) :] = sample.logprobs
        side: dict[str, Any] = {"advantages": advantage, "sampler_logps": logps}
        if sample.kept is not None and self.rollout.keep_sampling_mask:
            kept = np.full((len(ids), max(len(each) for each in sample.kept)), -1, np.int32)
            for t, each in enumerate(sample.kept, len(prompt)):
                kept[t, : len(each)] = each
            side["kept"] = kept
        if self.section.keep_routing:
            routing = sample.routing.numpy()
            # The last token is fed in training and was not while sampling: nothing depends on where it goes.
            side["routing"] = np.concatenate([routing, routing[-1:]])
        return Text(ids, len(prompt), side)

    def refine(self, micro: list[PackedRows]) -> list[PackedRows]:
        """Log-probabilities of the sampling weights, as training computes them, and of the reference."""
        engine, temperature = self.engine, self.rollout.temperature
        old = engine.passes.token_logps(micro, temperature)
        # A server may give none: then the trainer's own stand for them, and there is no gap to see.
        micro = [
            replace(
                rows,
                side={**rows.side, "sampler_logps": rows.side["sampler_logps"].where(~said.isnan(), logps)},
            )
            for rows, logps in zip(micro, old, strict=True)
            for said in [rows.side["sampler_logps"]]
        ]
        self._watch(micro, old)
        side = [{"old_logps": logps} for logps in old]
        if self.reference is not None:
            bare = [
                replace(rows, side={k: v for k, v in rows.side.items() if k != "routing"}) for rows in micro
            ]
            for each, logps in zip(side, self.reference.token_logps(bare, temperature), strict=True):
                each["reference_logps"] = logps
        return [replace(rows, side={**rows.side, **each}) for rows, each in zip(micro, side, strict=True)]

    def _watch(self, micro: list[PackedRows], old: list[torch.Tensor]) -> None:
        """The gap between what the sampler and what the trainer says of the same tokens."""
        gap = count = 0.0
        for rows, logps in zip(micro, old, strict=True):
            bears = rows.loss_weights != 0
            gap += float((rows.side["sampler_logps"] - logps)[bears].abs().sum())
            count += float(bears.sum())
        gap, count = all_reduce([gap, count], self.engine.device)
        if count and gap / count > self.rollout.gap_alarm:
            self.engine.tell(
                f"sampler and trainer differ by {gap / count:.3f} nat a token (rollout.gap_alarm="
                f"{self.rollout.gap_alarm}): look for stale weights, another precision or other sampling settings",
                kind="sampler_gap",
            )

    def _show(self, groups: list[Group]) -> None:
        scored, size = self.scored, self.rollout.group_size
        self.show(
            [
                {
                    "prompt": group.row["messages"][-1]["content"],
                    "mode": group.mode,
                    "completion": scored.answers[i * size].text,
                    "reward": float(scored.totals[i * size]),
                }
                for i, group in enumerate(groups)
            ]
        )


class _Scored:
    """Answers of some groups, one after the other, and their rewards."""

    def __init__(self, answers, rows, owner, scores, penalties, totals) -> None:
        self.answers, self.rows, self.owner = answers, rows, owner
        self.scores, self.penalties, self.totals = scores, penalties, totals

    @property
    def uniform_groups(self) -> list[bool]:
        """Whether the answers of a group all have one reward."""
        by_group: dict[int, list[float]] = {}
        for owner, total in zip(self.owner, self.totals, strict=True):
            by_group.setdefault(owner, []).append(float(total))
        return [max(values) - min(values) < 1e-9 for values in by_group.values()]


FEED = GrpoFeed
