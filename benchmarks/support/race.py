"""The two halves of a comparison, started and kept: turns on a link, losses without it."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.support import machine
from benchmarks.support.contestants import chosen, trained
from benchmarks.support.losses import SCHEDULE
from benchmarks.support.namespaces import Hosts, torchrun
from benchmarks.support.paths import ROOT
from benchmarks.support.rounds import Record, due, kept, read, seconds_of
from benchmarks.support.runs import Mistake
from qsdp.common.flags import flag
from qsdp.data.corpus import load_corpus

LOOPBACK = "loopback"
BOTH = ("threads", "device", "powersgd_rank")
TURNS = ("model", "tokens", "context", "vocab_size", "groups", "settle", "warmup")
LOSSES = ("data", "loss_model", "loss_steps", "loss_tokens", "loss_evals", "loss_seed")


def device_of(arguments: argparse.Namespace) -> str:
    """Where a comparison runs: on GPUs if there is one a rank. Raises Mistake if it cannot."""
    num_ranks = arguments.hosts * (arguments.nproc_per_node or 1)
    num_gpus = torch.cuda.device_count()
    if arguments.device == "cuda" and num_gpus < num_ranks:
        raise Mistake(
            f"--device is cuda, but {num_ranks} ranks need a GPU each and there are {num_gpus}: "
            "leave it out."
        )
    return arguments.device or ("cuda" if num_gpus >= num_ranks else "cpu")


def settings_of(arguments: argparse.Namespace) -> Record:
    """All that a step's time or bytes depend on. Rounds of other settings are no company."""
    described = machine.describe(arguments.device)
    del described["date"]
    return {
        "link": link_of(arguments),
        "hosts": arguments.hosts,
        "ranks": arguments.hosts * (arguments.nproc_per_node or 1),
        **{name: getattr(arguments, name) for name in (*BOTH, *TURNS)},
        "contestants": [one.name for one in chosen(arguments)],
        **described,
        "deepspeed": _version("deepspeed"),
        "code": _code(),
    }


def link_of(arguments: argparse.Namespace) -> str:
    """How a link is called."""
    return arguments.rate or "no limit"


def loss_settings_of(arguments: argparse.Namespace) -> Record:
    """All that a loss depends on. Raises Mistake for data that cannot be read."""
    settings = settings_of(arguments)
    for name in ("link", "hosts", *TURNS):
        del settings[name]
    try:
        corpus = load_corpus(arguments.data)
    except ValueError as error:
        raise Mistake(str(error)) from None
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(memoryview(tokens[:]).cast("B"))
    return settings | {
        **{name: getattr(arguments, name) for name in LOSSES},
        "data_sha256": digest.hexdigest()[:16],
        "schedule": SCHEDULE,
    }


def take_turns(arguments: argparse.Namespace, path: Path | None = None) -> Record:
    """The rounds of turns.py, kept at ``path`` where there is one, as a row a contestant.

    Raises Mistake if ``path`` is of other settings, RuntimeError if a rank fails.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="qsdp-link-") as folder:
            return take_turns(arguments, Path(folder, "turns.json"))
    arguments.device = device_of(arguments)
    everyone = chosen(arguments)
    record = kept(path, settings_of(arguments), {"rounds": []})
    names = [one.name for one in everyone]
    if record["rounds"]:
        print(f"{len(record['rounds'])} rounds are there already: {path}")
    if due(record["rounds"], names, arguments.rounds):
        command = [
            *("-m", "benchmarks.support.turns"),
            "--out",
            str(path),
            *_flags(arguments, (*TURNS, "rounds")),
        ]
        if arguments.rate == LOOPBACK:
            run_here(command, arguments)
        else:
            run_on_hosts(command, arguments)
        record = read(path)
    rounds = record["rounds"]
    rows = [
        {
            "name": one.name,
            "what": one.what,
            "role": one.role,
            "shards": one.shards,
            "seconds": seconds_of(rounds, one.name),
            **{
                part: [taken[one.name][part] for taken in rounds if one.name in taken]
                for part in ("sent_bytes", "parts")
            },
        }
        for one in everyone
    ]
    return {"settings": record["settings"], **record["facts"], "rows": rows}


def begin_losses(arguments: argparse.Namespace, path: Path) -> Record:
    """What is at ``path`` for these settings already. Raises Mistake if it is of others."""
    return kept(path, loss_settings_of(arguments), {"rows": {}})


def take_losses(arguments: argparse.Namespace, path: Path) -> Record:
    """What losses.py finds, kept at ``path``. Raises as ``take_turns`` does."""
    record = begin_losses(arguments, path)
    if any(one.name not in record["rows"] for one in trained(arguments)):
        command = ["-m", "benchmarks.support.losses", "--out", str(path)]
        command += _flags(arguments, LOSSES)
        run_here(command, arguments)
        record = read(path)
    return record


def run_here(command: list[str], arguments: argparse.Namespace) -> None:
    """Run a rank's program (``-m``, its module, its flags) in plain processes.

    Raises RuntimeError if one fails.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher += [str(arguments.hosts * (arguments.nproc_per_node or 1)), *command]
    with subprocess.Popen(launcher, env=os.environ | _environment(arguments)) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # killed, it would leave its ranks behind
            raise
    if status:
        raise RuntimeError(f"{command[1]} failed with status {status}.")


def run_on_hosts(command: list[str], arguments: argparse.Namespace) -> None:
    """Run a rank's program on every host of the link."""
    nproc = arguments.nproc_per_node
    launched = (
        [sys.executable, *command] if nproc is None else torchrun(arguments.hosts, nproc, command)
    )
    with Hosts(arguments.hosts, arguments.rate, offload=True) as hosts:
        hosts.run(launched, env=_environment(arguments), timeout=arguments.timeout)


def _flags(arguments: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    flags = []
    for name in (*BOTH, *names):
        flags += [flag(name), str(getattr(arguments, name))]
    return [*flags, "--contestants", *(one.name for one in chosen(arguments))]


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    found = {"OMP_NUM_THREADS": str(arguments.threads), "DS_ACCELERATOR": arguments.device}
    if arguments.device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _code() -> str:
    """A digest of qsdp and of the programs whose steps are timed."""
    files = [path for path in (ROOT / "qsdp").rglob("*") if path.suffix in (".py", ".so")]
    files += [
        Path(__file__).with_name(f"{name}.py")
        for name in (
            "contestants",
            "losses",
            "namespaces",
            "ranks",
            "rivals",
            "rounds",
            "steps",
            "turns",
        )
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
