"""DCP's files read and written so that nothing in them can run.

DCP keeps two kinds of pickles: the table of contents (``.metadata``), and a small one in the data
files for every value that is no tensor. Its own reader lets both name any function. Here
``dcp_table.py`` reads the table, and torch's restricted unpickler all else. What that one could not
read back is not written.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, WriteItemType
from torch.futures import Future

from qsdp.checkpoint.dcp_table import TABLE, read_table
from qsdp.checkpoint.folders import META
from qsdp.checkpoint.meta_json import read_meta
from qsdp.checkpoint.plain_values import Refused, not_plain, plain_only, plain_part, plain_value


class SafeReader(FileSystemReader):
    """DCP's reader of files, made safe: nothing that it reads can run.

    Its table of contents is read, and looked at, once, when this is made.
    """

    def __init__(self, path: Path) -> None:
        """Read the table. Raises ValueError if it is unreadable or wants code or other files."""
        super().__init__(path)
        files = read_meta(path)["checksums"]
        if TABLE not in files:
            raise Refused(f"{path / META} does not list {TABLE}: name another checkpoint.")
        self.metadata = read_table(path / TABLE, files)

    # Without keywords, so that DCP does not look for tables of single ranks.
    def read_metadata(self) -> Metadata:
        """The table of contents, as it was read when this was made."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned. Raises Refused for what asks for code to be loaded."""
        try:
            with plain_only():
                return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked[1] if asked else "more than plain data"
            raise not_plain(Path(self.path), name) from None


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner of a load, made safe: it takes tensors and plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is no whole tensor, if it is plain and of the kind that is held."""
        name = read_item.dest_index.fqn
        with plain_only():
            loaded = torch.load(value, weights_only=True)
        held, numbers = self.state_dict[name], (int, float, Tensor)
        if isinstance(held, Tensor) and held.dim():
            is_alike = isinstance(loaded, Tensor)
        else:  # a switch may have been unset
            is_alike = (
                loaded is None or isinstance(loaded, numbers) or not isinstance(held, numbers)
            )
        if not is_alike:
            raise TypeError(f"{name} is of another kind.")
        # The default planner unpickles without a limit, so it gets what was written here.
        again = io.BytesIO()
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


class SafeSavePlanner(DefaultSavePlanner):
    """DCP's planner of a save, made safe: it refuses what ``SafeLoadPlanner`` could not read.

    NumPy's numbers become Python's.
    """

    def create_local_plan(self) -> SavePlan:
        """The plan of this rank. Raises Refused for what could only be loaded by running code."""
        for name, value in self.state_dict.items():
            if isinstance(value, Tensor):
                plain_part(name, value)
        plan = super().create_local_plan()
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                name = item.index.fqn
                self.state_dict[name] = plain_value(name, self.state_dict[name])
        return plan
