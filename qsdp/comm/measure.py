"""What quantization costs: squared errors by parameter, and bits allotted by them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import compat
from qsdp.codec.payload import DType, Field, Layout, Segment
from qsdp.comm.levels import offset
from qsdp.config import CODED_BITS, ROUNDINGS, QSDPConfig


class Meter:
    """Adds up, for each parameter and direction, the squares of values and of their errors.

    Args:
        config: buckets and roundings.
        levels: the learned levels, if any.
        bits: for which bits to measure; None: those that the values travel at.
    """

    def __init__(
        self, config: QSDPConfig, levels: Tensor | None, bits: Sequence[int] | None = None
    ) -> None:
        self._config, self._levels, self._bits = config, levels, bits
        self._sums: dict[tuple[int, bool, int], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add_values(self, row: list[int], values: Tensor, *, is_grad: bool) -> None:
        """Measure the 1-D ``values`` of one table row's segment; raw ones have no error."""
        if not row[Field.BITS]:
            return
        for bits in self._bits or [row[Field.BITS]]:
            error, square = self._measure(values.float(), row, bits, is_grad)
            sums = self._sums[row[Field.PARAMETER], is_grad, bits if self._bits else 0]
            sums[0] += error
            sums[1] += square

    def totals(
        self, keys: Iterable[tuple[int, bool, int]], groups: Iterable[dist.ProcessGroup]
    ) -> Tensor:
        """fp64 [keys, 2] on the CPU: errors and squares over all ranks, added in rank order over
        one of ``groups`` after the other. A collective.

        A key is (parameter, is a gradient, bits), bits being 0 for those that the values travel at.
        """
        rows = [self._sums.get(key, [0.0, 0.0]) for key in keys]
        total = torch.tensor(rows, dtype=torch.float64).view(-1)
        for group in groups:
            mine = total.to(compat.device_of(group))
            everyone = mine.new_empty(group.size() * mine.numel())
            compat.all_gather(everyone, mine, group)
            total = torch.zeros_like(total)
            for part in everyone.cpu().view(group.size(), -1):
                total += part
        return total.view(-1, 2)

    def _measure(
        self, values: Tensor, row: list[int], bits: int, is_grad: bool
    ) -> tuple[float, float]:
        segment = Segment(
            bits=bits,
            dtype=DType.FP32,
            padded=values.numel(),
            parameter=row[Field.PARAMETER],
            bucket=self._config.bucket_of(bits, is_grad=is_grad),
            rounding=ROUNDINGS.index(self._config.rounding_of(bits)),
            levels=offset(self._config, row[Field.PARAMETER], bits, is_grad=is_grad),
        )
        layout = Layout([segment], row[Field.GROUP])
        table = torch.tensor(layout.table([values.numel()]))
        payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=values.device)
        decoded = torch.empty_like(values)
        given = values.contiguous().view(torch.uint8)
        torch.ops.qsdp.encode(given, table, 0, layout.header(0, 0), payload, self._levels)
        torch.ops.qsdp.decode(payload, table, 0, decoded.view(torch.uint8), levels=self._levels)
        return float((decoded - values).double().square().sum()), float(
            values.double().square().sum()
        )


def allot(
    numels: Sequence[int],
    errors: Sequence[Sequence[float]],
    budget: float,
    config: QSDPConfig,
    *,
    is_grad: bool,
) -> list[int]:
    """Bits for each parameter so that the sum of squared errors is least within the budget.

    From 2 bits each, the parameter whose error falls most for a bit of payload gets one bit more,
    as long as all payloads, bucket metadata included, stay within ``budget`` bits a value.

    Args:
        numels: values of each parameter.
        errors: ``errors[i][b]``: squared error of parameter i at CODED_BITS[b].
        budget: bits a value on average.
        is_grad: whether it is their gradients.

    Raises ValueError where not even 2 bits fit.
    """

    def size(place: int, bits: int) -> int:
        numel = numels[place]
        buckets = -(-numel // config.bucket_of(bits, is_grad=is_grad))
        return bits * numel + 64 * buckets

    left = budget * sum(numels)
    bits = [CODED_BITS[0]] * len(numels)
    left -= sum(size(i, b) for i, b in enumerate(bits))
    if left < 0:
        raise ValueError(
            f"the budget of {budget:g} bits a value is less than 2 bits and their buckets' metadata"
            " take; raise it or the bucket size"
        )
    while True:
        best, gain = None, 0.0
        for i, own in enumerate(bits):
            if own == CODED_BITS[-1]:
                continue
            cost = size(i, own + 1) - size(i, own)
            place = CODED_BITS.index(own)
            saved = errors[i][place] - errors[i][place + 1]
            if cost <= left and saved / max(cost, 1) > gain:
                best, gain = i, saved / max(cost, 1)
        if best is None:
            return bits
        left -= size(best, bits[best] + 1) - size(best, bits[best])
        bits[best] += 1
