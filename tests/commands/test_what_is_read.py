"""What is not finite has a place in every output, and what no manifest lists is not read."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.commands import evaluate
from qsdp.commands.train import main
from qsdp.common import atomic_files, json_files
from qsdp.data.corpus import load_corpus
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.methods.acdc.flags import DENSE_TWIN
from qsdp.models.gpt2.model import GPT
from qsdp.models.huggingface.weights import export_huggingface, load_huggingface
from qsdp.report import plots
from qsdp.report.metrics import MetricsWriter
from qsdp.train.trained_model import open_trained_model
from tests.support.bad_inputs import TEXT
from tests.support.file_operations import debris, tree
from tests.support.huggingface_models import our_model, their_model
from tests.support.short_history import short_history, short_summary
from tests.support.valued_checkpoints import save

BROKEN = {
    "a": math.nan,
    "b": [1.0, math.inf, (-math.inf, {"c": [math.nan]})],
    "d": {"e": {"f": -math.inf}, "g": ()},
}
WRITTEN = {"a": None, "b": [1.0, None, [None, {"c": [None]}]], "d": {"e": {"f": None}, "g": []}}


def strict(text: str) -> Any:
    """JSON as the standard has it, without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_a_null_for_every_number_that_is_not_finite(tmp_path: Path) -> None:
    json_files.write_json(tmp_path / "a.json", BROKEN)
    assert strict((tmp_path / "a.json").read_text()) == WRITTEN
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        metrics.log({"step": 1, "loss": math.inf, "errors": {"a": {"b": math.nan}}})
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "errors": {"a": {"b": None}}}


FLAGS = ["--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1"]
FLAGS += ["--one-shot", "0.5", "--save-every", "0"]
ACDC = ["--acdc", "--steps", "12", "--acdc-warmup", "2", "--acdc-phase", "2"]
ACDC += ["--acdc-last-dense", "3", "--acdc-last-sparse", "3", "--eval-every", "0"]


@pytest.fixture
def run(world_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``run(*flags)``: the folder of a tiny run."""
    monkeypatch.setattr(
        "qsdp.train.after_training.matmul_flops_per_s", lambda device, precision: 1e9
    )
    monkeypatch.setattr(
        "qsdp.train.after_training.write_plots", lambda folder, history, summary: []
    )
    (tmp_path / "text.txt").write_text(TEXT)

    def train(*flags: str) -> Path:
        out = tmp_path / "run"
        main(["--data", str(tmp_path / "text.txt"), "--out", str(out), *FLAGS, *flags])
        return out

    return train


def change(path: Path, edit: Callable[[torch.Tensor], None]) -> None:
    """Edit the embedding in the checkpoint at ``path``."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        meta = checkpoint.read_meta(path)
        reader = checkpoint.TensorReader(path)
        model = GPT(open_trained_model(path).size)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(reader.read(name))
            edit(model.embed.weight)
        text = (path / "tokenizer.json").read_text()
        del meta["checksums"]
        step = meta.pop("step")
        checkpoint.save(path.parent, step, model, None, meta, files={"tokenizer.json": text})
    finally:
        dist.destroy_process_group()


def times_a_million(weight: torch.Tensor) -> None:
    weight *= 1e6


def with_one_nan(weight: torch.Tensor) -> None:
    weight[1, 1] = math.nan


@pytest.mark.slow
def test_a_diverged_model_is_evaluated_to_the_end(
    run: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = run("--steps", "1")
    path = checkpoint.resolve(out)
    for number, edit in enumerate((times_a_million, with_one_nan)):
        change(path, edit)
        folder = tmp_path / f"evaluation-{number}"
        capfd.readouterr()
        evaluate.main([str(out), "--targets", "0.5", "--out", str(folder)])
        printed = capfd.readouterr().out
        assert "not finite" in printed
        found = strict((folder / "evaluation.json").read_text())
        assert [row["perplexity"] for row in found["results"]] == [None, None]
        assert set(os.listdir(folder)) <= {"evaluation.json", "evaluation.png"}
        assert not debris(folder)


@pytest.mark.slow
def test_a_run_that_diverges_comes_to_its_summary(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qsdp.train.validate.Evaluator.loss", lambda *_, **__: math.nan)
    out = run("--steps", "2", "--eval-every", "1")
    printed = capfd.readouterr().out
    assert "not finite" in printed
    told = strict((out / "summary.json").read_text())
    assert (told["val_loss"], told["one_shot"]) == (None, {"0.5": None})
    for line in (out / "metrics.jsonl").read_text().splitlines():
        strict(line)
    for path in (out / "checkpoints").rglob("meta.json"):
        strict(path.read_text())


@pytest.mark.slow
def test_a_dense_twin_carries_its_tokenizer(run: Callable[..., Path]) -> None:
    out = run(*ACDC)
    for folder in (DENSE_TWIN, "checkpoints"):
        path = checkpoint.latest(out / folder)
        assert path is not None
        for name in out.glob("*/*/meta.json"):
            strict(name.read_text())
        stored = path / "tokenizer.json"
        source = open_trained_model(path)
        assert source.tokenizer == str(stored)
        text = stored.read_text()
        stored.write_text(text.replace("q", "Q", 1))
        with pytest.raises(ValueError, match="not the one that the model was trained with"):
            open_trained_model(path)
        stored.unlink()
        with pytest.raises(ValueError, match=r"lacks tokenizer\.json"):
            open_trained_model(path)
        stored.write_text(text)
        assert open_trained_model(path) == source


def test_shards_that_are_not_counted_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab" * 1000)
    out = tmp_path / "shards"
    prepare_shards([tmp_path / "text.txt"], out, "char", shard_tokens=500)
    before = load_corpus(str(out), None)
    shutil.copyfile(out / "train-00000.bin", out / "train-00009.bin")
    (out / "val-00007.bin").write_bytes(b"\xff" * 50)
    after = load_corpus(str(out), None)
    for name in ("train", "val"):
        old, new = getattr(before, name), getattr(after, name)
        assert len(old) == len(new)
        assert (old[: len(old)] == new[: len(new)]).all()


def test_an_export_over_parts_is_what_everyone_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    their_model().save_pretrained(tmp_path, max_shard_size="2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    old = {name: (tmp_path / name).read_bytes() for name in set(index["weight_map"].values())}
    ours = our_model()
    export_huggingface(ours, tmp_path)
    assert not any((tmp_path / name).exists() for name in old)
    for is_stale in (False, True):
        if is_stale:  # as a copy of the old parts over the new file leaves it
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
            for name, content in old.items():
                (tmp_path / name).write_bytes(content)
        torch.testing.assert_close(
            load_huggingface(tmp_path).state_dict(), ours.state_dict(), rtol=0, atol=0
        )
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        embedding = theirs.transformer.wte.weight
        assert torch.equal(embedding, ours.embed.weight)


def test_plots_of_an_earlier_state_do_not_stay(tmp_path: Path) -> None:
    for name in ("errors", "wire", "mine"):
        (tmp_path / f"{name}.png").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    drawn = plots.write_plots(tmp_path, short_history(3, 0.0), short_summary(None))
    assert sorted(plots.remove_stale(tmp_path, drawn)) == ["errors.png", "wire.png"]
    assert {"mine.png", "notes.txt"} < set(tree(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 kB."""
    if os.getuid() != 0:
        pytest.skip("only root may mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def room(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_disk_that_is_really_full_is_left_as_it_was(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        save(small_disk / "checkpoints", 1, 1.0)
        json_files.write_json(small_disk / "summary.json", {"old": True})
        large = torch.nn.Linear(300, 300)
        before, free = tree(small_disk), room(small_disk)
        history = [{"step": step, "numbers": list(range(900))} for step in range(200)]
        works: dict[type[Exception], list[Callable[[], object]]] = {
            RuntimeError: [
                lambda: checkpoint.save(small_disk / "checkpoints", 2, large, None, {}, keep=1),
                lambda: checkpoint.save(small_disk / "checkpoints", 1, large, None, {}, keep=1),
            ],
            OSError: [
                lambda: json_files.write_json(small_disk / "summary.json", history),
                lambda: atomic_files.write_text(small_disk / "config.toml", "#" * 400_000),
            ],
            ValueError: [lambda: export_huggingface(our_model(width=160), small_disk / "out")],
        }
        for kind, calls in works.items():
            for work in calls:
                with pytest.raises(kind):
                    work()
                assert tree(small_disk) == before
                assert room(small_disk) >= free
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
            file.write(bytes(300_000))
        with pytest.raises(OSError, match="No space left"):
            plots.write_plots(small_disk / "plots", short_history(3, 1.0), short_summary(2.0))
        assert not debris(small_disk)
        filler.unlink()
        save(small_disk / "checkpoints", 2, 2.0, keep=1)
        assert os.listdir(small_disk / "checkpoints") == ["step-00000002"]
    finally:
        dist.destroy_process_group()
