"""launch/train_gpt.py as torchrun starts it for crashes.py: the exit status is noted in a folder.

    torchrun ... -m benchmarks.saving.crash_rank FOLDER FLAGS

torchrun does not tell the statuses of ranks that end after a signal. A rank that a signal ended
notes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qsdp.commands.exit import run
from qsdp.commands.train import main
from qsdp.common.atomic_files import write_text

FOLDER = Path(sys.argv.pop(1))
end_at_once = os._exit


def end(status: int) -> None:
    """Note the status before the process ends with it."""
    path = FOLDER / f"status-{os.environ['RANK']}"
    write_text(path, str(status))  # it may be killed here
    end_at_once(status)


os._exit = end  # type: ignore[assignment]
try:
    run(main)
except SystemExit as stop:
    end(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
