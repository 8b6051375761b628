"""What quantization costs: squared errors by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import Field
from qsdp.comm.learned_levels import LevelKind, levels_offset
from qsdp.common.dtypes import DType
from qsdp.common.gpu_streams import reads_on_this_stream
from qsdp.common.rounding import Rounding
from qsdp.compat.process_groups import control_device
from qsdp.compat.torch_collectives import all_gather_single
from qsdp.config import QSDPConfig


class Meter:
    """Measures quantization errors: adds up squares for each parameter and direction.

    The squares are those of values and of their errors. Values are decoded as the wire does:
    weights into their own type, gradients into fp32.

    Args:
        config: Buckets and roundings.
        levels: The learned levels, if any.
        bits: The bits for which to measure; None: those that the values travel at.
    """

    def __init__(
        self, config: QSDPConfig, levels: Tensor | None, bits: Sequence[int] | None = None
    ) -> None:
        self._config, self._levels, self._bits = config, levels, bits
        # fp64 [2] each, error and square: on the values' device, so that the host need not wait.
        self._sums: dict[tuple[int, bool, int], Tensor] = {}

    def add_values(self, row: list[int], values: Tensor, kind: LevelKind) -> None:
        """Measure the 1-D ``values`` of one table row's segment, if they are coded."""
        if not row[Field.BITS]:
            return
        for bits in self._bits or [row[Field.BITS]]:
            found = self._measure(values, row, bits, kind)
            key = (row[Field.PARAMETER], kind == LevelKind.GRAD, bits if self._bits else 0)
            if key in self._sums:
                reads_on_this_stream(self._sums[key])  # of a reduce; replicas have another stream
                found = self._sums[key] + found
            self._sums[key] = found

    def add_decoded(self, parameter: int, values: Tensor, decoded: Tensor) -> None:
        """Measure a parameter's 1-D weights against what they are ``decoded`` to elsewhere."""
        key = (parameter, False, 0)
        found = _squares(values.float(), decoded)
        self._sums[key] = self._sums[key] + found if key in self._sums else found

    def copy(self) -> Meter:
        """Another one that has seen the same."""
        other = Meter(self._config, self._levels, self._bits)
        other._sums = dict(self._sums)
        return other

    def totals(
        self, keys: Iterable[tuple[int, bool, int]], groups: Iterable[dist.ProcessGroup]
    ) -> Tensor:
        """fp64 [keys, 2] on the CPU: errors and squares over all ranks. A collective.

        They are added in rank order over one of ``groups`` after the other. A key is (parameter, is
        a gradient, bits), where bits are 0 for those that the values travel at.
        """
        device = next((sums.device for sums in self._sums.values()), None)
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        total = torch.cat([nothing[:0], *(self._sums.get(key, nothing) for key in keys)]).cpu()
        for group in groups:
            mine = total.to(control_device(group))
            everyone = mine.new_empty(group.size() * mine.numel())
            all_gather_single(everyone, mine, group)
            total = torch.zeros_like(total)
            for part in everyone.cpu().view(group.size(), -1):
                total += part
        return total.view(-1, 2)

    def relative(
        self, parameters: Sequence[int], groups: Iterable[dist.ProcessGroup], *, is_grad: bool
    ) -> list[float | None]:
        """The relative errors of ``parameters``, at the bits that they travel at. A collective.

        None where nothing was measured. The ``groups`` are those of ``totals``.
        """
        totals = self.totals([(each, is_grad, 0) for each in parameters], groups).tolist()
        return [(error / square) ** 0.5 if square else None for error, square in totals]

    def _measure(self, values: Tensor, row: list[int], bits: int, kind: LevelKind) -> Tensor:
        is_grad = kind == LevelKind.GRAD
        segment = Segment(
            bits=bits,
            dtype=DType(row[Field.DTYPE]),
            padded=values.numel(),
            parameter=row[Field.PARAMETER],
            bucket=self._config.bucket_of(bits, is_grad=is_grad),
            rounding=Rounding.of(self._config.rounding_of(bits, is_grad=is_grad)),
            levels=levels_offset(self._config, row[Field.PARAMETER], bits, kind),
        )
        layout = Layout([segment], row[Field.GROUP])
        encode, decode = (
            torch.tensor(layout.table([values.numel()], dtype))
            for dtype in (None, DType.FP32 if is_grad else None)
        )
        payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=values.device)
        decoded = torch.empty_like(values, dtype=torch.float32 if is_grad else None)
        given = values.contiguous().view(torch.uint8)
        ops.encode(given, encode, 0, layout.header(0, 0), payload, self._levels)
        ops.decode(payload, decode, 0, decoded.view(torch.uint8), levels=self._levels)
        return _squares(values.float(), decoded)


def _squares(exact: Tensor, decoded: Tensor) -> Tensor:
    """fp64 [2]: the squares of the error and of what is exact."""
    error, square = (part.double().square().sum() for part in (decoded.float() - exact, exact))
    return torch.stack([error, square])
