"""Frames that were changed on their way: refused or applied as the specification does, and no harm.

    python -m pytest tests/ops/test_mutated_frames.py

runs a hundred thousand of them under sanitizers too, in five minutes, as ``make test-all`` does.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import changes, codec
from qsdp.ops.reference.apply_changes import apply_changes
from tests.support import patience, recipes, sanitizers
from tests.support.frame_body import parts_of
from tests.support.kept_sender import BUCKETS, FLOATS, LENGTHS, Sender, some
from tests.support.kernel_inputs import assert_canaries, assert_same_values, off_by

ROOT = Path(__file__).parents[2]
COMPILED = [name for name in native.available() if name != native.PYTHON]
ABSENT = "the native library is not installed: there are only Python kernels to run"
NUM_FRAMES = int(os.environ.get("QSDP_MUTATED_FRAMES", "3000"))
RUNS, A_RUN = 4, 25_000
A_ROUND = 100
KEEPS = [rounding for rounding in Rounding if rounding.properties.keeps_grids]
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0x81, 124, 125, 126, 127, 252, 253, 254, 255)
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# As where the CUDA kernels are emulated: checked copies of everything in every kernel take minutes.
FLAGS = ["-std=c++20", "-Og", "-g1", "-fPIC", "-ffp-contract=off", "-Dalways_inline=unused"]
OF_ISA = {
    "avx2": ["-mavx2", "-mbmi2", "-mf16c", "-mno-fma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mbmi2", "-mf16c"],
}

Apply = Callable[[Tensor, Tensor, int, Tensor], object]


def small_layout(generator: torch.Generator) -> Layout:
    """One to a dozen segments of any bits, some of them raw or empty, some with uneven ends."""
    segments = []
    for parameter in range(1 + some(2, generator) * some(12, generator)):
        bits = (0, 2, 3, 4, 5, 6, 7, 8)[some(8, generator)]
        own: dict[str, int] = {"wire": FLOATS[some(3, generator)]}
        if bits:
            bucket = BUCKETS[some(len(BUCKETS), generator)]
            rounding = KEEPS[some(len(KEEPS), generator)]
            own = {"bucket": bucket, "rounding": rounding, "keeps_epochs": True}
        padded = LENGTHS[some(len(LENGTHS), generator)]
        segments.append(
            Segment(bits=bits, dtype=DType.FP32, padded=padded, parameter=parameter, **own)
        )
    return Layout(segments, group=1)


def mutated(body: bytes, other: bytes, rows: list[SegmentRow], chance: random.Random) -> bytes:
    """A body with something wrong, or other changes than it had; ``other`` is of the same table."""
    out = bytearray(body)
    counts = parts_of(body, rows).counts
    kind = chance.randrange(8)
    aimed = range(len(out))
    if kind in (0, 1):  # the bitmap or the counts
        aimed = (range(-(-len(rows) // 8)), range(counts.start, counts.stop) or aimed)[kind]
    if kind <= 3:
        for _ in range(chance.randint(1, 3)):
            at = chance.choice(aimed)
            out[at] = (
                chance.choice(EXTREMES)
                if chance.randrange(2)
                else out[at] ^ 1 << (chance.randrange(8))
            )
    elif kind == 4:
        at = chance.randint(0, len(out))
        out = out[:at] + other[chance.choice((at, chance.randint(0, len(other)))) :]
    elif kind == 5:
        out = out[: chance.randint(0, len(out))]
    elif kind == 6:
        out += chance.randbytes(chance.randint(1, 9)) if chance.randrange(2) else other
    else:
        first, last = sorted(chance.choices(range(len(out) + 1), k=2))
        out[first:last] = out[first:last][::-1]
    if len(out) >= -(-len(rows) // 8) and chance.randrange(4):
        # Made as long as it says, so that more than its length is looked at.
        for _ in range(2):
            missing = parts_of(out, rows).num_bytes - len(out)
            out = out + chance.randbytes(missing) if missing > 0 else out[: len(out) + missing]
    return bytes(out)


def outcome(apply: Apply, body: bytes, sender: Sender, row: Tensor, seed: int) -> Tensor | None:
    """The row with what ``body`` says, or None where it is refused, in one sentence.

    Frame and row end where their memory does, which sanitizers see; or they lie between others.
    """
    frame = torch.tensor(list(body), dtype=torch.uint8)
    kept, whole = row.clone(), None
    if seed % 2:
        kept, whole = off_by(len(row), seed % 64)
        kept.copy_(row)
    said = ""
    try:
        apply(frame, sender.table, sender.step, kept)
    except ValueError as error:
        said = str(error)
    assert re.fullmatch(r"(a frame [^:]*: give [^:.]*\.)?", said), said
    if whole is not None:
        assert_canaries(whole, kept)
    return None if said else kept


def values_of(decode: Callable[..., object], row: Tensor, sender: Sender) -> Tensor:
    out = torch.zeros_like(sender.x)
    decode(row, sender.table, sender.key, out.view(torch.uint8), False)
    return out.view(torch.uint8)


def sent(sender: Sender) -> Iterator[tuple[Tensor, bytes]]:
    """Rows, and the bodies of frames for them: of a first one, and of small and of great steps."""
    for by in (0.01, 0.1, 0.3):
        row = sender.kept.clone()
        yield row, sender.send(redraw_every=20).numpy().tobytes()
        sender.wander(by)


@pytest.mark.skipif(not COMPILED, reason=ABSENT)
def test_mutated_frames_are_refused_or_applied_as_the_specification_does(generator):
    chance = random.Random(some(2**62, generator))
    heads, num_refused, num_done = set(), 0, 0
    before = native.capability()
    try:
        while num_done < NUM_FRAMES:
            layout = small_layout(generator)
            x = torch.randn(layout.num_values, generator=generator)
            sender = Sender(layout, x, generator)
            rows = changes.kept_rows(sender.table)
            frames = list(sent(sender))
            for _, body in frames:
                heads.update(parts_of(body, rows).heads)
            for seed in range(num_done, num_done := num_done + A_ROUND):
                row, body = chance.choice(frames)
                other = mutated(body, chance.choice(frames)[1], rows, chance)
                want = outcome(apply_changes, other, sender, row, 0)
                num_refused += want is None
                if want is not None:
                    wanted = values_of(codec.decode, want, sender) if seed % 8 == 0 else None
                for name in COMPILED:
                    native.use(name)
                    got = outcome(torch.ops.qsdp.apply_changes, other, sender, row, seed)
                    assert (got is None) == (want is None), (name, other, sender.table)
                    if want is None:
                        continue
                    assert torch.equal(got, want), (name, other, sender.table)
                    values = values_of(torch.ops.qsdp.decode, got, sender)
                    if wanted is not None:
                        assert_same_values(values, wanted, torch.float32)
    finally:
        native.use(before)
    assert 0.2 < num_refused / num_done < 0.9
    forms = (range(1), range(1, 126), range(126, 254), range(254, 255), range(255, 256))
    assert all(heads & set(form) for form in forms)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.skipif(not COMPILED, reason=ABSENT)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with")
def test_mutated_frames_do_no_harm(tmp_path: Path) -> None:
    """A hundred thousand of them, given to a library that was built under sanitizers."""
    copy, torch_dir = tmp_path / "copy", Path(torch.__file__).parent
    for name in ("qsdp", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "pyproject.toml", copy)
    places = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_dir / 'include'}"]
    places.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    objects = []
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    for source in (*ROOT.glob("csrc/common/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")):
        isa = source.stem.removeprefix("kernels_")
        if isa in OF_ISA and not is_x86:
            continue
        objects.append(tmp_path / f"{source.parent.name}-{source.stem}.o")
        flags = [*FLAGS, *SANITIZE, *OF_ISA.get(isa, ())]
        build = ["g++", *flags, *places, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(build, check=True, timeout=patience.seconds())
    library = copy / "qsdp" / native.LIBRARY.name
    link = ["g++", "-shared", *SANITIZE, *map(str, objects), "-o", str(library)]
    link += [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True, timeout=patience.seconds())
    # Python's own allocations too end where a sanitizer sees it, which writes to stderr.
    under = ["env", f"LD_PRELOAD={sanitizers.runtimes()}", "ASAN_OPTIONS=detect_leaks=0"]
    under += ["PYTHONMALLOC=malloc", f"QSDP_MUTATED_FRAMES={A_RUN}"]
    tests = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    tests += ["tests/ops/test_mutated_frames.py", "-k", "specification"]
    for _ in range(RUNS):
        done = recipes.run([*under, *tests], copy)
        assert done.returncode == 0, done.stdout[-8000:]
        assert "1 passed" in done.stdout
