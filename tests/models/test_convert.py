"""``lab convert``: round trips, bounded memory, and what a killed or starved conversion leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_checkpoints as small
import torch
import typer

from lab_utils import cli
from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats import convert as conversion
from lab_utils.models.deepseek_v4.formats import files
from lab_utils.models.deepseek_v4.formats.convert import convert
from lab_utils.models.deepseek_v4.formats.files import FileWriter, Slot
from lab_utils.models.deepseek_v4.formats.plan import TARGETS
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader
from lab_utils.models.load import load_model

QUANTISED = ("fp8", "fp8+mxfp4", "base")


def values(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name, dtype=dtype) for name in reader.names()}


@pytest.fixture
def source(tmp_path) -> Path:
    small.write(tmp_path / "source", small.config())
    return tmp_path / "source"


@pytest.mark.parametrize("seed", range(3))
def test_bf16_goes_to_the_official_names_and_back_bit_for_bit(seed, tmp_path):
    truth = small.write(
        tmp_path / "a", small.config(n_routed_experts=2 + seed, moe_intermediate_size=20), seed
    )
    told = convert(tmp_path / "a", tmp_path / "b", "bf16", official_names=True, shard_gb=0.0003)
    assert told["from"] == "transformers" and told["files"] > 2
    assert "layers.0.ffn.experts.1.w3.weight" in small.stored(tmp_path / "b")
    assert convert(tmp_path / "b", tmp_path / "c", "bf16")["from"] == "official"
    assert small.same(small.stored(tmp_path / "c"), truth)


def test_fp32_weights_go_through_fp32_unchanged(tmp_path):
    truth = small.write(tmp_path / "a", small.config(), dtype=torch.float32)
    convert(tmp_path / "a", tmp_path / "b", "fp32", official_names=True)
    convert(tmp_path / "b", tmp_path / "c", "fp32")
    assert small.same(small.stored(tmp_path / "c"), truth)
    convert(tmp_path / "c", tmp_path / "d", "bf16")
    full = {name for name, tensor in small.stored(tmp_path / "d").items() if tensor.dtype == torch.float32}
    assert full == {name for name in truth if any(part in name for part in small.FULL)}


@pytest.mark.parametrize("to", QUANTISED)
@pytest.mark.parametrize("width", [132, 20])
def test_a_quantised_checkpoint_comes_back_from_bf16_with_the_same_codes_and_scales(to, width, tmp_path):
    small.write(tmp_path / "a", small.config(moe_intermediate_size=width))
    convert(tmp_path / "a", tmp_path / "b", to)
    convert(tmp_path / "b", tmp_path / "c", "bf16")
    convert(tmp_path / "c", tmp_path / "d", to)
    assert small.same(small.stored(tmp_path / "d"), small.stored(tmp_path / "b"))
    dtypes = {
        tensor.dtype for name, tensor in small.stored(tmp_path / "b").items() if name.endswith(".scale")
    }
    assert dtypes == {torch.float32 if to == "base" else torch.float8_e8m0fnu}


def scrambled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Any codes but NaN and any sensible scales: blocks that no rule would have made so."""
    g = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            random = torch.randint(0, 127, tensor.shape, generator=g) + 128 * torch.randint(
                2, tensor.shape, generator=g
            )
            random[: tensor.shape[0] // 2] &= 0xBF  # a half of the blocks without large codes
            tensor.view(torch.uint8).copy_(random)
        elif tensor.dtype == torch.int8:
            tensor.copy_(torch.randint(-128, 128, tensor.shape, generator=g))
            tensor[::3] &= 0x33  # small codes only
            tensor[::5] = 0
        elif name.endswith(".scale") and tensor.dtype == torch.float32:
            tensor.uniform_(1e-3, 2e-3, generator=g)
        elif name.endswith(".scale"):
            tensor.view(torch.uint8).copy_(torch.randint(110, 124, tensor.shape, generator=g))
    return tensors


@pytest.mark.parametrize("to", QUANTISED)
def test_any_codes_and_scales_come_back_when_their_checkpoint_is_at_hand(to, source, tmp_path):
    convert(source, tmp_path / "b", to)
    small.rewrite(tmp_path / "b", scrambled)
    original = small.stored(tmp_path / "b")
    told = convert(tmp_path / "b", tmp_path / "copy", to)
    assert small.same(small.stored(tmp_path / "copy"), original) and told["kept"] == told["blocks"] > 0

    convert(tmp_path / "b", tmp_path / "c", "bf16")
    told = convert(tmp_path / "c", tmp_path / "d", to, like=tmp_path / "b")
    assert told["kept"] == told["blocks"]
    assert small.same(small.stored(tmp_path / "d"), original)
    if to != "base":  # without it, other codes may stand for the same numbers, but the numbers are the same
        convert(tmp_path / "c", tmp_path / "e", to)
        assert small.same(values(tmp_path / "e"), values(tmp_path / "b"))


def test_trained_blocks_get_new_scales_and_the_others_keep_theirs(source, tmp_path):
    convert(source, tmp_path / "b", "fp8+mxfp4")
    small.rewrite(tmp_path / "b", scrambled)
    convert(tmp_path / "b", tmp_path / "c", "bf16")

    def train(tensors):
        tensors["model.layers.1.mlp.experts.down_proj"][1, 5, 40] += 0.011
        return tensors

    small.rewrite(tmp_path / "c", train)
    told = convert(tmp_path / "c", tmp_path / "d", "fp8+mxfp4", like=tmp_path / "b")
    assert told["blocks"] - told["kept"] == 1
    before, after = small.stored(tmp_path / "b"), small.stored(tmp_path / "d")
    changed = [n for n in before if not small.same({n: before[n]}, {n: after[n]})]
    assert {name.removesuffix("scale").removesuffix("weight") for name in changed} == {
        "layers.1.ffn.experts.1.w2."
    }
    untouched = torch.ones(136, dtype=torch.bool)
    untouched[5] = False
    w2 = "layers.1.ffn.experts.1.w2.weight"
    assert torch.equal(before[w2][untouched], after[w2][untouched])


def test_mxfp4_becomes_fp8_without_loss_and_with_the_codes_of_deepseeks_own_conversion(tmp_path):
    small.write(tmp_path / "a", small.whole_blocks())
    convert(tmp_path / "a", tmp_path / "b", "fp8+mxfp4")
    small.rewrite(tmp_path / "b", scrambled)
    told = convert(tmp_path / "b", tmp_path / "c", "fp8")
    assert told["kept"] == told["blocks"]
    assert small.same(values(tmp_path / "c"), values(tmp_path / "b"))
    packed, fp8 = small.stored(tmp_path / "b"), small.stored(tmp_path / "c")
    name = "layers.2.ffn.experts.1.w3"
    scale = packed[f"{name}.scale"].float()  # [128, 4], one block
    block = scale.amax() / 64
    assert fp8[f"{name}.scale"].float().item() == block
    numbers = CheckpointReader(tmp_path / "b").part(f"{name}.weight", 0, 128, torch.float32)
    assert torch.equal(fp8[f"{name}.weight"].float(), numbers / block)


def test_a_block_that_fp8_cannot_hold_is_counted(tmp_path):
    small.write(tmp_path / "a", small.whole_blocks())
    convert(tmp_path / "a", tmp_path / "b", "fp8+mxfp4")

    def spread(tensors):
        scale = tensors["layers.2.ffn.experts.1.w3.scale"].view(torch.uint8)
        scale[:] = 110
        scale[0] = 130  # sub-scales 2^20 apart
        return tensors

    small.rewrite(tmp_path / "b", spread)
    told = convert(tmp_path / "b", tmp_path / "c", "fp8")
    assert told["blocks"] - told["kept"] == 1


def test_the_house_loads_what_is_converted(source, tmp_path):
    convert(source, tmp_path / "b", "fp8+mxfp4")
    convert(tmp_path / "b", tmp_path / "c", "bf16")
    state = load_model(str(tmp_path / "c"), dtype="bfloat16").state_dict()
    found = values(tmp_path / "b", torch.bfloat16)
    assert all(
        torch.equal(tensor.to(torch.bfloat16), found[name].to(torch.bfloat16))
        for name, tensor in state.items()
    )
    assert (tmp_path / "c" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert sorted(p.name for p in (tmp_path / "c").glob("*.json*")) == [
        "config.json",
        "conversion.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_files_are_no_larger_than_asked_and_their_checksums_are_told(source, tmp_path):
    told = convert(source, tmp_path / "b", "fp8", shard_gb=0.0002)
    shards = json.loads((tmp_path / "b" / "conversion.json").read_text())["shards"]
    assert told["files"] == len(shards) > 5
    for shard in shards:
        file = tmp_path / "b" / shard["file"]
        assert file.stat().st_size == shard["bytes"] and files.sha256(file) == shard["sha256"]
        tensors = files.read_header(file).values()
        assert sum(e.nbytes for e in tensors) <= 200_000 or len(tensors) <= 2
        assert all(e.start % files.DTYPES[e.dtype].itemsize == 0 for e in tensors)


def same_files(one: Path, two: Path) -> bool:
    found = {folder: {p.name: p.read_bytes() for p in folder.glob("model*")} for folder in (one, two)}
    return bool(found[one]) and found[one] == found[two]


def interrupted(source: Path, destination: Path, after: int, monkeypatch, error: BaseException) -> None:
    """A conversion that ends with ``error`` in the middle of its file number ``after + 1``."""
    real, finished = files.os.pwrite, []

    def pwrite(descriptor, data, offset):
        if len(finished) >= after and offset > 5000:
            raise error
        return real(descriptor, data, offset)

    told = conversion.Journal.add
    monkeypatch.setattr(files.os, "pwrite", pwrite)
    monkeypatch.setattr(
        conversion.Journal, "add", lambda self, entry: (told(self, entry), finished.append(entry))
    )
    with pytest.raises((type(error), CheckpointError)) as caught:
        convert(source, destination, "fp8", shard_gb=0.0003)
    monkeypatch.undo()
    assert not destination.exists()
    if isinstance(error, OSError):
        assert isinstance(caught.value, CheckpointError) and "disk is full" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_stopped_conversion_goes_on_where_it_was(error, source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole", "fp8", shard_gb=0.0003)
    interrupted(source, tmp_path / "b", 2, monkeypatch, error)
    aside = tmp_path / "b.incomplete"
    kept = {p.name: p.stat().st_ino for p in aside.glob("*.safetensors")}
    assert len(kept) == 2 and not list(aside.glob(".model*"))
    # What a machine that lost power leaves: half a line, half a file, and a file that is not what it was.
    with (aside / "conversion.jsonl").open("a") as journal:
        journal.write('{"file": "model-000')
    (aside / ".model-00003-of-00009.safetensors.123").write_bytes(b"half")
    spoilt = aside / sorted(kept)[1]
    spoilt.write_bytes(b"x" * spoilt.stat().st_size)
    convert(source, tmp_path / "b", "fp8", shard_gb=0.0003)
    assert not aside.exists() and same_files(tmp_path / "b", tmp_path / "whole")
    after = {p.name: p.stat().st_ino for p in (tmp_path / "b").glob("*.safetensors")}
    assert after[sorted(kept)[0]] == kept[sorted(kept)[0]]
    assert not list((tmp_path / "b").glob("*.jsonl"))


def test_an_unfinished_conversion_is_not_mixed_with_another(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", 1, monkeypatch, KeyboardInterrupt())
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(source, tmp_path / "b", "fp8+mxfp4", shard_gb=0.0003)
    journal = conversion.Journal(tmp_path / "c", {"any": 1})
    with pytest.raises(CheckpointError, match="another conversion is writing"):
        convert(source, tmp_path / "c", "fp8")
    journal.close()
    (tmp_path / "b.incomplete" / "conversion.jsonl").unlink()
    with pytest.raises(CheckpointError, match="files but no journal"):
        convert(source, tmp_path / "b", "fp8", shard_gb=0.0003)


def test_a_full_disk_and_a_taken_folder_are_known_before_anything_is_written(source, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="already there and not empty"):
        convert(source, tmp_path / "b", "fp8")
    assert (tmp_path / "b" / "mine").read_text() == "kept"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"GB are to be written, 0\.0 GB are free"):
        convert(source, tmp_path / "c", "fp8")
    with pytest.raises(CheckpointError, match=r"choose one of bf16, fp32, fp8, fp8\+mxfp4, base"):
        convert(source, tmp_path / "d", "int4")
    assert set(TARGETS) == {"bf16", "fp32", *QUANTISED}


def test_weights_that_are_not_those_of_the_config_are_refused(source, tmp_path):
    small.edit_config(source, index_n_heads=5)
    with pytest.raises(
        CheckpointError, match=r"q_b_proj\.weight has shape \[96, 40\], config.json asks for \[80, 40\]"
    ):
        convert(source, tmp_path / "b", "fp8")
    small.edit_config(source, index_n_heads=6)
    small.rewrite(source, lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        convert(source, tmp_path / "b", "fp8")


def test_infinite_weights_and_odd_widths_are_named(tmp_path):
    small.write(tmp_path / "a", small.config(moe_intermediate_size=21))
    with pytest.raises(CheckpointError, match=r"w2\.weight has 21 columns, MXFP4 packs two a byte"):
        convert(tmp_path / "a", tmp_path / "b", "fp8+mxfp4")

    def blow_up(tensors):
        tensors["model.layers.1.self_attn.q_b_proj.weight"][3, 3] = float("inf")
        return tensors

    small.rewrite(tmp_path / "a", blow_up)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.wq_b\.weight: a number is infinite"):
        convert(tmp_path / "a", tmp_path / "b", "fp8")


def test_the_command_line_converts_and_says_what_was_wrong(source, tmp_path, monkeypatch, capsys):
    arguments = ["lab", "convert", str(source), str(tmp_path / "b"), "--to", "fp8+mxfp4"]
    for command, code in ((["--json"], 0), ([], 4)):
        monkeypatch.setattr(sys, "argv", [*arguments, *command])
        monkeypatch.setattr(cli, "app", typer.Typer())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
        printed = capsys.readouterr()
        if code == 0:
            told = json.loads(printed.out)
            assert told["to"] == "fp8+mxfp4" and told["tensors"] > 100
        else:
            assert printed.err.startswith("error: ") and "already there and not empty" in printed.err


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A bf16 checkpoint of 0.3 GB whose largest tensor has 0.1 GB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 65536, "hidden_size": 512, "n_routed_experts": 96, "moe_intermediate_size": 512}
    of = small.config(
        **sizes, num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["moe"]
    )
    with torch.device("meta"):
        state = small.DeepseekV4ForCausalLM(of).state_dict()
    slots = [
        Slot(n, "F32" if any(p in n for p in small.FULL) else "BF16", tuple(t.shape))
        for n, t in state.items()
    ]
    slots.sort(key=lambda slot: slot.dtype != "F32")
    writer = FileWriter(folder / "model.safetensors", slots)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for slot in slots:
        dtype = files.DTYPES[slot.dtype]
        for start in range(0, slot.nbytes // dtype.itemsize, len(noise)):
            rest = slot.nbytes // dtype.itemsize - start
            writer.write(slot.name, start * dtype.itemsize, noise[:rest].to(dtype))
    writer.finish()
    of.save_pretrained(folder)
    return folder


MEASURE = """
import sys
from pathlib import Path
from lab_utils.models.deepseek_v4.formats.convert import check_complete, convert
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

check_complete(CheckpointReader(sys.argv[1]))  # imports what the conversion imports
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3], shard_gb=1.0)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(large, tmp_path):
    reader, source = CheckpointReader(large), large
    sizes = [2 * torch.Size(reader.shape(name)).numel() for name in reader.names()]
    assert sum(sizes) > 280e6
    for to in ("fp8+mxfp4", "bf16"):
        command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / to), to]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < max(sizes), f"{to}: {int(done.stdout) / 1e6:.0f} MB"
        source = tmp_path / to


def test_a_killed_conversion_leaves_no_process_and_is_finished_by_the_same_command(large, tmp_path):
    out = tmp_path / "b"
    script = "import sys; from lab_utils.models.deepseek_v4.formats.convert import convert; "
    script += "convert(sys.argv[1], sys.argv[2], 'fp8+mxfp4', shard_gb=0.006, workers=2)"
    running = subprocess.Popen([sys.executable, "-c", script, str(large), str(out)])
    journal, patience = tmp_path / "b.incomplete" / "conversion.jsonl", time.monotonic() + 120
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert time.monotonic() < patience and running.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and len(workers) >= 2
    kept = {p.name: p.stat().st_ino for p in journal.parent.glob("model*.safetensors")}
    told = convert(large, out, "fp8+mxfp4", shard_gb=0.006, workers=2)
    assert 3 <= len(kept) < told["files"]
    assert sum(kept.get(p.name) == p.stat().st_ino for p in out.glob("*.safetensors")) >= 3
    convert(large, tmp_path / "whole", "fp8+mxfp4", shard_gb=0.006)
    assert same_files(out, tmp_path / "whole")
