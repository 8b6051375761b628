"""The wires that benchmarks/quality/quality.py compares, and the two settings in which it does."""

from __future__ import annotations

from dataclasses import dataclass

COUNTED_APART = ("twice", "once")
"""Ways to gather that train alike: one trains, the bytes of both are counted."""
GATHERS = (*COUNTED_APART, "delta")
METHODS = {
    "shift": ("--qsdp-rounding", "shift"),
    "dither": ("--qsdp-rounding", "dither"),
    "learned": ("--qsdp-levels", "learned"),
}
BITS = ((8, 8), (6, 6), (5, 4), (4, 4), (3, 3))  # of weights, of gradients
_LEARNED_AT_MOST = 6
_THREE = ("--qsdp-weight-bits", "4", "--qsdp-grad-bits", "3")
DELTA = {
    "w8g8-delta": ("--qsdp-bits", "8"),
    "w4g4-delta": ("--qsdp-bits", "4"),
    "w4g3-delta": _THREE,
    "w4g3-delta-rotated": (*_THREE, "--qsdp-grad-rotation", "hadamard"),
    "w4g3-delta-learned": (*_THREE, "--qsdp-levels", "learned"),
}
"""Flags of the wires that send changed codes, beside the gather, by name."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One way to train."""

    name: str
    method: str
    """fp32, a key of METHODS, default (what --qsdp-bits alone selects) or delta."""
    flags: tuple[str, ...] = ()
    """Flags of launch/train_gpt.py, except the gather."""
    gather: str = "twice"
    """How the trainings gather."""

    def all_flags(self, gather: str) -> list[str]:
        """Flags of a run that gathers so: see ``gathers``."""
        return [*self.flags, *(["--qsdp-gather", gather] if gather != "twice" else [])]

    @property
    def gathers(self) -> tuple[str, ...]:
        """In which ways the bytes of this wire are counted.

        Stock FSDP2 gathers twice. Bytes of changes depend on the training, and are counted there.
        """
        return (self.gather,) if self.method in ("fp32", "delta") else COUNTED_APART


def _wires() -> list[Wire]:
    wires = [Wire(name="fp32", method="fp32")]
    for weight_bits, grad_bits in BITS:
        bits = ("--qsdp-weight-bits", str(weight_bits), "--qsdp-grad-bits", str(grad_bits))
        for method, flags in METHODS.items():
            # Wider parameters keep the uniform grid: learned would be shift again.
            if method == "learned" and min(weight_bits, grad_bits) > _LEARNED_AT_MOST:
                continue
            name = f"w{weight_bits}g{grad_bits}-{method}"
            wires.append(Wire(name=name, method=method, flags=(*bits, *flags)))
    for bits_, gather in (("8", "twice"), ("4", "once")):
        name = f"w{bits_}g{bits_}-default"
        flags = ("--qsdp-bits", bits_)
        wires.append(Wire(name=name, method="default", flags=flags, gather=gather))
    wires += [
        Wire(name=name, method="delta", flags=flags, gather="delta")
        for name, flags in DELTA.items()
    ]
    return wires


WIRES = {wire.name: wire for wire in _wires()}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, the wires to compare on it and the seeds to average over."""

    model: str
    wires: tuple[str, ...]
    seeds: tuple[int, ...]


PRESETS = {
    # w8g8-default is w8g8-shift: 8 bits round by shift.
    "nano": Preset(
        model="nano",
        wires=tuple(name for name in WIRES if name not in ("w8g8-default", *DELTA)),
        seeds=(0, 1, 2),
    ),
    "delta": Preset(
        model="nano",
        wires=("fp32", "w8g8-default", "w4g4-default", *DELTA),
        seeds=(0, 1, 2),
    ),
    "larger": Preset(model="mini", wires=("fp32", "w8g8-default", "w4g4-default"), seeds=(0,)),
}
