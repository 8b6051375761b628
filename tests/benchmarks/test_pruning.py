"""benchmarks/pruning/pruning.py says what it measured: its splits, its runs, its table's logic."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.commands.parsing import parse
from qsdp.data.corpus import load_corpus
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = ("".join(random.choices("to be or not", k=20)) + "\n" for _ in range(300))
    path.write_text("to be or not\n" + "".join(lines))
    return path


def a_plan(load: Any, text: Path, tmp_path: Path, **options: Any) -> list[Any]:
    pruning = load("pruning.pruning")
    texts = load("pruning.pruning_data").split([text], tmp_path, None)
    return list(pruning.plan(pruning.Options(data=(text,), **options), texts))


def a_record(
    method: str, steps: int, seed: int = 0, wire: str = "stock", **losses: float
) -> dict[str, Any]:
    columns = ("dense", "0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4bit")
    test = {column: random.uniform(1.5, 3) for column in columns}
    test |= {name.removeprefix("at_").replace("_", "."): loss for name, loss in losses.items()}
    twin = {column: random.uniform(1.5, 3) for column in columns} if method == "acdc" else None
    return {
        "kind": "training",
        "method": method,
        "steps": steps,
        "seed": seed,
        "wire": wire,
        "test": test,
        "twin_test": twin,
        "twin_val": None,
    }


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"preset": "huge"}, "'huge'"),
        ({"methods": ("adamw", "lottery")}, "lottery"),
        ({"jobs": 0}, "0"),
        ({"steps": 0}, "0"),
        ({"split": "train"}, "'train'"),
        ({"data": (Path("nowhere.txt"),)}, "nowhere.txt"),
    ],
)
def test_pruning_refuses_what_it_cannot_run_in_one_sentence(
    load: Any, text: Path, tmp_path: Path, capsys: Any, option: dict[str, Any], named: str
) -> None:
    pruning = load("pruning.pruning")
    options = pruning.Options(**{"data": (text,), "out": tmp_path / "out"} | option)
    assert pruning.main(options) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


def test_a_test_text_with_characters_of_its_own_is_refused(
    load: Any, text: Path, tmp_path: Path, capsys: Any
) -> None:
    pruning = load("pruning.pruning")
    text.write_text(text.read_text() + "ß")
    assert pruning.main(pruning.Options(data=(text,), out=tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nano", "larger"])
@pytest.mark.parametrize("wires", [False, True])
def test_every_training_of_pruning_is_one_that_the_job_takes(
    load: Any, text: Path, tmp_path: Path, preset: str, wires: bool
) -> None:
    sequences = load("support.runs").SEQUENCES
    methods = load("pruning.pruning_methods").METHODS
    runs = a_plan(load, text, tmp_path, preset=preset, wires=wires)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = parse(run.flags)
        settings = run.settings
        assert config.method.PASSES == methods[settings["method"]].passes
        assert config.method.NAME in ("AdamW", "SAM", "GMP", "CrAM", "AC/DC")
        assert settings["method"].startswith(config.method.NAME.replace("/", "").lower())
        assert config.run.batch_size * settings["ranks"] == sequences
        assert (config.run.seed, config.run.steps) == (settings["seed"], settings["steps"])
        assert config.run.seq_len == settings["seq_len"]
        assert (config.qsdp is None) == (settings["wire"] == "stock")
        if config.qsdp is not None:
            assert settings["wire"] == f"{config.qsdp.weight_bits}-bit"


@pytest.mark.slow
def test_flags_for_tuning_reach_every_training_and_its_record(
    load: Any, text: Path, tmp_path: Path
) -> None:
    for run in a_plan(load, text, tmp_path, flags="--lr 0.005 --weight-decay 0"):
        config = parse(run.flags)
        assert (config.run.lr, config.run.weight_decay) == (0.005, 0)
        assert run.settings["flags"][-4:] == ["--lr", "0.005", "--weight-decay", "0"]


def test_all_methods_stand_at_equal_steps_and_at_equal_compute(
    load: Any, text: Path, tmp_path: Path
) -> None:
    methods = load("pruning.pruning_methods").METHODS
    for seed in (0, 1, 2):
        trained = {
            (run.settings["method"], run.settings["steps"])
            for run in a_plan(load, text, tmp_path, steps=700)
            if run.settings["seed"] == seed
        }
        assert {method for method, steps in trained if steps == 700} == methods.keys()
        assert {m for m, steps in trained if steps * methods[m].passes == 1400} == methods.keys()


def test_the_splits_are_apart_and_together_the_whole_text(
    load: Any, text: Path, tmp_path: Path
) -> None:
    texts = load("pruning.pruning_data").split([text, text], tmp_path, None)
    corpus = load_corpus(texts.train, texts.tokenizer)
    assert corpus.tokenizer is not None
    parts = (corpus.train, corpus.val, texts.test)
    whole = "".join(corpus.tokenizer.decode([int(i) for i in part]) for part in parts)
    assert whole == text.read_text() * 2
    assert len(texts.test) == pytest.approx(0.05 * len(whole), abs=1)
    assert len(corpus.val) == pytest.approx(0.095 * len(whole), abs=1)


@pytest.mark.slow
def test_the_tokenizer_is_made_of_the_training_text_alone_and_always_the_same(
    load: Any, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    data = load("pruning.pruning_data")
    text.write_text(text.read_text() * 20 + "zebra " * 100)
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    texts = data.split([text], first, 300)
    assert texts.sha256 == data.split([text], second, 300).sha256
    assert texts.vocab_size == 300
    assert "zebr" not in Path(texts.tokenizer).read_text()
    tokenizer = load_corpus(texts.train, texts.tokenizer).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode([int(i) for i in texts.test]).endswith("zebra zebra ")


def test_the_test_loss_is_of_the_checkpoint_compressed_and_put_back(
    load: Any, text: Path, tmp_path: Path
) -> None:
    data = load("pruning.pruning_data")
    texts = data.split([text], tmp_path, None)
    torch.manual_seed(random.randrange(1 << 30))
    model = GPT(GPTConfig.from_preset("nano", vocab_size=texts.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saved = checkpoint.save(tmp_path / "saved", 1, model, None, {})
    dist.destroy_process_group()
    losses = data.losses_on_test(saved, "nano", texts, 64)
    windows = (len(texts.test) - 1) // 64
    ids = torch.from_numpy(texts.test[: windows * 64 + 1].astype("int64"))
    _, expected = model(ids[:-1].view(windows, 64), ids[1:].view(windows, 64))
    assert losses["dense"] == pytest.approx(expected.item(), abs=1e-4)
    assert [*losses] == ["dense", *load("pruning.pruning_methods").TARGETS]
    assert len(set(losses.values())) == len(losses)


def test_rows_are_means_over_seeds_in_order_of_compute_and_twins_follow(load: Any) -> None:
    table = load("pruning.pruning_table")
    records = [
        a_record(method, steps, seed)
        for seed in (1, 0)
        for method, steps in (("acdc", 20), ("acdc", 10), ("cram-multi", 10), ("adamw", 20))
    ]
    rows = table.make_rows(records)
    assert [(row.method, row.passes) for row in rows] == [
        ("acdc", 10),
        ("acdc-twin", 10),
        ("adamw", 20),
        ("cram-multi", 20),
        ("acdc", 20),
        ("acdc-twin", 20),
    ]
    by_key = {(row.method, row.steps): row for row in rows}
    for record in records:
        row = by_key[record["method"], record["steps"]]
        place = row.seeds.index(record["seed"])
        assert row.losses["2:4"][place] == record["test"]["2:4"]
        base = record["twin_test"] or record["test"]
        gap = record["test"]["0.9"] - base["dense"]
        assert row.gaps("0.9")[place] == pytest.approx(gap)
    assert by_key["adamw", 20].gaps("dense") == [0.0, 0.0]


def test_settings_are_chosen_by_the_validation_split_alone(load: Any) -> None:
    table = load("pruning.pruning_table")
    records = [a_record("acdc", 20), a_record("gmp", 20)]
    for record in records:
        record["val"] = {column: loss + 1 for column, loss in record["test"].items()}
        record["test"] = record["twin_test"] = None
    records[0]["twin_val"] = 1.25
    rows = {row.method: row for row in table.make_rows(records, "val")}
    assert rows.keys() == {"acdc", "gmp"}
    assert rows["acdc"].gaps("0.9") == [pytest.approx(records[0]["val"]["0.9"] - 1.25)]
    assert rows["gmp"].losses["0.5"] == [records[1]["val"]["0.5"]]


@pytest.mark.parametrize("is_met", [True, False])
def test_the_verdicts_hold_the_methods_to_their_promises(load: Any, is_met: bool) -> None:
    table = load("pruning.pruning_table")
    slip = -0.001 if is_met else 0.001
    base = random.uniform(1, 2)
    multi: dict[str, float] = {"dense": base, "at_0_7": base + 0.06 + slip}
    multi |= {"at_0_8": base + 0.1, "at_0_9": base + 0.15 + slip}
    lead = 0.4 - slip
    adamw = {"at_0_7": base + 0.06, "at_0_8": base + 0.1 + lead, "at_0_9": base + 0.15 + lead}
    records = [
        a_record("cram-multi", 10, **multi),
        a_record("adamw", 20, **adamw),
        a_record("adamw", 10, dense=0.1, at_0_7=0.1, at_0_8=0.1, at_0_9=0.1),
        a_record("acdc", 20, at_0_9=2.0 + slip),
        a_record("gmp", 20, at_0_9=2.0),
        a_record("gmp", 10, at_0_9=0.1),
    ]
    found = table.verdicts(table.make_rows(records), 10, 0.4)
    assert len(found) == 7
    figures = [verdict for verdict in found if verdict["below"] is None]
    assert [verdict["what"] for verdict in figures] == [
        "CrAM+-Multi less AdamW at equal compute, dense"
    ]
    assert {verdict["is_met"] for verdict in found if verdict["below"] is not None} == {is_met}


def test_a_loss_that_is_no_number_misses_every_target(load: Any) -> None:
    table = load("pruning.pruning_table")
    record = a_record("cram-multi", 10)
    record["test"] = dict.fromkeys(record["test"], None)
    found = table.verdicts(table.make_rows([record]), 10, 0.4)
    assert [verdict["is_met"] for verdict in found] == [False, False]


def test_a_wire_is_judged_by_the_column_that_is_furthest_off(load: Any) -> None:
    table = load("pruning.pruning_table")
    records = []
    for seed in (0, 1):
        stock = a_record("cram-multi", 10, seed)
        near = stock | {"wire": "8-bit", "test": {k: v + 0.01 for k, v in stock["test"].items()}}
        far = stock | {"wire": "4-bit", "test": stock["test"] | {"0.8": stock["test"]["0.8"] - 1}}
        records += [stock, near, far]
    eight, four = table.wire_verdicts(table.make_rows(records))
    assert eight["measured"] == pytest.approx(0.01)
    assert eight["is_met"]
    assert four["measured"] == pytest.approx(-1)
    assert "(0.8)" in four["what"]
    assert not four["is_met"]


def test_the_table_shows_mean_and_spread_of_every_column(load: Any) -> None:
    table = load("pruning.pruning_table")
    records = [a_record("sam", 10, seed) for seed in (0, 1, 2)]
    (row,) = table.make_rows(records)
    shown = table.loss_table([row], "title")
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells[:3] == ["SAM", "10", "20"]
    losses = [record["test"]["4bit"] for record in records]
    assert cells[-1] == f"{statistics.mean(losses):.3f} ±{statistics.stdev(losses):.3f}"
