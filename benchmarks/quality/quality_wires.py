"""The wires that benchmarks/quality/quality.py compares, and the two settings in which it does."""

from __future__ import annotations

from dataclasses import dataclass

GATHERS = ("twice", "once")
METHODS = {
    "shift": ("--qsdp-rounding", "shift"),
    "dither": ("--qsdp-rounding", "dither"),
    "learned": ("--qsdp-levels", "learned"),
}
BITS = ((8, 8), (6, 6), (5, 4), (4, 4), (3, 3))  # of weights, of gradients
_LEARNED_AT_MOST = 6


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One way to train."""

    name: str
    method: str
    """fp32, a key of METHODS, or default: what --qsdp-bits alone selects."""
    flags: tuple[str, ...] = ()
    """Flags of launch/train_gpt.py, except the gather."""
    gather: str = "twice"
    """How the trainings gather; the bytes are measured both ways."""

    def all_flags(self, gather: str) -> list[str]:
        """Flags of a run that gathers ``twice`` or ``once``; stock FSDP2 knows only the former."""
        return [*self.flags, *(["--qsdp-gather", "once"] if gather == "once" else [])]

    @property
    def gathers(self) -> tuple[str, ...]:
        """How this wire can gather."""
        return GATHERS[:1] if self.method == "fp32" else GATHERS


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
        wires=tuple(name for name in WIRES if name != "w8g8-default"),
        seeds=(0, 1, 2),
    ),
    "larger": Preset(model="mini", wires=("fp32", "w8g8-default", "w4g4-default"), seeds=(0,)),
}
