"""SplitMix64's finalizer, and the numbers that each of its users makes of it."""

from __future__ import annotations

import numpy as np

from qsdp.codec.random_numbers import RandomKey
from qsdp.common.splitmix64 import GOLDEN_GAMMA, MASK, finalize
from qsdp.data.batches import Batches
from qsdp.methods.cram.optimizer import cram_random_bits

# The first numbers of SplitMix64 with seed 1234567, as other implementations give them.
KNOWN = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)


def test_the_finalizer_is_that_of_splitmix64_for_numbers_and_arrays() -> None:
    states = [1234567 + i * GOLDEN_GAMMA & MASK for i in range(1, len(KNOWN) + 1)]
    assert tuple(map(finalize, states)) == KNOWN
    assert finalize(np.array(states, dtype=np.uint64)).tolist() == list(KNOWN)


def test_every_chaining_gives_the_numbers_that_it_always_gave() -> None:
    places = ((0, 0), (1, 0), (0, 1), (7, 123456789), (2**63 - 1, 2**40))
    assert [cram_random_bits(*place) for place in places] == [
        *(12035550249420947055, 6791897765849424158, 3069472533636442495),
        *(17271834600348478504, 12710476021226462461),
    ]
    keys = (RandomKey(0, 0, 0, 0, 0, 0), RandomKey(3, 1, 1, 2, 0, 5, 4))
    assert [key.fold() for key in keys] == [701279491252118104, 3080083056687644789]
    tokens = np.arange(10_000, dtype=np.uint16)
    batches = Batches(tokens, 3, seq_len=4, seed=5, rank=1, world_size=2, grad_accum=2)
    drawn = [batches.get(step, micro)[0][:, 0].tolist() for step in (0, 7) for micro in (0, 1)]
    assert drawn == [[3576, 1197, 181], [2483, 978, 7719], [2657, 1067, 8884], [2478, 4245, 4967]]
