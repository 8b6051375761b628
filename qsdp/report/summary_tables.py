"""The tables at the end of a run."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qsdp.common.printing import printable
from qsdp.report.progress import format_bytes
from qsdp.report.summary_json import Summary, losses_beside
from qsdp.sparsity.compression_target import Compression

NAMES = {"gather": "weights", "reduce": "gradients"}
PARTS = ("encode", "wire", "decode")


def print_summary(console: Console, summary: Summary) -> None:
    """Print the tables and the sample of a run."""
    losses = Table(title="Validation loss, nats a token")
    losses.add_column("weights")
    losses.add_column("loss", justify="right")
    pruned = summary["sparsity"]["prunable"]
    name = "dense" if pruned < 0.01 else f"{pruned:.0%} pruned in training"
    losses.add_row(f"{name}, exact", _loss_in_words(summary["val_loss"]))
    if summary["val_loss_quantized"] is not None:
        losses.add_row(f"{name}, off the wire", _loss_in_words(summary["val_loss_quantized"]))
    for kept, loss in losses_beside(summary).items():
        losses.add_row(f"its {kept}", _loss_in_words(loss))
    for target, after in summary["one_shot"].items():
        losses.add_row(f"{target_in_tables(target)} in one shot", _loss_in_words(after))
    console.print(losses)
    console.print(_wire_table(summary))
    seconds = summary["wire"]["seconds_per_step"]
    known = {name: taken for name, taken in seconds.items() if taken is not None}
    if len(known) == len(seconds):
        console.print(_time_table(known))
    if summary["step_s_median"] is not None and summary["tokens_per_s"] is not None:
        mfu = summary["mfu"]
        share = "" if mfu is None else f", {mfu:.1%} of the matmul rate"
        console.print(
            f"{summary['step_s_median'] * 1e3:,.0f} ms a step (median), "
            f"{summary['tokens_per_s']:,.0f} tokens/s{share}",
            highlight=False,
        )
    if summary["skipped_steps"]:
        console.print(
            f"Of {summary['steps']:,} steps {summary['skipped_steps']:,} were skipped: their loss "
            "or gradient was not finite.",
            highlight=False,
        )
    if summary["sample"] is not None:
        # The model may well write what looks like markup or a control sequence.
        console.print(Panel(Text(printable(summary["sample"])), title="Sample"))
    elif summary["val_loss"] is None:
        console.print("No sample: the model's logits are not finite, the training has diverged.")


def _wire_table(summary: Summary) -> Table:
    wire, steps = summary["wire"], summary["steps_measured"]
    sent, fp32 = wire["sent_bytes_per_step"], wire["fp32_bytes_per_step"]
    table = Table(title=f"Bytes that a rank sends, {wire['source']}")
    table.add_column("")
    table.add_column("a step", justify="right")
    table.add_column(f"{steps} steps", justify="right")
    rows = [
        ("weights and gradients", sent),
        ("the same in fp32", fp32),
        ("saved", fp32 - sent),
        ("everything else", wire["other_bytes_per_step"]),
    ]
    for direction, count in wire["inter_node_bytes_per_step"].items():
        if count:
            rows.append((f"of {NAMES[direction]}, between nodes", count))
    for name, count in rows:
        share = (
            f" ({count / fp32:.1%})" if fp32 and name in ("weights and gradients", "saved") else ""
        )
        table.add_row(name, _signed_bytes(count) + share, _signed_bytes(count * steps))
    return table


def _time_table(seconds: dict[str, float]) -> Table:
    """What encoding, sending and decoding take: the mean over ranks and steps."""
    table = Table(title="Time on the wire, ms a step")
    table.add_column("")
    for part in (*PARTS, "together"):
        table.add_column(part, justify="right")
    for direction, name in NAMES.items():
        times = [1e3 * seconds[f"{direction}_{part}_s"] for part in PARTS]
        table.add_row(name, *(f"{time:.2f}" for time in (*times, sum(times))))
    return table


def target_in_tables(target: str) -> str:
    """A target of compression as the tables have it: a plain fraction as a percentage."""
    chosen = Compression.of(target)
    is_plain = chosen == Compression(sparsity=chosen.sparsity)
    return f"{chosen.sparsity:.0%} pruned" if is_plain else f"{chosen}"


def _loss_in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _signed_bytes(count: float) -> str:
    return format_bytes(count) if count >= 0 else f"-{format_bytes(-count)}"
