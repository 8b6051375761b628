"""What a user of the quantized wire chooses."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qsdp.common.rounding import Rounding

ROUNDINGS = tuple(rounding.label for rounding in Rounding)
LEVELS = ("uniform", "learned")
LEARNED_BITS = (2, 3, 4, 5, 6)
GATHERS = ("twice", "once")
REDUCES = {
    "auto": "two-hop where nodes are of one size",
    "flat": "one exchange among all ranks",
    "two-hop": "inside each node, then between nodes",
}
"""What ``QSDPConfig.reduce`` may be, and over which stages."""
CODED_BITS = tuple(range(2, 9))
WIRE_BITS = (*CODED_BITS, 16, 32)
MAX_BUCKET_SIZE = 1 << 20
LEVEL_STEPS = (10, 50, 200, 1000)


def check_config_bits(name: str, bits: object) -> None:
    """Raise ValueError unless ``bits`` is a width that a ``QSDPConfig`` can have."""
    if type(bits) is not int or bits not in WIRE_BITS:
        raise ValueError(f"{name} is {bits!r}: choose 2 to 8, 16 (bf16) or 32 (full precision).")


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value < 1 << 63:
        raise ValueError(f"{name} holds {value!r}: choose whole numbers from {least} on.")


@dataclass(frozen=True, kw_only=True)
class QSDPConfig:
    """How weights and gradients cross the wire (QSDP, arXiv 2302.02390).

    Raises ValueError, in one sentence that begins with the field's name, for a value that cannot be
    and for one that nothing would heed beside the others.
    """

    weight_bits: int = 8
    """Bits a weight in the all-gather: 2 to 8; 16 sends fp32 as bf16, 32 the values as they are."""

    grad_bits: int = 8
    """Bits a gradient value in the reduce-scatter: 2 to 8, 16 or 32 as above."""

    embedding_bits: int | None = None
    """Bits of embeddings and of the output head, both ways: few values, whose errors cost most.
    None takes ``weight_bits`` and ``grad_bits``, but at least 8.
    """

    local_grad_bits: int | None = None
    """Bits a coded gradient value inside a node, in the first hop of a two-hop reduce.
    None is 8: links inside a node are fast. Not with a flat reduce.
    """

    bucket_size: int | None = None
    """Values that share one (min, scale) pair: a multiple of 8.
    Smaller is more exact and costs 8 bytes a bucket. None: 1024 for 7 and 8 bits; below, 128 for
    weights and 256 for gradients.
    """

    rounding: str | None = None
    """How values become codes: the label of a ``Rounding``, which has it in words.
    The report tells of a biased one. None: shift (the paper's) for 7 and 8 bits, dither below.
    """

    levels: str = "uniform"
    """``uniform``, or ``learned`` for parameters of 2 to 6 bits.
    Learned levels are fitted to each parameter's normalised values at ``level_steps`` (QSDP,
    section 5), apart for its gradients, for its whole weights and for those that a mask keeps, as
    each of them travels then. They round stochastically between neighbours; wider parameters keep
    the uniform grid.
    """

    level_steps: tuple[int, ...] | None = None
    """Steps of the keys' clock before which levels are learned anew.
    Until the first the grid is uniform. None: 10, 50, 200 and 1000.
    """

    gather: str = "twice"
    """``twice``: the backward pass gathers again, and memory stays low.
    ``once``: the payload of the forward gather of modules in training mode is kept until the
    backward pass, and that of frozen parameters until their contents change, on whatever rank and
    by whatever edit.
    """

    reduce: str = "auto"
    """Over which stages ranks exchange, a name in ``REDUCES``.
    Gathers follow suit, so that each shard comes to a node once. All are flat unless there are
    several nodes of several ranks each.
    """

    ranks_per_node: int | None = None
    """Ranks of one node, consecutive ones, also for the counters of bytes.
    None: the launcher's LOCAL_WORLD_SIZE, or 1.
    """

    warmup_steps: int = 0
    """First steps of the keys' clock during which no fewer than ``warmup_bits`` are sent.
    Frozen weights that are gathered once are left out.
    """

    warmup_bits: int | None = None
    """Least bits a value during the warm-up: 2 to 8, 16 or 32. None: 32."""

    budget: float | None = None
    """Bits a coded value at most on average, of weights and of gradients.
    Padding and metadata are included; pruned values count. Each parameter is given 2 to 8 bits so
    that the measured squared error is least; the measure is taken in the first step after the
    warm-up, which travels at ``weight_bits`` and ``grad_bits``, or the first after it whose errors
    are finite. Parameters keep the bits that ``policy``, or an ``embedding_bits`` that is not None,
    gives them: if these are coded they count, and the others share what is left. None: no
    allocation.
    """

    seed: int = 0
    """The seed of every random number of the wire, 0 to 2**63 - 1; the same on all ranks."""

    policy: tuple[tuple[str, int | tuple[int, int]], ...] = ()
    """Pairs (pattern, bits) or (pattern, (weight bits, gradient bits)).
    The first shell-style pattern to match a parameter's full name sets its bits: only what cannot
    be coded goes first.
    """

    def __post_init__(self) -> None:
        for name in ("weight_bits", "grad_bits"):
            check_config_bits(name, getattr(self, name))
        for name in ("embedding_bits", "local_grad_bits", "warmup_bits"):
            if getattr(self, name) is not None:
                check_config_bits(name, getattr(self, name))
        size = self.bucket_size
        if size is not None and (
            type(size) is not int or size % 8 or not 8 <= size <= MAX_BUCKET_SIZE
        ):
            raise ValueError(
                f"bucket_size is {size!r}: choose a multiple of 8 between 8 and {MAX_BUCKET_SIZE}."
            )
        choices = {"levels": LEVELS, "gather": GATHERS, "reduce": tuple(REDUCES)}
        if self.rounding is not None:
            choices["rounding"] = ROUNDINGS
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")
        if self.ranks_per_node is not None:
            _check_whole("ranks_per_node", self.ranks_per_node, least=1)
        _check_whole("warmup_steps", self.warmup_steps, least=0)
        if self.level_steps is not None:
            if not isinstance(self.level_steps, list | tuple) or not self.level_steps:
                raise ValueError(f"level_steps is {self.level_steps!r}: give steps from 1 on.")
            for step in self.level_steps:
                _check_whole("level_steps", step, least=1)
            object.__setattr__(self, "level_steps", tuple(sorted(set(self.level_steps))))
        if self.budget is not None and not (
            isinstance(self.budget, int | float) and 2 < self.budget <= 9
        ):
            raise ValueError(f"budget is {self.budget!r}: choose more than 2 and at most 9 bits.")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed!r}: choose an integer from 0 to 2**63 - 1.")
        if not isinstance(self.policy, list | tuple):
            raise ValueError(f"policy is {self.policy!r}: give pairs (name pattern, bits).")
        policy = []
        for pair in self.policy:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
                raise ValueError(f"policy holds {pair!r}: give pairs (name pattern, bits).")
            name, bits = pair
            both = tuple(bits) if isinstance(bits, list | tuple) else (bits, bits)
            if len(both) != 2:
                raise ValueError(f"policy for {name!r} is {bits!r}: give bits, or two of them.")
            for each in both:
                check_config_bits(f"policy for {name!r}", each)
            policy.append((name, both if isinstance(bits, list | tuple) else bits))
        object.__setattr__(self, "policy", tuple(policy))
        self._check_company()
        self._check_widths()

    def _check_company(self) -> None:
        """Raise ValueError for a field that another one's value leaves without effect."""
        for name, is_heeded, needed in (
            ("level_steps", self.levels == "learned", "levels='learned'"),
            ("warmup_bits", self.warmup_steps > 0, "warmup_steps=N"),
            ("local_grad_bits", self.reduce != "flat", "reduce='two-hop'"),
        ):
            if getattr(self, name) is not None and not is_heeded:
                raise ValueError(
                    f"{name} is given without {needed}, so that nothing would heed it: add that, "
                    "or leave it out."
                )
        if self.embedding_bits is not None and any(name == "*" for name, _ in self.policy):
            raise ValueError(
                "embedding_bits is given beside a policy for '*', which is for embeddings too: "
                "leave one of the two out."
            )

    def _check_widths(self) -> None:
        """Raise ValueError for a field that is for widths that no value has."""
        grads = {grad for _, grad in self._pairs}
        first = {weight for weight, _ in self._pairs} | grads
        if self.reduce != "flat" and min(grads) <= 8:
            first.add(self.local_grad_bits or 8)
        # A budget is allotted after the warm-up, so that it waits for the end of one.
        is_allotted, least = self.budget is not None, self.least_warmup_bits
        sent = {*first, *(CODED_BITS if is_allotted else ())}
        if self.warmup_steps:
            sent |= {max(bits, least) for bits in first}
        is_coded, is_raised = self.has_codes, min(first) < least
        is_learned = self.levels == "learned"
        own = None if self.rounding == self.rounding_of(LEARNED_BITS[0]) else self.rounding
        narrow, below = "values of 8 bits or fewer", f"values of fewer than {least} bits"
        for name, value, wanted, is_heeded in (
            ("bucket_size", self.bucket_size, narrow, is_coded),
            ("rounding", self.rounding, narrow, is_coded),
            ("rounding", own, "values of 7 or 8 bits beside learned levels", bool(sent & {7, 8})),
            ("levels", is_learned or None, "values of 2 to 6 bits", bool(sent & {*LEARNED_BITS})),
            ("warmup_bits", self.warmup_bits, below, is_raised),
            ("warmup_steps", self.warmup_steps or None, below, is_raised or is_allotted),
            (
                "local_grad_bits",
                self.local_grad_bits,
                "gradients of 8 bits or fewer",
                is_allotted or min(grads) <= 8,
            ),
        ):
            if value is not None and not is_heeded:
                raise ValueError(
                    f"{name} is for {wanted}, but there are none: choose other bits, or leave it "
                    "out."
                )

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """Weight and gradient bits that parameters may have before a budget gives them others."""
        by_policy = [config_bits(bits) for _, bits in self.policy]
        if any(pattern == "*" for pattern, _ in self.policy):
            return by_policy
        return [*by_policy, *(self._bits_by_kind(is_embedding) for is_embedding in (False, True))]

    @property
    def has_codes(self) -> bool:
        """Whether any value may travel at 8 bits or fewer."""
        return self.budget is not None or min(map(min, self._pairs)) <= 8

    @property
    def needs_nodes(self) -> bool:
        """Whether ranks must fill nodes as ``reduce`` says; ``auto`` is flat if they do not."""
        return self.reduce not in ("auto", "flat")

    @property
    def learning_steps(self) -> tuple[int, ...]:
        """Steps before which levels are learned, where they are."""
        return LEVEL_STEPS if self.level_steps is None else self.level_steps

    @property
    def least_warmup_bits(self) -> int:
        """Least bits a value during the warm-up, where there is one."""
        return 32 if self.warmup_bits is None else self.warmup_bits

    def bucket_of(self, bits: int, *, is_grad: bool) -> int:
        """Values a bucket of ``bits``-bit codes of weights, or of gradients."""
        if self.bucket_size is not None:
            return self.bucket_size
        if bits >= 7:
            return 1024
        return 256 if is_grad else 128

    def rounding_of(self, bits: int) -> str:
        """How values are rounded to ``bits``-bit codes."""
        given = self.rounding
        if self.levels == "learned" and bits in LEARNED_BITS:
            if given is None or not Rounding.of(given).properties.has_levels:
                return Rounding.STOCHASTIC.label
        elif given is None:
            return Rounding.SHIFT.label if bits >= 7 else Rounding.DITHER.label
        return given

    def bits_of(self, name: str, is_embedding: bool) -> tuple[int, int]:
        """Weight and gradient bits of a parameter ``name`` that can be coded."""
        return self.bits_by_policy(name) or self._bits_by_kind(is_embedding)

    def _bits_by_kind(self, is_embedding: bool) -> tuple[int, int]:
        """Weight and gradient bits of parameters that no policy names."""
        if not is_embedding:
            return self.weight_bits, self.grad_bits
        if self.embedding_bits is not None:
            return self.embedding_bits, self.embedding_bits
        return max(self.weight_bits, 8), max(self.grad_bits, 8)

    def keeps_bits(self, name: str, is_embedding: bool) -> bool:
        """Whether a parameter's bits were chosen for it, so that a budget leaves them."""
        by_embedding_bits = is_embedding and self.embedding_bits is not None
        return by_embedding_bits or self.bits_by_policy(name) is not None

    def bits_by_policy(self, name: str) -> tuple[int, int] | None:
        """Weight and gradient bits that the first matching pattern gives to ``name``, if any."""
        for pattern, bits in self.policy:
            if fnmatchcase(name, pattern):
                return config_bits(bits)
        return None


def config_bits(bits: int | tuple[int, int]) -> tuple[int, int]:
    """Weight and gradient bits of what a ``QSDPConfig`` has: one number for both, or two."""
    return bits if isinstance(bits, tuple) else (bits, bits)
