"""Numbers of a configuration and shapes of parameters, beside transformers and the model itself."""

import subprocess
import sys

import pytest

from lab_utils.errors import RecipeError
from lab_utils.models.deepseek_v4 import counting
from lab_utils.models.presets import preset, presets
from lab_utils.planner.numbers import (
    embedding_shapes,
    final_shapes,
    layer_shapes,
    mtp_shapes,
    numbers,
    of_fields,
    size,
)


@pytest.mark.parametrize("name", presets())
def test_numbers_of_a_preset_are_those_of_transformers(name):
    own, config = numbers(f"preset:{name}"), preset(name)
    for field in own.__dataclass_fields__:
        if field in ("compress_csa", "compress_hca"):
            continue
        theirs = getattr(config, field)
        assert getattr(own, field) == (tuple(theirs) if isinstance(theirs, list) else theirs), field
    assert own.compress_rates == config.compress_rates


@pytest.mark.parametrize("name", presets())
def test_counts_are_the_same_from_either(name):
    own, config = numbers(f"preset:{name}"), preset(name)
    assert counting.parameters_by_component(own) == counting.parameters_by_component(config)
    assert counting.parameters_mtp(own) == counting.parameters_mtp(config)
    lengths = [100, 5000]
    assert counting.training_flops(own, lengths, mtp=True) == counting.training_flops(
        config, lengths, mtp=True
    )


def test_a_config_in_deepseeks_own_words_is_understood():
    tree = {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 1,
        "hidden_size": 64,
    }
    found = of_fields(tree)
    assert found.layer_types == (counting.WINDOW_ONLY, counting.CSA, counting.HCA, counting.CSA)
    assert found.mlp_layer_types == ("hash_moe", "moe", "moe", "moe") and found.hidden_size == 64


def test_shapes_are_those_of_the_model_in_its_order():
    from lab_utils.optim.table import shapes_of

    n = numbers("preset:tiny")
    own = embedding_shapes(n)
    for layer in range(n.num_hidden_layers):
        own += [(f"model.layers.{layer}.{name}", shape) for name, shape in layer_shapes(n, *n.kind(layer))]
    own += final_shapes(n) + mtp_shapes(n)
    assert sorted(own) == sorted(shapes_of(preset("tiny"), mtp=True))
    theirs = [name for name, _ in shapes_of(preset("tiny")) if name.startswith("model.layers.1.")]
    assert [name for name, _ in own if name.startswith("model.layers.1.")] == theirs


def test_shapes_of_pro_add_up_to_its_parameters():
    n = numbers("preset:pro")
    total = sum(size(shape) for _, shape in [*embedding_shapes(n), *final_shapes(n), *mtp_shapes(n)])
    for layer in range(n.num_hidden_layers):
        total += sum(size(shape) for _, shape in layer_shapes(n, *n.kind(layer)))
    assert total == 1_598_837_325_086


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'flash'"):
        numbers("preset:flush")


def test_planning_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from lab_utils.planner.plan import plan; plan('v4_pro_sft', 'ascend-910c', 1024); "
        "bad = {'torch', 'transformers', 'colossalai', 'pandas', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
