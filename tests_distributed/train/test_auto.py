"""``--qsdp-bits auto`` on several ranks: what it measures, and that a run is what it chose."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import tomllib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsdp.comm.traffic import Traffic
from qsdp.common.user_errors import UserError
from qsdp.models.gpt2.config import GPTConfig
from qsdp.train import loop, setup
from qsdp.train.auto import choose, link_speed
from qsdp.train.auto.cost_model import Measured, WireWay, ways_to_compare
from qsdp.train.config import TrainConfig
from qsdp.train.job import Job
from qsdp.train.loop import train_step
from qsdp.train.parallelize import parallelize
from qsdp.train.setup import set_up
from qsdp.train.world import World
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT
from tests_distributed.support.running import Run

SIZE = GPTConfig(vocab_size=64, num_layers=3, num_heads=2, width=64, context=64)


def here() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, torch.device("cpu"), "gloo", init_device_mesh("cpu", (size,)))


def measured_there(node: int) -> Measured:
    config = TrainConfig.of(model="tiny", seq_len=16, batch_size=2, qsdp_bits="auto")
    threads, rank = torch.get_num_threads(), dist.get_rank()
    states = torch.get_rng_state(), random.getstate()
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(node)),
        mock.patch.object(link_speed, "_MOST_TIMES", 2),
        mock.patch.object(link_speed, "_MOST_BYTES", 1 << 17),
        mock.patch.object(choose, "free_bytes", return_value=1e6 * (dist.get_world_size() - rank)),
    ):
        found = choose.measure_for_choice(config, SIZE, here())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.get_num_threads() == threads
    return found


@pytest.mark.parametrize(("ranks", "node"), [(2, 1), (4, 2)])
def test_all_ranks_measure_the_same_and_leave_nothing_behind(
    run: Run, ranks: int, node: int
) -> None:
    first, *others = run(ranks, measured_there, node)
    assert all(other == first for other in others)
    assert (first.num_ranks, first.ranks_per_node) == (ranks, node)
    values = 12 * 64**2  # matrices of a block, of which ranks hold equal parts
    assert first.block.values == (values + 2 * 64 + 9 * 64 + 2 * 64) // ranks
    assert first.block.gather_bytes[4] < first.block.gather_bytes[8] < first.block.values * 2
    transfers = [first.gather, first.reduce, first.stock_gather, first.stock_reduce]
    hops = [first.gather_across, first.gather_local, first.reduce_across, first.reduce_local]
    assert all((hop is None) == (node == 1) for hop in hops)
    for transfer in [*transfers, *filter(None, hops)]:
        assert transfer.bytes_per_s > 0
        assert transfer.latency_s > 0
        assert 0 <= transfer.busy <= 1
    assert min(first.block.forward_s, first.block.backward_s, first.optimizer_s) > 0
    # That of the rank with the least.
    assert first.free_bytes == 1_000_000


def sent_and_predicted(precision: str, bits: int) -> tuple[Any, Any]:
    """(direction, bytes) of each payload to another rank in a step, and how often by ``_sizes``."""
    config = TrainConfig.of(model="tiny", precision=precision, qsdp_bits=bits)
    world = here()
    sharded = parallelize(config, SIZE, world)
    model, handle = sharded.model, sharded.handle
    sent: Counter[tuple[str, int]] = Counter()
    send = Traffic.sent

    def seen(
        self: Traffic, direction: str, receivers: Iterable[int], num_bytes: int, **others: Any
    ) -> None:
        receivers = [*receivers]
        sent[direction, num_bytes] += len(receivers)
        send(self, direction, receivers, num_bytes, **others)

    tokens = torch.zeros((2, 16), dtype=torch.long)
    with mock.patch.object(Traffic, "sent", seen):
        model(tokens, tokens)[1].backward()
    assert handle is not None
    sizes = choose._sizes(config, SIZE, {bits: config.qsdp}, world.mesh.get_group())
    root, block = sizes["root"], sizes["block"]
    predicted = Counter(
        {
            ("gather", root["gather_bytes"][bits]): 1,
            ("gather", block["gather_bytes"][bits]): 2 * SIZE.num_layers,
            ("reduce", root["reduce_bytes"][bits]): 1,
            ("reduce", block["reduce_bytes"][bits]): SIZE.num_layers,
        }
    )
    total: Counter[str] = Counter()
    for (direction, num_bytes), times in predicted.items():
        total[direction] += num_bytes * times
    counted = handle.traffic.snapshot()
    assert total == {kind: counted[f"{kind}_sent_bytes"] for kind in total}
    return sent, predicted


def all_sent_and_predicted() -> list[tuple[Any, Any]]:
    return [sent_and_predicted(p, bits) for p in ("fp32", "bf16") for bits in (8, 4)]


def test_the_sizes_are_those_that_a_step_sends(run: Run) -> None:
    for found in run(2, all_sent_and_predicted):
        for sent, predicted in found:
            assert {each: n for each, n in sent.items() if each[0] != "other"} == predicted


def told(folder: Path) -> None:
    """In each part of measuring one rank is told to end: what comes next is not begun."""
    config = TrainConfig.of(
        model="tiny",
        data=str(folder / "text.txt"),
        out=str(folder / "told"),
        seq_len=16,
        eval_batches=1,
        qsdp_bits="auto",
    )
    parts = [
        (choose, "computation_s"),
        (choose, "codec_s"),
        (link_speed.Links, "_all_to_all"),
        (link_speed.Links, "_stock_gather"),
        (choose, "_choice_by_cost"),
        (setup, "parallelize"),
    ]
    for rank, ((place, name), (next_place, next_name)) in enumerate(pairwise(parts)):
        is_told, part = dist.get_rank() == rank % dist.get_world_size(), getattr(place, name)

        def measured(*args: Any, part: Any = part, is_told: bool = is_told) -> Any:
            if is_told:
                signal.raise_signal(signal.SIGUSR1)
            return part(*args)

        printed = io.StringIO()
        with (
            mock.patch.object(place, name, measured),
            mock.patch.object(next_place, next_name, side_effect=AssertionError),
            mock.patch.object(loop, "open_world", return_value=contextlib.nullcontext(here())),
            contextlib.redirect_stdout(printed),
        ):
            loop.training_loop(config)
        why = "SIGUSR1" if is_told else "a signal to another rank"
        said = f"{why}: no step was taken; the same command begins again\n"
        assert printed.getvalue() == (said if dist.get_rank() == 0 else "")


def test_a_signal_to_one_rank_ends_measuring_and_the_run_on_all(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run(2, told, tmp_path)


def weights(job: Job) -> dict[str, Tensor]:
    return {
        name: getattr(p, "to_local", lambda p=p: p)().detach().clone()
        for name, p in job.model.named_parameters()
    }


def trained(config: TrainConfig, num_steps: int) -> tuple[Job, list[float]]:
    with ExitStack() as held:
        job = set_up(config, here(), held)
        assert job is not None
        losses = [train_step(job)["loss"] for _ in range(num_steps)]
        job.save()
        return job, losses


def go_on(folder: Path) -> None:
    def config(name: str, **flags: Any) -> TrainConfig:
        return TrainConfig.of(
            data=str(folder / "text.txt"),
            out=str(folder / name),
            **{"model": "tiny", "steps": 9, "seq_len": 16, "batch_size": 2, "eval_batches": 1}
            | flags,
        )

    way = WireWay(bits=4, gather="once")

    def decided(measured: Measured) -> tuple[WireWay, dict[WireWay, float]]:
        return way, dict.fromkeys(ways_to_compare(measured), 1.0)

    auto, by_hand = {"qsdp_bits": "auto"}, {"qsdp_bits": 4, "qsdp_gather": "once"}
    with (
        mock.patch.object(choose, "decide_by_cost", decided),
        mock.patch.object(link_speed, "_MOST_TIMES", 2),
        mock.patch.object(link_speed, "_MOST_BYTES", 1 << 17),
    ):
        first, losses = trained(config("auto", **auto), 2)
    assert first.choice is not None
    assert first.choice.settings == by_hand
    assert first.config == config("auto", **by_hand)
    other, expected = trained(config("hand", **by_hand), 2)
    assert other.choice is None
    assert losses == expected
    theirs = weights(other)
    for name, own in weights(first).items():
        assert torch.equal(own, theirs[name]), name
    assert first.fingerprint == other.fingerprint

    # Whatever the link is by now, the run goes on as it began, and by its own flags too.
    with mock.patch.object(choose, "measure_for_choice", side_effect=AssertionError):
        for flags in (auto, by_hand, auto):
            again, _ = trained(config("auto", **flags), 1)
            assert again.choice == first.choice
            assert again.config.qsdp == other.config.qsdp
        assert again.steps_done == 5
        source = str(folder / "auto" / "checkpoints")
        elsewhere, _ = trained(config("elsewhere", **auto, resume=source), 1)
        assert elsewhere.choice == first.choice
        with ExitStack() as held, pytest.raises(UserError, match="qsdp_weight_bits 4, not 8"):
            set_up(config("auto", qsdp_bits=8), here(), held)
        with ExitStack() as held, pytest.raises(UserError, match="qsdp_bits unset, not auto"):
            set_up(config("hand", **auto), here(), held)
    changed, _ = trained(config("auto", qsdp_bits=8, resume=str(folder / "auto")), 1)
    assert changed.choice is None
    assert (folder / "auto" / "config.toml").read_text().count("#") == 0


def test_a_run_is_that_of_the_chosen_flags_bit_for_bit_and_keeps_them(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run(2, go_on, tmp_path)


def test_the_command_says_in_one_line_what_it_chose_and_writes_it_down(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)

    def flags(name: str, *more: str) -> list[str]:
        data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / name)]
        return [*data, *SMALL, "--steps", "3", "--one-shot", "none", *more]

    printed = run_jobs.succeed((2,), flags("auto", "--qsdp-bits", "auto"))
    lines = [line for line in printed.splitlines() if line.startswith("--qsdp-bits auto: ")]
    assert len(lines) == 1
    assert re.search(
        r"since the link carries [\d,]+ Mbit/s .* s a step predicted, .* s with", lines[0]
    )
    text = (tmp_path / "auto" / "config.toml").read_text()
    assert text.startswith(f"# {lines[0]}\n")
    summary = json.loads((tmp_path / "auto" / "summary.json").read_text())
    choice, settings = summary["choice"], tomllib.loads(text)
    chosen = {name: value for name, value in choice["settings"].items() if value is not None}
    assert chosen == {n: v for n, v in settings.items() if n.startswith("qsdp_") and v}
    assert choice["predicted_s"].keys() >= {"stock FSDP2", "8 bits gathered once"}

    given = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    run_jobs.succeed((2,), flags("hand", *given))
    losses = [[line["loss"] for line in read_metrics(tmp_path / n)] for n in ("auto", "hand")]
    assert losses[0] == losses[1]
    by_hand = json.loads((tmp_path / "hand" / "summary.json").read_text())
    assert by_hand["choice"] is None
    assert by_hand["val_loss"] == summary["val_loss"]
