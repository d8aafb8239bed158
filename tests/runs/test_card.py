"""The run card: every figure from a run directory of known numbers, and what it says where files are absent or damaged.

The run is a stand-in: its files are written here, with numbers that a reader can add up.
"""

import hashlib
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from lab_utils.errors import RunError
from lab_utils.recipe import Recipe
from lab_utils.runs import card
from lab_utils.runs.card import _charts, _history, _words, write
from lab_utils.runs.directory import RunDirectory, create

BEGAN = 1_800_000_000.0
KEYS = (
    "data",
    "optimizer",
    "layout",
    "hardware",
    "wall_clock_s",
    "tokens",
    "tokens_per_s",
    "mfu",
    "energy_kwh",
    "evaluation",
    "audit",
    "software",
    "reproduce",
)
RECIPE = {
    "name": "known",
    "seed": 7,
    "model": {"source": "base:tiny", "dtype": "bfloat16", "checkpointing": "full"},
    "data": {
        "train": [{"manifest": "ascent-tasks-sft", "families": ["lists"], "weight": 0.5}],
        "validation": [{"manifest": "ascent-tasks-sft", "split": "validation"}],
        "row_tokens": 64,
    },
    "optim": {"kind": "muon", "lr": 3e-4, "momentum": 0.9, "weight_decay": 0.1},
    "schedule": {"steps": 40, "batch_tokens": 1024, "warmup_steps": 4, "shape": "wsd"},
    "cluster": {"nproc": 4, "nodes": 2, "accelerator": "npu"},
    "parallel": {"pp": 2, "ep": 2},
}


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of two attempts on two nodes of four dies: 40 steps in lines of 10, the second attempt from step 20."""
    run = create(Recipe.parse(RECIPE), tmp_path)
    layout = {"dp": 4, "ep": 2, "pp": 2, "virtual_stages": 1, "zero": 1, "offload": False, "micro_rows": 1}
    attempt = {
        "ranks": 8,
        "nodes": ["npu-001.hall", "npu-002.hall"],
        "kind": "npu",
        "device": "Ascend910_9391",
        "device_gib": 64.0,
        "peak_flops": 376e12,
        "peak_source": "published",
        "cann": "9.1.0",
        "driver": "25.3.rc1",
        "environment": {"HCCL_CONNECT_TIMEOUT": "1800"},
        "layout": {**layout, "accumulation": 4},
    }
    facts = {
        "attempts": [{"opened": BEGAN, **attempt}, {"opened": BEGAN + 1000, **attempt}],
        "data": {
            "train": [{"units": 1200, "tokens": 50_000}],
            "validation": [{"units": 40, "tokens": 1_000}],
            "questions": 0,
        },
    }
    keep(run, "facts.json", facts)
    keep(run, "provenance.json", PROVENANCE)
    # Lines of 10 steps: 1 s a step and 100 tokens/s, then 2 s and 300 tokens/s after the resume.
    lines = [(10, 10, 1, 100), (20, 20, 1, 100), (30, 30, 1, 100), (30, 1020, 2, 300), (40, 1040, 2, 300)]
    for step, at, seconds, rate in lines:
        row = {
            "time": BEGAN + at,
            "train/loss": 8.0 / step,
            "train/num_tokens": 100.0 * step if at < 1000 else 2000.0 + 600.0 * (step - 20),
            "train/epoch": step / 20,
            "train/skipped_steps": 1.0,
            "perf/step_time": seconds,
            "perf/time/data": 0.25 * seconds,
            "perf/time/forward_backward": 0.75 * seconds,
            "perf/tokens_per_s": rate,
            "perf/tokens_per_s_per_chip": rate / 8,
            "perf/mfu": rate / 1000,
            "chip/util_mean": 50.0 if at < 1000 else 90.0,
            "chip/util_min": 40.0 if at < 1000 else 80.0,
            "chip/power": 300.0,
            "mem/allocated_peak": 10.0 + step / 10,
        }
        run.append("metrics.jsonl", {"step": step, **row})
        if at in (20, 1040):
            held_out = {"time": BEGAN + at + 1, "eval/loss": 10.0 / step}
            run.append("metrics.jsonl", {"step": step, **held_out})
    event(run, 22, "checkpoint", "step-000020")
    event(run, 31, "sink_dropped", "W&B is off")
    event(run, 500, "stop_requested", "checkpoint=True")
    event(run, 1001, "resumed", "from step-000020")
    event(run, 1042, "checkpoint", "step-000040")
    status = {"created": BEGAN - 60, "started": BEGAN + 1000, "finished": BEGAN + 1050, "step": 40}
    keep(
        run,
        "status.json",
        {**status, "state": "succeeded", "launcher": "slurm", "job": "17", "world_size": 8},
    )
    return run


PROVENANCE = {
    "recipe_hash": "ab" * 32,
    "data": {
        "ascent-tasks-sft": {
            "version": "3",
            "licence": "Apache-2.0",
            "provenance": "Made here.",
            "format": "messages",
            "splits": {
                "train": {
                    "kind": "file",
                    "files": [
                        {"path": "a.jsonl", "sha256": "1" * 64, "bytes": 10, "rows": 3},
                        {"path": "b.jsonl", "sha256": "2" * 64, "bytes": 20, "rows": 4},
                    ],
                },
                "validation": {
                    "kind": "generated",
                    "generator": "tasks_messages",
                    "seed": 5,
                    "sha256": "3" * 64,
                    "bytes": 30,
                    "rows": 5,
                },
            },
            "sha256": {"a.jsonl": "1" * 64, "b.jsonl": "2" * 64},
        }
    },
    "git": {"commit": "c" * 40, "branch": "main", "dirty": True, "untracked": ["x"], "diff": "-a\n+b\n"},
    "python": "3.11.7",
    "platform": "Linux",
    "host": "login-1",
    "cwd": "/work",
    "packages": {"torch": "2.12.0", "torch_npu": "2.12.0", "colossalai": "0.5.0", "zlib": "1"},
    "lock_sha256": "4" * 64,
    "site": {
        "fabric": "HCCS and RoCE",
        "cabinets": {"A01": ["npu-001"], "A02": ["npu-00[2-9]"], "B01": ["npu-1*"]},
    },
}


def keep(run, name, tree):
    (run.path / name).write_text(json.dumps(tree))


def event(run, at, kind, message):
    run.append("events.jsonl", {"time": BEGAN + at, "kind": kind, "message": message})


def checkpoint(run):
    """Two ranks' optimizer files: one tensor whole, one in rows of two ranks; weights and their hash."""
    folder = run.path / "checkpoints" / "step-000040"
    for part in ("model", "optimizer"):
        (folder / part).mkdir(parents=True)
    wide, tall = np.zeros((4, 6), np.float32), np.zeros((8, 5), np.float32)
    moments = {
        "model.norm.weight/master": np.zeros(6, np.float32),
        "model.norm.weight/step": np.zeros((), np.float32),
    }
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({"lm_head.weight/master": tall, **moments}, folder / "optimizer" / "part-00000-000.safetensors")
    save_file({f"{name}[0:4]/master": wide}, folder / "optimizer" / "part-00000-001.safetensors")
    save_file(
        {f"{name}[4:10]/master": np.zeros((6, 6), np.float32)},
        folder / "optimizer" / "part-00001-000.safetensors",
    )
    config = {"model_type": "llama", "architectures": ["Llama"], "num_hidden_layers": 1, "vocab_size": 8}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    keep(run, "checkpoints/step-000040/MANIFEST.json", {"model/model.safetensors": {"sha256": "5" * 64}})
    (folder / "COMPLETE").touch()


def measure(value, low, high, n):
    return {"value": value, "interval": [low, high], "n": n, "by_family": {}}


def evaluate(run):
    report = {
        "version": 2,
        "target": {"name": run.name, "checkpoint": "step-000040"},
        "exact_match": measure(0.75, 0.7, 0.8, 400),
        "perplexity": None,
        "base": {"source": "base:tiny", "exact_match": measure(0.1, 0.05, 0.15, 400)},
        "manifests": [{"name": "ascent-tasks-prompts", "split": "test", "format": "prompt", "rows": 400}],
        "settings": {"modes": ["chat"]},
        "notes": {"perplexity": "No text was given."},
    }
    keep(run, "report.json", report)


def audit(run, unchanged=()):
    rows = [
        {"name": name, "shape": [2], "changed": name not in unchanged, "relative_change": change}
        for name, change in (("a", 0.5), ("b", 0.0 if "b" in unchanged else 1e-3), ("c", 0.1))
    ]
    report = {
        "checkpoint": "step-000040",
        "tensors": 3,
        "changed": 3 - len(unchanged),
        "unchanged": list(unchanged),
        "indexer_changed": None,
        "by_tensor": rows,
        "buffers": [],
    }
    keep(run, "audit.json", report)


def chips(run, watts=450.0):
    """Samples of one node of two chips, 10 s apart, over the first attempt's 30 s."""
    (run.path / "chips").mkdir(exist_ok=True)
    for n in range(4):
        power = {} if watts is None else {"chip/power_total": 2 * watts, "joules": 20 * watts * n}
        chips = [{"index": i, **({} if watts is None else {"power": watts})} for i in range(2)]
        run.append("chips/node-0.jsonl", {"time": BEGAN + 10 * n, **power, "chips": chips})


# -- figures -------------------------------------------------------------------------------------------------


def test_time_is_that_of_all_attempts_without_the_pause_between_them(run):
    found = card.card(run)
    # The first ends with its last line or event (a request to stop is no sign of life), the second as the job did.
    assert [a["seconds"] for a in found["attempts"]] == [31.0, 50.0]
    assert found["wall_clock_s"] == 81.0
    assert (found["started"], found["ended"], found["queued_s"]) == (BEGAN, BEGAN + 1050, 60.0)


def test_speed_is_tokens_over_the_time_in_steps_and_mfu_has_its_denominator(run):
    found = card.card(run)
    # 20 steps of 1 s at 100 tokens/s, then 20 of 2 s at 300: 2,000 + 12,000 tokens in 60 s.
    assert found["steps"] == found["planned_steps"] == 40
    assert found["tokens"] == 14_000
    assert found["tokens_per_s"] == pytest.approx(14_000 / 60)
    assert found["throughput"]["median"]["tokens_per_s"] == 200.0
    assert found["throughput"]["mean"]["tokens_per_s_per_chip"] == pytest.approx(14_000 / 60 / 8)
    assert found["mfu"] == pytest.approx((20 * 0.1 + 40 * 0.3) / 60)
    assert found["throughput"]["seconds_in_steps"] == 60.0
    assert found["throughput"]["step_time_s"] == {"mean": 1.5, "median": 1.5}
    assert found["throughput"]["end_to_end_tokens_per_s"] == pytest.approx(14_000 / 81)
    assert found["throughput"]["time_split"] == pytest.approx({"data": 0.25, "forward_backward": 0.75})
    assert (found["hardware"]["peak_flops"], found["hardware"]["peak_source"]) == (376e12, "published")


def test_chips_and_energy(run):
    chips(run)
    found = card.card(run)
    assert found["chips"]["util_mean_percent"] == 70.0 and found["chips"]["util_min_percent"] == 40.0
    assert found["chips"]["power_mean_w"] == 300.0 and found["chips"]["allocated_peak_gib"] == 14.0
    # 900 W for 30 s.
    assert found["energy_kwh"] == pytest.approx(900 * 30 / 3.6e6)
    assert found["energy"]["joules_per_token"] == pytest.approx(900 * 30 / 14_000)
    assert found["energy"]["chips"] == 2 and 0 < found["energy"]["covered"] < 1
    assert "energy_kwh" not in found["not_recorded"]


def test_power_that_nobody_reports_is_null_and_not_zero(run):
    chips(run, watts=None)
    found = card.card(run)
    assert found["energy_kwh"] is None and found["energy"] is None
    assert "power" in found["not_recorded"]["energy_kwh"]


def test_a_run_ends_without_reading_gigabytes_of_samples_again(run, monkeypatch):
    chips(run)
    monkeypatch.setattr(_history, "CHIP_BYTES", 2)
    monkeypatch.setattr(
        "lab_utils.telemetry.chip_log._samples", lambda path: pytest.fail("the samples are read")
    )
    found = card.card(run, brief=True)
    assert found["energy_kwh"] == pytest.approx(900 * 30 / 3.6e6), "the node's own sum"
    assert found["energy"]["chips"] == 2 and "covered" not in found["energy"]


def test_data_have_split_version_licence_and_the_hash_of_every_file(run):
    found = card.card(run)["data"]
    train, validation = found["sources"]
    assert (train["version"], train["licence"], train["split"], train["families"]) == (
        "3",
        "Apache-2.0",
        "train",
        ["lists"],
    )
    assert [f["sha256"][0] for f in train["files"]] == ["1", "2"] and train["rows"] == 7
    assert (train["units"], train["tokens_per_pass"], train["weight"]) == (1200, 50_000, 0.5)
    assert validation["files"][0] == {
        "path": "tasks_messages, seed 5",
        "sha256": "3" * 64,
        "bytes": 30,
        "rows": 5,
    }
    assert found["epochs"] == 2.0


def test_hardware_counts_nodes_packages_and_the_cabinets_that_the_site_names(run):
    found = card.card(run)["hardware"]
    assert (found["chips"], found["packages"], found["nodes"], found["ranks_per_node"]) == (8, 4, 2, 4)
    assert found["cabinets"] == ["A01", "A02"] and found["fabric"] == "HCCS and RoCE"
    assert found["superpods"] is None and found["storage"] is None, "nothing says it: nothing is guessed"
    assert (found["launcher"], found["job"]) == ("slurm", "17")


def test_layout_is_the_ranks_own_and_says_where_an_earlier_attempt_had_another(run):
    facts = json.loads((run.path / "facts.json").read_text())
    facts["attempts"][0]["layout"] = {**facts["attempts"][0]["layout"], "pp": 1, "dp": 8}
    keep(run, "facts.json", facts)
    found = card.card(run)["layout"]
    assert [found[k] for k in ("ranks", "dp", "ep", "pp", "zero", "micro_rows", "accumulation")] == [
        8,
        4,
        2,
        2,
        1,
        1,
        4,
    ]
    assert [(each["pp"], each["dp"]) for each in found["earlier"]] == [(1, 8)]


def test_optimizer_has_every_setting_and_which_tensors_are_whose(run):
    checkpoint(run)
    found = card.card(run)
    optimizer = found["optimizer"]
    assert (optimizer["kind"], optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (
        "muon",
        3e-4,
        0.9,
        0.1,
    )
    assert optimizer["schedule"]["shape"] == "wsd" and optimizer["schedule"]["decay_fraction"] == 0.2
    # 10 × 6 of a matrix whose rows two ranks kept; head and norm are AdamW's.
    assert optimizer["groups"] == {
        "adamw": {"tensors": 2, "matrices": None, "parameters": 46},
        "muon": {"tensors": 1, "matrices": 1, "parameters": 60},
    }
    assert (found["model"]["parameters"], found["model"]["tensors"]) == (106, 3)
    assert found["model"]["checkpoint_sha256"] == {"model.safetensors": "5" * 64}


def test_adamw_alone_shows_no_setting_of_muon(tmp_path):
    run = create(Recipe.parse({**RECIPE, "optim": {"lr": 1e-3}}), tmp_path)
    assert {"momentum", "update_rms"}.isdisjoint(card.card(run)["optimizer"])


def test_evaluation_before_and_after_and_the_held_out_loss(run):
    evaluate(run)
    found = card.card(run)["evaluation"]
    assert found["measures"]["exact_match"]["before"]["value"] == 0.1
    assert found["measures"]["exact_match"]["after"] == measure(0.75, 0.7, 0.8, 400)
    assert "perplexity" not in found["measures"] and found["base"] == "base:tiny"
    assert found["during"]["eval/loss"] == {"first": 0.5, "first_step": 20, "last": 0.25, "last_step": 40}


@pytest.mark.parametrize("unchanged", [(), ("b",)])
def test_the_audit_says_whether_every_weight_moved(run, unchanged):
    audit(run, unchanged)
    found = card.card(run)["audit"]
    assert found["every_weight_moved"] is (not unchanged)
    assert (found["changed"], found["tensors"], found["unchanged"]) == (
        3 - len(unchanged),
        3,
        list(unchanged),
    )
    assert found["least"]["name"] == "b" and found["most"]["name"] == "a"


def test_stability_counts_restarts_skips_alerts_and_steps_done_twice(run):
    found = card.card(run)["stability"]
    assert (found["skipped_steps"], found["checkpoints"], found["alert_count"]) == (1.0, 2, 1)
    assert found["alerts"][0]["message"] == "W&B is off"
    assert found["lines_repeated_after_resumes"] == 1, "the line of step 30"


def test_loss_at_tenths_of_the_run(run):
    found = {row["percent"]: row for row in card.card(run)["loss"]}
    assert found[20]["train/loss"] == 0.8 and found[50]["eval/loss"] == 0.5
    assert found[100] == {"percent": 100, "step": 40, "train/loss": 0.2, "eval/loss": 0.25}


def test_software_and_the_command_that_repeats_the_run(run):
    found = card.card(run)
    software, again = found["software"], found["reproduce"]
    assert software["main"] == {"torch": "2.12.0", "torch_npu": "2.12.0", "colossalai": "0.5.0"}
    assert (software["cann"], software["driver"], software["dirty"], software["diff_lines"]) == (
        "9.1.0",
        "25.3.rc1",
        True,
        2,
    )
    recipe = (run.path / "recipe.yaml").read_bytes()
    assert again["recipe_sha256"] == hashlib.sha256(recipe).hexdigest() and again["recipe"] == recipe.decode()
    assert (again["seed"], again["commit"], again["lock_sha256"]) == (7, "c" * 40, "4" * 64)
    assert again["recipe_hash"] == "ab" * 32, "as it was launched"
    assert again["command"] == f"lab run {run.path}/recipe.yaml"
    assert again["commands"][:3] == [
        f"lab card {run.name} --diff > changes.diff",
        f"git checkout {'c' * 40}",
        "git apply changes.diff",
    ]


# -- what is missing -----------------------------------------------------------------------------------------


def test_a_run_of_nothing_but_a_recipe_has_a_card_that_says_so(tmp_path):
    run = create(Recipe.parse(RECIPE), tmp_path)
    found = card.card(run)
    assert set(KEYS) <= found.keys()
    for key in ("wall_clock_s", "tokens", "tokens_per_s", "mfu", "energy_kwh", "evaluation", "audit"):
        assert found[key] is None and found["not_recorded"][key]
    assert f"lab audit {run.name}" in found["not_recorded"]["audit"]
    paths = write(run)
    assert paths["md"].read_text().count("not recorded") > 20


def test_a_failed_run_has_a_card_with_its_error(run):
    status = json.loads((run.path / "status.json").read_text())
    keep(run, "status.json", {**status, "state": "failed", "error": "Rank 3 lost its chip."})
    found = card.card(run)
    assert (found["state"], found["error"], found["tokens"]) == ("failed", "Rank 3 lost its chip.", 14_000)
    assert "Rank 3 lost its chip." in write(run)["md"].read_text()


def test_a_run_without_chips_says_so(run):
    facts = json.loads((run.path / "facts.json").read_text())
    for attempt in facts["attempts"]:
        attempt |= {"kind": "cpu", "device": "Some CPU"}
    keep(run, "facts.json", facts)
    found = card.card(run)
    assert found["hardware"]["chips"] == 0 and found["hardware"]["packages"] is None
    assert "none: CPU" in write(run)["md"].read_text()
    assert "reports its power" in found["not_recorded"]["energy_kwh"]


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "status.json",
        "provenance.json",
        "facts.json",
        "report.json",
        "audit.json",
        "metrics.jsonl",
    ],
)
@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"attempts": 3, "data": 4, "version": 2, "step": "x"}']
)
def test_a_damaged_file_costs_its_own_part_and_never_the_card(run, name, content):
    checkpoint(run), evaluate(run), audit(run)
    (run.path / name).write_text(content)
    paths = write(run)
    found = json.loads(paths["json"].read_text())
    assert set(KEYS) <= found.keys() and found["run"] == run.name
    if name != "metrics.jsonl":
        assert found["tokens"] == 14_000
    if name != "audit.json":
        assert found["audit"]["tensors"] == 3
    assert run.name in paths["md"].read_text() and run.name in paths["html"].read_text()


def test_damage_leaves_its_reason(run):
    (run.path / "audit.json").write_text('{"tensors": 3}')
    assert "by_tensor" in card.card(run)["not_recorded"]["audit"]


def test_a_card_that_cannot_be_made_is_a_warning_and_no_error(run, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write_atomic", full)
    card.refresh(run)
    assert "warning: the run card could not be made (OSError" in capsys.readouterr().err


def test_an_old_run_without_facts_counts_attempts_by_its_events(run):
    (run.path / "facts.json").unlink()
    found = card.card(run)
    assert len(found["attempts"]) == 2 and found["hardware"]["chips"] == 8
    assert found["data"]["sources"][0]["units"] is None
    # The first attempt began before its first line; only that line is known.
    assert found["attempts"][0]["started"] == BEGAN + 10


# -- form ----------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_card(run):
    checkpoint(run), evaluate(run), audit(run)
    first = {kind: path.read_bytes() for kind, path in write(run).items()}
    assert {kind: path.read_bytes() for kind, path in write(run).items()} == first
    assert sorted(path.name for path in run.path.glob("card.*")) == ["card.html", "card.json", "card.md"]


def test_markdown_shows_the_figures(run):
    chips(run), checkpoint(run), evaluate(run), audit(run)
    text = write(run)["md"].read_text()
    for figure in (
        "| tokens | 14 k |",
        "| wall clock | 1 min 21 s |",
        "| tokens/s | 233 |",
        "| MFU | 23.3 % |",
        "| energy | 0.0075 kWh |",
        "| exact match | 10.0 % → 75.0 % |",
        "| tensors that moved | 3 of 3 |",
        "| MFU (of 376 TFLOP/s a device: published) | 23.3 % | 20.0 % |",
        "- cabinets: 2: A01, A02",
        "- packages of two dies: 4",
        "| train | ascent-tasks-sft (lists) | train | 3 | Apache-2.0 | 7 | 1,200 | 50,000 | 0.5 |",
        "| muon | 1 | 1 | 60 |",
        "| 100 % | 40 | 0.2000 | 0.2500 |",
        "- restarts and resumes: 1",
    ):
        assert figure in text, figure


def test_the_page_is_one_file_that_asks_nobody_and_draws_the_loss(run):
    evaluate(run)
    text = write(run)["html"].read_text()
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|<script|https?:""", text), "nothing is fetched"
    assert "<svg viewBox" in text and 'aria-label="Alignment loss"' in text
    assert text.count("<section>") == 14


def test_a_name_with_marks_is_text_in_the_page(run):
    status = json.loads((run.path / "status.json").read_text())
    keep(run, "status.json", {**status, "state": "failed", "error": "<b>bold</b> | a\nbar"})
    paths = write(run)
    assert "<b>bold" not in paths["html"].read_text()
    assert "&lt;b&gt;bold" in paths["html"].read_text()


def test_curves_keep_their_ends_and_stay_few():
    steps = {step: {"train/loss": float(step)} for step in range(1, 10_001)}
    points = _history.curves(steps, ["train/loss", "eval/loss"])["train/loss"]
    assert len(points) == _history.MAX_POINTS and points[-1][0] == 10_000
    assert points[0][1] == pytest.approx(13.0)  # the mean of the first 25


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.0, 3.0), (-5.0, 5.0), (0.001, 0.0011), (0, 1e7)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = _charts._ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    "seconds, text",
    [(0.25, "0.2 s"), (59.96, "60.0 s"), (81, "1 min 21 s"), (7322, "2 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds, text):
    assert _words.duration(seconds) == text


def test_what_is_unknown_is_never_zero():
    words = _words
    for show in (
        words.text,
        words.whole,
        words.short,
        words.share,
        words.duration,
        words.moment,
        words.energy,
    ):
        assert show(None) == show(float("nan")) == "not recorded"
    assert words.unit(None, "GiB") == "not recorded" and words.unit(2, "GiB") == "2 GiB"


# -- command and imports -------------------------------------------------------------------------------------


def test_the_command_prints_the_card_and_its_json(run):
    def lab(*words):
        done = subprocess.run(
            [sys.executable, "-m", "lab_utils.cli", "card", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(lab(str(run.path), "--json"))
    assert set(KEYS) <= found.keys() and found["tokens"] == 14_000
    assert (run.path / "card.html").is_file()
    assert f"# {run.name}" in lab(str(run.path))
    assert lab(str(run.path), "--diff") == "-a\n+b\n"


def test_making_a_card_imports_no_torch(run):
    code = (
        "import sys; from lab_utils.runs import card; card.card(sys.argv[1]); "
        "print([m for m in ('torch', 'colossalai', 'pandas', 'matplotlib', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_run_whose_ranks_were_killed_has_a_card_too(stand_in, recipe):
    from lab_utils.runs.api import launch

    stand_in(fail={"rank": 0, "step": 12, "how": "SIGKILL"})
    started = launch(recipe)
    with pytest.raises(RunError):
        started.wait(progress=False)
    deadline = time.monotonic() + 30
    while not (started.path / "card.html").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = json.loads((started.path / "card.json").read_text())
    assert found["state"] == "failed" and found["error"] == started.status["error"]
    assert (found["steps"], found["planned_steps"]) == (11, 20)
    assert found["wall_clock_s"] > 0
