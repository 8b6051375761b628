"""Start launch/train_gpt.py under torchrun, as a user would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import patience

ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 40
# A small job: two sequences of 16 characters a rank and step.
SMALL = [*("--model", "tiny"), *("--seq-len", "16"), *("--batch-size", "2")]
SMALL += ["--eval-batches", "1"]


def environment() -> dict[str, str]:
    """The caller's, with one thread a process and without a launcher's own variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(
    *flags: str,
    program: str = "launch/train_gpt.py",
    launcher: tuple[str, ...] = ("--standalone",),
    num_ranks: int = 2,
) -> Job:
    """Start torchrun with ``num_ranks`` processes of the training job, or another ``program``."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher]
    command += ["--nproc-per-node", str(num_ranks), program, *flags]
    return Job(
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )


class Job:
    """A launcher and its ranks, all in one session."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.output = ""

    def wait(self, timeout: float | None = None) -> int:
        """The launcher's exit status; what all printed is in ``output``. Kills them when late."""
        timeout = patience.seconds() if timeout is None else timeout
        try:
            self.output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s:\n{self.output}") from None
        return self._process.returncode

    def succeed(self) -> str:
        """Wait for exit status 0 and return what was printed."""
        assert self.wait() == 0, self.output
        return self.output

    def tell(self, number: int) -> None:
        """Send the launcher a signal."""
        self._process.send_signal(number)

    def ranks(self) -> dict[int, int]:
        """The processes of its ranks, by rank."""
        found = {}
        for child in self._children():
            with contextlib.suppress(OSError):  # one that has just ended
                for text in Path(f"/proc/{child}/environ").read_text().split("\0"):
                    if text.startswith("RANK="):
                        found[int(text.removeprefix("RANK="))] = child
        return found

    def kill(self) -> None:
        """SIGKILL the launcher and all ranks, if they still run."""
        if self._process.poll() is not None:
            return
        for group in self._process_groups():
            os.killpg(group, signal.SIGKILL)
        self.output, _ = self._process.communicate()

    def _process_groups(self) -> set[int]:
        """torchrun gives every rank a session of its own: find them by their parent."""
        groups = {self._process.pid}
        for child in self._children():
            try:
                groups.add(os.getpgid(child))
            except ProcessLookupError:
                continue
        return groups

    def _children(self) -> list[int]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(child) for child in children.read_text().split()]
