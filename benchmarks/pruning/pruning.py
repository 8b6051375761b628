"""What a model loses when it is compressed in one shot, by the method that trained it.

    python -m benchmarks.pruning.pruning --data tinyshakespeare.txt
    python -m benchmarks.pruning.pruning --data tinyshakespeare.txt --wires
    python -m benchmarks.pruning.pruning --preset larger \\
        --data wikitext2.test.txt wikitext2.valid.txt

CrAM and SAM take two passes a step: beside --steps of them stand as many steps of the others (equal
steps) and twice as many (equal compute). The last 5 % of the text are a test split, on which the
table stands; settings are chosen on the validation split:

    python -m benchmarks.pruning.pruning --data tinyshakespeare.txt --methods gmp acdc --seeds 0 \\
        --flags="--lr 4e-3" --split val --out out/lr-4e-3

Every run leaves one small JSON file in --out, and the same command goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from benchmarks.pruning.pruning_data import Texts, losses_on_test, split
from benchmarks.pruning.pruning_methods import (
    METHODS,
    PRESETS,
    TARGETS,
    WIRE_METHODS,
    WIRES,
    Preset,
    steps_of,
    tuned_flags,
)
from benchmarks.pruning.pruning_table import (
    as_json,
    gap_table,
    loss_table,
    make_rows,
    plot,
    verdicts,
    wire_verdicts,
)
from benchmarks.support import machine
from benchmarks.support.namespaces import exit_on_termination
from benchmarks.support.runs import (
    SEQUENCES,
    Mistake,
    Processes,
    Record,
    Run,
    launch,
    read_records,
    report_failures,
    run_all,
    write_json,
)
from qsdp import checkpoint
from qsdp.common.user_errors import quoted
from qsdp.methods.acdc.flags import DENSE_TWIN as TWIN
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.models.registry import preset_defaults
from qsdp.train.run_flags import RunFlags

STEPS = 1000
EVAL_BATCHES = 75  # about half of nano's validation split
SPLITS = {"test": "Test", "val": "Validation"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare methods by the test loss after compressing in one shot."""

    data: tuple[Path, ...]
    """Text files, which are joined: the last 5 % test, of the rest 90 % train and 10 % validate."""

    preset: str = "nano"
    """nano or larger: which model, methods and seeds.
    nano: all methods, three seeds. larger: the mini model with 2048 BPE tokens (5.3M parameters),
    the five main methods, one seed.
    """

    methods: tuple[str, ...] | None = None
    """Which methods, if not the preset's.
    They are adamw, sam, gmp, cram, cram-plus, cram-multi, cram-2:4 and acdc.
    """

    wires: bool = False
    """In place of all methods, two of them on 2 ranks over three wires.
    CrAM+-Multi and AC/DC over the 8-bit and the 4-bit wire and over stock FSDP2.
    """

    seeds: tuple[int, ...] | None = None
    """Seeds of weights, data order and rounding, if not the preset's."""

    steps: int = STEPS
    """Optimizer steps of CrAM and SAM."""

    flags: str = ""
    """Flags of launch/train_gpt.py for all runs, after those of the preset."""

    split: str = "test"
    """Which losses are shown and judged: test, or val to choose settings by."""

    jobs: int = 1
    """Trainings side by side. Losses do not depend on it; seconds do."""

    out: Path | None = None
    """Folder of the runs' records, pruning.json and pruning.png. Unset: out/pruning/PRESET."""


def main(options: Options) -> int:
    """Run what is missing, print the tables, write pruning.json and the plot.

    Returns the exit status: 0, 1 if a run failed, 2 for options that cannot be run.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log is no reason to break lines
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qsdp-pruning-") as folder:
        try:
            preset = check(options)
            texts = split(options.data, Path(folder), preset.bpe_tokens)
            runs = plan(options, texts)
            name = f"{options.preset}-wires" if options.wires else options.preset
            out = options.out or Path("out/pruning", name)
            records = read_records(out, runs)
        except (Mistake, ValueError, OSError) as error:
            print(f"error: {quoted(error)}.", file=sys.stderr)
            return 2

        def take(run: Run, processes: Processes) -> Record:
            return train(run, texts, processes)

        if failed := run_all(runs, records, out, options.jobs, console, take, result_of):
            report_failures(failed)
            return 1
    report([records[run.name] for run in runs], options, preset, out, console)
    return 0


def check(options: Options) -> Preset:
    """The preset that is meant. Raises Mistake for options that cannot be run."""
    if options.preset not in PRESETS:
        raise Mistake(f"--preset is {options.preset!r}: choose one of {', '.join(PRESETS)}.")
    if unknown := set(options.methods or ()) - METHODS.keys():
        raise Mistake(
            f"--methods holds {', '.join(sorted(unknown))}: choose among {', '.join(METHODS)}."
        )
    for name in ("jobs", "steps"):
        if getattr(options, name) < 1:
            raise Mistake(f"--{name} is {getattr(options, name)}: choose 1 or more.")
    if options.split not in SPLITS:
        raise Mistake(f"--split is {options.split!r}: choose one of {', '.join(SPLITS)}.")
    for path in options.data:
        if not path.is_file():
            raise Mistake(f"--data {path} is no file: give texts.")
    return PRESETS[options.preset]


def plan(options: Options, texts: Texts) -> list[Run]:
    """All runs, seed by seed."""
    preset = PRESETS[options.preset]
    ranks = 2 if options.wires else 1
    common = {
        "model": preset.model,
        "ranks": ranks,
        "seq_len": preset_defaults()[preset.model].get("seq_len", RunFlags.seq_len),
        "data": "+".join(path.name for path in options.data),
        "data_sha256": texts.sha256,
        "parameters": count_parameters(preset.model, texts.vocab_size),
    }
    flags = ["--model", preset.model, "--data", str(texts.train), "--tokenizer", texts.tokenizer]
    flags += ["--batch-size", str(SEQUENCES // ranks), "--eval-batches", str(EVAL_BATCHES * ranks)]
    flags += ["--eval-every", "0", "--save-every", "0", "--resume", "none"]
    flags += ["--one-shot", ",".join(TARGETS)]
    more_flags = shlex.split(options.flags)
    runs = []
    for seed in options.seeds or preset.seeds:
        for wire, way in (WIRES if options.wires else {"stock": WIRES["stock"]}).items():
            for method, steps in trainings(options, preset):
                own = [
                    *METHODS[method].flags,
                    *tuned_flags(preset, method, steps),
                    *way,
                    *more_flags,
                ]
                settings = common | {
                    "kind": "training",
                    "method": method,
                    "wire": wire,
                    "seed": seed,
                    "steps": steps,
                    "flags": own,
                }
                name = f"{method.replace(':', '')}-{wire}-{steps}-seed{seed}"
                more = ["--seed", str(seed), "--steps", str(steps)]
                runs.append(Run(name, settings, [*flags, *more, *own]))
    return runs


def trainings(options: Options, preset: Preset) -> list[tuple[str, int]]:
    """Methods and steps: those of equal compute first."""
    methods = options.methods or (WIRE_METHODS if options.wires else preset.methods)
    first = [(method, steps_of(method, options.steps)[0]) for method in methods]
    if options.wires:
        return first
    return first + [(m, steps) for m in methods for steps in steps_of(m, options.steps)[1:]]


def count_parameters(model: str, vocab_size: int) -> int:
    """Values in the model that is trained."""
    with torch.device("meta"):
        built = GPT(GPTConfig.from_preset(model, vocab_size=vocab_size))
    return sum(parameter.numel() for parameter in built.parameters())


def train(run: Run, texts: Texts, processes: Processes) -> Record:
    """Take one run from start to end. Raises RuntimeError with the end of its log."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsdp-pruning-") as folder:
        out = Path(folder)
        summary = launch(run, out, processes)
        losses: dict[str, dict[str, float] | None] = {}
        for name, place in (("test", "checkpoints"), ("twin_test", TWIN)):
            path = checkpoint.latest(out / place)
            losses[name] = path and losses_on_test(
                path, run.settings["model"], texts, run.settings["seq_len"]
            )
    return run.settings | {
        "val": {"dense": summary["val_loss"]} | summary["one_shot"],
        "twin_val": summary.get("dense_twin_val_loss"),
        "sparsity": summary["sparsity"]["prunable"],
        **losses,
        "step_s_median": summary["step_s_median"],
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine.describe(machine.device()),
    }


def result_of(record: Record) -> str:
    """A record in a few words."""
    shown = {"dense": "dense", "0.7": "70 %", "0.9": "90 %"}
    return "test " + ", ".join(f"{record['test'][t]:.3f} {name}" for t, name in shown.items())


def report(
    records: list[Record], options: Options, preset: Preset, out: Path, console: Console
) -> None:
    """Print tables and verdicts, write pruning.json and the plot."""
    rows = make_rows(records, options.split)
    first = records[0]
    title = (
        f"{first['model']} ({first['parameters'] / 1e6:.1f}M parameters), {first['data']}, "
        f"{options.steps} steps of two passes"
    )
    console.print(loss_table(rows, f"{SPLITS[options.split]} loss, nats a token: {title}"))
    console.print(gap_table(rows, "The same less that of the dense model"))
    console.print(
        "Mean and standard deviation over seeds. `dense` is the model as training left it: GMP and "
        "AC/DC leave it pruned, and AC/DC's is compared with its dense twin."
    )
    if options.wires:
        found = wire_verdicts(rows)
    else:
        found = verdicts(rows, options.steps, preset.lead)
    for verdict in found:
        limit = verdict["below"]
        state = "met" if verdict["is_met"] else "MISSED"
        told = "" if limit is None else f", to be at most {limit:+.2f}: {state}"
        aim = "" if verdict.get("aim") is None else f" (aim {verdict['aim']:+.2f})"
        console.print(f"{verdict['what']}: {verdict['measured']:+.4f}{told}{aim}", highlight=False)
    described = machine.describe(machine.device())
    console.print(machine.one_line(described), highlight=False)
    result = {
        "title": title,
        "split": options.split,
        "machine": described,
        "rows": as_json(rows),
        "targets": found,
    }
    write_json(out / "pruning.json", result)
    if not plot(rows, out / "pruning.png", title, options.split):
        console.print("no plot: it needs matplotlib")


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(
        main(tyro.cli(Options, prog="python -m benchmarks.pruning.pruning", description=__doc__))
    )
