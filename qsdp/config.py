"""What a user of the quantized wire chooses."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

ROUNDINGS = ("shift", "dither", "stochastic", "nearest")
CODED_BITS = tuple(range(2, 9))
WIRE_BITS = (*CODED_BITS, 16, 32)
MAX_BUCKET_SIZE = 1 << 20


def check_bits(name: str, bits: object) -> None:
    """Raise ValueError unless ``bits`` is a width that the wire knows."""
    if type(bits) is not int or bits not in WIRE_BITS:
        raise ValueError(f"{name} is {bits!r}; choose 2 to 8, 16 (bf16) or 32 (full precision)")


@dataclass(frozen=True, kw_only=True)
class QSDPConfig:
    """How weights and gradients cross the wire (QSDP, arXiv 2302.02390)."""

    weight_bits: int = 8
    """Bits a weight in the all-gather: 2 to 8, 16 sends bf16, 32 sends the values as they are."""

    grad_bits: int = 8
    """Bits a gradient value in the reduce-scatter: 2 to 8, 16 or 32 as above."""

    bucket_size: int = 1024
    """Values that share one (min, scale) pair: a multiple of 8. Smaller is more exact and costs
    8 bytes a bucket."""

    rounding: str = "shift"
    """`shift` (the paper's, one random shift a bucket), `dither` (one a value), `stochastic`
    (coin flip) or `nearest` (biased: the report says so)."""

    seed: int = 0
    """Seeds every random number of the wire, 0 to 2**63 - 1; the same on all ranks."""

    policy: tuple[tuple[str, int], ...] = ()
    """Pairs (pattern, bits): the first shell-style pattern that matches a parameter's full name
    sets its bits for weights and gradients. Wins over everything but what cannot be coded."""

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("grad_bits", self.grad_bits)
        size = self.bucket_size
        if type(size) is not int or size % 8 or not 8 <= size <= MAX_BUCKET_SIZE:
            raise ValueError(
                f"bucket_size is {size!r}; choose a multiple of 8 between 8 and {MAX_BUCKET_SIZE}"
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed!r}; choose an integer from 0 to 2**63 - 1")
        if not isinstance(self.policy, list | tuple):
            raise ValueError(f"policy is {self.policy!r}; give pairs (name pattern, bits)")
        for pair in self.policy:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
                raise ValueError(f"policy holds {pair!r}; give pairs (name pattern, bits)")
            check_bits(f"policy for {pair[0]!r}", pair[1])
        object.__setattr__(self, "policy", tuple((name, bits) for name, bits in self.policy))

    def bits_by_policy(self, name: str) -> int | None:
        """Bits that the first matching policy pattern gives to parameter ``name``, if any."""
        return next((bits for pattern, bits in self.policy if fnmatchcase(name, pattern)), None)
