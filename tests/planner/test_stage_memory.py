"""Memory by term: what each choice keeps, against the code's own statements and against simple sums."""

import pytest

from lab_utils.planner import kept
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import find
from lab_utils.planner.memory import GIB, SEEN_BY_TWIN, TERMS, stage_memory
from lab_utils.planner.numbers import numbers
from lab_utils.recipe import Recipe
from lab_utils.recipe.sections import ModelSection


def recipe(**changes) -> Recipe:
    tree = {
        "model": {"source": "preset:pro", "dtype": "bfloat16", "checkpointing": "full", "mtp_loss": 0.1},
        "data": {"train": [{"manifest": "any"}], "row_tokens": 4096},
        "optim": {"kind": "muon"},
        "parallel": {"ep": 64, "pp": 16},
        "schedule": {"batch_tokens": 6144 * 4096, "micro_rows": 1},
    }
    return Recipe.parse(tree).with_changes(changes)


@pytest.mark.parametrize(("kind", "numbers_of_d"), [("none", 14), ("mhc", 8), ("attention", 14), ("full", 4)])
def test_a_block_keeps_what_its_module_says_beside_attention_and_experts(kind, numbers_of_d):
    n = numbers("preset:pro")
    found = kept.block(
        n, "heavily_compressed_attention", False, ModelSection(dtype="bfloat16", checkpointing=kind), 4096, 8
    )
    own = found["streams"] + found["block"]
    coefficients = 2 * 4 * (24 + 1 + 32 + 4 + 39 * 4) + 8  # fp32, where the streams' mixing isn't made again
    assert own == pytest.approx(numbers_of_d * 7168 * 2, abs=coefficients)


def test_each_kind_of_checkpointing_keeps_less_than_the_one_before():
    peaks = [
        max(
            stage.terms["activations"]
            for stage in stage_memory(recipe(**{"model.checkpointing": kind}), 2048)
        )
        for kind in ("none", "mhc", "attention", "full")
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.15 * peaks[0]


def test_terms_add_up_and_the_twin_sees_all_but_the_devices_own():
    stages = stage_memory(recipe(), 2048, cluster=find("ascend-910c"), assumed=Assumptions())
    assert len(stages) == 16
    for stage in stages:
        assert set(stage.terms) == set(TERMS)
        assert stage.peak == pytest.approx(sum(stage.terms.values()))
        assert stage.seen_by_twin == pytest.approx(sum(stage.terms[name] for name in SEEN_BY_TWIN))
        assert (
            stage.terms["runtime"] == 3.4 and stage.terms["communicators"] > 0.5 and stage.terms["slack"] > 0
        )
    bare = stage_memory(recipe(), 2048)
    assert all(stage.terms["runtime"] == stage.terms["slack"] == 0 for stage in bare)
    assert [s.seen_by_twin for s in bare] == pytest.approx([s.seen_by_twin for s in stages])


def test_weights_of_all_ranks_are_the_model_and_its_second_embedding():
    laid = recipe()
    stages = stage_memory(laid, 2048)
    n = numbers("preset:pro")
    experts = 3 * n.hidden_size * n.moe_intermediate_size * n.n_routed_experts * (1 - 1 / 64)
    layers = [sum(stop - start for start, stop in stage.layers) for stage in stages]
    layers[-1] += 1  # the block of multi-token prediction
    whole = sum(s.parameters for s in stages) + experts * sum(layers)
    assert whole == 1_598_837_325_086 + n.vocab_size * n.hidden_size
    tables = 3 * 8 * n.vocab_size * n.num_experts_per_tok  # of the layers that route by token
    assert stages[0].terms["weights"] == pytest.approx((2 * stages[0].parameters + tables) / GIB, rel=1e-5)


def test_offload_moves_masters_and_moments_to_the_host():
    on, off = (stage_memory(recipe(**{"parallel.offload": value}), 2048)[3] for value in (False, True))
    assert off.terms["masters"] == off.terms["moments"] == 0
    assert off.host == pytest.approx(on.terms["masters"] + on.terms["moments"])


def test_muon_keeps_half_the_moments_of_adamw():
    muon, adamw = (stage_memory(recipe(**{"optim.kind": kind}), 2048)[3].terms for kind in ("muon", "adamw"))
    experts = 4 * 6 * 3 * 7168 * 3072 / 2  # of this rank, over two replicas
    assert adamw["moments"] > 8 * experts / GIB and muon["moments"] > 4 * experts / GIB
    assert muon["moments"] < 4.8 * experts / GIB + 4 * 1.6e9 / 8 / GIB


def test_a_longer_row_costs_in_proportion_and_its_selection_besides():
    model = ModelSection(dtype="bfloat16", checkpointing="none")
    n = numbers("preset:pro")
    short, long = (
        kept.block(n, "compressed_sparse_attention", False, model, T, 8)["attention"] for T in (4096, 8192)
    )
    assert long == short + 8 * n.index_topk  # a token's, from where the indexer selects


def test_the_last_stage_has_room_for_the_fp32_gradient_of_the_head_and_a_product_of_it():
    stages = stage_memory(recipe(), 2048)
    both = 2 * 4 * 129280 * 7168 / GIB
    assert stages[-1].terms["temporary"] + stages[-1].terms["exchange"] > both
    assert stages[3].terms["temporary"] < both


def test_memory_is_what_the_engine_itself_held_when_it_was_built_at_full_size():
    """`lab twin`: stage 0 of V4-Pro on 2,048 ranks (pp 16, ep 64, AdamW, full) in its first backward passes."""
    laid = recipe(**{"optim.kind": "adamw", "schedule.batch_tokens": 4096 * 4096})
    own = stage_memory(laid, 2048)[0].terms
    twin = {
        "weights": 7.5539,
        "gradients": 15.0730,
        "masters": 3.0113,
        "activations": 14.1336,
        "streams": 0.2188,
    }
    for name, gib in twin.items():
        assert own[name] == pytest.approx(gib, rel=0.01), name
    assert own["exchange"] + own["temporary"] == pytest.approx(0.9844 + 5.1310, rel=0.03)


def test_without_checkpoints_micro_batches_in_flight_fill_the_first_stages():
    stages = stage_memory(recipe(**{"model.checkpointing": "none"}), 2048)
    middle = stages[1:-1]
    a_batch = [stage.terms["activations"] / stage.in_flight for stage in middle]
    assert max(a_batch) == pytest.approx(min(a_batch), rel=0.02)
    assert [stage.in_flight for stage in middle] == list(range(15, 1, -1))


def test_communicators_take_what_the_launch_scripts_give_them():
    from lab_utils.ascend.environment import buffer_mb

    where = find("ascend-910c")

    def held(laid, cluster=where):
        return stage_memory(laid, 2048, cluster=cluster)[1].terms["communicators"]

    long = recipe(**{"data.row_tokens": 32768, "schedule.batch_tokens": 32768 * 6144})
    slurm = {"cluster.launcher": "slurm", "cluster.nodes": 128, "cluster.nproc": 16}
    assert held(long) == pytest.approx(held(recipe()) * buffer_mb(long.with_changes(slurm)) / 64)
    own = recipe(**slurm, **{"cluster.options": {"environment": {"HCCL_BUFFSIZE": "128"}}})
    assert held(own) == pytest.approx(2 * held(recipe()))
    assert held(recipe(), find("h200")) == pytest.approx(2 * held(recipe()))
