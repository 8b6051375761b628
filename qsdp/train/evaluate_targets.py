"""Loss and perplexity over targets of compression, from one dense model on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import qsdp
from qsdp.common.json_files import json_value, write_json
from qsdp.common.printing import printable
from qsdp.data.batches import eval_batches
from qsdp.data.corpus import Corpus
from qsdp.data.records import is_records
from qsdp.data.token_shards import TokenRange, Tokens
from qsdp.oneshot.in_memory import compressed
from qsdp.oneshot.registry import by_method, solver_of
from qsdp.report.plots import may_fail, write_target_plot
from qsdp.report.summary_json import Losses
from qsdp.report.summary_tables import target_in_tables
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.train.agree_on_inputs import agree_on_config, agree_on_data, read_corpus
from qsdp.train.config import TrainConfig
from qsdp.train.evaluate_flags import TARGETS, EvaluateFlags
from qsdp.train.parallelize import shard_model
from qsdp.train.trained_model import TrainedModel, open_trained_model
from qsdp.train.validate import Evaluator
from qsdp.train.wire_bytes import StockWire
from qsdp.train.world import World, open_world


def evaluate_targets(flags: EvaluateFlags) -> None:
    """Evaluate the targets that ``flags`` name: print the table, write what ``out`` is to hold.

    Called on every rank, under torchrun or alone. Raises UserError, on every rank, for whatever the
    user can correct.
    """
    with open_world(flags.timeout_s, flags.backend) as world:
        source = world.together(lambda: open_trained_model(flags.checkpoint))
        config = world.together(lambda: _config(flags, source))
        agree_on_config(config, world)
        corpus = world.together(lambda: _load_corpus(config, source, world))
        agree_on_data(corpus, world)
        tokens = world.together(lambda: _tokens(flags, config, source, corpus))
        num_sequences = (len(tokens) - 1) // config.run.seq_len
        num_batches = -(-num_sequences // (config.run.batch_size * world.size))
        config = config.changed(eval_batches=num_batches)
        model = shard_model(config, source.size, world, world.mesh)
        targets = world.together(lambda: _checked_targets(flags, config, source, model))
        world.all_alike(lambda: source.load(model))
        evaluator = Evaluator(
            config, world, replace(corpus, val=tokens), model, StockWire(model, world, 1)
        )
        method = flags.chosen_method
        rows = _rows(evaluator, config, model, targets, method, world)
        seen = _seen_in_training(source, corpus) if flags.split == "test" else 0
        results = {
            "source": str(source.path.resolve()),
            "compressed_to": source.target,
            "compressed_by": source.method,
            "method": method if targets else None,
            "step": source.step,
            "data": config.data.data,
            "split": flags.split,
            "sequences": num_sequences,
            "tokens": num_sequences * config.run.seq_len,
            # Of a test split, what the run's own validations have looked at.
            "tokens_seen_in_validation": seen,
            "prunable_patterns": config.compression.patterns,
            "results": rows,
            "world_size": world.size,
            "versions": {"qsdp": qsdp.__version__, "torch": torch.__version__},
        }
        world.on_main(lambda: _report(json_value(results), flags.out))


def _config(flags: EvaluateFlags, source: TrainedModel) -> TrainConfig:
    """What is known of the run's settings, with what the flags change, on stock FSDP2."""
    given = {"data": flags.data, "prunable": flags.prunable, "text_field": flags.text_field}
    given = {name: value for name, value in given.items() if value is not None}
    if flags.data is not None and not is_records(flags.data):
        given.setdefault("text_field", None)  # the run's is not for it
    return source.config.changed(
        **given,
        out=None if flags.out is None else str(flags.out),
        timeout_s=flags.timeout_s,
        backend=flags.backend,
    )


def _load_corpus(config: TrainConfig, source: TrainedModel, world: World) -> Corpus:
    corpus = read_corpus(config.data, source.tokenizer, world)
    if corpus.vocab_size > source.size.vocab_size:
        raise ValueError(
            f"--data {config.data.data} has a vocabulary of {corpus.vocab_size}, but the model one "
            f"of {source.size.vocab_size}: give data of the run's tokenizer."
        )
    return corpus


def _tokens(
    flags: EvaluateFlags, config: TrainConfig, source: TrainedModel, corpus: Corpus
) -> TokenRange:
    """Whole sequences, as many as asked for. They are cut here, so that ranks only share them."""
    start = corpus.test_start if flags.split == "test" else 0
    rest: Tokens = TokenRange(corpus.val, start, len(corpus.val))
    num_batches = flags.eval_batches
    if num_batches is None:
        num_batches = source.config.output.eval_batches
    most = num_batches * config.run.batch_size * source.world_size or len(rest)
    tokens = TokenRange(rest, 0, most * config.run.seq_len + 1)
    eval_batches(tokens, config.run.batch_size, config.run.seq_len)  # for its checks
    return tokens


def _checked_targets(
    flags: EvaluateFlags, config: TrainConfig, source: TrainedModel, model: torch.nn.Module
) -> list[Compression]:
    targets = flags.chosen
    if targets is None:
        texts = TARGETS.split(",") if source.target is None else []
        targets = tuple(map(Compression.of, texts))
    solver_of(flags.chosen_method)  # for its checks
    if flags.method is not None and not targets:
        raise ValueError(
            f"--method {flags.method} has nothing to do, as {source.path} is compressed already: "
            "name targets, or leave it out."
        )
    prunable = Prunable.of(model, config.compression.patterns)
    for target in targets:
        prunable.check(target)
    return list(dict.fromkeys(targets))


def _rows(
    evaluator: Evaluator,
    config: TrainConfig,
    model: torch.nn.Module,
    targets: list[Compression],
    method: str,
    world: World,
) -> list[dict[str, Any]]:
    """What the model is worth as it is, and at each target."""
    console = Console()
    columns = (
        *(TextColumn("evaluating {task.description}"), BarColumn()),
        *(MofNCompleteColumn(), TimeRemainingColumn()),
    )
    is_shown = world.is_main and console.is_terminal
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task("the model as it is", total=1 + len(targets))
        rows = [_row_at_target(evaluator, None)]
        for target in targets:
            bar.update(task, advance=1, description=str(target))
            with compressed(model, target, config.compression.patterns, method=method):
                rows.append(_row_at_target(evaluator, target))
    return rows


def _row_at_target(evaluator: Evaluator, target: Compression | None) -> dict[str, Any]:
    loss = evaluator.loss()
    return {
        "target": None if target is None else str(target),
        "loss": loss,
        "perplexity": perplexity(loss),
        "zeros": evaluator.sparsity(),
    }


def perplexity(loss: float) -> float:
    """The perplexity at a target: e to its loss in nats, infinite beyond all floats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _seen_in_training(source: TrainedModel, corpus: Corpus) -> int:
    """Tokens of the test split that the run's own validations read, of its own data."""
    config = source.config
    sequences = config.output.eval_batches * config.run.batch_size * source.world_size
    seen = sequences * config.run.seq_len + 1
    return max(0, min(seen, len(corpus.val)) - corpus.test_start)


def _report(results: dict[str, Any], out: Path | None) -> None:
    console = Console()
    rows = results["results"]
    is_test = results["split"] == "test"
    name = "Test" if is_test else "Validation"
    source = Text(printable(f"{results['source']}, step {results['step']}"))
    console.print(source, soft_wrap=True)
    by = by_method(results["method"])
    title = f"{name} loss after one-shot compression{by}, {results['tokens']:,} tokens"
    table = Table(title=title)
    table.add_column("weights")
    for column in ("nats a token", "more", "perplexity", "zeros: prunable", "all"):
        table.add_column(column, justify="right")
    dense = rows[0]["loss"]
    for row in rows:
        loss = row["loss"]
        is_known = loss is not None and dense is not None
        table.add_row(
            # An export may be another's, who had it say what he liked.
            Text(printable(_row_name(results, row["target"]))),
            "not finite" if loss is None else f"{loss:.4f}",
            f"{loss - dense:+.4f}" if is_known and row is not rows[0] else "",
            "not finite" if row["perplexity"] is None else f"{row['perplexity']:,.3f}",
            *(f"{row['zeros'][part]:.2%}" for part in ("prunable", "model")),
        )
    console.print(table)
    if results["tokens_seen_in_validation"]:
        console.print(
            f"Note: the run's own validations read {results['tokens_seen_in_validation']:,} tokens "
            "of this test split; train with fewer --eval-batches to keep it unseen.",
            highlight=False,
            soft_wrap=True,
        )
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", results)
    losses: Losses = {
        "val_loss": dense,
        "one_shot": {row["target"]: row["loss"] for row in rows if row["target"] is not None},
    }
    plot = out / "evaluation.png"
    noted = ""
    if may_fail(f"{plot}", lambda: write_target_plot(plot, losses, name.lower())) is False:
        noted = "; no plot: matplotlib is not installed (pip install matplotlib)"
        if plot.exists():
            plot.unlink()
            noted += ", and the one of an earlier evaluation is removed"
    console.print(f"Results are in {out}{noted}", highlight=False, markup=False, soft_wrap=True)


def _row_name(results: dict[str, Any], target: str | None) -> str:
    if target is not None:
        return target_in_tables(target)
    compressed_to = results["compressed_to"]
    by = by_method(results["compressed_by"])
    return "dense" if compressed_to is None else f"exported at {compressed_to}{by}"
