"""`--qsdp-bits auto` in a world of one, and what it measures of a machine."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from qsdp.config import QSDPConfig
from qsdp.models import GPTConfig
from qsdp.train import probe
from qsdp.train.choose import Choice, is_choice
from qsdp.train.cli import main
from qsdp.train.config import TrainConfig
from qsdp.train.signals import Stop
from tests.bad_inputs import TEXT
from tests.test_cli import small_run

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

    grown = probe._grown

    def watched(run: Any, *rest: Any) -> tuple[float, float]:
        def noted(num: int, length: int) -> tuple[float, float]:
            seen.append(num * length)
            return run(num, length)  # type: ignore[no-any-return]

        return grown(noted, *rest)

    monkeypatch.setattr(probe, "_passes", passes)
    monkeypatch.setattr(probe, "_grown", watched)
    monkeypatch.setattr(probe, "COMPUTE_S", limit_s)
    config = TrainConfig(batch_size=batch, seq_len=64)
    state = torch.get_rng_state()
    found = probe.computation_s(config, SIZE, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    whole = batch * 64
    if limit_s > 1:
        assert max(seen) == whole
        assert found == ((1.0, 2.0), (1.0, 2.0))
    else:  # one try of a short sequence each, scaled up
        assert seen == [32, 32]
        assert found == ((whole / 32, whole / 16), (whole / 32, whole / 16))


def test_a_slow_block_ends_the_growing_before_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock[0])

    def run(num: int, length: int) -> tuple[float, float]:
        clock[0] += num * length / 1000
        return num * length / 3000, num * length / 1500

    forward, backward = probe._grown(run, 8, 1024, limit_s=1.5)
    assert clock[0] <= 1.5
    assert (forward, backward) == pytest.approx((8192 / 3000, 8192 / 1500))


@pytest.mark.parametrize(
    ("rate", "burst", "latency_s"), [(125e3, 0.0, 0.2), (12.5e6, 256e3, 1e-4), (1e10, 0.0, 1e-5)]
)
def test_a_links_rate_is_found_in_its_share_of_the_time_behind_a_burst(
    monkeypatch: pytest.MonkeyPatch, rate: float, burst: float, latency_s: float
) -> None:
    links = probe.Links(cast(Any, None), CPU, None, {}, 10.0, Stop())
    bucket, spent = [burst], [0.0]

    def timed(size: int, times: int) -> tuple[float, float]:
        begun = spent[0]
        for _ in range(times):
            spent[0] += latency_s + max(0.0, size - bucket[0]) / rate
            bucket[0] = max(0.0, bucket[0] - size)
        return (spent[0] - begun) / times, 0.0

    monkeypatch.setattr(links, "_timed", timed)
    found = links._transfer(cast(Any, lambda size: size), 4 << 20, 2.0)
    assert spent[0] <= 2.0 + 4 * latency_s + (1 << 16) / rate  # at least one of 64 KiB is sent
    assert found.latency_s == pytest.approx(latency_s, rel=0.01)
    assert found.bytes_per_s == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 33), (3, 32), (16, 128)])
def test_shapes_grow_to_the_batch(batch: int, length: int) -> None:
    shapes = [*probe._shapes(batch, length)]
    assert shapes[-1] == (batch, length)
    sizes = [num * tokens for num, tokens in shapes]
    assert sizes[0] <= 32
    assert all(a < b <= 4 * a for a, b in pairwise(sizes))


def test_codec_and_optimizer_have_a_speed() -> None:
    for bits in (8, 4):
        encode, decode = probe.codec_s(QSDPConfig(weight_bits=bits), 5000, CPU, 0.1)
        assert encode > 0
        assert decode > 0
    assert probe.optimizer_s(CPU) > 0


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
