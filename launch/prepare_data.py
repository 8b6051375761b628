"""Text, JSONL and parquet to token shards: ``launch/prepare_data.py --help`` explains each flag."""

from __future__ import annotations

from qsdp.commands.exit import run
from qsdp.commands.prepare import main

if __name__ == "__main__":
    run(main)
