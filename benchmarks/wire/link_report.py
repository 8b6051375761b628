"""Several links in one table: ``link.py --report FOLDER ...``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support import machine
from benchmarks.support.rounds import Record, differs, read
from benchmarks.support.runs import Mistake
from benchmarks.wire.link_table import losses_in_words, median_of, ratio, references

COLUMNS = {
    "alone-fp32": "floor",
    "fsdp-fp32": "FSDP2",
    "zero3-fp32": "ZeRO-3",
    "ddp-fp32": "DDP",
    "ddp-powersgd-fp32": "DDP PowerSGD",
    "qsdp-w8g8-once-fp32": "qsdp W8G8",
    "qsdp-w4g4-once-fp32": "qsdp W4G4",
    "qsdp-w4g4-delta-fp32": "qsdp W4G4, changes",
}
OURS = "qsdp-w4g4-once-fp32"
AGAINST = {
    "fsdp-fp32": "FSDP2",
    "the best that shards": "best that shards",
    "the best rival": "best rival",
}
LINKS = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s"}
PER_LINK = ("link", "code")


def report(folders: list[Path]) -> str:
    """A table in Markdown: a row a folder, and what they were measured on and with.

    Raises Mistake for a folder without a finished comparison, and for one of other settings.
    """
    records = [_finished(folder) for folder in folders]
    first, codes = records[0], {record["settings"]["code"] for record in records}
    for folder, record in zip(folders[1:], records[1:], strict=True):
        difference = differs(first["settings"], record["settings"], PER_LINK)
        if difference is not None:
            name, old, new = difference
            raise Mistake(
                f"{folder} has {name} {new}, but {folders[0]} {old}: give folders that differ in "
                "their link only."
            )
    links = [record["link"] for record in records]
    for place, folder in enumerate(folders):
        if links[place] in links[:place]:
            raise Mistake(
                f"{folder} is of {links[place]}, as one before it: leave one of the two out."
            )
    names = {row["name"] for row in first["rows"]}
    columns = {name: head for name, head in COLUMNS.items() if name in names}
    against = [name for name in AGAINST if name in references(first) and OURS in names]
    heads = ["link", *columns.values(), *(f"W4G4 of {AGAINST[name]}" for name in against)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in records:
        rows = {row["name"]: row for row in record["rows"]}
        cells = [LINKS.get(record["link"], record["link"])]
        cells += [f"{median_of(rows[name]):.2f}" for name in columns]
        for name in against:
            other = references(record)[name]
            faster = f"{ratio(other, rows[OURS]):.2f}x"
            cells.append(faster if name in rows else f"{faster} ({other['what']})")
        lines.append("| " + " | ".join(cells) + " |")
    settings = first["settings"]
    lines += [
        "",
        f"Seconds a training step, fp32, {first['parameters'] / 1e6:.1f}M parameters, "
        f"{first['tokens']} tokens a rank and step, {first['ranks']} ranks on {first['hosts']} "
        "hosts; medians; qsdp gathers once, and changes where it says so; PowerSGD of rank "
        f"{settings['powersgd_rank']}; "
        f"{machine.one_line(first['machine'])}.",
    ]
    losses = next((record["losses"] for record in records if record.get("losses")), None)
    if losses:
        found = losses["rows"]
        values = ", ".join(
            f"{head} {found[name]['val_loss']:.3f}"
            for name, head in columns.items()
            if name in found and found[name]["val_loss"] is not None
        )
        lines += ["", f"Validation loss: {values} ({losses_in_words(losses)})."]
    commands = ", ".join(f"`--rate {record['link']}`" for record in records)
    lines += [
        "",
        f"Command: `sudo python -m benchmarks.wire.link --hosts {first['hosts']} --model "
        f"{settings['model']}` with {commands}.",
    ]
    if len(codes) > 1:
        lines += ["", "The links were measured with different states of the code."]
    return "\n".join(lines)


def _finished(folder: Path) -> Record:
    path = folder / "link.json"
    if not path.exists():
        raise Mistake(
            f"{folder} holds no finished comparison (link.json): let link.py --out {folder} end "
            "first."
        )
    record = read(path)
    if not isinstance(record.get("rows"), list) or "machine" not in record:
        raise Mistake(f"{path} is not a record of a comparison: give another folder.")
    return record
