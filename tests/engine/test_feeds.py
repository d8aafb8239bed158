"""Rounds of samples in a real run: they teach something, and a round that was cut short is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from feed_jobs import BASE, few, lines, weights, worked
from safetensors.torch import load_file
from small_v4 import write_source

from lab_utils.errors import LabError
from lab_utils.recipe import DistillObjective, GrpoObjective, PreferenceObjective, Recipe
from lab_utils.recipe.recipe import OBJECTIVES
from lab_utils.runs.checks import preflight
from lab_utils.runs.directory import RunDirectory
from lab_utils.telemetry.names import lookup

pytestmark = pytest.mark.slow
# The base model seldom ends an answer: a reward for ending one differs within most groups.
GRPO: dict[str, Any] = {
    "objective": {"kind": "grpo", "rewards": [{"name": "length", "options": {"longest": 16, "margin": 12}}]},
    "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 16},
    "data": {"train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}], "row_tokens": 384},
    "schedule": {"steps": 4, "batch_tokens": 1536, "warmup_steps": 0, "shape": "constant"},
}
GAP = "train/sampling/sampling_logp_difference/max"
TEXTS = {"train": [{"manifest": "ascent-tasks-sft", "split": "validation"}], "row_tokens": 512}
PAIRS = {"train": [{"manifest": "ascent-tasks-preference", "split": "validation"}], "row_tokens": 1024}
# Both updates of a round, twice; and a run that ends between the two updates of the first round. Without a baseline
# every answer counts; ε keeps Adam from making rounding errors of gradients near zero as large as any other step.
WHOLE = {
    **GRPO,
    "objective": {
        **GRPO["objective"],
        "updates_per_rollout": 2,
        "baseline": "none",
        "scale": "none",
        "drop_uniform_groups": False,
    },
    "optim": {"lr": 3e-4, "eps": 1e-6},
}
BEGUN = {**WHOLE, "schedule": {**GRPO["schedule"], "steps": 1}}
FREE = {"steps": 3, "batch_tokens": 4096, "warmup_steps": 0}
LAYOUT_FREE = {
    "kto": {
        "objective": {"kind": "preference", "loss": "kto", "reference": "live"},
        "data": PAIRS,
        "optim": {"lr": 1e-4},
        "schedule": FREE,
    },
    "distill": {
        "objective": {"kind": "distill", "teachers": [{"source": "preset:tiny"}], "on_policy": False},
        "data": TEXTS,
        "optim": {"lr": 1e-4},
        "schedule": FREE,
    },
}


# -- one launch for each number of ranks ---------------------------------------------------------------------------


def small_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every objective in all its losses on a few rows and a tiny model, with everything that adds a metric."""
    sets = {
        name: few(folder, f"ascent-tasks-{name}", rows)
        for name, rows in (("sft", 4), ("preference", 4), ("prompts", 8))
    }
    source = write_source(folder / "small")

    def tree(data: str, held_out: tuple[str, ...], steps: int = 1, **more: Any) -> dict[str, Any]:
        return {
            "model": {"source": source, "mtp_loss": 0.1, "balance_loss": 0.01, "balance_rate": 0.001},
            "data": {
                "train": [sets[data]],
                "validation": [sets[each] for each in held_out],
                "row_tokens": 1024,
            },
            "schedule": {"steps": steps, "batch_tokens": 1024, "warmup_steps": 0},
            **more,
        }

    rollout = {"prompts": 2, "group_size": 2, "max_new_tokens": 4}
    runs = {"sft": tree("sft", ("sft", "prompts")), "reward": tree("preference", ("preference",))}
    runs["reward"] |= {"objective": {"kind": "reward"}, "model": {"source": source}}  # it has no head for MTP
    for loss in losses_of(PreferenceObjective):
        objective = {"kind": "preference", "loss": loss}
        if loss == "robust":
            objective["label_smoothing"] = 0.1
        # The others' reference comes from the cache.
        if loss == "kto":
            objective["reference"] = "live"
        runs[f"preference-{loss}"] = tree("preference", ("preference",), objective=objective)
    for loss in losses_of(GrpoObjective):
        objective = {
            "kind": "grpo",
            "loss": loss,
            "kl_weight": 0.1,
            "sequence_mask": 0.1,
            "drop_uniform_groups": False,
            "rewards": [{"name": "exact"}, {"name": "format"}],
        }
        more = {"rollout": {**rollout, "modes": ["chat", "max"], "length_penalty": {"chat": 0.1}}}
        runs[f"grpo-{loss}"] = tree("prompts", ("prompts",), steps=2, objective=objective, **more)
    for loss in losses_of(DistillObjective):
        teachers = [{"source": source, "domains": ["arithmetic"]}, {"source": "base:tiny"}]
        objective = {"kind": "distill", "loss": loss, "teachers": teachers}
        runs[f"distill-{loss}"] = tree("prompts", ("prompts",), objective=objective, rollout=rollout)
    objective = {"kind": "distill", "teachers": [{"source": source}], "on_policy": False}
    runs["distill-texts"] = tree("sft", ("sft", "prompts"), objective=objective)
    return runs


def losses_of(section: type) -> tuple[str, ...]:
    return get_args(section.model_fields["loss"].annotation)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("feeds")


@pytest.fixture(scope="module")
def one_rank(root) -> dict[str, RunDirectory]:
    (root / "data").mkdir()
    runs = {"whole": WHOLE, "begun": BEGUN, "halves-1=begun": WHOLE, **LAYOUT_FREE}
    return worked(root / "one", runs | small_runs(root / "data"))


@pytest.fixture(scope="module")
def two_ranks(root, one_rank) -> dict[str, RunDirectory]:
    root = root / "two"
    schedule = {"batch_tokens": 2048, "warmup_steps": 0, "shape": "constant"}
    plain = {"data": TEXTS, "schedule": {**schedule, "steps": 12}, "optim": {"lr": 1e-3}}
    teachers = [{"source": str(root / "teacher" / "checkpoints" / "step-000012" / "model")}]
    on_policy = {
        "objective": {"kind": "distill", "teachers": teachers},
        "rollout": {"prompts": 16, "group_size": 4, "max_new_tokens": 16},
        "data": {**GRPO["data"], "row_tokens": 512},
        "schedule": {**schedule, "steps": 14},
    }
    off_policy = {
        "objective": {"kind": "distill", "teachers": teachers, "on_policy": False},
        "schedule": {**schedule, "steps": 6},
    }
    runs = {"teacher": plain, "on": {**plain, **on_policy}, "off": {**plain, **off_policy}}
    return worked(root, {**runs, "halves-2=../one/begun": WHOLE}, ranks=2)


@pytest.fixture(scope="module")
def four_ranks(root) -> dict[str, RunDirectory]:
    cut = {kind: {**tree, "parallel": {"ep": 2, "pp": 2}} for kind, tree in LAYOUT_FREE.items()}
    return worked(root / "four", cut, ranks=4)


# -- what comes of them --------------------------------------------------------------------------------------------


def test_grpo_moves_weights_by_samples_that_its_own_passes_agree_with(one_rank):
    rows = lines(one_rank["whole"])
    rounds = [row for row in rows if "train/reward" in row]
    assert len(rounds) == 2 and any(row["train/reward_std"] > 0 for row in rounds)
    gaps = [row[GAP] for row in rows if GAP in row]
    assert len(gaps) == 4 and max(gaps) < 1e-3
    assert all(row["train/grad_norm"] > 0 for row in rows if GAP in row)
    before = load_file(next((Path("lab_utils/models/shipped/tiny")).glob("*.safetensors")))
    after = weights(one_rank["whole"])
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name].float())]
    assert len(moved) > 100


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_within_a_round_goes_on_with_the_same_samples(request, one_rank, ranks):
    halves = request.getfixturevalue(f"{'one' if ranks == 1 else 'two'}_rank{'s' * (ranks > 1)}")[
        f"halves-{ranks}"
    ]
    # Nothing more was sampled of the round that the checkpoint lies in.
    logs = list((one_rank["begun"].path / "rollouts").glob("*.log"))
    assert logs
    for log in logs:
        path = halves.path / "rollouts" / log.name
        assert not path.exists() or path.stat().st_size == log.stat().st_size
    expected, found = weights(one_rank["whole"]), weights(halves)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
            assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize(("kind", "factor"), [("on", 0.75), ("off", 0.5)])
def test_distillation_draws_nearer_to_its_teacher(two_ranks, kind, factor):
    """The teacher is the student after some fine-tuning; on samples and on given texts their divergence falls."""
    divergence = [row["train/teacher_kl"] for row in lines(two_ranks[kind]) if "train/teacher_kl" in row]
    assert sum(divergence[-3:]) < factor * sum(divergence[:3]), divergence


@pytest.mark.parametrize("kind", LAYOUT_FREE)
def test_an_objective_gives_the_same_losses_under_expert_and_pipeline_parallelism(one_rank, four_ranks, kind):
    """A live reference, the look at a whole batch that kto takes, and a teacher go through the stages too."""
    expected, found = (
        [row["train/loss"] for row in lines(runs[kind]) if "train/loss" in row]
        for runs in (one_rank, four_ranks)
    )
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 3


# What a kind has to have logged, or the next test would hold nothing.
TELLING = {
    "sft": {"eval/loss", "eval/exact_match", "moe/cv_mean", "train/mtp_loss", "train/indexer_kl"},
    "preference": {"train/rewards/margins", "eval/rewards/margins", "eval/logps/chosen"},
    "reward": {"train/margin", "eval/accuracy"},
    "grpo": {"train/rewards/length_penalty/mean", "train/masked_sequences", "train/kl", "eval/exact_match"},
    "distill": {"train/teacher_kl"},
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_no_objective_logs_what_the_list_of_metrics_has_not(one_rank, kind):
    runs = {name: run for name, run in one_rank.items() if run.recipe.objective.kind == kind}
    logged = {name: {key for row in lines(run) for key in row if "/" in key} for name, run in runs.items()}
    assert set().union(*logged.values()) >= TELLING[kind]
    unknown = {name: sorted(key for key in keys if lookup(key) is None) for name, keys in logged.items()}
    assert not {name: keys for name, keys in unknown.items() if keys}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective.keep_routing": True}, r"objective\.keep_routing needs a record"),
        ({"rollout.top_p": 0.9}, r"rollout\.keep_sampling_mask needs a record"),
        ({"rollout.top_k": 5, "rollout.keep_sampling_mask": False}, None),
    ],
)
def test_records_that_no_server_gives_are_refused(tmp_path, changes, says):
    server = {**GRPO["rollout"], "source": "server", "server": "http://127.0.0.1:9/v1"}
    recipe = Recipe.parse({**BASE, **GRPO, "rollout": server}).with_changes(changes)
    if says is None:
        return preflight(recipe, tmp_path)
    with pytest.raises(LabError, match=says):
        preflight(recipe, tmp_path)
    preflight(Recipe.parse({**BASE, **GRPO}).with_changes(changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout.prompts": 3, "cluster.nproc": 2}, "rollout.prompts=3 cannot be shared evenly by 2"),
        ({"objective.rewards.0.options": {"longst": 3}}, "did you mean 'longest'"),
        ({"objective.rewards.0.name": "exat"}, "did you mean 'exact'"),
        ({"data.validation": [{"manifest": "ascent-tasks-sft"}]}, "ascent-tasks-sft has format messages"),
    ],
)
def test_rollouts_that_cannot_be_are_refused_before_a_start(tmp_path, changes, says):
    recipe = Recipe.parse({**BASE, **GRPO}).with_changes(changes)
    with pytest.raises(LabError, match=says):
        preflight(recipe, tmp_path)
