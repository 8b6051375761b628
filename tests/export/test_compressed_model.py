"""A checkpoint compressed tensor by tensor is the model compressed at once, whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsdp.commands.compress import main
from qsdp.export import export_compressed, load_export, read_mask
from qsdp.export.tensor_files import TensorFiles
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_
from tests.support import command_line, patience
from tests.support.bad_inputs import BadInput
from tests.support.small_gpt import SIZE, save_model

pytestmark = pytest.mark.usefixtures("gloo_of_one")

ROOT = Path(__file__).parents[2]

FLAGS = [
    BadInput("nothing to do", "{}/run", "nothing says what to compress to"),
    BadInput("a sparsity of 1.2", "{}/run --sparsity 1.2", "--sparsity is 1.2"),
    BadInput("a sparsity in words", "{}/run --sparsity half", "--sparsity"),
    BadInput("a pattern without a colon", "{}/run --pattern 24", "--pattern is '24': give N:M"),
    BadInput("a pattern that keeps all", "{}/run --pattern 4:4", "--pattern is 4:4"),
    BadInput("a pattern and a sparsity", "{}/run --pattern 2:4 --sparsity 0.5", "is given beside"),
    BadInput("a pattern and no sparsity", "{}/run --pattern 2:4 --sparsity 0", "is given beside"),
    BadInput("a scope of nothing", "{}/run --sparsity 0 --scope layer", "--scope is given without"),
    BadInput("1 bit", "{}/run --bits 1", "--bits is 1"),
    BadInput("an unknown scope", "{}/run --sparsity 0.5 --scope row", "--scope is 'row'"),
    BadInput("blocks of nothing", "{}/run --bits 4 --block 4", "--block is given without"),
    BadInput("an unknown method", "{}/run --bits 4 --method obs", "--method is 'obs': choose one"),
    BadInput("a method for nothing", "{}/run --sparsity 0 --method magnitude", "nothing to do"),
    BadInput("an unknown flag", "{}/run --sparsty 0.5", "--sparsty"),
    BadInput("files of no size", "{}/run --bits 4 --max-file-gib 0", "--max-file-gib is 0"),
    BadInput("no checkpoint", "{}/none --bits 4", "none holds no complete checkpoint"),
    BadInput("blocks that do not fit", "{}/run --sparsity 0.5 --block 5", "groups of 5"),
    BadInput("patterns of nothing", "{}/run --bits 4 --prunable layers.*", "'layers.*' matches no"),
]


@pytest.mark.parametrize(
    "target",
    [
        *("0", "0.5", "0.93", "0.7+layer", "0.5+block4", "0.6+layer+block8"),
        *("2:4", "3:8+4bit", "4bit", "0.8+3bit", "0.5+block2+8bit"),
    ],
)
def test_an_export_is_the_model_compressed_at_once_bit_for_bit(tmp_path: Path, target: str) -> None:
    model = save_model(tmp_path)
    out = tmp_path / "out"
    chosen = Compression.of(target)
    facts = export_compressed(tmp_path / "checkpoints" / "step-00000007", SIZE, chosen, out)
    prunable = Prunable.of(model)
    with torch.no_grad():
        masks = prune_and_round_(prunable.shards(), chosen, prunable.dims)
    written = load_file(out / "model.safetensors")
    assert list(facts["zeros"]["tensors"]) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name].view(torch.int32), parameter.detach().view(torch.int32))
        zeros = {"zeros": int((parameter == 0).sum()), "values": parameter.numel()}
        assert facts["zeros"]["tensors"][name] == zeros
    packed = load_file(out / "masks.safetensors")
    assert packed.keys() == set(prunable.names)
    for name, mask in zip(prunable.names, masks, strict=True):
        assert torch.equal(packed[name], mask.bits)
        assert torch.equal(read_mask(out, name), mask.unpack())
        assert not written[name][~read_mask(out, name)].any()
    again = GPT(SIZE)
    load_export(out, again)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_chosen_parameters_alone_are_compressed_and_large_models_come_in_several_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path)
    out = tmp_path / "deep" / "out"
    limit = 8192
    flags = [str(tmp_path), "--sparsity", "0.5", "--prunable", "embed.*,blocks.*.mlp.up.weight"]
    main([*flags, "--out", str(out), "--max-file-gib", str(limit / 2**30)])
    assert "50.0" in capfd.readouterr().out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    parts = {file: load_file(out / file) for file in files}
    assert all(sum(t.nbytes for t in part.values()) <= limit for part in parts.values())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    before = dict(model.named_parameters())
    chosen = {"embed.weight", *(f"blocks.{i}.mlp.up.weight" for i in range(3))}
    for name, file in index["weight_map"].items():
        assert torch.equal(parts[file][name], before[name]) == (name not in chosen)
    assert load_file(out / "masks.safetensors").keys() == chosen
    facts = json.loads((out / "compression.json").read_text())
    assert facts["target"] == "0.5"
    assert facts["model"] == asdict(SIZE)
    assert facts["source"]["step"] == 7
    counts = facts["zeros"]["prunable"]
    assert counts["zeros"] >= counts["values"] // 2
    assert (out / "tokenizer.json").read_text() == "{}"


_MEASURE = """
import sys
from pathlib import Path
from qsdp.commands.compress import main

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if name in l)
    return int(line.split()[1]) * 1024

small, large, target, out = sys.argv[1:]
main([small, "--sparsity", target, "--out", out + "-small"])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
main([large, "--sparsity", target, "--out", out])
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(tmp_path: Path) -> None:
    sizes = {
        layers: GPTConfig(vocab_size=11, num_layers=layers, num_heads=2, width=160, context=8)
        for layers in (1, 24)
    }
    models = {layers: save_model(tmp_path / str(layers), size) for layers, size in sizes.items()}
    model_bytes = sum(p.nbytes for p in models[24].parameters())
    paths = [str(tmp_path / f"{n}/checkpoints/step-00000007") for n in sizes]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths, "0.7", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    largest = max(p.nbytes for p in models[24].parameters())
    # Tables of contents grow with the number of tensors; the weights must not be among them.
    assert model_bytes > 29e6
    assert grown < 16 * largest + 8e6, (grown, largest, model_bytes)


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000007"
    before = sorted(tmp_path.iterdir())
    written: list[str] = []
    write = TensorFiles.write

    def fail(files: TensorFiles, name: str, tensor: torch.Tensor) -> None:
        write(files, name, tensor)
        written.append(name)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TensorFiles, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        export_compressed(path, SIZE, Compression(sparsity=0.5), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file_bytes is 0: choose 1 or more"):
        export_compressed(tmp_path, SIZE, Compression(bits=4), tmp_path / "out", file_bytes=0)


@pytest.mark.parametrize("bad", FLAGS, ids=lambda bad: bad.name)
def test_a_mistake_is_refused_in_one_sentence(
    bad: BadInput, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "run")
    assert bad.said in refused(bad.arguments(tmp_path), tmp_path / "out", capfd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_in_use_a_damaged_checkpoint_and_many_processes_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "run")
    flags = [str(tmp_path / "run"), "--sparsity", "0.5"]
    assert "exists already" in refused(flags, tmp_path / "run", capfd)
    (tmp_path / "empty").mkdir()
    main([*flags, "--out", str(tmp_path / "empty")])
    capfd.readouterr()
    compressed = [str(tmp_path / "empty"), "--bits", "4"]
    assert "compressed already (0.5)" in refused(compressed, tmp_path / "out", capfd)
    shards = next((tmp_path / "run").rglob("*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert "is damaged" in refused(flags, tmp_path / "out", capfd)
    shards.unlink()
    assert "is damaged (it is missing)" in refused(flags, tmp_path / "out", capfd)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(flags, tmp_path / "out", capfd)
    assert not (tmp_path / "out").exists()


def refused(flags: list[str], out: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What the command says, in one sentence, of these ``flags`` and this ``--out``."""
    return command_line.refused([*flags, "--out", str(out)], capfd, main)
