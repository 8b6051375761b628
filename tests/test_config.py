"""QSDPConfig refuses what the wire cannot do, in one sentence."""

from __future__ import annotations

import dataclasses
import re

import pytest

from qsdp.comm.policy_checks import check_embeddings, check_policy
from qsdp.config import QSDPConfig


def refusal(**settings: object) -> str:
    with pytest.raises(ValueError) as caught:
        QSDPConfig(**settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert re.fullmatch(r"([^.]|\.(?! ))+[^.]\.", message), f"not one sentence: {message}"
    return message


@pytest.mark.parametrize("field", ["weight_bits", "grad_bits"])
@pytest.mark.parametrize("bits", [1, 9, 0, -8, 15, 17, 24, 64, True, False, None, "8", 8.5, 8.0])
def test_bits_that_the_wire_does_not_know_are_named_with_what_it_knows(field, bits):
    message = refusal(**{field: bits})
    assert message.startswith(f"{field} is {bits!r}")
    for allowed in ("2 to 8", "16", "32"):
        assert allowed in message


@pytest.mark.parametrize("field", ["bucket_size", "weight_bucket_size"])
@pytest.mark.parametrize("size", [0, 12, 1, 7, 1023, -8, (1 << 20) + 8, 1024.0, "1024", True])
def test_a_bucket_size_that_cannot_be_packed_is_named_with_the_allowed_range(field, size):
    message = refusal(**{field: size})
    assert message.startswith(f"{field} is {size!r}")
    for allowed in ("multiple of 8", "8", str(1 << 20)):
        assert allowed in message


@pytest.mark.parametrize("rounding", ["shfit", "", "Shift", 0, ["shift"]])
def test_an_unknown_rounding_is_named_with_the_four_that_exist(rounding):
    message = refusal(rounding=rounding)
    assert repr(rounding) in message
    for name in ("shift", "dither", "stochastic", "nearest"):
        assert name in message.replace(repr(rounding), "", 1)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 0.5, "0", None, True])
def test_a_seed_that_cannot_be_a_key_is_named_with_the_allowed_range(seed):
    message = refusal(seed=seed)
    assert repr(seed) in message
    assert "0 to 2**63 - 1" in message


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("*.weight", "'*.weight'"),
        (None, "None"),
        (8, "8"),
        ((8,), "8"),
        ((None,), "None"),
        (("*.weight",), "weight"),
        ((("*.weight",),), "'*.weight'"),
        ((("*.weight", 8, 8),), "'*.weight'"),
        (((8, "*.weight"),), "'*.weight'"),
        ((("*.weight", 1),), "1"),
        ((("*.weight", 9),), "9"),
        ((("*.weight", True),), "True"),
        ((("*.weight", 4.0),), "4.0"),
        ((("*.weight", "4"),), "'4'"),
        ((("*", 8), ("*.bias", 0)), "0"),
    ],
)
def test_a_bad_policy_is_named_with_the_form_it_must_have(policy, named):
    message = refusal(policy=policy)
    assert named in message
    assert "pattern" in message or "2 to 8" in message


FOUR = {"weight_bits": 4, "grad_bits": 4}
RAW = {"weight_bits": 32, "grad_bits": 16}
LEARNED = {**FOUR, "levels": "learned"}
ALL_LEARNED = {**LEARNED, "embedding_bits": 6, "reduce": "flat"}
WIDE = (("*", (7, 16)),)
DELTA = {**FOUR, "gather": "delta"}
OF_WEIGHTS = (("*.up.*", (4, 16)),)

# What nothing would heed, by field, and what is taken although it looks alike.
UNHEEDED = [
    ("level_steps", {"level_steps": (3,)}, {**LEARNED, "level_steps": (3,)}),
    ("warmup_bits", {**FOUR, "warmup_bits": 8}, {**FOUR, "warmup_bits": 8, "warmup_steps": 1}),
    ("warmup_bits", {"warmup_steps": 1, "warmup_bits": 8}, {"warmup_steps": 1, "warmup_bits": 16}),
    ("warmup_bits", {"warmup_steps": 1, "warmup_bits": 8, "budget": 4}, {"budget": 4}),
    (
        "warmup_steps",
        {"weight_bits": 32, "grad_bits": 32, "warmup_steps": 1},
        {**RAW, "warmup_steps": 1},
    ),
    ("local_grad_bits", {"reduce": "flat", "local_grad_bits": 4}, {"local_grad_bits": 4}),
    ("local_grad_bits", {**RAW, "local_grad_bits": 4}, {"grad_bits": 8, "local_grad_bits": 4}),
    ("local_grad_bits", {"policy": WIDE, "local_grad_bits": 4}, {"local_grad_bits": 16}),
    ("bucket_size", {**RAW, "bucket_size": 64}, {**RAW, "bucket_size": 64, "embedding_bits": 8}),
    ("rounding", {**RAW, "rounding": "nearest"}, {**RAW, "rounding": "nearest", "budget": 4}),
    ("rounding", {**ALL_LEARNED, "rounding": "shift"}, {**LEARNED, "rounding": "shift"}),
    ("rounding", {**ALL_LEARNED, "rounding": "dither"}, {**ALL_LEARNED, "rounding": "nearest"}),
    (
        "rounding",
        {**ALL_LEARNED, "rounding": "dither", "warmup_steps": 1},
        {**ALL_LEARNED, "rounding": "dither", "warmup_steps": 1, "warmup_bits": 8},
    ),
    ("levels", {"levels": "learned"}, {"levels": "learned", "budget": 4}),
    ("levels", {**RAW, "levels": "learned"}, {"levels": "learned", "local_grad_bits": 6}),
    ("levels", {**FOUR, "levels": "learned", "policy": WIDE}, {**FOUR, "levels": "learned"}),
    ("levels", {**DELTA, "grad_bits": 8, "levels": "learned"}, {**DELTA, "levels": "learned"}),
    (
        "levels",
        {**DELTA, "grad_bits": 16, "embedding_bits": 16, "levels": "learned", "policy": OF_WEIGHTS},
        {**DELTA, "grad_bits": 8, "levels": "learned", "local_grad_bits": 4},
    ),
    (
        "rounding",
        {**ALL_LEARNED, "gather": "delta", "weight_bits": 8, "rounding": "dither"},
        {**ALL_LEARNED, "gather": "delta", "weight_bits": 8, "rounding": "nearest"},
    ),
    (
        "levels",
        {"weight_bits": 4, "grad_bits": 8, "gather": "delta", "levels": "learned"},
        {**DELTA, "grad_bits": 8, "levels": "learned", "grad_budget": 4},
    ),
    (
        "gather",
        {"policy": (("*", (16, 4)),), "gather": "delta", "grad_budget": 4},
        {**DELTA, "grad_budget": 4},
    ),
    ("grad_rotation", {"grad_rotation": "hadamard"}, {"grad_rotation": "hadamard", "budget": 4}),
    (
        "grad_rotation",
        {"weight_bits": 4, "grad_bits": 7, "grad_rotation": "hadamard"},
        {"weight_bits": 7, "grad_bits": 6, "grad_rotation": "hadamard"},
    ),
    ("embedding_bits", {"embedding_bits": 4, "policy": WIDE}, {"embedding_bits": 4}),
    (
        "weight_bucket_size",
        {**RAW, "weight_bucket_size": 64},
        {**RAW, "weight_bucket_size": 64, "embedding_bits": 8},
    ),
    (
        "weight_bucket_size",
        {"weight_bits": 32, "embedding_bits": 32, "grad_bits": 4, "weight_bucket_size": 64},
        {"weight_bits": 32, "grad_bits": 4, "weight_bucket_size": 64, "budget": 4},
    ),
    (
        "bucket_size",
        {"policy": WIDE, "weight_bucket_size": 64, "bucket_size": 256},
        {"weight_bucket_size": 64, "bucket_size": 256},
    ),
    ("gather", {"policy": (("*", (16, 4)),), "gather": "delta"}, {**DELTA, "weight_bits": 8}),
    (
        "rounding",
        {"policy": WIDE, "gather": "delta", "rounding": "shift"},
        {"policy": WIDE, "gather": "delta", "rounding": "nearest"},
    ),
    ("delta_room", {**FOUR, "gather": "once", "delta_room": 0.25}, {**DELTA, "delta_room": 0.25}),
    ("delta_redraw_every", {"delta_redraw_every": 9}, {**DELTA, "delta_redraw_every": 9}),
    ("delta_codes", {**FOUR, "delta_codes": "rank"}, {**DELTA, "delta_codes": "rank"}),
    (
        "delta_codes",
        {**DELTA, "delta_codes": "node", "reduce": "flat"},
        {**DELTA, "delta_codes": "node"},
    ),
]


@pytest.mark.parametrize(("field", "ignored", "heeded"), UNHEEDED)
def test_a_field_that_nothing_would_heed_is_refused_by_its_name(field, ignored, heeded):
    assert refusal(**ignored).startswith((f"{field} is ", f"{field}='delta' is "))
    without = {name: value for name, value in ignored.items() if name != field}
    assert QSDPConfig(**without) == dataclasses.replace(QSDPConfig(), **without)
    assert QSDPConfig(**heeded)


@pytest.mark.parametrize("room", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.25", True])
def test_a_room_that_a_grid_cannot_have_is_named_with_the_allowed_range(room):
    message = refusal(**DELTA, delta_room=room)
    assert message.startswith(f"delta_room is {room!r}: ")


@pytest.mark.parametrize("steps", [0, -1, 2.0, "3", True, 1 << 63])
def test_steps_for_which_no_grid_can_be_kept_are_named(steps):
    message = refusal(**DELTA, delta_redraw_every=steps)
    assert message.startswith(f"delta_redraw_every holds {steps!r}: ")


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("bucket_size", {"bucket_size": 136}),
        ("weight_bucket_size", {"weight_bucket_size": 136}),
    ],
)
def test_what_kept_grids_cannot_have_is_refused_beside_them_alone(field, more):
    assert refusal(**DELTA, **more).startswith(f"{field} is {more[field]!r}")
    assert QSDPConfig(**FOUR, gather="once", **more)
    assert QSDPConfig(**DELTA, budget=4.0, warmup_steps=3, warmup_bits=8)


@pytest.mark.parametrize("field", ["budget", "grad_budget"])
@pytest.mark.parametrize("budget", [2, 2.0, 9.01, float("nan"), float("inf"), "4", (4,)])
def test_a_budget_that_no_bits_can_keep_is_named_with_the_allowed_range(field, budget):
    assert refusal(**{field: budget}).startswith(f"{field} is {budget!r}: choose more than 2 and")


def test_a_budget_is_of_both_directions_or_of_gradients_alone():
    both, grads = QSDPConfig(budget=4.5), QSDPConfig(grad_budget=4.5)
    assert [both.budget_of(is_grad=is_grad) for is_grad in (False, True)] == [4.5, 4.5]
    assert [grads.budget_of(is_grad=is_grad) for is_grad in (False, True)] == [None, 4.5]
    assert refusal(budget=4, grad_budget=3.6).startswith("budget is 4 beside grad_budget=3.6, ")


def test_learned_levels_beside_kept_grids_are_for_gradients():
    for gather in ("twice", "once", "delta"):
        config = QSDPConfig(**LEARNED, gather=gather)
        found = [
            [config.has_levels(bits, is_grad=is_grad) for bits in (2, 6, 7, 16)]
            for is_grad in (False, True)
        ]
        assert found == [[gather != "delta"] * 2 + [False] * 2, [True, True, False, False]]
        weights = "stochastic" if gather != "delta" else "dither"
        assert config.rounding_of(3, is_grad=False) == weights
        assert config.rounding_of(3, is_grad=True) == "stochastic"


def test_kept_grids_have_room_and_last_as_given_or_for_200_steps():
    config = QSDPConfig(gather="delta")
    assert (config.room, config.redraw_every) == (0.25, 200)
    for room in (1, 0.01):
        config = QSDPConfig(gather="delta", delta_room=room, delta_redraw_every=1)
        assert (config.room, config.redraw_every) == (room, 1)


def test_a_budget_has_all_gradients_rotated_that_it_gives_bits():
    def rotated(**settings):
        config = QSDPConfig(**FOUR, **settings)
        return [config.rotates(b, keeps_bits=k) for b in (2, 6, 7, 8, 32) for k in (True, False)]

    narrow = [True] * 4 + [False] * 6
    assert rotated() == rotated(budget=4) == [False] * 10
    assert rotated(grad_rotation="hadamard") == narrow
    assert rotated(grad_rotation="hadamard", budget=4) == [
        *([True] * 4),
        *([False, True] * 2),
        *([False] * 2),
    ]
    assert refusal(grad_rotation="random").startswith("grad_rotation is 'random': choose one of")


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_buckets_and_roundings_of_weights_and_of_gradients_are_found_apart(bits):
    def found(**settings):
        config = QSDPConfig(**settings)
        pairs = [
            (config.bucket_of(bits, is_grad=is_grad), config.rounding_of(bits, is_grad=is_grad))
            for is_grad in (False, True)
        ]
        return [each for pair in pairs for each in pair]

    weights, how, grads, _ = found()
    assert [weights, how, grads, how] == found()
    assert found(bucket_size=512) == [512, how, 512, how]
    assert found(weight_bucket_size=512) == [512, how, grads, how]
    assert found(weight_bucket_size=32, bucket_size=64) == [32, how, 64, how]
    for gather in ("twice", "once"):
        assert found(gather=gather, rounding="stochastic")[1::2] == ["stochastic", "stochastic"]
    assert found(gather="delta") == [128, "dither", grads, how]
    assert found(gather="delta", bucket_size=64) == [64, "dither", 64, how]
    assert found(gather="delta", bucket_size=512, weight_bucket_size=8) == [8, "dither", 512, how]
    for rounding in ("shift", "dither", "stochastic", "nearest"):
        of_weights = "nearest" if rounding == "nearest" else "dither"
        assert found(gather="delta", rounding=rounding)[1::2] == [of_weights, rounding]


def test_a_policy_pattern_that_sets_no_bits_of_a_model_is_refused():
    config = QSDPConfig(policy=(("a.*", 4), ("*.weight", 8), ("a.bias", 2)))
    with pytest.raises(ValueError, match=r"'a\.bias' matches only parameters that patterns before"):
        check_policy(config, ["a.weight", "a.bias", "b.weight"], {})
    with pytest.raises(ValueError, match=r"'\*\.weight' matches only"):
        check_policy(config, ["a.weight", "a.bias"], {})
    swapped = dataclasses.replace(config, policy=config.policy[::-1])
    check_policy(swapped, ["a.weight", "a.bias", "a.scale", "b.weight"], {})


def test_bits_of_embeddings_that_are_not_there_are_refused():
    config = QSDPConfig(embedding_bits=4, policy=(("head.*", 8),))
    check_embeddings(config, {"head.weight", "embed.weight"})
    check_embeddings(QSDPConfig(), ())
    for names, why in (((), "has none"), (("head.weight",), "gives bits already")):
        with pytest.raises(ValueError, match=rf"embedding_bits is 4, .* {why}: leave it out"):
            check_embeddings(config, names)


@pytest.mark.parametrize("steps", [(), "10", 10, (0,), (1.5,)])
def test_steps_of_levels_that_cannot_be_are_named(steps):
    assert refusal(**LEARNED, level_steps=steps).startswith("level_steps ")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16, 32])
def test_every_documented_width_is_accepted(bits):
    config = QSDPConfig(weight_bits=bits, grad_bits=bits, policy=(("*", bits),))
    assert (config.weight_bits, config.grad_bits) == (bits, bits)


@pytest.mark.parametrize("rounding", ["shift", "dither", "stochastic", "nearest"])
def test_every_documented_rounding_is_accepted(rounding):
    assert QSDPConfig(rounding=rounding).rounding == rounding


def test_the_ends_of_the_allowed_ranges_are_accepted():
    for size in (8, 16, 1 << 20):
        assert QSDPConfig(bucket_size=size).bucket_size == size
    for seed in (0, (1 << 63) - 1):
        assert QSDPConfig(seed=seed).seed == seed


def test_the_defaults_are_the_papers_practice():
    config = QSDPConfig()
    assert (config.weight_bits, config.grad_bits, config.bucket_of(8, is_grad=True)) == (8, 8, 1024)
    assert (config.rounding_of(8, is_grad=True), config.seed, config.policy) == ("shift", 0, ())
    assert (config.least_warmup_bits, config.learning_steps) == (32, (10, 50, 200, 1000))


def test_a_config_is_keyword_only_frozen_and_comparable():
    with pytest.raises(TypeError):
        QSDPConfig(8)  # type: ignore[misc]
    config = QSDPConfig(policy=[["*.weight", 4]])  # type: ignore[arg-type,list-item]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 4  # type: ignore[misc]
    assert config == QSDPConfig(policy=(("*.weight", 4),))
    assert hash(config) == hash(QSDPConfig(policy=(("*.weight", 4),)))


def test_the_first_matching_policy_pattern_sets_the_bits():
    config = QSDPConfig(policy=(("blocks.0.*", 4), ("*.weight", 6), ("blocks.*", 32)))
    assert config.bits_by_policy("blocks.0.attn.weight") == (4, 4)
    assert config.bits_by_policy("blocks.1.attn.weight") == (6, 6)
    assert config.bits_by_policy("blocks.1.attn.bias") == (32, 32)
    assert config.bits_by_policy("embed.bias") is None
    assert config.bits_by_policy("BLOCKS.0.bias") is None
    assert QSDPConfig().bits_by_policy("blocks.0.attn.weight") is None
