"""Names of both layouts, config.json of both, and the reader: any format, any rows, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest
import small_checkpoints as small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV4Config, FineGrainedFP8Config

from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats import names
from lab_utils.models.deepseek_v4.formats.config import official_config, transformers_config
from lab_utils.models.deepseek_v4.formats.convert import convert
from lab_utils.models.deepseek_v4.formats.files import read_header
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader
from lab_utils.models.load import load_model
from lab_utils.models.presets import preset, presets

FORMATS = ("bf16", "fp8", "fp8+mxfp4", "base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in every format; ``truth`` are those of the bf16 one."""
    root = tmp_path_factory.mktemp("formats")
    truth = small.write(root / "transformers", small.config())
    for to in FORMATS:
        convert(root / "transformers", root / to, to, official_names=True, shard_gb=0.0005)
    return root, truth


def test_every_tensor_has_an_official_name_and_comes_back():
    for name, tensor in small.tensors(small.config(), 0).items():
        stack = names.stack_names(name, tensor.shape[0])
        for e, slots in enumerate(stack or [[names.official_name(name)]]):
            for i, official in enumerate(slots):
                found = names.place(official)
                assert found.ours == name
                if stack:
                    assert (found.expert, found.slot, found.kind) == (e, i, names.EXPERT)


def test_names_are_those_of_the_released_files():
    assert names.official_name("model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight") == (
        "layers.3.attn.indexer.weights_proj.weight"
    )
    assert names.official_name("model.hc_head.hc_scale") == "hc_head_scale"
    assert names.official_name("mtp.0.ffn_hc.fn") == "mtp.0.hc_ffn_fn"
    assert names.stack_names("model.layers.7.mlp.experts.gate_up_proj", 2)[1] == [
        "layers.7.ffn.experts.1.w1.weight",
        "layers.7.ffn.experts.1.w3.weight",
    ]
    for name in ("layers.0.attn.wq_c.weight", "model.layers.0.attn.wq_a.weight", "layers.0.e_proj.weight"):
        with pytest.raises(CheckpointError, match=name):
            names.place(name)
    with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm"):
        names.official_name("layers.0.input_layernorm.weight")


@pytest.mark.parametrize("to", FORMATS)
def test_transformers_own_loader_finds_the_same_model_under_the_official_names(to, tmp_path):
    small.write(tmp_path / "source", small.whole_blocks())
    convert(tmp_path / "source", tmp_path / to, to, official_names=True)
    quantised = {} if to == "bf16" else {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    theirs, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / to, dtype=torch.bfloat16, output_loading_info=True, **quantised
    )
    assert not any(told.values()), told
    reader, state = CheckpointReader(tmp_path / to), theirs.state_dict()
    assert {n for n in reader.names() if not n.startswith("mtp.")} == set(state)
    for name, tensor in state.items():
        assert torch.equal(reader.read(name, dtype=tensor.dtype), tensor), name


@pytest.mark.parametrize("name", presets())
def test_the_official_config_is_the_same_model_to_transformers(name, tmp_path):
    ours = preset(name)
    ours.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    official = official_config(tmp_path, tree, "bfloat16", "fp4", 1)
    assert official["expert_dtype"] == "fp4" and official["quantization_config"]["scale_fmt"] == "ue8m0"
    assert len(official["compress_ratios"]) == ours.num_hidden_layers + 1
    (tmp_path / "config.json").write_text(json.dumps(official))
    back = transformers_config(tmp_path, official, "bfloat16")
    expected = ours.to_dict() | {"dtype": "bfloat16"}
    assert {k: v for k, v in back.items() if expected.get(k) != v} == {}
    assert set(expected) - set(back) <= {"_name_or_path"}
    again = official_config(tmp_path, official, "bfloat16", None, 0)
    assert "quantization_config" not in again and len(again["compress_ratios"]) == ours.num_hidden_layers


def test_the_released_config_is_understood(tmp_path):
    """The keys of the released config.json of V4-Flash."""
    flash = preset("flash")
    tree = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 43,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
        "num_hash_layers": 3,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    back = transformers_config(tmp_path, tree, "bfloat16")
    assert "quantization_config" not in back and "expert_dtype" not in back
    for key in ("layer_types", "mlp_layer_types", "rope_parameters", "compress_rates", "qk_rope_head_dim"):
        assert back[key] == flash.to_dict()[key], key
    (tmp_path / "config.json").write_text(json.dumps(back))
    assert official_config(tmp_path, back, "bfloat16", "fp4", 1)["compress_ratios"] == tree["compress_ratios"]


@pytest.mark.parametrize("to", ["transformers", *FORMATS])
def test_the_reader_gives_transformers_names_shapes_and_values(folders, to):
    root, truth = folders
    reader = CheckpointReader(root / to)
    expected_format = {"bf16": "official"}.get(to, to)
    assert reader.format == expected_format and reader.skipped == []
    assert set(reader.names()) == set(truth)
    for name, tensor in truth.items():
        assert reader.shape(name) == tuple(tensor.shape)
        found = reader.read(name)
        assert found.dtype == tensor.dtype == reader.dtype(name), name
        if to in ("transformers", "bf16"):
            assert torch.equal(found, tensor), name
        elif found.is_floating_point():
            worst = 0.3 if "experts" in name else 0.07
            assert (found - tensor).abs().max() <= worst * tensor.abs().max(), name
    assert reader.read("lm_head.weight", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing"):
        reader.read("model.nothing")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), to=st.sampled_from(["transformers", *FORMATS]))
def test_rows_are_those_of_the_whole_tensor(folders, data, to):
    reader = CheckpointReader(folders[0] / to)
    name = data.draw(st.sampled_from(reader.names()))
    length = reader.shape(name)[0]
    start, stop = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
    found = reader.read(name, slice(start, stop))
    assert torch.equal(found, reader.read(name)[start:stop])
    assert torch.equal(reader.read(name, slice(-1, None)), reader.read(name)[-1:])


@pytest.mark.parametrize("to", ["transformers", *FORMATS])
def test_only_the_bytes_of_the_rows_are_read(folders, to):
    reader = CheckpointReader(folders[0] / to)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    reader.read(name)
    whole, experts = reader.bytes_read, reader.shape(name)[0]
    reader.read(name, slice(1, 2))
    assert reader.bytes_read - whole == whole / experts
    before = reader.bytes_read
    reader.read("model.layers.1.self_attn.q_b_proj.weight", slice(130, 140))
    each = {"transformers": 2, "bf16": 2}.get(to, 1)
    assert reader.bytes_read - before == 10 * 40 * each + {"base": 4, "fp8": 1, "fp8+mxfp4": 1}.get(to, 0)
    with pytest.raises(ValueError, match="without a step"):
        reader.read(name, slice(0, 3, 2))


def test_a_plain_folder_of_the_house_is_read(tmp_path):
    model = load_model("preset:tiny", dtype="float32", seed=1)
    from lab_utils.models.load import save_pretrained

    save_pretrained(model, model.config, tmp_path / "m")
    reader = CheckpointReader(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert torch.equal(reader.read(name), tensor), name
    reader.close()
    assert torch.equal(reader.read("lm_head.weight"), model.lm_head.weight)


def test_copies_of_the_embedding_under_mtp_are_left_out_and_named(folders, tmp_path):
    convert(folders[0] / "transformers", tmp_path / "m", "fp8+mxfp4")
    copies = {"mtp.0.embed.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
    small.rewrite(tmp_path / "m", lambda t: t | {copy: t[of].clone() for copy, of in copies.items()})
    reader = CheckpointReader(tmp_path / "m")
    assert sorted(reader.skipped) == sorted(copies)
    assert set(reader.names()) == set(folders[1])


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_nan_scale(tensors):
    tensors["layers.1.ffn.experts.2.w3.scale"].view(torch.uint8)[5, 1] = 255
    return tensors


def with_nan_code(tensors):
    tensors["layers.1.attn.wq_b.weight"].view(torch.uint8)[7, 3] = 0x7F
    return tensors


def with_short_scale(tensors):
    return tensors | {"layers.0.attn.wkv.scale": tensors["layers.0.attn.wkv.scale"][:, :1].clone()}


DAMAGE = {
    "unknown tensor": (lambda t: t | {"layers.0.attn.wq_z.weight": torch.ones(2)}, r"layers\.0\.attn\.wq_z"),
    "missing expert": (without("layers.2.ffn.experts.1.w2.weight"), r"experts\.1\.w2\.(weight|scale)"),
    "weight gone": (without("layers.0.attn.wkv.weight"), r"scale layers\.0\.attn\.wkv\.scale has no weight"),
    "scale gone": (without("layers.0.attn.wkv.scale"), r"F8_E4M3 without a scale"),
    "packed scale gone": (without("layers.0.ffn.experts.0.w1.scale"), r"I8 without a scale"),
    "short scale": (
        with_short_scale,
        r"attn\.wkv\.scale is F8_E8M0 \[1, 1\], its weight asks for .* \[1, 2\]",
    ),
    "scaled norm": (
        lambda t: t | {"norm.scale": torch.ones(1), "norm.weight": t["norm.weight"].float()},
        r"none that DeepSeek-V4 quantises",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence_with_the_tensors_name(folders, kind, tmp_path):
    change, message = DAMAGE[kind]
    convert(folders[0] / "transformers", tmp_path / "m", "fp8+mxfp4")
    small.rewrite(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path / "m")


@pytest.mark.parametrize(
    "change, name, message",
    [
        (with_nan_scale, "model.layers.1.mlp.experts.gate_up_proj", r"experts\.2\.w3\.weight: .*255 is NaN"),
        (with_nan_code, "model.layers.1.self_attn.q_b_proj.weight", r"attn\.wq_b\.weight: .*code is NaN"),
    ],
)
def test_a_nan_in_the_file_is_an_error_when_it_is_read(folders, change, name, message, tmp_path):
    convert(folders[0] / "transformers", tmp_path / "m", "fp8+mxfp4")
    small.rewrite(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path / "m").read(name)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_files_that_are_truncated_missing_or_no_safetensors_are_told_apart(folders, tmp_path):
    convert(folders[0] / "transformers", tmp_path / "m", "fp8", shard_gb=0.0005)
    file = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    data = file.read_bytes()
    for cut, message in (
        (len(data) - 1, f"{len(data) - 1} bytes where .* {len(data)}"),
        (100, "header"),
        (3, "header"),
    ):
        file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(tmp_path / "m")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        CheckpointReader(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    file.write_bytes(data)
    tree = json.loads(index.read_text())
    tree["weight_map"]["layers.0.attn.nothing"] = file.name
    index.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.nothing"):
        CheckpointReader(tmp_path / "m")
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        CheckpointReader(tmp_path / "m")
    index.unlink()
    for left in (tmp_path / "m").glob("*.safetensors"):
        left.unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        CheckpointReader(tmp_path / "m")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folders, tmp_path):
    convert(folders[0] / "transformers", tmp_path / "m", "bf16")
    reader = CheckpointReader(tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    entry = read_header(file)["lm_head.weight"]
    os.truncate(file, entry.start + entry.nbytes // 2)
    with pytest.raises(CheckpointError, match=r"ends inside tensor lm_head\.weight"):
        reader.read("lm_head.weight")


def test_another_model_is_refused(tmp_path):
    small.write(tmp_path / "m", small.config())
    small.edit_config(tmp_path / "m", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type llama"):
        CheckpointReader(tmp_path / "m")


def test_the_configuration_class_reads_what_is_written(folders):
    for to in FORMATS:
        found = DeepseekV4Config.from_pretrained(folders[0] / to)
        expected = small.config()
        for key in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "o_lora_rank"):
            assert getattr(found, key) == getattr(expected, key), (to, key)
