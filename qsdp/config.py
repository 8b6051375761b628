"""What a user of the quantized wire chooses."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qsdp.common.rounding import Rounding
from qsdp.common.wire_company import MAX_DELTA_BUCKET, check_company
from qsdp.common.wire_values import Policy, bits_of_both, check_values, checked_policy

ROUNDINGS = tuple(rounding.label for rounding in Rounding)
LEVELS = ("uniform", "learned")
LEARNED_BITS = (2, 3, 4, 5, 6)
GATHERS = ("twice", "once", "delta")
GRAD_ROTATIONS = ("none", "hadamard")
REDUCES = {
    "auto": "two-hop where nodes are of one size",
    "flat": "one exchange among all ranks",
    "two-hop": "inside each node, then between nodes",
}
"""What ``QSDPConfig.reduce`` may be, and over which stages."""
DELTA_CODES = ("rank", "node")
CODED_BITS = tuple(range(2, 9))
LEVEL_STEPS = (10, 50, 200, 1000)


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

    weight_bucket_size: int | None = None
    """Values a bucket of coded weights: a multiple of 8, at most 128 if only changes are gathered.
    None: ``bucket_size``, or else what that says, and 128 for any bits if only changes are.
    """

    rounding: str | None = None
    """How values become codes: the label of a ``Rounding``, which has it in words.
    The report tells of a biased one. None: shift (the paper's) for 7 and 8 bits, dither below.
    Where changes are gathered, weights take dither unless it is nearest.
    """

    levels: str = "uniform"
    """``uniform``, or ``learned`` for parameters of 2 to 6 bits.
    Learned levels are fitted to each parameter's normalised values at ``level_steps`` (QSDP,
    section 5), apart for its gradients, for its whole weights and for those that a mask keeps, as
    each of them travels then. They round stochastically between neighbours; wider parameters keep
    the uniform grid, and so do all weights where changes are gathered.
    """

    level_steps: tuple[int, ...] | None = None
    """Steps of the keys' clock before which levels are learned anew.
    Until the first the grid is uniform. None: 10, 50, 200 and 1000.
    """

    grad_rotation: str = "none"
    """``none``, or ``hadamard`` for gradients of 2 to 6 bits, and all that a budget gives bits.
    A reduce adds up signed Hadamard transforms of their buckets, which are nearly normal and have
    few outliers, and transforms the sum back (SDP4Bit, arXiv 2410.15526). Exact zeros of a
    gradient are kept no more.
    """

    gather: str = "twice"
    """``twice``: the backward pass gathers again, and memory stays low.
    ``once``: the payload of the forward gather of modules in training mode is kept until the
    backward pass, and that of frozen parameters until their contents change, on whatever rank and
    by whatever edit.
    ``delta``: every rank keeps the packed codes of the whole model, on grids that last for many
    steps, and only codes that changed are sent, once a warm-up is over.
    """

    delta_room: float | None = None
    """Room on both sides of a grid that is kept, as a part of its range: above 0, at most 1.
    With more, fewer values leave their grids, which are coarser. None: 0.25.
    """

    delta_redraw_every: int | None = None
    """Steps for which a grid is kept, unless values leave it before. None: 200."""

    delta_codes: str | None = None
    """Where codes are kept. ``rank``: on every rank those of the whole model.
    ``node``: the ranks of a node keep them between them, and gather them from each other inside the
    node in each forward and backward pass. It takes several nodes of several ranks. None: rank.
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

    grad_budget: float | None = None
    """``budget`` of gradients alone: all weights keep their bits. Not beside ``budget``."""

    seed: int = 0
    """The seed of every random number of the wire, 0 to 2**63 - 1; the same on all ranks."""

    policy: Policy = ()
    """Pairs (pattern, bits) or (pattern, (weight bits, gradient bits)).
    The first shell-style pattern to match a parameter's full name sets its bits: only what cannot
    be coded goes first.
    """

    def __post_init__(self) -> None:
        choices = {"levels": LEVELS, "gather": GATHERS, "reduce": tuple(REDUCES)}
        choices["grad_rotation"] = GRAD_ROTATIONS
        choices |= {"rounding": ROUNDINGS} if self.rounding is not None else {}
        choices |= {"delta_codes": DELTA_CODES} if self.delta_codes is not None else {}
        check_values(vars(self), choices)
        if self.level_steps is not None:
            object.__setattr__(self, "level_steps", tuple(sorted(set(self.level_steps))))
        object.__setattr__(self, "policy", checked_policy(self.policy))
        check_company(vars(self))
        self._check_widths()

    def _check_widths(self) -> None:
        """Raise ValueError for a field that is for widths that no value has."""
        weights, grads = ({*column} for column in zip(*self._pairs, strict=True))
        has_narrow = self.has_budget or bool(grads & {*LEARNED_BITS})
        if self.reduce != "flat" and min(grads) <= 8:
            grads.add(self.local_grad_bits or 8)
        first = weights | grads
        # A budget is allotted after the warm-up, so that it waits for the end of one.
        is_allotted, least = self.has_budget, self.least_warmup_bits
        is_learned, is_delta = self.levels == "learned", self.gather == "delta"
        # What may have learned levels, and what the rounding is for beside those.
        sent, whose = (grads, "gradients") if is_delta else (first, "values")
        warmed = {max(bits, least) for bits in sent} if self.warmup_steps else set()
        allotted = CODED_BITS if is_allotted and min(sent) <= 8 else ()
        sent = {*sent, *warmed, *allotted}
        is_coded, is_raised = self.has_codes, min(first) < least
        has_weights, has_grads = (
            self.budget_of(is_grad=is_grad) is not None or min(bits) <= 8
            for is_grad, bits in ((False, weights), (True, grads))
        )
        is_rotated = self.grad_rotation != "none"
        own = None if self.rounding == self.rounding_of(2, is_grad=True) else self.rounding
        of_grads = self.rounding if is_delta else None
        of_grads = None if of_grads == self.rounding_of(2, is_grad=False) else of_grads
        size_of_grads = None if self.weight_bucket_size is None else self.bucket_size
        narrow, below = "values of 8 bits or fewer", f"values of fewer than {least} bits"
        narrow_weights, narrow_grads = "weights of 8 bits or fewer", "gradients of 8 bits or fewer"
        for name, value, wanted, is_heeded in (
            ("gather='delta'", is_delta or None, narrow_weights, has_weights),
            ("bucket_size", self.bucket_size, narrow, is_coded),
            ("bucket_size", size_of_grads, narrow_grads, has_grads),
            ("weight_bucket_size", self.weight_bucket_size, narrow_weights, has_weights),
            ("rounding", self.rounding, narrow, is_coded),
            ("rounding", of_grads, narrow_grads, has_grads),
            ("rounding", own, f"{whose} of 7 or 8 bits beside learned levels", bool(sent & {7, 8})),
            ("levels", is_learned or None, f"{whose} of 2 to 6 bits", bool(sent & {*LEARNED_BITS})),
            ("grad_rotation", is_rotated or None, "gradients of 2 to 6 bits", has_narrow),
            ("warmup_bits", self.warmup_bits, below, is_raised),
            ("warmup_steps", self.warmup_steps or None, below, is_raised or is_allotted),
            ("local_grad_bits", self.local_grad_bits, narrow_grads, has_grads),
        ):
            if value is not None and not is_heeded:
                raise ValueError(
                    f"{name} is for {wanted}, but there are none: choose other bits, or leave it "
                    "out."
                )

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """Weight and gradient bits that parameters may have before a budget gives them others."""
        by_policy = [bits_of_both(bits) for _, bits in self.policy]
        if any(pattern == "*" for pattern, _ in self.policy):
            return by_policy
        return [*by_policy, *(self._bits_by_kind(is_embedding) for is_embedding in (False, True))]

    @property
    def has_codes(self) -> bool:
        """Whether any value may travel at 8 bits or fewer."""
        return self.has_budget or min(map(min, self._pairs)) <= 8

    @property
    def has_budget(self) -> bool:
        """Whether a budget gives gradients their bits, and perhaps weights."""
        return self.budget_of(is_grad=True) is not None

    def budget_of(self, *, is_grad: bool) -> float | None:
        """The budget of coded weights, or of gradients; None where none gives them bits."""
        return self.grad_budget if is_grad and self.budget is None else self.budget

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

    @property
    def room(self) -> float:
        """Room on both sides of a grid that is kept, as a part of its range."""
        return 0.25 if self.delta_room is None else float(self.delta_room)

    @property
    def redraw_every(self) -> int:
        """Steps for which a grid is kept."""
        return 200 if self.delta_redraw_every is None else self.delta_redraw_every

    def bucket_of(self, bits: int, *, is_grad: bool) -> int:
        """Values a bucket of ``bits``-bit codes of weights, or of gradients."""
        if not is_grad and self.weight_bucket_size is not None:
            return self.weight_bucket_size
        if self.bucket_size is not None:
            return self.bucket_size
        if not is_grad and self.gather == "delta":
            return MAX_DELTA_BUCKET
        if bits >= 7:
            return 1024
        return 256 if is_grad else 128

    def has_levels(self, bits: int, *, is_grad: bool) -> bool:
        """Whether levels are learned for ``bits``-bit codes of weights, or of gradients."""
        is_uniform = self.levels == "uniform" or (not is_grad and self.gather == "delta")
        return not is_uniform and bits in LEARNED_BITS

    def rounding_of(self, bits: int, *, is_grad: bool) -> str:
        """How values are rounded to ``bits``-bit codes of weights, or of gradients."""
        given = self.rounding
        if not is_grad and self.gather == "delta":
            if given is None or not Rounding.of(given).properties.keeps_grids:
                return Rounding.DITHER.label
            return given
        if self.has_levels(bits, is_grad=is_grad):
            if given is None or not Rounding.of(given).properties.has_levels:
                return Rounding.STOCHASTIC.label
        elif given is None:
            return Rounding.SHIFT.label if bits >= 7 else Rounding.DITHER.label
        return given

    def rotates(self, grad_bits: int, *, keeps_bits: bool) -> bool:
        """Whether gradients of ``grad_bits`` are rotated; ``keeps_bits``: no budget changes them.

        Where a budget may, they are at any bits: it measures errors of what is sent.
        """
        widest = max(LEARNED_BITS if keeps_bits or not self.has_budget else CODED_BITS)
        return self.grad_rotation != "none" and grad_bits <= widest

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
                return bits_of_both(bits)
        return None
