#!/usr/bin/env python3
"""usage: where_time_went.py REPORTS [PHASES]

Prints seconds a phase, the slowest tests and the threads of the largest pool worker. REPORTS is the
folder that QSDP_TEST_REPORT named for the tests; PHASES has a line "SECONDS NAME" for each phase.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

NUM_TESTS = 15


def main(reports: Path, phases: Path | None = None) -> None:
    if phases is not None:
        lines = [line.partition(" ") for line in phases.read_text().splitlines()]
        print("seconds  phase")
        for seconds, _, name in [*lines, (str(sum(int(s) for s, _, _ in lines)), "", "together")]:
            print(f"{seconds:>7}  {name}")
    tests = [
        (float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}")
        for file in sorted(reports.glob("*.xml"))
        for case in ElementTree.parse(file).iter("testcase")
    ]
    print(f"\nseconds  test (the {NUM_TESTS} slowest of {len(tests)})")
    for seconds, name in sorted(tests, reverse=True)[:NUM_TESTS]:
        print(f"{seconds:>7.1f}  {name}")
    threads = [json.loads(file.read_text())["max_threads"] for file in reports.glob("pool-*.json")]
    if threads:
        print(f"\nthreads in a pool worker, at most: {max(threads)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
