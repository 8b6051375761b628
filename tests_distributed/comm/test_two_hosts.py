"""The bytes that qsdp counts are those that cross the wire between two hosts.

Hosts are network namespaces, so these tests need Linux, root and iproute2, and say so if skipped.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.support.namespaces import Hosts, Unavailable
from benchmarks.wire import wire
from tests.support import patience
from tests_distributed.support.launching import TEXT
from tests_distributed.support.pool import preloaded

REPOSITORY = Path(__file__).resolve().parents[2]
LINK, WIRE = "benchmarks.wire.link", "benchmarks.wire.wire"
TRANSFER = """
import os, socket, sys, time
num_bytes, piece = int(sys.argv[1]), int(sys.argv[2])
if os.environ["RANK"] == "0":
    server = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    connection, _ = server.accept()
    while num_bytes > 0:
        num_bytes -= len(connection.recv(1 << 20))
else:
    while True:
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    for start in range(0, num_bytes, piece):
        connection.sendall(bytes(min(piece, num_bytes - start)))
"""


# The training job, without what takes longest at the end of a run.
SHORT_END = """
from qsdp.commands import train
from qsdp.commands.exit import run
from qsdp.train import after_training as finish, validate
validate._SAMPLE_TOKENS = 2
finish.matmul_flops_per_s = lambda *_: 1e10
finish.write_plots = lambda *_: []
run(train.main)
"""


def run_program(program: str, *arguments: str) -> int:
    """Run a program of benchmarks/ in this process, which has imported what it needs.

    Returns its exit status.
    """
    sys.argv = [program, *arguments]
    try:
        importlib.import_module(program).main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _be_program(program: str, *arguments: str) -> None:
    """The life of a process that is nothing but this program."""
    sys.exit(run_program(program, *arguments))


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``run_program`` changes, and what is said to a program, are afterwards as before."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


pytestmark = pytest.mark.usefixtures("_as_before")


@pytest.fixture
def _hosts_can_be_made() -> None:
    try:
        with Hosts(1):
            pass
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_hosts_can_be_made")
@pytest.mark.parametrize("piece", [300, pytest.param(1_000_000, marks=pytest.mark.heavy)])
def test_the_interface_counts_what_a_program_sends(tmp_path: Path, piece: int) -> None:
    num_bytes = random.randrange(1_000_000, 3_000_000)
    counters = tmp_path / "counters.json"
    program = [sys.executable, "-c", TRANSFER, str(num_bytes), str(piece)]
    patient = ["--timeout", str(patience.seconds())]
    assert run_program(LINK, "--json", str(counters), *patient, "--", *program) == 0
    receiver, sender = json.loads(counters.read_text())
    sent_twice = 1448 * sender["retransmitted_segments"]
    # A segment sent twice need not be a full one, and makes acknowledgements longer, by 36 bytes.
    options = 36 * receiver["sent_packets"] if sent_twice else 0
    assert -500 - sent_twice < sender["sent_payload"] - num_bytes < 500
    assert -500 < receiver["received_payload"] - num_bytes < 500 + sent_twice
    assert abs(receiver["sent_payload"]) < 500 + options


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_a_shaped_link_is_no_faster_than_asked(tmp_path: Path) -> None:
    program = [sys.executable, "-c", TRANSFER, "2000000", "1000000"]
    with Hosts(2, rate="16mbit") as hosts:
        start = time.monotonic()
        hosts.run(program, timeout=patience.seconds())
        elapsed_s = time.monotonic() - start
    assert elapsed_s > (2_000_000 - 256 * 1024) * 8 / 16e6


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_a_failure_on_one_host_ends_the_others() -> None:
    program = "import os, time; os.environ['RANK'] == '1' and exit(3); time.sleep(1000)"
    with Hosts(2) as hosts, pytest.raises(RuntimeError, match="failed on host 1 with status 3"):
        hosts.run([sys.executable, "-c", program], timeout=patience.seconds())


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_no_host_is_left_after_termination() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    process = context.Process(target=_be_program, args=(LINK, "--", "sleep", "1000"), daemon=True)
    process.start()
    prefix = f"qsdp-{process.pid}-"
    deadline = time.monotonic() + patience.seconds()
    while f"{prefix}host1" not in _namespaces() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.join(patience.seconds())
    assert process.exitcode
    assert prefix not in _namespaces()


@pytest.mark.parametrize("tool", [LINK, WIRE])
def test_without_the_programs_a_tool_says_so_with_status_2(
    tmp_path: Path,
    tool: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_program(tool, *(["--", "true"] if tool is LINK else [])) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: network namespaces need")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_counted_bytes_are_the_interfaces_bytes_to_3_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, text, train = (tmp_path / name for name in ("wire.json", "text.txt", "train.py"))
    text.write_text(TEXT)
    train.write_text(SHORT_END)
    monkeypatch.setattr(wire, "TRAIN", train)
    flags = ["--cases", "8", "--steps", "2", "6", "--json", str(result)]
    flags += ["--timeout", str(patience.seconds()), "--"]
    flags += ["--model", "nano", "--data", str(text), "--batch-size", "2", "--one-shot", "none"]
    monkeypatch.setattr(sys, "argv", [WIRE, *flags])
    with pytest.raises(SystemExit) as stop:
        wire.main()
    assert stop.value.code == 0
    (row,) = json.loads(result.read_text())
    assert abs(row["difference"]) < 0.03
    assert row["counted_of_fp32"] < 0.265
    assert row["seen_of_fp32"] < 0.265 * 1.03


def _namespaces() -> str:
    listing = ["ip", "netns", "list"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout
