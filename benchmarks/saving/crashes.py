"""The crash matrix: a run is killed, stopped, starved of disk and damaged, and must lose nothing.

    sudo python -m benchmarks.saving.crashes
    python -m benchmarks.saving.crashes --short

Trainings (launch/train_gpt.py: the model tiny, CrAM, the 8-bit wire), on two ranks under torchrun
and in one process, are disturbed, started again by the same command, and compared with one that was
left alone: each step's line of metrics once, its loss bit for bit, all weights and moments
bit-identical, a line wherever an older checkpoint had to serve. What is random is drawn from
--seed. Disks that are full or read-only need root and mount: those rows are left out without, which
is said. Every part leaves one JSON file in --out, and the same command goes on where it stopped.

Exits with status 1 if anything was lost without a word, hung, differs or is not as promised.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.saving import crash_rows
from benchmarks.saving.crash_folder import Row, Whole, can_mount
from benchmarks.saving.crash_jobs import Stage
from benchmarks.support import machine
from benchmarks.support.namespaces import exit_on_termination
from benchmarks.support.runs import (
    Mistake,
    Processes,
    Record,
    Run,
    read_records,
    report_failures,
    run_all,
    write_json,
)
from qsdp.common.user_errors import quoted

SAVE_EVERY = 4
STEPS = {1: 120, 2: 80}  # by ranks
FULL = "root and mount"
FLAGS = ["--model", "tiny", "--tokenizer", "byte", "--seq-len", "8", "--batch-size", "2"]
FLAGS += ["--eval-batches", "1", "--eval-every", "0", "--one-shot", "none", "--warmup-steps", "1"]
FLAGS += ["--qsdp-bits", "8", "--cram", "--save-every", str(SAVE_EVERY)]
DELTA = ("--qsdp-bits", "4", "--qsdp-gather", "delta", "--qsdp-delta-redraw-every", "50")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Disturb trainings in all ways, and see that nothing is lost."""

    short: bool = False
    """A minute of it: in one process, some kills and signals, one kind of damage."""

    parts: tuple[str, ...] | None = None
    """Names of parts to run, if not all."""

    kills: int | None = None
    """SIGKILLs of each run that is killed, 20 unless given (in the short form 3)."""

    seed: int = 0
    """Seed of the instants, of the ranks that are struck and of the bytes that are damaged."""

    jobs: int = 2
    """Parts side by side."""

    patience_s: float = 300
    """Seconds after which a job that has not ended has hung."""

    out: Path | None = None
    """Folder of the records and of crashes.json; out/crashes or out/crashes-short unless given."""


@dataclass(frozen=True)
class Part:
    """Rows that one run makes, one after the other."""

    name: str
    ranks: int
    make: Callable[[Stage, Whole, random.Random], list[Row]]
    flags: tuple[str, ...] = ()
    needs_mount: bool = False
    wire: tuple[str, ...] = ()
    """Flags that change its numbers, and those of the undisturbed run that it is compared with."""


def main(options: Options) -> int:
    """Run what is missing, print the tables, write crashes.json.

    Returns the exit status: 0, 1 if a row failed, 2 for options that cannot be run.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log is no reason to break lines
    try:
        all_parts = {part.name: part for part in chosen(options)}
        out = options.out or Path("out", "crashes-short" if options.short else "crashes")
        runs = plan(options, [*all_parts.values()])
        records = read_records(out, runs)
    except (Mistake, ValueError, OSError) as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        return 2
    console.print(f"--seed {options.seed}", highlight=False)
    missing = [all_parts[run.name] for run in runs if run.name not in records]
    with tempfile.TemporaryDirectory(prefix="qsdp-crashes-") as folder:
        theatre = Theatre(Path(folder), options)
        if missing:
            console.print("undisturbed runs first")
            theatre.rehearse(missing)

        def take(run: Run, processes: Processes) -> Record:
            return run.settings | theatre.take(all_parts[run.name], processes)

        failed = run_all(runs, records, out, options.jobs, console, take, result_of)
    if failed:
        report_failures(failed)
        return 1
    done = [records[run.name] for run in runs]
    left_out = sorted(all_parts.keys() - {run.name for run in runs})
    console.print(table(done))
    console.print(totals_table(done))
    for name in left_out:
        console.print(f"left out: {name}, which needs {FULL}", highlight=False)
    described = machine.describe()
    console.print(machine.one_line(described), highlight=False)
    totals = totals_of(done)
    write_json(
        out / "crashes.json",
        {"machine": described, "seed": options.seed, "totals": totals, "left_out": left_out}
        | {"parts": done},
    )
    console.print(
        f"{totals['rows']} rows: {totals['lost']} silent losses, {totals['hangs']} hangs, "
        f"{totals['differs']} with other weights, {totals['wrong']} not as promised otherwise",
        highlight=False,
    )
    return 1 if any(totals[name] for name in ("lost", "hangs", "differs", "wrong")) else 0


def chosen(options: Options) -> list[Part]:
    """The parts that ``options`` ask for. Raises Mistake for what cannot be run."""
    found = {part.name: part for part in parts(options)}
    if options.parts is None:
        return [*found.values()]
    for name in options.parts:
        if name not in found:
            raise Mistake(f"--parts holds {name!r}: choose among {', '.join(found)}.")
    return [found[name] for name in options.parts]


def parts(options: Options) -> list[Part]:
    """The whole matrix, or its short form. Raises Mistake for what cannot be run."""
    if options.kills is not None and options.kills < 1:
        raise Mistake(f"--kills is {options.kills}: choose 1 or more.")
    if options.jobs < 1:
        raise Mistake(f"--jobs is {options.jobs}: choose 1 or more.")
    if not options.patience_s > 0:
        raise Mistake(f"--patience-s is {options.patience_s}: choose a number above 0.")
    number = options.kills or (3 if options.short else 20)
    ways = crash_rows.HOWS[:1] if options.short else crash_rows.HOWS

    def killed(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.kills(stage, whole, rng, number, SAVE_EVERY)

    def signalled(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.signals(stage, whole, rng, SAVE_EVERY)

    def restarted(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.restarts(stage, whole, rng, SAVE_EVERY)

    def all_damaged(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return [crash_rows.all_damaged(stage.run, stage.folder / "run", whole, rng)]

    def damaged(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.damages(stage, whole, rng, ways)

    def unwritable(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return [crash_rows.unwritable(stage.run, stage.folder / "run", whole)]

    def two_jobs(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.two_jobs(stage, whole)

    def full_checkpoints(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.full_for_checkpoints(stage, whole)

    def full_metrics(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.full_for_metrics(stage, whole, SAVE_EVERY)

    def full_plots(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.full_for_plots(stage, whole)

    def full_summary(stage: Stage, whole: Whole, rng: random.Random) -> list[Row]:
        return crash_rows.full_for_summary(stage, whole)

    late = ("--save-async",)
    alone = [
        Part("kills, one process", 1, killed),
        Part("kills, one process, async", 1, killed, late),
        Part("signals, one process", 1, signalled),
        Part("damage", 1, damaged),
        Part("damage everywhere", 1, all_damaged),
        Part("two jobs on one folder", 1, two_jobs),
        # Modes bind all but root.
        Part("read-only folder", 1, unwritable, needs_mount=os.geteuid() == 0),
        Part("disk full for checkpoints", 1, full_checkpoints, needs_mount=True),
        Part("disk full for checkpoints, async", 1, full_checkpoints, late, needs_mount=True),
        Part("disk full for metrics", 1, full_metrics, needs_mount=True),
        Part("disk full for plots", 1, full_plots, needs_mount=True),
        Part("disk full for summary", 1, full_summary, needs_mount=True),
    ]
    if options.short:
        names = ("kills, one process", "signals, one process", "damage", "read-only folder")
        names += ("two jobs on one folder", "disk full for checkpoints")
        return [part for part in alone if part.name in names]
    together = [
        Part("kills, two ranks", 2, killed),
        Part("kills, two ranks, async", 2, killed, late),
        Part("kills, two ranks, async, delta", 2, killed, late, wire=DELTA),
        Part("signals, two ranks", 2, signalled),
        Part("signals, two ranks, async", 2, signalled, late),
        Part("restarts by torchrun", 2, restarted),
        Part("restarts by torchrun, async", 2, restarted, late),
        Part("disk full for checkpoints, two ranks", 2, full_checkpoints, needs_mount=True),
    ]
    # Two ranks are killed here: one process would show no more.
    return [*together, *[part for part in alone if not part.name.startswith("kills")]]


def plan(options: Options, wanted: list[Part]) -> list[Run]:
    """The parts that this user can run here, as records name them."""
    runs = []
    for part in wanted:
        if part.needs_mount and not can_mount():
            continue
        settings = {"kind": part.name, "ranks": part.ranks, "steps": STEPS[part.ranks]}
        settings |= {"seed": options.seed, "flags": [*FLAGS, *part.flags, *part.wire]}
        if "kills" in part.name:
            settings["kills"] = options.kills or (3 if options.short else 20)
        runs.append(Run(part.name, settings, []))
    return runs


class Theatre:
    """The undisturbed runs, by ranks and wire, and the stages on which others are disturbed."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._folder, self._options = folder, options
        self._text = folder / "text.txt"
        rng = random.Random(0)
        self._text.write_text("".join(rng.choice("abcdefgh \n") for _ in range(20_000)))
        self._wholes: dict[tuple[int, tuple[str, ...]], Whole] = {}

    def rehearse(self, parts: list[Part]) -> None:
        """Make the undisturbed runs. Raises RuntimeError if one fails."""
        for number, (size, wire) in enumerate(sorted({(p.ranks, p.wire) for p in parts})):
            out = self._folder / f"whole-{number}"
            with self._stage(f"rehearsal-{number}", size, wire) as stage:
                end = stage.run(out, "--keep", "6")
            if end.status:
                raise SystemExit(
                    f"error: the undisturbed run failed ({quoted(' '.join(end.said)[-2000:])})."
                )
            self._wholes[size, wire] = Whole.of(out)

    def take(self, part: Part, processes: Any) -> Record:
        """Make the rows of a part."""
        started = time.monotonic()
        rng = random.Random(f"{self._options.seed} {part.name}")
        with self._stage(part.name, part.ranks, (*part.flags, *part.wire)) as stage:
            processes.add(stage)
            try:
                rows = part.make(stage, self._wholes[part.ranks, part.wire], rng)
            except Exception:
                raise RuntimeError(traceback.format_exc()) from None
            processes.discard(stage)
        for row in rows:
            row.said = row.said.replace(f"{stage.folder}/", "")
        return {
            "rows": [asdict(row) | {"faults": row.faults} for row in rows],
            "seconds": round(time.monotonic() - started, 1),
            "machine": machine.describe(),
        }

    def _stage(self, name: str, ranks: int, more: tuple[str, ...]) -> Stage:
        flags = [*FLAGS, *more, "--data", str(self._text), "--steps", str(STEPS[ranks])]
        flags += ["--keep", "2"]
        return Stage(self._folder / name, flags, ranks, self._options.patience_s)


def result_of(record: Record) -> str:
    """A record in a few words."""
    rows = record["rows"]
    return f"{sum(not row['faults'] for row in rows)} of {len(rows)} rows hold"


def totals_of(records: list[Record]) -> dict[str, int]:
    """How many of all rows have which kind of fault."""
    rows = [row for record in records for row in record["rows"]]
    names = ("lost", "hangs", "differs", "wrong")
    return {"rows": len(rows)} | {name: sum(bool(row[name]) for row in rows) for name in names}


def table(records: list[Record]) -> Table:
    """The table of every row."""
    found = Table(title="What was done, and what came of it")
    for name in ("part", "what", "when", "status", "on standard error", "verdict"):
        found.add_column(name, overflow="fold")
    for record in records:
        for row in record["rows"]:
            said = row["said"] if len(row["said"]) <= 160 else f"{row['said'][:160]}..."
            verdict = "holds" if not row["faults"] else "FAILS: " + "; ".join(row["faults"])
            cells = (record["kind"], row["what"], row["when"], row["ended"], said, verdict)
            found.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return found


def totals_table(records: list[Record]) -> Table:
    """The table of a line a part."""
    found = Table(title="In all")
    for name in ("part", "rows", "silent losses", "hangs", "other weights", "otherwise wrong", "s"):
        found.add_column(name, justify="left" if name == "part" else "right")
    for record in records:
        totals = totals_of([record])
        numbers = [totals[name] for name in ("rows", "lost", "hangs", "differs", "wrong")]
        found.add_row(record["kind"], *map(str, numbers), f"{record['seconds']:.0f}")
    return found


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(
        main(tyro.cli(Options, prog="python -m benchmarks.saving.crashes", description=__doc__))
    )
