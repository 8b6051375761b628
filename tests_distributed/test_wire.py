"""The bytes that qsdp counts are those that cross the wire between two hosts.

Hosts are network namespaces, so these tests need Linux, root and iproute2, and say so if skipped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.namespaces import Hosts, Unavailable
from tests import patience
from tests_distributed.launching import TEXT

REPOSITORY = Path(__file__).resolve().parent.parent
LINK = REPOSITORY / "benchmarks" / "link.py"
WIRE = REPOSITORY / "benchmarks" / "wire.py"
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
    _python(LINK, "--json", str(counters), "--timeout", str(patience.seconds()), "--", *program)
    receiver, sender = json.loads(counters.read_text())
    sent_twice = 1448 * sender["retransmitted_segments"]
    # A segment sent twice need not be a full one, and makes acknowledgements longer, by 36 bytes.
    options = 36 * receiver["sent_packets"] if sent_twice else 0
    assert -500 - sent_twice < sender["sent_payload"] - num_bytes < 500
    assert -500 < receiver["received_payload"] - num_bytes < 500 + sent_twice
    assert abs(receiver["sent_payload"]) < 500 + options


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_a_shaped_link_is_no_faster_than_asked(tmp_path: Path) -> None:
    program = [sys.executable, "-c", TRANSFER, "4000000", "1000000"]
    with Hosts(2, rate="16mbit") as hosts:
        start = time.monotonic()
        hosts.run(program, timeout=patience.seconds())
        elapsed_s = time.monotonic() - start
    assert elapsed_s > (4_000_000 - 256 * 1024) * 8 / 16e6


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_a_failure_on_one_host_ends_the_others() -> None:
    program = "import os, time; os.environ['RANK'] == '1' and exit(3); time.sleep(1000)"
    with Hosts(2) as hosts, pytest.raises(RuntimeError, match="failed on host 1 with status 3"):
        hosts.run([sys.executable, "-c", program], timeout=patience.seconds())


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_no_host_is_left_after_termination() -> None:
    process = subprocess.Popen([sys.executable, LINK, "--", "sleep", "1000"])
    prefix = f"qsdp-{process.pid}-"
    deadline = time.monotonic() + patience.seconds()
    while f"{prefix}host1" not in _namespaces() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(patience.seconds()) != 0
    assert prefix not in _namespaces()


@pytest.mark.parametrize("tool", [LINK, WIRE])
def test_without_the_programs_a_tool_says_so_with_status_2(tmp_path: Path, tool: Path) -> None:
    done = subprocess.run(
        [sys.executable, tool, *(["--", "true"] if tool is LINK else [])],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: network namespaces need")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("_hosts_can_be_made")
def test_counted_bytes_are_the_interfaces_bytes_to_3_percent(tmp_path: Path) -> None:
    result = tmp_path / "wire.json"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    patient = ["--timeout", str(patience.seconds())]
    small = ["--model", "nano", "--data", str(text), "--batch-size", "2"]
    _python(
        WIRE, "--cases", "8", "--steps", "2", "6", "--json", str(result), *patient, "--", *small
    )
    (row,) = json.loads(result.read_text())
    assert abs(row["difference"]) < 0.03
    assert row["counted_of_fp32"] < 0.265
    assert row["seen_of_fp32"] < 0.265 * 1.03


def _python(*command: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _namespaces() -> str:
    listing = ["ip", "netns", "list"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout
