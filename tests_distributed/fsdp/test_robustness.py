"""What goes wrong on one rank alone ends all ranks soon, with a sentence that says what it was."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from qsdp.comm import transport
from tests.support import patience
from tests_distributed.conftest import Run
from tests_distributed.support.helpers import all_ranks, full_grads, make_batch, make_model, shard
from tests_distributed.support.launching import SMALL, TEXT, Job, start
from tests_distributed.support.pool import GLOO_TIMEOUT_S, preloaded

# --- ranks that disagree at install -----------------------------------------------------------

Odd = tuple[dict[str, Any], Callable[[], nn.Module], str, str, str]


def _toy() -> nn.Module:
    return shard(make_model())


def _with_a_frozen_weight() -> nn.Module:
    model = make_model()
    model.blocks[1].mlp.up.weight.requires_grad_(False)
    return shard(model)


def _with_a_layer_less() -> nn.Module:
    return shard(make_model(num_layers=1))


def _with_another_shape() -> nn.Module:
    return shard(make_model(hidden=6))


def _with_fewer_groups() -> nn.Module:
    return shard(make_model(), nested=False)


def _with_one_group() -> nn.Module:
    return fully_shard(make_model(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _kept_gathered() -> nn.Module:
    return shard(make_model(), reshard=False)


# The config and the model of one rank, what is said to differ, and how: there, and on the others.
ODD: list[Odd] = [
    ({"weight_bits": 4}, _toy, "qsdp with weight_bits", "4", "8"),
    ({"grad_bits": 3}, _toy, "qsdp with grad_bits", "3", "8"),
    ({"embedding_bits": 6}, _toy, "qsdp with embedding_bits", "6", "None"),
    ({"seed": 12}, _toy, "qsdp with seed", "12", "0"),
    ({"bucket_size": 64}, _toy, "qsdp with bucket_size", "64", "None"),
    ({"rounding": "dither"}, _toy, "qsdp with rounding", "'dither'", "None"),
    ({"gather": "once"}, _toy, "qsdp with gather", "'once'", "'twice'"),
    ({"warmup_steps": 5}, _toy, "qsdp with warmup_steps", "5", "0"),
    ({"policy": (("*.up.weight", 4),)}, _toy, "with policy", "(('*.up.weight', 4),)", "()"),
    ({}, _with_a_frozen_weight, "has blocks.1.mlp.up.weight", "frozen", "trainable"),
    ({}, _with_another_shape, "has blocks.0.mlp.up.weight", "of shape 6x10", "of shape 5x10"),
    ({}, _with_fewer_groups, "the group of blocks.0.norm1.weight", "12 others", "7 others"),
    ({}, _with_one_group, "the group of embed.weight", "30 others", "4 others"),
    ({}, _kept_gathered, "the group of", "gathered until", "resharded after"),
]


def _expected(case: Odd, odd: int) -> str:
    """What every rank is to say."""
    _, _, about, there, elsewhere = case
    values = [there, elsewhere] if odd else [elsewhere, there]
    first, second = map(re.escape, values)
    return rf"rank {odd or 1} .*{re.escape(about)}.* {first}.* but rank 0 .*{second}.*every rank"


def _install_all_apart(odd: int) -> list[str]:
    return [_install_apart(odd, config, build) for config, build, *_ in ODD]


def _install_apart(odd: int, config: dict[str, Any], build: Callable[[], nn.Module]) -> str:
    is_odd = dist.get_rank() == odd
    model = build() if is_odd else _toy()
    try:
        qsdp.install(model, qsdp.QSDPConfig(**(config if is_odd else {})))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "installed"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree_stop_at_install_and_each_names_the_difference(
    run: Run, ranks: int
) -> None:
    odd = random.randrange(ranks)
    for messages in run(ranks, _install_all_apart, odd):
        for case, message in zip(ODD, messages, strict=True):
            assert re.match(_expected(case, odd), message), message


def test_a_rank_that_lacks_a_layer_is_named(run: Run) -> None:
    odd = random.randrange(3)
    for message in run(3, _install_apart, odd, {}, _with_a_layer_less):
        layer = "blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.qkv.weight and 10 more"
        assert f"rank {odd} does not shard {layer} but rank {0 if odd else 1} does" in message


def test_a_mistake_of_one_rank_stops_all(run: Run) -> None:
    odd = random.randrange(3)
    config = {"policy": (("*.no_such", 4),)}
    messages = run(3, _install_apart, odd, config, _toy)
    mistake = messages.pop(odd)
    assert mistake.startswith("the policy pattern '*.no_such' matches no parameter")
    for message in messages:
        assert message.startswith(f"rank {odd} cannot install qsdp ({mistake}): give every rank")


def _install_apart_on_replicas(odd: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    said = "installed"
    try:
        bits = 3 if dist.get_rank() == odd else 5
        qsdp.install(shard(make_model(), mesh=mesh), qsdp.QSDPConfig(weight_bits=bits))
    except RuntimeError as error:
        said = str(error)
    qsdp.install(shard(make_model(), mesh=mesh))
    return said


def test_replicas_that_disagree_stop_too_and_may_then_agree(run: Run) -> None:
    odd = random.randrange(4)
    bits = (3, 5) if odd else (5, 3)
    for said in run(4, _install_apart_on_replicas, odd):
        expected = f"rank {odd or 1} installs qsdp with weight_bits {bits[0]} but rank 0 with"
        assert said.startswith(f"{expected} {bits[1]}:")


def _install_with_arguments_apart(odd: int, what: str) -> tuple[str, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rank = dist.get_rank()
    own: dict[str, Any] = {"replicate_mesh": mesh["replicate"]}
    odds: dict[str, Any] = {
        "replicate_mesh": {},
        "replicate_mesh of two dimensions": {"replicate_mesh": mesh},
        "node_mesh": {},
        "config": own | {"config": {"weight_bits": 4}},
    }
    if what == "node_mesh":
        own = {"node_mesh": mesh}
    model = shard(make_model(), mesh=None if what == "node_mesh" else mesh["shard"])
    started, said = time.monotonic(), "not called"
    # Only a replica that agrees on its meshes talks to the other, which is left out here: it would
    # wait until this one's processes end.
    if what in ("node_mesh", "config") or rank // 2 == odd // 2:
        try:
            qsdp.install(model, **(odds[what] if rank == odd else own))
        except (RuntimeError, ValueError) as error:
            said = str(error)
    return said, time.monotonic() - started


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("replicate_mesh", r"rank \d installs qsdp with replicate_mesh (None|\(2,\)) but rank \d "),
        ("replicate_mesh of two dimensions", "replicate_mesh has 2 dimensions; give a 1-D mesh"),
        ("node_mesh", r"rank \d installs qsdp with node_mesh (None|\(2, 2\)) but rank \d "),
        ("config", "config is a dict; give a qsdp.QSDPConfig"),
    ],
)
def test_arguments_of_install_that_differ_are_named_at_once(run: Run, what: str, said: str) -> None:
    odd = random.randrange(4)
    for rank, (message, seconds) in enumerate(run(4, _install_with_arguments_apart, odd, what)):
        assert seconds < GLOO_TIMEOUT_S / 2
        if message != "not called":
            assert re.search(said, message), message
            is_mistake = what in ("config", "replicate_mesh of two dimensions")
            begins = f"rank {odd} cannot install qsdp (" if is_mistake and rank != odd else ""
            assert message.startswith(begins)


# --- ranks whose groups got different sets of gradients ---------------------------------------


class Chooser(nn.Module):
    """Layers of which each forward pass uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)

    def forward(self, x_BC: Tensor, chosen: str) -> Tensor:
        x_BC = torch.tanh(self.first(x_BC))
        return sum(self.get_submodule(name)(x_BC).square().sum() for name in chosen.split())


class Tower(nn.Module):
    """Two choosers, one after the other in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Chooser() for _ in range(2))

    def forward(self, x_BC: Tensor, *chosen: str) -> Tensor:
        return sum(block(x_BC, names) for block, names in zip(self.blocks, chosen, strict=True))


def _tower(config: dict[str, Any] | None, device: str = "cpu") -> tuple[Any, Any]:
    model: Any = Tower().to(device)
    mesh = all_ranks(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = None if config is None else qsdp.install(model, qsdp.QSDPConfig(**config))
    return model, handle


def _noise(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 6, generator=generator)


def train_apart(
    steps: list[list[str]], odd: int, config: dict[str, Any], device: str = "cpu"
) -> tuple[str, float]:
    """Step by step: what the second block uses on most ranks, and on the odd one."""
    model, _ = _tower(config, device)
    for step, choices in enumerate(steps):
        started = time.monotonic()
        try:
            chosen = choices[dist.get_rank() == odd]
            torch.autograd.backward(model(_noise(step).to(device), "left right wide", chosen))
        except RuntimeError as error:
            return str(error), time.monotonic() - started
    return "trained on garbage", 0.0


ALIKE = ["left wide", "left wide"]
APART = {
    "at the first step": ([["left right", "left"]], "right"),
    "with sizes that are equal": ([["left", "right"]], "(left|right)"),
    "after good steps": ([ALIKE, ALIKE, ["left wide", "left"]], "wide"),
    "with more": ([ALIKE, ["left wide", "left right wide"]], "right"),
    "with another that is as large": ([ALIKE, ["left wide", "right wide"]], "(left|right)"),
    "when all change": ([ALIKE, ["right", "right wide"]], "wide"),
}


@pytest.mark.parametrize("case", APART)
@pytest.mark.parametrize(("ranks", "hops"), [(2, 1), (3, 1), (4, 2)])
def test_ranks_with_other_gradients_than_their_peers_raise_and_name_the_parameters(
    run: Run, case: str, ranks: int, hops: int
) -> None:
    steps, layer = APART[case]
    odd = random.randrange(ranks)
    config = {"ranks_per_node": ranks // hops, "reduce": "two-hop" if hops > 1 else "flat"}
    for message, seconds in run(ranks, train_apart, steps, odd, config):
        names = rf"blocks\.1\.{layer}\.weight and blocks\.1\.{layer}\.bias"
        said = rf"rank \d has no gradient of {names} to reduce, but rank \d has: use the same"
        assert re.match(said, message), message
        assert "\n" not in message
        assert seconds < GLOO_TIMEOUT_S / 2


def _change_together(config: dict[str, Any] | None) -> tuple[list[dict[str, Tensor]], list[int]]:
    model, handle = _tower(config)
    grads, sent = [], []
    for step, chosen in enumerate(["left", "left right", "left right", "wide", "wide left"]):
        torch.autograd.backward(model(_noise(step), chosen, "left"))
        grads.append(full_grads(model))
        model.zero_grad()
        if handle is not None:
            sent.append(handle.traffic.snapshot()["reduce_sent_bytes"])
    return grads, sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_set_that_changes_on_all_ranks_costs_one_exchange_of_the_old_one(
    run: Run, ranks: int
) -> None:
    full = {"weight_bits": 32, "grad_bits": 32}
    stock = run(ranks, _change_together, None)
    ours = run(ranks, _change_together, full)
    for (expected, _), (found, sent) in zip(stock, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        total = [0, *sent]
        per_step = [after - before for before, after in pairwise(total)]
        # The counters show payloads of reduces that took place, each once.
        assert per_step[1] == per_step[2] > per_step[0]


def _unused_as_zeros(odd: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    both = []
    for config in (None, {"weight_bits": 32, "grad_bits": 32}):
        model, _ = _tower(config)
        model.set_reduce_scatter_unused_params(True)
        chosen = "left" if dist.get_rank() == odd else "left right"
        torch.autograd.backward(model(_noise(0), "left right", chosen))
        both.append(full_grads(model))
    return both[0], both[1]


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="came with torch 2.13"
)
def test_what_the_message_advises_helps(run: Run) -> None:
    for stock, ours in run(3, _unused_as_zeros, 1):
        assert "blocks.1.right.weight" in ours
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


class Three(nn.Sequential):
    """Three layers of one size, of which one rank leaves out the second, and others the third."""

    odd: int

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self[1 + (dist.get_rank() == self.odd)](self[0](x_BC))
        return y_BC


def _skip_a_block(odd: int, as_wholes: bool) -> str:
    torch.manual_seed(1)
    model: Any = Three(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model.odd = odd
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    if not as_wholes:
        fully_shard(model, mesh=mesh)
    qsdp.install(model)
    try:
        model(_noise(0))
    except RuntimeError as error:
        return str(error)
    return "gathered garbage"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("as_wholes", [False, True])
def test_a_gather_that_meets_that_of_another_group_is_refused(
    run: Run, ranks: int, as_wholes: bool
) -> None:
    in_a_pass = r"rank \d sent a payload with header .* for the group of [12]\."
    at_its_beginning = r"rank 1 is at a forward pass with the first group 2.*, but rank 0 with 1\."
    for message in run(ranks, _skip_a_block, 1, as_wholes):
        assert re.search(at_its_beginning if as_wholes else in_a_pass, message)


# --- damage -----------------------------------------------------------------------------------


def damaged(direction: str, byte: int, bit: int) -> str:
    model = shard(make_model())
    qsdp.install(model)
    torch.autograd.backward(model(*make_batch(model, 0)))

    def damage(received: Tensor) -> None:
        # Of the first rank's payload, or of the second's, which is the first that it receives.
        if received.dtype == torch.uint8:  # not what ranks agree on before they send payloads
            received[byte] ^= 1 << bit

    wait = transport.Arrival.wait

    def damaged_on_the_way(arrival: Any) -> Tensor | None:
        seen = wait(arrival)
        assert seen is not None
        damage(seen)
        return seen

    try:
        if direction == "gather":
            transport.Arrival.wait = damaged_on_the_way  # type: ignore[method-assign]
            torch.autograd.backward(model(*make_batch(model, 1)))
        else:
            loss = model(*make_batch(model, 1))
            transport.Arrival.wait = damaged_on_the_way  # type: ignore[method-assign]
            torch.autograd.backward(loss)
    except RuntimeError as error:
        return str(error)
    finally:
        transport.Arrival.wait = wait  # type: ignore[method-assign]
    return "trained on garbage"


@pytest.mark.parametrize("direction", ["gather", "reduce"])
def test_a_payload_whose_header_is_damaged_in_one_bit_is_refused(run: Run, direction: str) -> None:
    for _ in range(5):
        byte, bit = random.randrange(32), random.randrange(8)
        for message in run(2, damaged, direction, byte, bit):
            assert re.search(r"rank [01] sent a payload with header .* is expected", message)


# --- ranks that end, or hang ------------------------------------------------------------------

HANG_S = patience.seconds(8)
"""How long a collective waits for a rank that hangs: no working one takes as long."""


def _loop(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    """What a user of the library writes."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    model = shard(make_model())
    qsdp.install(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1_000_000):
        torch.autograd.backward(model(*make_batch(model, step)))
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with (folder / "steps").open("a") as steps:
                steps.write(f"{step}\n")


def _job(rank: int, ranks: int, folder: Path, timeout_s: float, *more: str) -> None:
    """The training job, where the launcher's store is a file."""
    from qsdp.train import cli, world

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(folder / "store"), ranks)
    world.rendezvous = lambda url, timeout: iter([(store, rank, ranks)])
    flags = ["--data", str(folder / "text.txt"), "--out", str(folder / "out"), *SMALL]
    cli.main([*flags, *more, "--timeout-s", str(int(timeout_s)), "--steps", "1000000"])


def _quantized_job(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    _job(rank, ranks, folder, timeout_s, "--qsdp-bits", "8")


def _measuring_job(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    """Rank 1 finds no memory in the middle of measuring the link."""
    from qsdp.train.links import Links

    make, calls = Links._bytes, itertools.count()

    def made(links: Links, size: int) -> Tensor:
        is_full = rank == 1 and next(calls) == 9
        return make(links, 1 << 60 if is_full else size)

    Links._bytes = made  # type: ignore[method-assign]
    _job(rank, ranks, folder, timeout_s, "--qsdp-bits", "auto")


Life = Callable[[int, int, Path, float], None]


def _live(life: Life, rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    life(rank, ranks, folder, timeout_s)


def _start(life: Life, ranks: int, folder: Path, timeout_s: float) -> list[Any]:
    """Processes, of which each writes into a file of its own."""
    (folder / "text.txt").write_text(TEXT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    processes: list[Any] = []
    for rank in range(ranks):
        process = context.Process(
            target=_live, args=(life, rank, ranks, folder, timeout_s), daemon=True
        )
        process.start()
        processes.append(process)
    return processes


def _wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + patience.seconds()
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Callable[..., tuple[list[Any], list[str], float]]]:
    """Let three processes live a life, send one a signal in the middle of a step, and return exit
    codes, outputs and how many seconds the others took to end."""
    processes: list[Any] = []

    def run(
        life: Life, progress: str, victim: int, number: int, timeout_s: float
    ) -> tuple[list[Any], list[str], float]:
        processes.extend(_start(life, 3, tmp_path, timeout_s))
        outputs = [tmp_path / f"output-{rank}" for rank in range(3)]

        def has_begun() -> bool:
            text = "\n".join(path.read_text() for path in outputs if path.exists())
            assert all(process.is_alive() for process in processes), text
            return _num_lines(tmp_path / progress) > 3

        _wait_until(has_begun, "no step was taken")
        time.sleep(random.uniform(0, 0.05))
        os.kill(processes[victim].pid, number)
        started = time.monotonic()
        others = [process for i, process in enumerate(processes) if i != victim]
        for process in others:
            process.join(patience.seconds())
        seconds = time.monotonic() - started
        codes = [process.exitcode for process in others]
        return codes, [path.read_text() for i, path in enumerate(outputs) if i != victim], seconds

    yield run
    for process in processes:
        process.kill()
        process.join()


SENTENCE = (
    r"the (agreement at a (forward|backward) pass|(gather|reduce) of the group of \S+"
    r"( and \d+ others?)? at step \d+) failed on rank {rank}: a rank has ended or does not answer "
    r"\(.+\)"
)
IN_THE_JOB = (
    rf"^error on rank {{rank}}: ({SENTENCE}|the (sum over all ranks|sum of the gradients' norm|"
    r"agreement at qsdp.clip_grad_norm_) failed on rank {rank}: a rank has ended or does not "
    r"answer \(.+\)|a collective failed: a rank .+)$"
)


@pytest.mark.parametrize(
    ("life", "progress", "said", "number"),
    [
        (_loop, "steps", SENTENCE, signal.SIGKILL),
        pytest.param(_loop, "steps", SENTENCE, signal.SIGSTOP, marks=pytest.mark.heavy),
        (_quantized_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGKILL),
        (_quantized_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGSTOP),
        (_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGKILL),
    ],
)
def test_when_a_rank_ends_or_hangs_the_others_end_and_name_the_collective(
    three: Callable[..., tuple[list[Any], list[str], float]],
    life: Life,
    progress: str,
    said: str,
    number: int,
) -> None:
    victim = random.randrange(3)
    # Of a rank that has ended the others hear before they have waited that long.
    timeout_s = 2 * patience.seconds() if number == signal.SIGKILL else HANG_S
    codes, outputs, seconds = three(life, progress, victim, number, timeout_s)
    assert seconds < patience.seconds()
    survivors = [rank for rank in range(3) if rank != victim]
    for rank, code, output in zip(survivors, codes, outputs, strict=True):
        assert code not in (None, 0), output
        assert re.search(said.format(rank=rank), output, re.MULTILINE), output
        if life is not _loop:
            assert code == 1
            assert "Traceback" not in output


def test_a_fault_of_a_rank_that_measures_the_link_ends_all_in_a_sentence_each(
    tmp_path: Path,
) -> None:
    processes = _start(_measuring_job, 2, tmp_path, 2 * patience.seconds())
    try:
        for process in processes:
            process.join(patience.seconds())
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    outputs = [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    assert codes == [1, 1], outputs
    for rank, why in enumerate([r"a rank has ended or does not answer \(", ".*allocate memory"]):
        said = f"^error on rank {rank}: the measuring of the link failed on rank {rank}: {why}"
        assert re.search(said, outputs[rank], re.MULTILINE), outputs[rank]
        assert "Traceback" not in outputs[rank]


def test_under_torchrun_a_killed_rank_is_replaced_and_a_job_that_is_told_to_end_saves(
    tmp_path: Path,
) -> None:
    # One launch for all: starting ranks takes longest.
    program = tmp_path / "told.py"
    program.write_text(
        "import os, pathlib\n"
        "from qsdp.train import cli, world\n"
        "end = world.end_process\n"
        "def end_and_say(status):\n"
        "    name = f'status-{os.environ[\"RANK\"]}'\n"
        "    (pathlib.Path(__file__).parent / name).write_text(str(status))\n"
        "    end(status)\n"
        "world.end_process = end_and_say\n"
        "cli.run(cli.main)\n"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(out), *SMALL, "--eval-every", "0"]
    flags += ["--qsdp-bits", "8", "--steps", "1000000", "--save-every", "3"]
    launcher = ("--standalone", "--max-restarts", "1")
    job = start(*flags, program=str(program), launcher=launcher, num_ranks=2)
    checkpoints = out / "checkpoints"
    try:
        pids = _have_saved(job, checkpoints, {})
        os.kill(pids[1], signal.SIGKILL)
        _have_saved(job, checkpoints, pids)
        job.tell(signal.SIGTERM)
        assert job.wait() == 1
    finally:
        job.kill()
    lost = r"^error on rank 0: .* a rank has ended or does not answer \(.+\)$"  # a save has many
    assert re.search(lost, job.output, re.MULTILINE), job.output
    assert 'told.py", line' not in job.output
    assert [(tmp_path / f"status-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, len(lines) + 1)]
    assert f"SIGTERM: step {len(lines)} of 1000000 is saved" in job.output
    assert (checkpoints / f"step-{len(lines):08d}").is_dir()


def _have_saved(job: Job, checkpoints: Path, earlier: dict[int, int]) -> dict[int, int]:
    """Wait until other processes than the earlier ones have saved, and return that of each rank."""

    def are_others() -> bool:
        return len(job.ranks()) == 2 and not {*job.ranks().values()} & {*earlier.values()}

    def steps() -> set[str]:
        return {path.name for path in checkpoints.glob("step-????????")}

    _wait_until(are_others, "torchrun has started nobody")
    found = steps()
    _wait_until(lambda: bool(steps() - found), "none was saved")
    return job.ranks()
