"""``--qsdp-bits auto`` in a world of one, and what it measures of a machine."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from qsdp.commands.train import main
from qsdp.config import QSDPConfig
from qsdp.models.gpt2.config import GPTConfig
from qsdp.train.auto import link_speed, machine_speed
from qsdp.train.auto.choose import Choice, _choice_by_cost, is_choice
from qsdp.train.auto.cost_model import decide_by_cost
from qsdp.train.config import TrainConfig
from qsdp.train.signals import Stop
from tests.support.bad_inputs import TEXT
from tests.support.command_line import small_run
from tests.support.links import SLOW, measured

SIZE = GPTConfig(vocab_size=64, num_layers=3, num_heads=2, width=32, context=64)
CPU = torch.device("cpu")


@pytest.mark.usefixtures("world_of_one")
def test_one_rank_trains_without_a_wire_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    flags = small_run(tmp_path, "--qsdp-bits", "auto", "--one-shot", "none")
    main(flags)
    said = "--qsdp-bits auto: stock FSDP2, since one rank sends nothing"
    assert capfd.readouterr().out.count(said) == 1
    text = (tmp_path / "out" / "config.toml").read_text()
    assert text.startswith(f"# {said}\n")
    assert "qsdp_bits" not in tomllib.loads(text)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["choice"]["settings"] == {"qsdp_bits": None}
    main(flags)
    assert "holds this run, finished after 2 steps" in capfd.readouterr().out
    main(["--config", str(tmp_path / "out" / "config.toml")])
    assert "holds this run, finished after 2 steps" in capfd.readouterr().out


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("limit_s", [300.0, 1e-9])
def test_the_computation_is_that_of_the_whole_batch_and_draws_no_numbers(
    monkeypatch: pytest.MonkeyPatch, batch: int, limit_s: float
) -> None:
    seen: list[int] = []

    def passes(module: Any, forward: Any, device: torch.device) -> tuple[float, float]:
        forward().backward()
        return 1.0, 2.0

    grown = machine_speed._grown

    def watched(run: Any, *rest: Any) -> tuple[float, float]:
        def noted(num: int, length: int) -> tuple[float, float]:
            seen.append(num * length)
            return run(num, length)  # type: ignore[no-any-return]

        return grown(noted, *rest)

    monkeypatch.setattr(machine_speed, "_passes", passes)
    monkeypatch.setattr(machine_speed, "_grown", watched)
    monkeypatch.setattr(machine_speed, "COMPUTE_S", limit_s)
    config = TrainConfig.of(batch_size=batch, seq_len=64)
    state = torch.get_rng_state()
    found = machine_speed.computation_s(config, SIZE, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    whole = batch * 64
    if limit_s > 1:
        assert max(seen) == whole
        assert found == ((1.0, 2.0), (1.0, 2.0))
    else:  # one try of a short sequence each behind the first call, scaled up
        assert seen == [32, 32, 32, 32]
        assert found == ((whole / 32, whole / 16), (whole / 32, whole / 16))


def test_a_slow_block_ends_the_growing_before_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(machine_speed.time, "perf_counter", lambda: clock[0])

    def run(num: int, length: int) -> tuple[float, float]:
        clock[0] += num * length / 1000
        return num * length / 3000, num * length / 1500

    forward, backward = machine_speed._grown(run, 8, 1024, limit_s=1.5)
    assert clock[0] <= 1.5
    assert (forward, backward) == pytest.approx((8192 / 3000, 8192 / 1500))


@pytest.mark.parametrize("slow_calls", [[0], [0, 1], [0, 2], [0, 1, 3]])
def test_growing_is_not_ended_by_calls_that_set_libraries_up(
    monkeypatch: pytest.MonkeyPatch, slow_calls: list[int]
) -> None:
    """As on a GPU: kernels are loaded when they are first called, and then all take alike."""
    clock, seen = [0.0], list[int]()
    monkeypatch.setattr(machine_speed.time, "perf_counter", lambda: clock[0])

    def run(num: int, length: int) -> tuple[float, float]:
        both = (20.0, 0.0) if not seen else (0.4, 0.0) if len(seen) in slow_calls else (1e-3, 1e-3)
        seen.append(num * length)
        clock[0] += sum(both)
        return both

    assert machine_speed._grown(run, 8, 1024, limit_s=1.0) == pytest.approx((1e-3, 1e-3))
    assert seen[0] == 32
    assert max(seen) == 8192
    assert clock[0] <= 21.0


class FakeLinks(link_speed.Links):
    """Collectives of two ranks that only move a clock, over links that let a burst pass."""

    def __init__(
        self, clock: list[float], rate: float, burst: float, latency_s: float, spent_s: float = 0.0
    ) -> None:
        super().__init__(
            cast(Any, None), CPU, (), {"gather": 4 << 20, "reduce": 4 << 20}, 0.0, spent_s, Stop()
        )
        self.clock, self.rate, self.bucket, self.latency_s = clock, rate, burst, latency_s
        self.calls, self.held_up_s = 0, dict[int, float]()
        clock[0] = spent_s

    def send(self, size: int) -> Any:
        def run() -> None:
            self.calls += 1
            self.clock[0] += self.held_up_s.get(self.calls, 0.0)
            self.clock[0] += self.latency_s + max(0.0, size - self.bucket) / self.rate
            self.bucket = max(0.0, self.bucket - size)

        return run

    def all_reduce(self, *_: Any, **__: Any) -> None:
        self.clock[0] += 2 * self.latency_s  # there and back

    def _all_gather(self, size: int, group: Any) -> Any:
        return self.send(size)

    _all_to_all = _all_gather

    def _stock_gather(self, size: int) -> Any:
        return self.send(size)

    _stock_reduce = _stock_gather


def fake_links(monkeypatch: pytest.MonkeyPatch, *args: float) -> FakeLinks:
    clock = [0.0]
    fake = FakeLinks(clock, *args)
    monkeypatch.setattr(link_speed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(link_speed.dist, "all_reduce", fake.all_reduce)
    return fake


@pytest.mark.parametrize(
    ("rate", "burst", "latency_s"),
    [
        (125e3, 0.0, 0.05),
        (12.5e6, 256e3, 1e-4),
        (12.5e6, 0.0, 0.05),
        (1e10, 0.0, 1e-5),
    ],
)
def test_a_links_rate_is_found_in_its_time_behind_a_burst_and_far_away(
    monkeypatch: pytest.MonkeyPatch, rate: float, burst: float, latency_s: float
) -> None:
    fake = fake_links(monkeypatch, rate, burst, latency_s)
    found = fake.measured()
    assert fake.clock[0] <= 10.0
    for transfer in found.values():
        assert transfer.latency_s == pytest.approx(latency_s, rel=0.06)
        assert transfer.bytes_per_s == pytest.approx(rate, rel=0.01)
        assert transfer.num_bytes >= min(1 << 18, rate / 10)


@pytest.mark.parametrize("rate", [12.5e6, 1.25e8])
@pytest.mark.parametrize(
    ("call", "held_up_s"), [(1, 0.15), (1, 0.7), *((n, 0.25) for n in range(2, 40))]
)
def test_a_call_that_is_held_up_is_not_the_link(
    monkeypatch: pytest.MonkeyPatch, rate: float, call: int, held_up_s: float
) -> None:
    """The first may have had to connect, any other waits for a rank that did something else."""
    fake = fake_links(monkeypatch, rate, 0.0, 1e-4, 4.0)
    fake.held_up_s[call] = held_up_s
    for transfer in fake.measured().values():
        assert transfer.latency_s == pytest.approx(1e-4, abs=4e-4)
        assert transfer.bytes_per_s == pytest.approx(rate, rel=0.15)
        assert transfer.num_bytes > 1 << 18


@pytest.mark.parametrize("rate", [12.5e6, 2e6])
@pytest.mark.parametrize("burst", [1e6, 16e6, 64e6])
def test_the_end_of_a_burst_does_not_take_all_the_time(
    monkeypatch: pytest.MonkeyPatch, rate: float, burst: float
) -> None:
    fake = fake_links(monkeypatch, rate, burst, 1e-4, 4.0)
    fake.measured()
    assert fake.clock[0] <= 12.0


def test_without_time_a_rate_is_that_of_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_links(monkeypatch, 125e3, 0.0, 1e-4, 60.0)
    for transfer in fake.measured().values():
        assert transfer.bytes_per_s == pytest.approx(125e3, rel=0.02)


@pytest.mark.parametrize("spent_s", [0.0, 5.0, 8.9, 60.0])
def test_what_a_round_takes_beside_what_it_times_counts_too(
    monkeypatch: pytest.MonkeyPatch, spent_s: float
) -> None:
    """Each answer takes half a second.

    Whatever time there is, each kind is sent once at least, the first also to find out how long a
    round takes.
    """
    fake = fake_links(monkeypatch, 1e9, 0.0, 0.25, spent_s)
    found = fake.measured()
    a_round = 5 * 0.25 + 1e-3
    assert fake.clock[0] <= max(link_speed.LIMIT_S + a_round, spent_s + 5 * a_round)
    for transfer in found.values():
        assert transfer.num_bytes >= link_speed._FIRST_BYTES
        if spent_s < link_speed.LIMIT_S:  # else it was never asked for
            assert 0.9 * 0.25 <= transfer.latency_s < 0.26


def test_free_memory_is_what_the_machine_says_shared_by_its_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "meminfo"
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(machine_speed, "_MEMORY", said)
    monkeypatch.setattr(machine_speed, "_OF_A_CONTAINER", ((str(limit), str(used)),))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    said.write_text("MemTotal:  900 kB\nMemAvailable:     400 kB\n")
    assert machine_speed.free_bytes(CPU) == 100 * 1024
    for most, free in (
        ("max", 400 * 1024),
        ("60000", 50000),
        ("9000", 0),
        ("9000000000", 400 * 1024),
    ):
        limit.write_text(f"{most}\n")
        used.write_text("10000\n")
        assert machine_speed.free_bytes(CPU) == free / 4
    limit.unlink()
    pages = {"SC_AVPHYS_PAGES": 40, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine_speed.os, "sysconf", pages.__getitem__)
    said.unlink()
    assert machine_speed.free_bytes(CPU) == 10 * 4096
    pages["SC_AVPHYS_PAGES"] = -1
    assert machine_speed.free_bytes(CPU) == float("inf")


def test_the_line_says_what_once_keeps_or_would_keep_and_what_little_was_sent() -> None:
    facts = measured(SLOW)
    once = _choice_by_cost(facts, 0.0)
    assert once.settings["qsdp_gather"] == "once"
    assert once.why.endswith("; it keeps 10.3 MB")
    assert "only" not in once.why
    twice = _choice_by_cost(replace(facts, free_bytes=100_000_000), 0.0)
    assert "qsdp_gather" not in twice.settings
    said = "; 4 bits gathered once would keep 10.3 MB, too much of what is free"
    assert twice.why.endswith(said)
    # Where gathering once was not wanted anyway nothing is said of it, though without it another
    # way may be near enough to the fastest.
    coding = {"encode_s": {8: 3e-10, 4: 8e-10}, "decode_s": {8: 3e-10, 4: 1e-9}}
    coded = measured(3.35e9, **coding, free_bytes=0)
    assert decide_by_cost(coded)[0] != decide_by_cost(replace(coded, free_bytes=None))[0]
    assert "keep" not in _choice_by_cost(coded, 0.0).why
    fast = measured(1e15, latency_s=0.0)
    assert "keep" not in _choice_by_cost(replace(fast, free_bytes=0), 0.0).why
    few = _choice_by_cost(replace(facts, reduce=replace(facts.reduce, num_bytes=4096)), 0.0)
    assert "the link carries 100 Mbit/s a rank (measured with 4,096 bytes only) and" in few.why


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 33), (3, 32), (16, 128)])
def test_shapes_grow_to_the_batch(batch: int, length: int) -> None:
    shapes = [*machine_speed._shapes(batch, length)]
    assert shapes[-1] == (batch, length)
    sizes = [num * tokens for num, tokens in shapes]
    assert sizes[0] <= 32
    assert all(a < b <= 4 * a for a, b in pairwise(sizes))


def test_codec_and_optimizer_have_a_speed() -> None:
    for bits in (8, 4):
        encode, decode = machine_speed.codec_s(QSDPConfig(weight_bits=bits), 5000, CPU, 0.1)
        assert encode > 0
        assert decode > 0
    assert machine_speed.optimizer_s(CPU) > 0


def test_only_a_whole_choice_is_taken_from_a_checkpoint() -> None:
    choice = Choice(
        settings={"qsdp_bits": 4},
        what="4 bits",
        why="it is so",
        predicted_s={"4 bits": 1.0},
        measured=None,
        took_s=1.0,
    )
    good = json.loads(json.dumps(asdict(choice)))
    assert is_choice(good)
    assert Choice(**good) == choice
    for bad in (
        {},
        good | {"settings": {"out": "/"}},
        good | {"settings": {"qsdp_bits": "auto"}},
        good | {"settings": []},
        good | {"settings": {}},
        good | {"why": 'x"\nout = "/'},
        good | {"more": 1},
    ):
        assert not is_choice(bad)
