"""The segment table of a codec call: its columns, a row with names, and what is checked of it."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from qsdp.codec.payload import EPOCH_BYTES, HEADER_BYTES, META_BYTES
from qsdp.codec.random_numbers import uniform
from qsdp.common.dtypes import ITEM_BYTES, TORCH_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.config import LEARNED_BITS, MAX_DELTA_BUCKET

_NO_BUFFER = 1 << 62  # bytes: more than any row can ask for


class Field(IntEnum):
    """Columns of the int64 segment table that one codec call works through."""

    BITS = 0  # 2 to 8: coded; 0: raw
    DTYPE = 1  # of the flat buffer's elements
    WIRE = 2  # dtype of a raw segment on the wire
    BUFFER_BYTE = 3  # where the segment starts in the flat buffer
    NUMEL = 4  # valid values
    PADDED = 5  # values that the buffer reserves; decode zeroes the rest
    BUCKET = 6  # values a bucket
    ROUNDING = 7  # a ``Rounding``
    META_BYTE = 8  # where the bucket metadata starts in the payload
    DATA_BYTE = 9  # where codes or raw values start in the payload
    PARAMETER = 10  # third counter word of the generator
    GROUP = 11  # fourth counter word of the generator
    LEVELS = 12  # where the segment's 2**bits learned levels start, in floats; -1: a uniform grid
    EPOCH_BYTE = 13  # where the buckets' epochs start in the payload; -1: there are none


class Part(IntEnum):
    """Columns of the int64 parts that say which segment table each payload of a call is for."""

    KEY = 0  # the folded ``RandomKey``
    TABLE = 1  # which of the segment tables
    BUFFER = 2  # which row of the buffers
    PAYLOAD = 3  # which row of the payloads
    ADD = 4  # decode: 1 adds to what the buffer holds, 0 overwrites it; encode: 0


def check_table(
    buffer: Tensor | None,
    table: Tensor,
    payload: Tensor,
    levels: Tensor | None = None,
    add: bool = False,
) -> None:
    """Raise ValueError unless the segment table of ``encode`` or ``decode`` fits what is beside it.

    ``buffer`` is None where a call has no part in one.
    What the levels hold is not looked at: a codec call is safe whatever it is.
    """
    for name, tensor in (("buffer", buffer), ("payload", payload)):
        if tensor is not None and not _is_bytes(tensor, 1):
            raise ValueError(
                f"the {name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                "give a contiguous 1-D uint8 view."
            )
    if table.dtype != torch.int64 or table.device.type != "cpu" or table.dim() != 2:
        raise ValueError(
            f"the table is {table.dtype} on {table.device}: give int64 rows on the cpu."
        )
    _check_sizes(table, payload, levels)
    _check_rows(table, _NO_BUFFER if buffer is None else buffer.numel(), payload.numel(), levels)
    if add:
        _check_adds(table)


def check_tables(
    buffers: Tensor,
    tables: Tensor,
    parts: Tensor,
    payloads: Tensor,
    levels: Tensor | None = None,
    *,
    may_add: bool,
) -> None:
    """Raise ValueError unless the segment tables of ``encode_all`` or ``decode_all`` fit the rest.

    Only what may add has parts that do. All tables are checked, each once.
    """
    for name, tensor in (("buffers", buffers), ("payloads", payloads)):
        if not _is_bytes(tensor, 2):
            raise ValueError(
                f"the {name} are {tensor.dtype} of shape {tuple(tensor.shape)}: "
                "give contiguous 2-D uint8 rows."
            )
    if tables.dtype != torch.int64 or tables.device.type != "cpu" or tables.dim() != 3:
        raise ValueError(
            f"the tables are {tables.dtype} of shape {tuple(tables.shape)} on {tables.device}: "
            f"give int64 [kinds, segments, {len(Field)}] on the cpu."
        )
    if (parts.dtype, parts.device.type, parts.dim()) != (torch.int64, "cpu", 2):
        raise ValueError(
            f"the parts are {parts.dtype} of shape {tuple(parts.shape)} on {parts.device}: "
            f"give int64 [parts, {len(Part)}] on the cpu."
        )
    if parts.shape[1] != len(Part):
        raise ValueError(f"the parts have {parts.shape[1]} columns: give {len(Part)}.")
    _check_sizes(tables, payloads, levels)
    for table in tables:
        _check_rows(table, buffers.shape[1], payloads.shape[1], levels)
    counts = {Part.TABLE: tables, Part.BUFFER: buffers, Part.PAYLOAD: payloads}
    for part in parts.tolist():
        for column, of in counts.items():
            if not 0 <= part[column] < len(of):
                raise ValueError(
                    f"a part names {column.name.lower()} {part[column]} of {len(of)}: give one "
                    "that is there, counted from 0."
                )
        if part[Part.ADD] not in (0, may_add):
            allowed = "0 or 1" if may_add else "0, since nothing adds to a payload"
            raise ValueError(f"a part has {Part.ADD.name} {part[Part.ADD]}: give {allowed}.")
    for kind in parts[parts[:, Part.ADD] == 1, Part.TABLE].unique():
        _check_adds(tables[kind])


def _is_bytes(tensor: Tensor, dim: int) -> bool:
    return tensor.dtype == torch.uint8 and tensor.dim() == dim and tensor.is_contiguous()


def _check_sizes(table: Tensor, payload: Tensor, levels: Tensor | None) -> None:
    """Check the sizes of one table and payload, or of several: of their last dimension."""
    if table.shape[-1] != len(Field):
        raise ValueError(f"the table has {table.shape[-1]} columns: give {len(Field)}.")
    if payload.shape[-1] < HEADER_BYTES:
        raise ValueError(
            f"the payload has {payload.shape[-1]} bytes: give the 32 of a header or more."
        )
    if levels is not None and (
        levels.dtype != torch.float32
        or levels.device.type != "cpu"
        or levels.dim() != 1
        or not levels.is_contiguous()
    ):
        raise ValueError(
            f"the levels are {levels.dtype} of shape {tuple(levels.shape)} on {levels.device}: "
            "give a contiguous 1-D fp32 tensor on the cpu."
        )


def _check_rows(
    table: Tensor, buffer_bytes: int, payload_bytes: int, levels: Tensor | None
) -> None:
    for row in table.tolist():
        for field in (Field.DTYPE, Field.WIRE):
            if row[field] not in iter(DType):
                raise ValueError(
                    f"a segment has {field.name} {row[field]}: give 0 to {max(DType)}."
                )
        segment = SegmentRow(row)
        segment.check(buffer_bytes, payload_bytes)
        segment.check_levels(0 if levels is None else levels.numel())


def _check_adds(table: Tensor) -> None:
    for dtype in table[:, Field.DTYPE].tolist():
        if dtype != DType.FP32:
            name = DType(dtype).name
            raise ValueError(
                f"decode adds into a segment of {name}: give an fp32 buffer and table."
            )


class SegmentRow:
    """One row of the segment table with names, and the slices it stands for."""

    def __init__(self, row: list[int]) -> None:
        self.bits, self.bucket = row[Field.BITS], row[Field.BUCKET]
        self.numel, self.padded = row[Field.NUMEL], row[Field.PADDED]
        self.row = row
        self.dtype = TORCH_DTYPES[DType(row[Field.DTYPE])]
        self.wire = TORCH_DTYPES[DType(row[Field.WIRE])]

    def check(self, buffer_bytes: int, payload_bytes: int) -> None:
        """Raise ValueError unless the row fits a buffer and a payload of these sizes."""
        row = self.row
        if self.bits not in (0, 2, 3, 4, 5, 6, 7, 8):
            raise ValueError(f"a segment has {self.bits} bits: give 2 to 8, or 0 for raw.")
        if not 0 <= self.numel <= self.padded:
            raise ValueError(f"a segment has {self.numel} of {self.padded} values: give 0 to all.")
        item = ITEM_BYTES[DType(row[Field.DTYPE])]
        inside = row[Field.BUFFER_BYTE] >= 0 and row[Field.DATA_BYTE] >= HEADER_BYTES
        inside &= row[Field.BUFFER_BYTE] + self.padded * item <= buffer_bytes
        if self.bits:
            rounding = row[Field.ROUNDING]
            if self.bucket < 8 or self.bucket % 8 or not 0 <= rounding < len(Rounding):
                raise ValueError(
                    f"a segment has buckets of {self.bucket} and rounding {rounding}: "
                    f"give a positive multiple of 8 and 0 to {max(Rounding)}."
                )
            if row[Field.DTYPE] == DType.OPAQUE:
                raise ValueError("a coded segment is opaque: code fp32, bf16 or fp16.")
            inside &= row[Field.META_BYTE] >= HEADER_BYTES and row[Field.META_BYTE] % 4 == 0
            inside &= row[Field.META_BYTE] + META_BYTES * self.num_buckets <= payload_bytes
            if self.has_epochs:
                self._check_epochs()
                start = row[Field.EPOCH_BYTE]
                inside &= start >= HEADER_BYTES and start % 4 == 0
                inside &= start + EPOCH_BYTES * self.num_buckets <= payload_bytes
        elif (row[Field.DTYPE] == DType.OPAQUE) != (row[Field.WIRE] == DType.OPAQUE):
            raise ValueError("a raw segment is opaque on one side only: make both or none opaque.")
        elif self.has_epochs:
            self._check_epochs()
        inside &= row[Field.DATA_BYTE] + self.data_bytes <= payload_bytes
        if not inside:
            raise ValueError(
                f"a segment reaches outside its {buffer_bytes} buffer bytes or "
                f"{payload_bytes} payload bytes: make table, buffer and payload from one layout."
            )

    def _check_epochs(self) -> None:
        """Raise ValueError unless the row may have the epochs of kept grids."""
        if (
            not self.bits
            or self.bucket > MAX_DELTA_BUCKET
            or not self.rounding.properties.keeps_grids
        ):
            known = [f"{each.label} ({each})" for each in Rounding if each.properties.keeps_grids]
            raise ValueError(
                f"a segment with epochs has {self.bits} bits, buckets of {self.bucket} and "
                f"rounding {self.row[Field.ROUNDING]}: give 2 to 8 bits, at most "
                f"{MAX_DELTA_BUCKET} values a bucket and {' or '.join(known)}."
            )

    def check_levels(self, num_levels: int) -> None:
        """Raise ValueError unless the row's learned levels are among ``num_levels`` floats."""
        start = self.row[Field.LEVELS]
        if start == -1:
            return
        if self.bits not in LEARNED_BITS or not self.rounding.properties.has_levels:
            known = [f"{each.label} ({each})" for each in Rounding if each.properties.has_levels]
            raise ValueError(
                f"a segment of learned levels has {self.bits} bits and rounding "
                f"{self.row[Field.ROUNDING]}: give 2 to 6 bits and {' or '.join(known)}, or -1 for "
                "the uniform grid."
            )
        if start < 0 or start + self.num_codes > num_levels:
            raise ValueError(
                f"a segment's {self.num_codes} levels start at {start} of {num_levels} floats: "
                "give levels that hold them, or -1 for the uniform grid."
            )

    @property
    def rounding(self) -> Rounding:
        """The rounding of a coded segment, once it is checked."""
        return Rounding(self.row[Field.ROUNDING])

    @property
    def has_epochs(self) -> bool:
        """Whether its grids are kept."""
        return self.row[Field.EPOCH_BYTE] != -1

    @property
    def num_codes(self) -> int:
        """How many codes a value of the segment may have."""
        return 1 << self.bits

    def levels(self, levels: Tensor | None) -> Tensor | None:
        """The segment's learned levels, fp32 [2**bits]; None stands for the uniform grid."""
        start = self.row[Field.LEVELS]
        return None if levels is None or start < 0 else levels.narrow(0, start, self.num_codes)

    @property
    def data_bytes(self) -> int:
        """Bytes of the segment's codes, or of its values as they are."""
        if self.bits:
            return -(-self.numel * self.bits // 8)
        return self.numel * ITEM_BYTES[DType(self.row[Field.WIRE])]

    @property
    def num_buckets(self) -> int:
        """Buckets of a coded segment."""
        return -(-self.numel // self.bucket)

    def values(self, buffer: Tensor) -> Tensor:
        """The segment's valid values: its dtype, [numel], a copy (offsets may be unaligned)."""
        return self._span(buffer, self.numel).clone().view(self.dtype)

    def store(self, buffer: Tensor, values: Tensor, keep_padding: bool) -> None:
        """Write the decoded ``values`` into the segment's place in ``buffer``."""
        self._span(buffer, self.numel).copy_(values.view(torch.uint8))
        if not keep_padding:
            self._span(buffer, self.padded)[values.numel() * self.dtype.itemsize :].zero_()

    def meta(self, payload: Tensor) -> Tensor:
        """The bytes of ``payload`` that hold the metadata of the segment's buckets."""
        return payload.narrow(0, self.row[Field.META_BYTE], META_BYTES * self.num_buckets)

    def epochs(self, payload: Tensor) -> Tensor | None:
        """The bytes of ``payload`` that hold the epochs of the segment's buckets, if any."""
        if not self.has_epochs:
            return None
        return payload.narrow(0, self.row[Field.EPOCH_BYTE], EPOCH_BYTES * self.num_buckets)

    def data(self, payload: Tensor) -> Tensor:
        """The bytes of ``payload`` that hold the segment's codes or raw values."""
        return payload.narrow(0, self.row[Field.DATA_BYTE], self.data_bytes)

    def uniform(
        self, num: int, key: int, device: torch.device, epochs: Tensor | None = None
    ) -> Tensor:
        """``num`` numbers of the segment's own, fp32 [num] in (-1/2, 1/2): [Note: Keys].

        ``epochs``: int32 [buckets], where values have them.
        """
        if epochs is not None:
            epochs = epochs.repeat_interleave(self.bucket // 8)[: -(-num // 8)]
        parameter, group = self.row[Field.PARAMETER], self.row[Field.GROUP]
        return uniform(num, parameter, group, key, device, epochs)

    def _span(self, buffer: Tensor, numel: int) -> Tensor:
        return buffer.narrow(0, self.row[Field.BUFFER_BYTE], numel * self.dtype.itemsize)
