"""Time by term: counts against the model's own FLOPs, and what each choice must do to a step."""

import pytest

from lab_utils.models.deepseek_v4.counting import layer_costs, training_flops
from lab_utils.planner import work
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import find
from lab_utils.planner.numbers import numbers
from lab_utils.planner.rates import Rates
from lab_utils.planner.rollout import experts_read, rollout_time
from lab_utils.planner.timing import GROUPS, step_time
from lab_utils.recipe import Recipe

CLUSTER = find("ascend-910c")


def recipe(preset="pro", **changes) -> Recipe:
    tree = {
        "model": {"source": f"preset:{preset}", "dtype": "bfloat16", "checkpointing": "full"},
        "data": {"train": [{"manifest": "any"}], "row_tokens": 4096},
        "optim": {"kind": "muon"},
        "parallel": {"ep": 64, "pp": 16},
        "schedule": {"batch_tokens": 6144 * 4096, "micro_rows": 1},
    }
    return Recipe.parse(tree).with_changes(changes)


def step(assumed: Assumptions | None = None, **changes):
    return step_time(recipe(**changes), CLUSTER, 2048, assumed)


@pytest.mark.parametrize("preset", ["tiny", "flash", "pro"])
def test_products_of_all_layers_are_the_models_flops(preset):
    n, N, T = numbers(f"preset:{preset}"), 512, 512
    options = {"indexer_loss": False, "warmup": False, "fused": True}
    own = [work.layer(n, kind, T, N, 1, 2, **options) for kind in n.layer_types]
    costs, _ = layer_costs(n, T)
    mixing = 2 * N * (2 * 4 * 6 * 4 + 2 * 16) * n.hidden_size  # of the streams, bound by memory
    for one, kind, cost in zip(own, n.layer_types, costs, strict=True):
        flops = sum(p.flops for p in one.products) + one.attention + one.scores + mixing
        if kind == "compressed_sparse_attention" and not any(p.part == "indexer" for p in one.products):
            continue  # nothing is selected, so the indexer doesn't run; the model's count has it
        assert flops == pytest.approx(N * cost, rel=2e-3)


def test_the_model_flops_of_pro_are_those_of_the_report():
    found = step()
    assert found.flops_per_token == pytest.approx(309.92e9, rel=5e-3)
    assert found.flops_per_token == training_flops(numbers("preset:pro"), [4096])
    assert step(**{"model.mtp_loss": 0.1}).trained_flops_per_token > found.trained_flops_per_token


def test_terms_add_up_and_mfu_follows_from_them():
    found = step()
    assert set(found.terms) == set(GROUPS) and found.seconds == pytest.approx(sum(found.terms.values()))
    assert found.tokens == 6144 * 4096
    rate = found.flops_per_token * found.tokens / found.seconds
    assert found.mfu == pytest.approx(rate / (2048 * 376e12))
    assert found.binding.endswith("% of the step")


def test_the_less_is_made_again_the_faster():
    seconds = [step(**{"model.checkpointing": kind}).seconds for kind in ("none", "mhc", "attention", "full")]
    assert seconds == sorted(seconds)


def test_more_micro_batches_dilute_the_bubble_and_virtual_stages_cut_it():
    plain = step()
    double = step(**{"schedule.batch_tokens": 2 * 6144 * 4096})
    assert double.terms["bubble"] == pytest.approx(plain.terms["bubble"]) and double.mfu > plain.mfu
    halved = step(**{"parallel.virtual_stages": 2})
    assert halved.terms["bubble"] < 0.75 * plain.terms["bubble"]
    assert halved.terms["messages"] > 1.5 * plain.terms["messages"]


def test_each_assumption_moves_its_own_term():
    plain = step()
    assert step(Assumptions(hidden_exchange=1.0)).terms["all_to_all"] == 0
    assert (
        step(Assumptions(kernels="plain")).terms["hyper_connections"] > 3 * plain.terms["hyper_connections"]
    )
    assert step(Assumptions(imbalance=1.5)).parts["experts"] == pytest.approx(
        plain.parts["experts"] * 1.5 / 1.1
    )
    low, high = step(Assumptions(case="low")), step(Assumptions(case="high"))
    assert high.seconds < plain.seconds < low.seconds


def test_the_optimizer_on_the_host_is_slow_with_muon_and_says_so():
    off = step(**{"parallel.offload": True})
    assert off.terms["optimizer"] > 20 * step().terms["optimizer"] and off.binding.startswith("optimizer")


def test_checkpoints_stall_by_their_share_and_more_when_they_are_written_in_the_step():
    beside = step(**{"schedule.save_every": 100})
    within = step(**{"schedule.save_every": 100, "schedule.async_save": False})
    assert 0 < beside.terms["checkpoint"] < within.terms["checkpoint"] and step().terms["checkpoint"] == 0


def test_in_the_indexers_warmup_nothing_else_is_trained():
    warm = step(**{"model.indexer_phase": "warmup"})
    assert warm.terms["products"] < 0.6 * step().terms["products"]
    layers = step(Assumptions(loss_share=0.01), **{"model.indexer_phase": "warmup"})
    assert layers.terms["indexer"] > 0 and layers.terms["recompute"] == 0


def test_products_grow_into_their_efficiency_and_narrow_ones_do_not():
    rates = Rates(CLUSTER, Assumptions())

    def share(rows, inner, outer, groups=1):
        one = work.Product("attention", rows, inner, outer, groups)
        return one.flops / rates.product(one) / 376e12

    assert share(256, 256, 256) < share(1024, 1024, 1024) < share(4096, 4096, 4096) < 0.8
    assert share(16, 7168, 7168) < 0.25 * share(1024, 7168, 7168)
    fp32 = work.Product("router", 4096, 4096, 4096, precision="fp32")
    assert rates.product(fp32) > 3 * rates.product(work.Product("router", 4096, 4096, 4096))


def test_decoding_reads_every_expert_once_many_answer():
    n = numbers("preset:pro")
    assert experts_read(n, 1) == pytest.approx(6 / 384) and experts_read(n, 4096) > 0.999
    tree = recipe().model_dump(mode="json")
    tree |= {
        "objective": {"kind": "grpo"},
        "rollout": {"prompts": 512, "group_size": 16, "max_new_tokens": 1024},
    }
    drawn = rollout_time(Recipe.parse(tree), CLUSTER, 2048)
    assert drawn.tokens == 512 * 16 * 1024 and drawn.seconds == pytest.approx(
        drawn.decode_steps * drawn.step_s
    )
    assert drawn.terms["weights"] > drawn.terms["cache"]  # bound by weights
    few = rollout_time(Recipe.parse(tree).with_changes({"rollout.group_size": 4}), CLUSTER, 2048)
    assert few.coverage < drawn.coverage and few.tokens_per_s < drawn.tokens_per_s


def test_rows_that_travel_are_sorted_again_where_they_arrive():
    n, options = numbers("preset:tiny"), {"indexer_loss": False, "warmup": False, "fused": False}
    here, over = (work.layer(n, n.layer_types[0], 512, 512, ep, 4, **options).moved["other"] for ep in (1, 2))
    assert over - here == pytest.approx(512 * 4 * n.num_experts_per_tok * n.hidden_size * 4)


def test_on_cores_nothing_hides_the_all_to_all():
    from lab_utils.planner.cluster import Cluster
    from lab_utils.planner.network import Group, all_to_all
    from lab_utils.planner.own import machines

    cores = Cluster.model_validate(machines()[0]["cluster"])
    small = recipe("tiny", **{"parallel": {"ep": 2}, "schedule.batch_tokens": 8192, "data.row_tokens": 1024})
    laid = small.with_changes(
        {
            "model.dtype": "float32",
            "model.checkpointing": "none",
            "optim.kind": "adamw",
            "schedule.micro_rows": None,
        }
    )
    found = step_time(laid, cores, 2, Assumptions(imbalance=1.0)).terms["all_to_all"]
    n = numbers("preset:tiny")
    sent = 4096 * n.num_experts_per_tok * n.hidden_size * 4 / 2
    one_way = all_to_all(cores, Group(2, 2, 2, 2), sent, "expected")
    assert found == pytest.approx(4 * n.num_hidden_layers * one_way, rel=0.01)
