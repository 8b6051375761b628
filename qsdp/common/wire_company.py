"""What settings of the wire ask of each other, whatever bits there are. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsdp.common.wire_values import check_bucket_size

MAX_DELTA_BUCKET = 128
"""Values of a bucket at most where changed codes are sent, each by a place of seven bits."""


def check_company(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that another one's value leaves without effect, or refuses.

    ``values`` are all fields of a ``QSDPConfig`` by name, each of which may be as it is.
    """
    is_delta = values["gather"] == "delta"
    for name, is_heeded, needed in (
        ("level_steps", values["levels"] == "learned", "levels='learned'"),
        ("warmup_bits", values["warmup_steps"] > 0, "warmup_steps=N"),
        ("local_grad_bits", values["reduce"] != "flat", "reduce='two-hop'"),
        ("delta_room", is_delta, "gather='delta'"),
        ("delta_redraw_every", is_delta, "gather='delta'"),
        ("delta_codes", is_delta, "gather='delta'"),
    ):
        if values[name] is not None and not is_heeded:
            raise ValueError(
                f"{name} is given without {needed}, so that nothing would heed it: add that, "
                "or leave it out."
            )
    if values["embedding_bits"] is not None and any(name == "*" for name, _ in values["policy"]):
        raise ValueError(
            "embedding_bits is given beside a policy for '*', which is for embeddings too: "
            "leave one of the two out."
        )
    if is_delta:
        _check_delta(values)


def _check_delta(values: Mapping[str, Any]) -> None:
    """Raise ValueError for what grids that are kept cannot have."""
    if values["delta_codes"] == "node" and values["reduce"] == "flat":
        raise ValueError(
            "delta_codes is 'node' beside reduce='flat', which knows no nodes: leave one of the "
            "two out."
        )
    if values["levels"] == "learned":
        raise ValueError(
            f"levels is {values['levels']!r} beside gather='delta', which keeps uniform grids: "
            "leave one of the two out."
        )
    if values["weight_bucket_size"] is not None:
        check_bucket_size("weight_bucket_size", values["weight_bucket_size"], MAX_DELTA_BUCKET)
    elif values["bucket_size"] is not None and values["bucket_size"] > MAX_DELTA_BUCKET:
        raise ValueError(
            f"bucket_size is {values['bucket_size']} beside gather='delta', for weights too: "
            f"choose at most {MAX_DELTA_BUCKET}, or add weight_bucket_size=N."
        )
