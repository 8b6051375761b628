"""What launch/evaluate.py says of a run and of its exports is what the run said of itself."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsdp.commands import compress, evaluate, train
from qsdp.data.token_shards import TokenRange, TokenShards
from qsdp.models.gpt2.config import GPTConfig
from qsdp.train import evaluate_targets
from qsdp.train.config import TrainConfig
from qsdp.train.trained_model import TrainedModel, _settings
from tests.support.bad_inputs import TEXT, BadInput

pytestmark = pytest.mark.usefixtures("world_of_one")

TARGETS = "0.5,2:4,4bit,0.6+layer"

FLAGS = [
    BadInput("no checkpoint", "{}/none", "none holds no complete checkpoint"),
    BadInput("an unknown target", "{}/run --targets 0.5,half", "has the term 'half'"),
    BadInput("a sparsity of 2", "{}/run --targets 2", "--targets: sparsity is 2.0"),
    BadInput("an unknown split", "{}/run --split train", "--split is 'train'"),
    BadInput("fewer than no batches", "{}/run --eval-batches=-1", "--eval-batches is -1"),
    BadInput("an unknown method", "{}/run --method obs", "--method is 'obs': choose one of"),
    BadInput("a method for nothing", "{}/run --targets none --method magnitude", "nothing to do"),
    BadInput("missing data", "{}/run --data {}/none.txt", "none.txt cannot be read"),
    BadInput("data of another tokenizer", "{}/run --data {}/new.txt", "'~'", ("new.txt", b"~~~~")),
    BadInput("a folder that is a file", "{}/run --out {}/text.txt", "text.txt is a file"),
    BadInput("a pattern that does not fit", "{}/run --targets 2:7", "groups of 7"),
    BadInput("patterns of nothing", "{}/run --prunable layers.*", "'layers.*' matches no"),
    BadInput("a checkpoint of nobody", "{}/other", "holds no complete checkpoint"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run in ``run``, and its text."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    flags = ["--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--steps", "2"]
    flags += ["--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "3"]
    flags += ["--one-shot", TARGETS]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        train.main([*flags, "--qsdp-bits", "8"])
    return folder


def test_patterns_are_for_what_is_evaluated_whatever_the_run_compressed(tmp_path: Path) -> None:
    run = TrainConfig.of(one_shot=("none",), qsdp_bits=8, batch_size=7).as_dict()
    # As an older version took it: no run could have both now.
    run |= {"cram": True, "cram_sparsity": [0.5], "cram_targets": ["2:4"]}
    settings = _settings(tmp_path, run)
    assert settings.run.batch_size == 7
    source = TrainedModel(
        tmp_path, None, 2, settings, 1, GPTConfig.from_preset("tiny", vocab_size=9), True
    )
    flags = evaluate.parse_evaluate_flags(
        [str(tmp_path), "--prunable", "a.*,b.*", "--targets", "none"]
    )
    assert evaluate_targets._config(flags, source).compression.patterns == ["a.*", "b.*"]
    flags = evaluate.parse_evaluate_flags([str(tmp_path)])
    assert evaluate_targets._config(flags, source).compression.patterns is None


def evaluated(out: Path, *flags: str) -> tuple[dict[str, Any], dict[str | None, Any]]:
    """What evaluation.json says, and its rows by target."""
    evaluate.main([*flags, "--out", str(out)])
    results = json.loads((out / "evaluation.json").read_text())
    return results, {row["target"]: row for row in results["results"]}


def test_the_losses_are_those_of_the_run(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    flags = ["--targets", TARGETS, "--method", "magnitude"]
    results, rows = evaluated(tmp_path, str(folder / "run"), *flags)
    assert (results["compressed_by"], results["method"]) == (None, "magnitude")
    assert rows.keys() == {None, *TARGETS.split(",")}
    assert rows[None]["loss"] == summary["val_loss"]
    assert {t: row["loss"] for t, row in rows.items() if t is not None} == summary["one_shot"]
    for row in rows.values():
        assert row["perplexity"] == math.exp(row["loss"])
    assert rows["0.5"]["zeros"]["prunable"] == 0.5
    assert (results["split"], results["sequences"], results["tokens"]) == ("val", 6, 48)
    assert "50% pruned" in capfd.readouterr().out


def test_what_an_export_says_of_itself_steers_no_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    row = {"target": None, "loss": 1.0, "perplexity": 2.0, "zeros": {"prunable": 0.0, "model": 0.0}}
    results = {"source": "there\x1b[2J", "compressed_to": "2:4[/]", "compressed_by": "me\x1b[31m"}
    results |= {"method": None, "step": 3, "split": "val", "tokens": 8, "results": [row]}
    evaluate_targets._report(results | {"tokens_seen_in_validation": 0}, None)
    printed = capfd.readouterr().out
    assert "\x1b" not in printed
    assert "there\ufffd[2J, step 3\n" in printed
    assert "2:4[/]" in printed


@pytest.mark.parametrize("flags", ["--sparsity 0.5", "--pattern 2:4", "--bits 4"])
def test_the_loss_of_an_export_is_the_one_shot_loss_of_the_run(
    folder: Path, tmp_path: Path, flags: str, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    export = tmp_path / "export"
    compress.main([str(folder / "run"), *flags.split(), "--out", str(export)])
    results, rows = evaluated(tmp_path / "out", str(export))
    assert list(rows) == [None]
    assert rows[None]["loss"] == summary["one_shot"][results["compressed_to"]]
    assert (results["compressed_by"], results["method"]) == ("magnitude", None)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main([str(export), "--method", "magnitude"])
    assert re.fullmatch(r"error: --method .* is compressed already: .*\n", capfd.readouterr().err)


def test_the_test_split_is_the_last_half_of_the_validation_split(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [str(folder / "run"), "--targets", "none"]
    num_val = len(TEXT) - int(len(TEXT) * 0.9)
    whole, whole_rows = evaluated(tmp_path, *flags, "--eval-batches", "0")
    assert whole["sequences"] == (num_val - 1) // 8
    half, rows = evaluated(tmp_path, *flags, "--split", "test", "--eval-batches", "0")
    assert half["sequences"] == (num_val - num_val // 2 - 1) // 8
    assert half["tokens_seen_in_validation"] == 0
    assert rows[None]["loss"] != whole_rows[None]["loss"]
    # The same tokens as a validation split of their own.
    text = TEXT[-(num_val - num_val // 2) :]
    (tmp_path / "last.txt").write_text(TEXT[: 9 * len(text)] + text)
    again, again_rows = evaluated(
        tmp_path, *flags, "--eval-batches", "0", "--data", str(tmp_path / "last.txt")
    )
    assert again["sequences"] == half["sequences"]
    assert again_rows[None]["loss"] == pytest.approx(rows[None]["loss"], abs=1e-6)
    assert "Note" not in capfd.readouterr().out


def test_a_range_of_tokens_reads_as_a_slice_does_and_tells_of_mistakes() -> None:
    whole = np.arange(20, dtype=np.uint32)
    shards = TokenShards([whole[:7], whole[7:]], vocab_size=15)
    part = TokenRange(shards, 5, 14)
    for start in range(-2, 12):
        for stop in range(-2, 12):
            assert part[start:stop].tolist() == whole[5:14][start:stop].tolist()
    assert len(part) == 9
    assert part.mistake is None
    nested = TokenRange(TokenRange(shards, 10, 20), 2, 100)
    assert len(nested) == 8
    assert nested[:3].tolist() == [12, 13, 14]
    _ = nested[3:4]
    assert "token id 15" in str(nested.mistake)


def test_a_plot_is_drawn_where_matplotlib_is(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [str(folder / "run"), "--targets", "0.5"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        evaluated(tmp_path / "without", *flags)
    assert os.listdir(tmp_path / "without") == ["evaluation.json"]
    assert "no plot: matplotlib is not installed" in capfd.readouterr().out
    pytest.importorskip("matplotlib")
    evaluated(tmp_path / "with", *flags)
    assert (tmp_path / "with" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bad", FLAGS, ids=lambda bad: bad.name)
def test_a_mistake_is_refused_in_one_sentence(
    bad: BadInput, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = bad.arguments(folder)
    given = sorted(os.listdir(folder))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: \S.*\n", said), said
    assert bad.said in said
    assert sorted(os.listdir(folder)) == given
