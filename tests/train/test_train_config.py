"""The settings of a run: presets, files, flags, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from qsdp.commands.parsing import parse
from qsdp.common.user_errors import UserError
from qsdp.config import QSDPConfig
from qsdp.methods.cram.flags import CrAMFlags
from qsdp.models.registry import family_of, preset_defaults
from qsdp.train.config import TrainConfig, all_groups, setting_names, setting_types
from qsdp.train.config_file import FILE_TYPES, LISTS, read_config_file
from qsdp.train.loop import learning_rate
from qsdp.train.wire_flags import WireFlags, parse_policy

# Every flag of the wire but --qsdp-bits, none at its default.
FULL_WIRE = [
    *("--qsdp-weight-bits", "5", "--qsdp-grad-bits", "4", "--qsdp-embedding-bits", "7"),
    *("--qsdp-local-grad-bits", "6", "--qsdp-bucket-size", "64", "--qsdp-rounding", "nearest"),
    *("--qsdp-levels", "learned", "--qsdp-level-steps", "20,3", "--qsdp-budget", "3.5"),
    *("--qsdp-policy", "blocks.0.*=8,*.attn.*=8/4", "--qsdp-warmup-steps", "2"),
    *("--qsdp-warmup-bits", "8", "--qsdp-gather", "once", "--qsdp-reduce", "two-hop"),
    *("--qsdp-ranks-per-node", "2", "--qsdp-errors", "--replicas", "2"),
    *("--qsdp-weight-bucket-size", "32", "--qsdp-grad-rotation", "hadamard"),
]
# Those that go with none of these.
DELTA_WIRE = [
    *("--qsdp-bits", "4", "--qsdp-gather", "delta", "--qsdp-delta-room", "0.1"),
    *("--qsdp-delta-redraw-every", "50", "--qsdp-delta-codes", "node"),
    *("--qsdp-grad-budget", "3.5"),
]


def test_every_model_preset_is_trained_as_its_context_allows() -> None:
    assert len(preset_defaults()) > 1
    for model in preset_defaults():
        context = family_of(model).size_of_preset(model, 50).context
        assert parse(["--model", model]).run.seq_len <= context


def test_every_setting_has_one_home_and_a_type_that_files_and_flags_can_hold() -> None:
    names = [name for group in all_groups().values() for name in setting_names(group)]
    assert len(names) == len({*names})
    assert {*setting_types().values()} <= FILE_TYPES.keys() | LISTS.keys()


def test_unset_flags_take_the_values_of_the_models_preset() -> None:
    config = parse(["--model", "gpt2-medium"])
    assert (config.run.lr, config.run.batch_size) == (3e-4, 8)
    assert config.run.last_lr == pytest.approx(3e-5)
    assert (parse([]).run.lr, parse([]).run.last_lr) == (1e-3, 1e-4)


def test_an_unset_minimum_follows_the_learning_rate(tmp_path: Path) -> None:
    config = parse(["--lr", "5e-5"])
    assert config.run.last_lr == pytest.approx(5e-6)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert parse(["--config", str(file), "--lr", "1e-6"]).run.last_lr == pytest.approx(1e-7)
    assert parse(["--lr", "5e-5", "--min-lr", "0"]).run.last_lr == 0


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "gpt2"\nlr = 1\nsteps = 7\ncram = true\ncram-sparsity = [0.25, 0.5]\n')
    config = parse(["--config", str(file), "--steps", "9"])
    assert (config.run.model, config.run.lr, config.run.steps) == ("gpt2", 1.0, 9)
    assert config.settings()["cram_sparsity"] == (0.25, 0.5)
    assert config.run.seq_len == 1024
    assert parse([f"--config={file}", "--model=nano"]).run.seq_len == 64


def test_a_written_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = parse(
        [
            *("--qsdp-bits", "4", "--cram", "--no-cram-plus", "--cram-sparsity", "0.5,0.25"),
            *("--out", 'a "folder"\\with é', "--lr", "1e-5", "--min-lr", "1e-6"),
        ]
    )
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert parse(["--config", str(file)]) == config


def test_a_written_configuration_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(parse(["--resume", "none"]).to_toml(), encoding="utf-8")
    assert parse(["--config", str(file)]).output.resume == "auto"


@pytest.mark.parametrize("name", ["\U0001f702", 'a\x7f\x01\t"\\b', "é\u2028", "out"])
def test_a_written_configuration_is_read_back_whatever_the_folders_name(
    tmp_path: Path, name: str
) -> None:
    config = parse(["--out", str(tmp_path / name)])
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert parse(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        (["--qsdp-bits", "8"], (8, 8)),
        (["--qsdp-bits=8", "--qsdp-grad-bits", "3"], (8, 3)),
        (["--qsdp-weight-bits", "4", "--qsdp-grad-bits", "3"], (4, 3)),
        (["--qsdp-weight-bits", "4"], (4, 2)),
        ([], (6, 2)),
    ],
)
def test_a_flag_for_bits_wins_over_a_files_bits_that_it_stands_in_place_of(
    tmp_path: Path, flags: list[str], bits: tuple[int, int]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("qsdp_bits = 6\nqsdp_grad_bits = 2\n")
    wire = parse(["--config", str(file), *flags]).qsdp
    assert wire is not None
    assert (wire.weight_bits, wire.grad_bits) == bits


@pytest.mark.parametrize(
    "given",
    [
        "qsdp_bits = 4\nqsdp_gather = 'once'\nqsdp_reduce = 'two-hop'\nqsdp_errors = false\n",
        "qsdp_weight_bits = 4\nqsdp_grad_bits = 8\n",
        "",
    ],
)
def test_auto_as_a_flag_chooses_anew_whatever_a_file_says_of_what_it_chooses(
    tmp_path: Path, given: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"out = 'there'\n{given}")
    flags = ["--config", str(file), "--qsdp-bits", "auto"]
    assert parse(flags) == TrainConfig.of(qsdp_bits="auto", out="there")
    for more in ("qsdp_levels = 'learned'", "qsdp_budget = 3.0", "qsdp_errors = true"):
        file.write_text(f"{more}\n{given.replace('qsdp_errors = false', '')}")
        name = more.partition(" ")[0]
        with pytest.raises(UserError, match=f"^--config {file} sets {name}, .* out of the file"):
            parse(flags)
    with pytest.raises(UserError, match=r"^--qsdp-gather is given beside --qsdp-bits auto"):
        parse([*flags, "--qsdp-gather", "once", "--qsdp-errors"])


@pytest.mark.parametrize(
    ("given", "flags", "targets"),
    [
        ("cram = true\ncram_sparsity = [0.25]", ["--cram-targets", "2:4"], ["2:4"]),
        ("cram = true\ncram_targets = ['2:4']", ["--cram-sparsity", "0.25"], ["0.25"]),
    ],
)
def test_a_flag_for_targets_wins_over_a_files_sparsities_and_the_other_way(
    tmp_path: Path, given: str, flags: list[str], targets: list[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(given)
    method = parse(["--config", str(file), *flags]).method
    assert isinstance(method, CrAMFlags)
    assert [*map(str, method.targets)] == targets


def test_cram_alone_is_cram_plus_multi_as_published() -> None:
    method = parse(["--cram"]).method
    assert isinstance(method, CrAMFlags)
    assert method.cram_plus
    assert method.cram_sparsity == (0.5, 0.7, 0.9)
    assert method.cram_rho == 0.05
    assert not parse(["--cram", "--no-cram-plus"]).settings()["cram_plus"]


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        ([], None),
        (["--qsdp-bits", "8"], (8, 8)),
        (["--qsdp-bits", "8", "--qsdp-grad-bits", "4"], (8, 4)),
        (["--qsdp-weight-bits", "2"], (2, 32)),
        (["--qsdp-grad-bits", "16"], (32, 16)),
    ],
)
def test_bits_are_set_together_or_by_direction(
    flags: list[str], bits: tuple[int, int] | None
) -> None:
    wire = parse(flags).qsdp
    assert bits == (None if wire is None else (wire.weight_bits, wire.grad_bits))


def test_four_bits_alone_take_the_best_setting_that_the_wire_knows() -> None:
    assert parse(["--qsdp-bits", "4", "--seed", "3"]).qsdp == QSDPConfig(
        weight_bits=4, grad_bits=4, seed=3
    )


def test_every_flag_of_the_wire_reaches_its_config(tmp_path: Path) -> None:
    config = parse([*FULL_WIRE, "--out", "here"])
    assert config.qsdp == QSDPConfig(
        weight_bits=5,
        grad_bits=4,
        embedding_bits=7,
        local_grad_bits=6,
        bucket_size=64,
        weight_bucket_size=32,
        rounding="nearest",
        levels="learned",
        grad_rotation="hadamard",
        level_steps=(3, 20),
        policy=(("blocks.0.*", 8), ("*.attn.*", (8, 4))),
        budget=3.5,
        warmup_steps=2,
        warmup_bits=8,
        gather="once",
        reduce="two-hop",
        ranks_per_node=2,
        seed=0,
    )
    assert (config.run.replicas, config.wire.qsdp_errors) == (2, True)
    delta = parse([*DELTA_WIRE, "--out", "here"])
    assert delta.qsdp == QSDPConfig(
        **dict.fromkeys(("weight_bits", "grad_bits"), 4),
        gather="delta",
        delta_room=0.1,
        delta_redraw_every=50,
        delta_codes="node",
        grad_budget=3.5,
    )
    # A field that no flag sets would be out of reach here, and a flag that sets none is missing.
    settings = {field.name for field in fields(QSDPConfig)} - {"seed"}
    flags = {field.name.removeprefix("qsdp_") for field in fields(WireFlags)} - {"bits", "errors"}
    assert settings == flags
    wires = (config.qsdp, delta.qsdp)
    for name in settings:
        assert any(getattr(wire, name) != getattr(QSDPConfig(), name) for wire in wires), name
    file = tmp_path / "config.toml"
    for each in (config, delta):
        file.write_text(each.to_toml(), encoding="utf-8")
        assert parse(["--config", str(file)]) == each


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--qsdp-weight-bits", "16"], "--qsdp-gather delta is for weights of 8 bits or fewer, "),
        (["--qsdp-reduce", "flat"], "--qsdp-delta-codes is 'node' beside --qsdp-reduce flat, "),
        (["--qsdp-bucket-size", "256"], "--qsdp-bucket-size is 256 .* --qsdp-weight-bucket-size N"),
    ],
)
def test_what_goes_with_no_kept_grids_is_refused_by_its_flag(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        parse([*DELTA_WIRE, *flags])


def test_a_budget_alone_measures_at_8_bits() -> None:
    assert parse(["--qsdp-budget", "3"]).qsdp == QSDPConfig(budget=3.0)
    assert parse(["--qsdp-budget", "3", "--qsdp-gather", "once"]).qsdp == QSDPConfig(
        budget=3.0, gather="once"
    )
    assert parse(["--qsdp-budget", "3", "--qsdp-bits", "5"]).qsdp == QSDPConfig(
        weight_bits=5, grad_bits=5, budget=3.0
    )


def test_a_budget_of_gradients_takes_the_place_of_their_bits() -> None:
    budget = ["--qsdp-grad-budget", "3"]
    assert parse(budget).qsdp == parse([*budget, "--qsdp-grad-bits", "8"]).qsdp
    assert parse(budget).qsdp == QSDPConfig(weight_bits=32, grad_bits=8, grad_budget=3.0)
    assert parse([*budget, "--qsdp-weight-bits", "4"]).qsdp == QSDPConfig(
        weight_bits=4, grad_bits=8, grad_budget=3.0
    )
    assert parse([*budget, "--qsdp-bits", "5"]).qsdp == QSDPConfig(
        weight_bits=5, grad_bits=5, grad_budget=3.0
    )
    with pytest.raises(UserError, match=r"^--qsdp-budget is 4 beside --qsdp-grad-budget 3, "):
        parse([*budget, "--qsdp-budget", "4"])
    late = ["--qsdp-warmup-steps", "9", "--steps", "9"]
    with pytest.raises(UserError, match=r"^--qsdp-grad-budget is allotted after"):
        parse([*budget, *late])


def test_auto_is_taken_as_a_flag_and_from_a_file_and_has_no_wire_yet(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(parse(["--qsdp-bits", "auto"]).to_toml(), encoding="utf-8")
    for config in (parse(["--qsdp-bits=auto"]), parse(["--config", str(file)])):
        assert (config.wire.qsdp_bits, config.qsdp, config.out_dir.name.split("-")[2]) == (
            *("auto", None, "auto"),
        )
    assert parse(["--config", str(file), "--qsdp-bits", "4"]).wire.qsdp_bits == 4


@pytest.mark.parametrize("field", [f.name for f in fields(WireFlags)])
def test_no_flag_of_the_wire_is_ignored_under_stock_fsdp2(field: str) -> None:
    value = parse(DELTA_WIRE if "delta" in field else FULL_WIRE).settings()[field]
    bits = ("qsdp_bits", "qsdp_weight_bits", "qsdp_grad_bits")
    if field in (*bits, "qsdp_budget", "qsdp_grad_budget"):
        assert TrainConfig.of(**{field: value or 8}).qsdp is not None
        return
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} is given without"):
        TrainConfig.of(**{field: value})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("*=4", (("*", 4),)),
        (" a.*=8 , *.b=16/2", (("a.*", 8), ("*.b", (16, 2)))),
        ("[ab]=x=3", (("[ab]=x", 3),)),
    ],
)
def test_a_policy_is_read_as_written(text: str, policy: object) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize("text", ["", "a", "=4", "a=", "a=4/", "a=/4", "a=4,", "a=-4", "a=4.0"])
def test_half_a_policy_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--qsdp-policy holds '.*': give PATTERN=BITS"):
        TrainConfig.of(qsdp_bits=8, qsdp_policy=text)


def test_runs_that_differ_in_wire_optimizer_or_seed_get_folders_of_their_own() -> None:
    four = ["--qsdp-bits", "4"]
    flags = [[], ["--qsdp-bits", "8"], four, ["--cram"], ["--seed", "1"], ["--replicas", "2"]]
    flags += [[*four, "--qsdp-gather", "once"], [*four, "--qsdp-levels", "learned"]]
    flags += [[*four, "--qsdp-policy", f"{pattern}=8"] for pattern in ("*.up.*", "*.down.*")]
    flags += [["--qsdp-budget", bits] for bits in ("3", "3.5")]
    folders = {parse(f).out_dir for f in flags}
    assert len(folders) == len(flags)
    assert all(folder.parent == Path("out") for folder in folders)


def test_help_explains_every_flag_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = """model data tokenizer steps batch-size grad-accum seq-len lr min-lr warmup-steps
        weight-decay beta2 clip-grad seed precision out eval-every eval-batches save-every keep
        save-async resume qsdp-bits qsdp-weight-bits qsdp-grad-bits qsdp-bucket-size qsdp-rounding
        cram cram-sparsity cram-rho no-cram-plus config replicas qsdp-embedding-bits
        qsdp-local-grad-bits qsdp-levels qsdp-level-steps qsdp-policy qsdp-budget qsdp-warmup-steps
        qsdp-warmup-bits qsdp-gather qsdp-reduce qsdp-ranks-per-node qsdp-errors
        max-bad-steps qsdp-weight-bucket-size qsdp-delta-room qsdp-delta-redraw-every
        qsdp-grad-budget qsdp-grad-rotation text-field"""
    for flag in flags.split():
        assert f"--{flag}" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "'stepz'"),
        ('steps = "many"', "an integer"),
        ("steps = true", "an integer"),
        ("cram = 1", "true or false"),
        ("cram_sparsity = 0.5", "a list of numbers"),
        ("cram_sparsity = [true]", "a list of numbers"),
        ("qsdp_level_steps = [1.5]", "a list of integers"),
        ("qsdp_level_steps = 10", "a list of integers"),
        ('qsdp_bits = "8"', "an integer or auto"),
        ("qsdp-policy = ['*=4']", "a string"),
        ("steps = ", "not a TOML file"),
        ("[model]\nname = 3", "a string"),
        ("lr = 1" + "0" * 400, "beyond all floats"),
        ("cram-sparsity = [1" + "0" * 400 + "]", "beyond all floats"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_config_file(file)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 100), (0, 5), (100, 100), (1000, 20), (4, 5)])
def test_the_learning_rate_warms_up_then_falls_to_its_minimum(warmup: int, steps: int) -> None:
    config = TrainConfig.of(warmup_steps=warmup, steps=steps, lr=1e-2)  # to a tenth
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 < rate <= 1e-2 for rate in rates)
    rising = rates[:warmup]
    assert rising == sorted(rising)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup + 1 < steps:
        assert rates[warmup] == pytest.approx(1e-2)
        assert rates[-1] == pytest.approx(1e-3)
