"""Network namespaces that stand for hosts, and what their interfaces count.

Every host is a namespace with one interface, ``eth0``, a cable (veth pair) to a bridge in one more
namespace, and an address 10.77.0.1, 10.77.0.2, ...; nothing is added to the machine's own network.

To count, segmentation offload is off: a packet is a frame of at most 1514 bytes, as on a real
network, and the interface counts the headers of each. That takes processor time, for which a
network card has its own, and can hold a link below half a Gbit/s: to measure time, leave it on.
What the programs sent is then ``bytes - 66 * packets``: Ethernet 14, IPv4 20, TCP 20 and its time
stamps 12. The few packets with longer headers (the opening of a connection, ARP) are some tens of
bytes a connection. What TCP sent twice is left out, as full segments of 1448 bytes: it may be less.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from qsdp.common.user_errors import quoted

HEADER_BYTES = 66
SEGMENT_BYTES = 1448  # what such a packet carries at most: 1500 bytes on the link
INTERFACE = "eth0"
MASTER_PORT = 29500


class Unavailable(RuntimeError):
    """This machine or this user cannot make network namespaces."""


@dataclass(frozen=True)
class Counters:
    """What an interface has counted since it was made."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int
    retransmitted_segments: int

    @property
    def sent_payload(self) -> int:
        """Bytes that left the host, less packet headers and full segments that TCP sent twice."""
        sent_twice = SEGMENT_BYTES * self.retransmitted_segments
        return self.sent_bytes - HEADER_BYTES * self.sent_packets - sent_twice

    @property
    def received_payload(self) -> int:
        """Bytes that reached the host, less packet headers."""
        return self.received_bytes - HEADER_BYTES * self.received_packets


class Hosts:
    """A context manager: ``num_hosts`` namespaces on one switch, gone when the block ends.

    Args:
        num_hosts: 1 to 250.
        rate: What each host may send at most, as ``tc`` writes it ("100mbit", "1gbit").
        offload: Leave segmentation offload on: for times, not for counts of packets.

    Raises:
        Unavailable: On entering, in one sentence, without root or without the programs.
    """

    def __init__(self, num_hosts: int, rate: str | None = None, *, offload: bool = False) -> None:
        if not 1 <= num_hosts <= 250:
            raise ValueError(f"num_hosts is {num_hosts}: choose 1 to 250.")
        self._prefix = f"qsdp-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._hosts = [f"{self._prefix}-host{host}" for host in range(num_hosts)]
        self._rate = rate
        self._offload = offload

    def __enter__(self) -> Hosts:
        for program in ["ip", "tc"] if self._rate else ["ip"]:
            if shutil.which(program) is None:
                raise Unavailable(
                    f"network namespaces need the program {program!r}, which is not on the PATH: "
                    "install iproute2."
                )
        if os.geteuid() != 0:
            raise Unavailable(
                f"network namespaces need root, but this is user {os.geteuid()}: run with sudo."
            )
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        output: Path | None = None,
    ) -> None:
        """Run a command on every host at once; env-variable rendezvous, one process a host.

        In each argument ``{host}`` stands for the host's number. The variables RANK, WORLD_SIZE,
        LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are set.

        Args:
            command: Program and arguments.
            env: More variables, on top of this process's own.
            timeout: Seconds after which the command counts as hung.
            output: A folder that takes what host i prints, as ``host<i>.log``.

        Raises:
            RuntimeError: A host's command fails (the others are then killed) or hangs.
        """
        processes: list[subprocess.Popen[bytes]] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for host, name in enumerate(self._hosts):
                filled = [argument.replace("{host}", str(host)) for argument in command]
                log = None if output is None else (output / f"host{host}.log").open("wb")
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *filled],
                        env={**os.environ, **self._rendezvous(host), **(env or {})},
                        stdout=log,
                        stderr=None if log is None else subprocess.STDOUT,
                    )
                )
                if log is not None:
                    log.close()
            waiting = dict(enumerate(processes))
            while waiting:
                time.sleep(0.05)
                for host, process in list(waiting.items()):
                    if process.poll() is not None:
                        del waiting[host]
                    if process.returncode:
                        raise RuntimeError(
                            f"the command failed on host {host} with status {process.returncode}."
                        )
                if deadline is not None and time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the command did not end on hosts {[*waiting]} in {timeout} s."
                    )
        finally:
            self._kill()
            for process in processes:
                process.wait()

    def counters(self) -> list[Counters]:
        """What each host's interface has counted since the hosts were made."""
        return [_read_counters(name) for name in self._hosts]

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them."""
        self._kill()
        for name in [*self._hosts, self._switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "addrgenmode", "none", "up")
        for host, name in enumerate(self._hosts):
            port = f"port{host}"
            _ip("netns", "add", name)
            cable = ["type", "veth", "peer", "name", INTERFACE, "netns", name]
            _ip("-n", self._switch, "link", "add", port, *cable)
            # No address generation: IPv6 would talk to its neighbours on its own.
            plain = ["addrgenmode", "none"]
            if not self._offload:
                plain += ["gso_max_segs", "1"]
            _ip("-n", self._switch, "link", "set", port, *plain, "master", "switch", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", INTERFACE, *plain, "up")
            _ip("-n", name, "address", "add", f"{_address(host)}/24", "dev", INTERFACE)
            if self._rate:
                shape = ["tbf", "rate", self._rate, "burst", "256kb", "latency", "200ms"]
                _run(["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *shape])

    def _rendezvous(self, host: int) -> dict[str, str]:
        return {
            "RANK": str(host),
            "WORLD_SIZE": str(len(self._hosts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(MASTER_PORT),  # the hosts are ours alone: no port is taken
            "GLOO_SOCKET_IFNAME": INTERFACE,
            # NCCL would see one machine, and take its memory for the way to the other hosts.
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "NCCL_HOSTID": self._hosts[host],
            "NCCL_IB_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
            # torch warns of every peer whose address has no name, and here none has.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }

    def _kill(self) -> None:
        # By namespace, because torchrun puts its workers into sessions of their own.
        for name in self._hosts:
            listing = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for pid in listing.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue


def torchrun(num_hosts: int, nproc_per_node: int, command: list[str]) -> list[str]:
    """The command line that starts ``command`` with torchrun on every host, for ``Hosts.run``."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nnodes", str(num_hosts), "--node-rank", "{host}"]
    launcher += ["--nproc-per-node", str(nproc_per_node)]
    return [*launcher, "--master-addr", _address(0), "--master-port", str(MASTER_PORT), *command]


def exit_on_termination() -> None:
    """Let SIGTERM and SIGHUP end the program through its ``with`` blocks."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def _address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def _read_counters(namespace: str) -> Counters:
    (link,) = json.loads(_ip("-n", namespace, "-s", "-j", "link", "show", INTERFACE))
    sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
    # Two lines of TCP figures: their names, their values.
    lines = _run(["ip", "netns", "exec", namespace, "cat", "/proc/net/snmp"]).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return Counters(
        sent["bytes"],
        sent["packets"],
        received["bytes"],
        received["packets"],
        int(values[names.index("RetransSegs")]),
    )


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"`{' '.join(command)}` failed ({quoted(done.stderr)}): "
            "run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN, which network namespaces need."
        )
    return done.stdout
