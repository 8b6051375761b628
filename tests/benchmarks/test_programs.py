"""The programs in benchmarks/ say what they measured: their arithmetic, options and records."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from qsdp.commands.parsing import parse


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 300)
    return path


def a_record(
    wire: str, seed: int, loss: float, sent: float = 1.0, kind: str = "training", **more: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "wire": wire,
        "seed": seed,
        "gather": "twice",
        "val_loss": loss,
        "sent_bytes_per_step": sent,
        "fp32_bytes_per_step": 8 * sent,
        "parameters": 1000,
        "ranks": 2,
    } | more


# saving.py


def test_a_save_is_timed_both_ways(load: Any, tmp_path: Path) -> None:
    saving = load("saving.saving")
    options = SimpleNamespace(model="tiny", rounds=1, tokens=8, folder=tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        row = saving.measure(options)
    finally:
        dist.destroy_process_group()
    assert row["bytes"] > 3 * 4 * 10_000  # the weights and two moments of each
    assert min(row.values()) > 0
    assert not [*tmp_path.iterdir()]


# quality.py


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"preset": "huge"}, "'huge'"),
        ({"wires": ("fp32", "w9g9-shift")}, "w9g9-shift"),
        ({"wires": ("w8g8-learned",)}, "w8g8-learned"),
        ({"gathers": ("thrice",)}, "thrice"),
        ({"ranks": 5}, "5"),
        ({"ranks": 1}, "1"),
        ({"jobs": 0}, "0"),
        ({"data": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_quality_refuses_what_it_cannot_run_in_one_sentence(
    load: Any, text: Path, tmp_path: Path, capsys: Any, option: dict[str, Any], named: str
) -> None:
    quality = load("quality.quality")
    options = quality.Options(**{"data": text, "out": tmp_path / "out"} | option)
    assert quality.main(options) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nano", "larger", "delta"])
def test_every_training_of_quality_is_one_that_the_job_takes(
    load: Any, text: Path, preset: str
) -> None:
    quality = load("quality.quality")
    for run in quality.plan(quality.Options(data=text, preset=preset)):
        config = parse(run.flags)
        wire = run.settings["wire"]
        assert (config.qsdp is None) == (wire == "fp32")
        assert config.run.model == run.settings["model"]
        assert config.run.batch_size * run.settings["ranks"] == quality.SEQUENCES
        if config.qsdp is not None:
            assert wire.startswith(f"w{config.qsdp.weight_bits}g{config.qsdp.grad_bits}")
            assert config.qsdp.gather == run.settings["gather"]
            assert (config.qsdp.gather == "delta") == ("delta" in wire)
            assert (config.qsdp.levels == "learned") == wire.endswith("learned")


def test_the_table_spans_all_bits_and_methods_and_seeds(load: Any, text: Path) -> None:
    quality = load("quality.quality")
    runs = quality.plan(quality.Options(data=text))
    trained = {(run.settings["wire"], run.settings["seed"]) for run in runs if run.is_training}
    for seed in (0, 1, 2):
        for bits in ("w8g8", "w6g6", "w5g4", "w4g4", "w3g3"):
            for method in ("shift", "dither", "learned"):
                # Learned levels are for 6 bits and below.
                assert ((f"{bits}-{method}", seed) in trained) == (
                    (bits, method) != ("w8g8", "learned")
                )
        assert ("fp32", seed) in trained
        assert ("w4g4-default", seed) in trained


def test_every_wire_but_stock_is_counted_gathered_twice_and_once(load: Any, text: Path) -> None:
    quality = load("quality.quality")
    runs = quality.plan(quality.Options(data=text))
    counted: dict[str, set[str]] = {}
    for run in runs:
        counted.setdefault(run.settings["wire"], set()).add(run.settings["gather"])
    assert counted.pop("fp32") == {"twice"}
    assert all(gathers == {"twice", "once"} for gathers in counted.values())


def test_bytes_of_changed_codes_are_those_of_their_own_training(load: Any, text: Path) -> None:
    quality = load("quality.quality")
    wires = ("w4g4-default", "w4g4-delta", "w8g8-default", "w8g8-delta")
    runs = quality.plan(quality.Options(data=text, wires=wires, seeds=(0,)))
    kinds = [(run.settings["kind"], run.settings["gather"]) for run in runs if "delta" in run.name]
    assert kinds == [("training", "delta")] * 2
    assert {run.settings["steps"] for run in runs if run.is_training} == {2000}


@pytest.mark.parametrize(("above", "is_met"), [(0.0049, True), (0.0051, False)])
def test_changed_codes_are_held_against_whole_weights_of_the_same_seeds(
    load: Any, above: float, is_met: bool
) -> None:
    table = load("quality.quality_table")
    losses = {"w4g4-default": 2.0, "w4g4-delta": 2.0 + above}
    losses |= {"w8g8-default": 1.9, "w8g8-delta": 1.9 - above}
    gathers = {"w4g4-default": "once", "w8g8-default": "twice"}
    records = [
        a_record(wire, seed, loss + seed, gather=gathers.get(wire, "delta"))
        for wire, loss in losses.items()
        for seed in (0, 1)
    ]
    four, eight = table.verdicts(table.make_rows(records, []))[-2:]
    assert (four["measured"], four["is_met"]) == (pytest.approx(above), is_met)
    assert (eight["measured"], eight["is_met"]) == (pytest.approx(-above), True)


def test_quality_goes_on_from_its_records_and_from_no_others(
    load: Any, text: Path, tmp_path: Path
) -> None:
    quality, runs = load("quality.quality"), load("support.runs")
    run, *_ = quality.plan(quality.Options(data=text, steps=7))
    assert runs.read_record(tmp_path, run) is None
    record = run.settings | {"val_loss": random.random()}
    quality.write_json(tmp_path / f"{run.name}.json", record)
    assert runs.read_record(tmp_path, run) == record
    for name in ("steps", "ranks", "data_sha256", "flags"):
        other = run.settings | {name: "another"}
        with pytest.raises(quality.Mistake, match=name):
            runs.read_record(tmp_path, quality.Run(run.name, other, run.flags))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_a_parameter_count_each_value_once_whatever_the_ranks(load: Any, ranks: int) -> None:
    table = load("quality.quality_table")
    parameters, width = 12_000, random.uniform(0.5, 12)
    # A rank sends its N-th of the model to each of N - 1 others.
    sent = (ranks - 1) * parameters / ranks * width
    record = a_record("w4g4-dither", 0, 2.0, sent, ranks=ranks, parameters=parameters)
    assert table.bytes_per_parameter(record) == pytest.approx(width)


def test_gaps_are_between_runs_of_the_same_seed(load: Any) -> None:
    table = load("quality.quality_table")
    base = {seed: random.uniform(1, 3) for seed in range(3)}
    gaps = {seed: random.uniform(-0.1, 0.1) for seed in range(3)}
    records = [a_record("fp32", seed, loss) for seed, loss in base.items()]
    records += [a_record("w4g4-default", seed, base[seed] + gaps[seed]) for seed in (2, 0, 1)]
    once = a_record("w4g4-default", 0, 9.0, sent=0.5, kind="bytes", gather="once")
    stock, four = table.make_rows(records, [once])
    assert stock.minus_fp32 is None
    assert four.minus_fp32 == pytest.approx([gaps[0], gaps[1], gaps[2]])
    assert four.mean_gap == pytest.approx(statistics.mean(gaps.values()))
    assert four.spread == pytest.approx(statistics.stdev(gaps.values()))
    assert four.bytes_per_parameter["once"] == four.bytes_per_parameter["twice"] / 2
    assert len(four.val_loss) == 3


@pytest.mark.parametrize(("gap", "sent", "is_met"), [(0.019, 840, True), (0.021, 860, False)])
def test_the_verdicts_hold_the_default_to_its_promise(
    load: Any, gap: float, sent: float, is_met: bool
) -> None:
    table = load("quality.quality_table")
    records = [a_record("fp32", 0, 2.0), a_record("w4g4-default", 0, 2.0 + gap, sent)]
    found = table.verdicts(table.make_rows(records, []))
    assert [verdict["is_met"] for verdict in found] == [is_met, is_met]


def test_a_loss_that_is_no_number_misses_its_target(load: Any) -> None:
    table = load("quality.quality_table")
    records = [a_record("fp32", 0, 2.0), a_record("w8g8-shift", 0, float("nan"))]
    (verdict,) = table.verdicts(table.make_rows(records, []))
    assert not verdict["is_met"]


def test_the_time_left_is_the_mean_of_runs_of_the_same_kind(load: Any, text: Path) -> None:
    quality = load("quality.quality")
    runs = quality.plan(quality.Options(data=text, wires=("fp32", "w4g4-dither"), seeds=(0,)))
    assert [run.is_training for run in runs] == [True, True, False]
    records = [{"kind": "training", "seconds": 100.0}, {"kind": "training", "seconds": 300.0}]
    assert load("support.runs").seconds_left(runs[1:2], records) == 200.0
    records.append({"kind": "bytes", "seconds": 8.0})
    assert load("support.runs").seconds_left(runs[1:], records) == 208.0


# nodes.py


def rows_of_passes(gather: float, reduce: float, saved: float) -> list[dict[str, Any]]:
    """What passes.py finds at one width if all is as promised: bytes of a node."""
    rows = []
    for kind, share in (("flat", 1.0), ("two-hop", 0.5)):
        sent, reduced = share * gather, share * reduce
        for name, way, gathers, reduces in (
            ("forward", "twice", sent, 0.0),
            ("kept", "twice", sent, reduced),
            ("step", "twice", sent * 2 * saved, reduced),
            ("step", "once", sent, reduced),
        ):
            rows.append(
                {
                    "bits": 4,
                    "reduce": kind,
                    "gather": way,
                    "kind": name,
                    "seen": gathers + reduces,
                    "counted_gather": gathers,
                    "counted_reduce": reduces,
                }
            )
    return rows


def test_differences_of_passes_tell_reduces_from_gathers(load: Any) -> None:
    nodes = load("wire.nodes")
    gather, reduce = random.uniform(1e6, 2e6), random.uniform(1e6, 2e6)
    lines = nodes.lines_of_passes(rows_of_passes(gather, reduce, saved=0.995))
    assert nodes.mistakes(lines) == []
    seen = {(line.what, line.reduce, line.gather): line.seen for line in lines}
    assert seen["reduce", "flat", "twice"] == pytest.approx(reduce)
    assert seen["reduce", "two-hop", "twice"] == pytest.approx(reduce / 2)
    assert seen["gather", "flat", "once"] == pytest.approx(gather)
    assert seen["gather", "two-hop", "once"] == pytest.approx(gather / 2)
    ratios = {ratio.what: ratio for ratio in nodes.ratios_of(lines)}
    assert ratios["reduce, two-hop of flat"].value == pytest.approx(0.5)
    assert ratios["gathers, once of twice"].value == pytest.approx(1 / 1.99)
    assert all(ratio.is_met for ratio in ratios.values())


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_counters_that_do_not_tell_what_crossed_are_found(load: Any, factor: float) -> None:
    nodes = load("wire.nodes")
    rows = rows_of_passes(1e6, 2e6, saved=1.0)
    for row in rows:
        row["counted_reduce"] *= factor
    wrong = nodes.mistakes(nodes.lines_of_passes(rows))
    assert {(line.what, line.reduce) for line in wrong} == {
        ("reduce", "flat"),
        ("reduce", "two-hop"),
    }


def test_a_two_hop_reduce_that_sends_as_much_as_a_flat_one_misses_its_target(load: Any) -> None:
    nodes = load("wire.nodes")
    rows = rows_of_passes(1e6, 2e6, saved=1.0)
    flat = [row for row in rows if row["reduce"] == "flat"]
    lines = nodes.lines_of_passes(flat + [row | {"reduce": "two-hop"} for row in flat])
    missed = {ratio.what for ratio in nodes.ratios_of(lines) if not ratio.is_met}
    assert missed == {"reduce, two-hop of flat"}


def test_a_whole_step_is_compared_with_its_own_target(load: Any) -> None:
    nodes = load("wire.nodes")
    common = {"bits": 8, "what": "step", "gather": "twice", "counted": 1.0}
    for two_hop, is_met in ((0.6, True), (0.63, False)):
        lines = [
            nodes.Line(reduce="flat", seen=1.0, **common),
            nodes.Line(reduce="two-hop", seen=two_hop, **common),
        ]
        (ratio,) = nodes.ratios_of(lines)
        assert ratio.is_met == is_met
        assert ("MISSED" in nodes.table(lines, [ratio])) == (not is_met)


# memory.py


def memory_event(ts: float, num_bytes: int, total: int) -> dict[str, Any]:
    arguments = {"Bytes": num_bytes, "Total Allocated": total}
    return {"name": "[memory]", "ts": ts, "args": arguments}


def test_a_trace_is_read_as_bytes_since_it_began(load: Any) -> None:
    memory = load("cost.memory")
    start = random.randrange(10**6)
    sizes = [random.randrange(1, 10**6) for _ in range(30)]
    total, events, totals = start, [], []
    for number, size in enumerate([*sizes, *(-size for size in sizes)]):
        total += size
        totals.append(total - start)
        events.append(memory_event(number, size, total))
    mark = random.randrange(10, 50)
    events += [{"name": memory._MARK, "ts": ts} for ts in (3.5, mark + 0.5)]
    random.shuffle(events)
    reading = memory.Reading()
    memory.read_trace(events, reading)
    assert reading.peak == max(totals) == sum(sizes)
    assert reading.between == totals[mark]


def test_a_trace_that_tells_nothing_is_an_error(load: Any) -> None:
    memory = load("cost.memory")
    with pytest.raises(RuntimeError, match="0 marks"):
        memory.read_trace([memory_event(0, 8, 8)], memory.Reading())


@pytest.mark.parametrize(
    ("between", "peak", "kept", "is_met"),
    [
        (1000, 1000, 1000, True),
        (1000, 400, 1000, True),
        (1020, 400, 1000, False),
        (1000, 1020, 1000, False),
        (500, 500, 1000, False),
        (0, 0, 0, False),
    ],
)
def test_gathering_once_may_cost_the_payload_and_no_more(
    load: Any, between: int, peak: int, kept: int, is_met: bool
) -> None:
    row = load("cost.memory").Row(
        bits=4,
        between_twice=5000,
        between_once=5000 + between,
        peak_twice=9000,
        peak_once=9000 + peak,
        kept=kept,
    )
    assert row.is_met == is_met


# gpu_training.py


def test_a_quantized_run_is_compared_with_its_own_method_at_the_most_bits(load: Any) -> None:
    losses = {("plain", 8): 2.5, ("plain", 32): 2.0, ("CrAM+", 32): 3.0, ("CrAM+", 4): 3.25}
    rows = [{"method": m, "bits": b, "loss": loss} for (m, b), loss in losses.items()]
    found = [row["difference"] for row in load("quality.gpu_training").with_differences(rows)]
    assert found == [0.5, None, None, 0.25]
