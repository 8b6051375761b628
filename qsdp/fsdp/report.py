"""What `handle.report()` says: how every parameter travels, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    group: int | None
    """None for a parameter that FSDP2 does not shard: it does not travel."""
    weight: str
    """How it travels in the gather: `8 bits`, `raw float32`, ...; `none` when it does not."""
    grad: str
    """How its gradient travels in the reduce; `none` when it is frozen or not sharded."""
    why: str


@dataclass(frozen=True)
class Report:
    """Rows in the model's order, and remarks on what does not travel as one might think."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "group", "weight", "gradient", "why")
        lines = [head]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            group = "-" if row.group is None else str(row.group)
            lines.append((row.name, shape, group, row.weight, row.grad, row.why))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *(f"note: {remark}" for remark in self.remarks)])
