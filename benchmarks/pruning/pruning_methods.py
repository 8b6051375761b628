"""The methods that benchmarks/pruning/pruning.py compares, and the settings in which it does."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4bit")
"""What every final model is compressed to in one shot."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    label: str
    flags: tuple[str, ...] = ()
    """Flags of launch/train_gpt.py."""
    passes: int = 1
    """Forward and backward passes a step."""


METHODS = {
    "adamw": Method(label="AdamW"),
    "sam": Method(label="SAM", flags=("--sam",), passes=2),
    "gmp": Method(label="GMP 90 %", flags=("--gmp",)),
    "cram": Method(
        label="CrAM 70 %", flags=("--cram", "--no-cram-plus", "--cram-targets", "0.7"), passes=2
    ),
    "cram-plus": Method(label="CrAM+ 70 %", flags=("--cram", "--cram-targets", "0.7"), passes=2),
    "cram-multi": Method(
        label="CrAM+-Multi 50/70/90 %", flags=("--cram", "--cram-targets", "0.5,0.7,0.9"), passes=2
    ),
    "cram-multi-rho0": Method(
        label="CrAM+-Multi, rho 0",
        flags=("--cram", "--cram-targets", "0.5,0.7,0.9", "--cram-rho", "0"),
        passes=2,
    ),
    "cram-2:4": Method(label="CrAM+ 2:4", flags=("--cram", "--cram-targets", "2:4"), passes=2),
    "acdc": Method(label="AC/DC 90 %", flags=("--acdc",)),
}

WIRES = {"stock": (), "8-bit": ("--qsdp-bits", "8"), "4-bit": ("--qsdp-bits", "4")}
"""How weights and gradients travel; ``stock`` is FSDP2's own full precision."""

WIRE_METHODS = ("cram-multi", "acdc")
"""The methods that are trained over every wire."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its tokens, the methods to compare and the seeds to average over."""

    model: str
    bpe_tokens: int | None
    """Size of a BPE vocabulary trained on the training text; None for characters."""
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tuned: dict[str, tuple[str, ...]]
    """Flags of launch/train_gpt.py by method, chosen on the validation split.
    ``10%`` stands for a share of the steps.
    """
    lead: float
    """Nats by which CrAM+-Multi is to be ahead of AdamW at 80 and 90 %."""


PRESETS = {
    "nano": Preset(
        model="nano",
        bpe_tokens=None,
        methods=tuple(METHODS),
        seeds=(0, 1, 2),
        tuned={
            "adamw": ("--lr", "4e-3"),
            "sam": ("--lr", "4e-3"),
            **dict.fromkeys(("cram", "cram-plus", "cram-2:4"), ("--lr", "8e-3")),
            **dict.fromkeys(("cram-multi", "cram-multi-rho0", "gmp"), ("--lr", "8e-3")),
            "acdc": ("--lr", "8e-3", "--acdc-phase", "10%", "--acdc-last-sparse", "50%"),
        },
        lead=0.4,
    ),
    "larger": Preset(
        model="mini",
        bpe_tokens=2048,
        methods=("adamw", "gmp", "cram-plus", "cram-multi", "acdc"),
        seeds=(0,),
        tuned={
            **dict.fromkeys(("adamw", "gmp", "cram-plus", "cram-multi"), ("--lr", "2e-3")),
            "acdc": ("--acdc-phase", "10%", "--acdc-last-sparse", "50%", "--lr", "2e-3"),
        },
        lead=0.0,
    ),
}


def tuned_flags(preset: Preset, method: str, steps: int) -> list[str]:
    """The flags chosen for a training of so many steps."""
    flags = preset.tuned.get(method, ())
    return [str(round(float(f[:-1]) / 100 * steps)) if f.endswith("%") else f for f in flags]


def steps_of(method: str, steps: int) -> tuple[int, ...]:
    """The numbers of steps that a method is trained for.

    These are those of CrAM, and as many as cost the same.
    """
    passes = METHODS[method].passes
    return (steps,) if passes == 2 else (2 * steps, steps)
