"""What one evaluation does, settled before any weights are read: it travels as JSON to the process that does it.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lab_utils.errors import RecipeError
from lab_utils.evaluation.held_out import find_split, split_specs
from lab_utils.evaluation.targets import Target, resolve
from lab_utils.models.load import load_tokenizer_path
from lab_utils.recipe.objectives import MODES
from lab_utils.registry import nearest

# Longest answer by mode, in tokens: the longest right answer of the shipped tasks, a tool call with two arguments,
# takes 70 or so; reasoning needs room before it.
BUDGETS = {"chat": 96, "thinking": 384, "max": 768}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """Settings of one evaluation.

    Attributes:
        target: the weights to evaluate; base: those to compare with; against: those of a pairwise comparison.
        reference: π_ref of ``reward_accuracy``; absent: the base.
        on: manifests as ``NAME:SPLIT``, splits settled.
        limit: most rows of each manifest.
        modes: reasoning modes of the questions, the first one gives the headline numbers.
        budgets: longest answer by mode, in tokens.
        samples, ks, temperature: answers drawn for pass@k, at each k; 0 samples: none.
        judge: "exact", or the weights of a generative judge.
        row_tokens: T of the rows that texts are packed into; running text is cut to it.
        accelerator, dtype, seed: device kind, working precision, seed of sampling.
    """

    target: Target
    on: tuple[str, ...]
    base: Target | None = None
    against: Target | None = None
    reference: Target | None = None
    judge: Target | None = None
    limit: int | None = None
    modes: tuple[str, ...] = ("chat",)
    budgets: tuple[int, ...] = (BUDGETS["chat"],)
    samples: int = 0
    ks: tuple[int, ...] = ()
    temperature: float = 1.0
    row_tokens: int = 1024
    accelerator: str = "auto"
    dtype: str = "float32"
    seed: int = 0

    def budget(self, mode: str) -> int:
        return self.budgets[self.modes.index(mode)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        tree = json.loads(text)
        for role in ("target", "base", "against", "reference", "judge"):
            tree[role] = tree[role] and Target(**tree[role])
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in tree.items()})


def make_plan(
    target: str,
    *,
    on: str | Sequence[str],
    split: str | None = None,
    base: str | bool | None = None,
    against: str | None = None,
    judge: str = "exact",
    reference: str | None = None,
    modes: str | Sequence[str] | None = None,
    budget: int | str | dict[str, int] | None = None,
    samples: int = 0,
    k: str | Sequence[int] | None = None,
    temperature: float = 1.0,
    **rest: Any,
) -> Plan:
    """A plan from what a user gives; see ``report.evaluate`` for the arguments.

    Raises:
        LabError: a target, manifest, split or mode that does not exist, numbers out of range, or an option that would
            change nothing.
    """
    weights = resolve(target)
    recipe = _recipe(weights)
    specs = []
    for spec in split_specs(on):
        manifest, chosen = find_split(spec, split)
        specs.append(f"{manifest.path or manifest.name}:{chosen}")
    wanted = _modes(modes) or (recipe.data.mode if recipe else "chat",)
    if against is None and judge != "exact":
        raise RecipeError("--judge compares two targets' answers: name the other one with --against.")
    plan = Plan(
        target=weights,
        on=tuple(dict.fromkeys(specs)),
        base=_base(weights, base),
        against=_beside(against, weights) if against else None,
        reference=_beside(reference, weights) if reference else None,
        judge=None if judge == "exact" else resolve(judge),
        modes=wanted,
        budgets=_budgets(budget, wanted),
        samples=samples,
        ks=_ks(k, samples),
        temperature=temperature,
        row_tokens=recipe.data.row_tokens if recipe else 1024,
        **rest,
    )
    return _checked(plan)


def _recipe(target: Target) -> Any:
    from lab_utils.runs.directory import RunDirectory

    return RunDirectory(target.run).recipe if target.run else None


def _base(target: Target, base: str | bool | None) -> Target | None:
    if base is False:
        return None
    if base is None or base is True:
        return target.base()
    return _beside(base, target)


def _beside(source: str, target: Target) -> Target:
    """Weights to compare with; those without a tokenizer of their own read what the target reads."""
    found = resolve(source)
    borrows = target.run and not found.run and load_tokenizer_path(found.source) is None
    return replace(found, run=target.run) if borrows else found


def _modes(modes: str | Sequence[str] | None) -> tuple[str, ...]:
    names = modes.split(",") if isinstance(modes, str) else list(modes or ())
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if name not in MODES:
            raise RecipeError(f"--modes: there is no reasoning mode '{name}': {nearest(name, list(MODES))}.")
    return tuple(dict.fromkeys(names))


def _budgets(budget: int | str | dict[str, int] | None, modes: tuple[str, ...]) -> tuple[int, ...]:
    """``96``, ``"96"`` (every mode), ``"chat=96,max=1024"`` or a dict; the rest stays as in BUDGETS."""
    given: dict[str, Any] = {}
    if isinstance(budget, dict):
        given = dict(budget)
    elif budget is not None:
        for part in str(budget).split(","):
            mode, equals, number = part.rpartition("=")
            given |= {mode.strip(): number} if equals else dict.fromkeys(modes, number)
    for mode, number in given.items():
        if mode not in modes:
            raise RecipeError(
                f"--budget names mode '{mode}', which is not evaluated: add it to --modes (now {', '.join(modes)})."
            )
        if not str(number).strip().isdigit() or int(number) < 1:
            raise RecipeError(f"--budget of mode {mode} is '{number}': give a number of tokens, 1 or more.")
    return tuple(int(given.get(mode, BUDGETS[mode])) for mode in modes)


def _ks(k: str | Sequence[int] | None, samples: int) -> tuple[int, ...]:
    if not samples:
        if k:
            raise RecipeError("--k needs sampled answers: give --samples, at least as many as the largest k.")
        return ()
    if k is None:
        return tuple(sorted({1, samples}))
    parts = k.split(",") if isinstance(k, str) else [str(each) for each in k]
    if not parts or not all(part.strip().isdigit() for part in parts):
        raise RecipeError(f"--k is '{k}': give numbers with commas, as 1,4.")
    ks = sorted({int(part) for part in parts})
    if ks[0] < 1 or ks[-1] > samples:
        raise RecipeError(f"--k asks for {ks}, but {samples} samples allow 1 … {samples}: raise --samples.")
    return tuple(ks)


def _checked(plan: Plan) -> Plan:
    if plan.samples < 0:
        raise RecipeError(f"--samples is {plan.samples}: give 0 (none) or more.")
    if plan.temperature <= 0:
        raise RecipeError(
            f"--temperature is {plan.temperature}: sampling needs more than 0 (greedy answers are always given)."
        )
    if plan.limit is not None and plan.limit < 1:
        raise RecipeError(f"--limit is {plan.limit}: give 1 or more, or leave it out for every row.")
    if plan.dtype not in DTYPES:
        raise RecipeError(f"--dtype: {nearest(plan.dtype, list(DTYPES))}, not '{plan.dtype}'.")
    return plan
