"""The command line on several ranks: refusals, whole small runs, and torchrun's part in a mistake.

Ranks are those of a pool, but where the launcher itself is what a test is about.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qsdp.checkpoint import TensorReader
from qsdp.commands import compress
from qsdp.export import read_mask
from qsdp.models.gpt2.model import GPT
from qsdp.ops import native
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_
from qsdp.train.trained_model import open_trained_model
from tests.support import patience
from tests.support.bad_inputs import DATA, FLAGS, TEXT, shards_with_late_ids
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, start

WIDTH = 64


def num_values(vocab_size: int) -> tuple[int, int]:
    """Values of the blocks of SMALL's model and of its root, rows padded to a multiple of two."""
    return 2 * (2 * WIDTH + 12 * WIDTH**2), WIDTH * (vocab_size + vocab_size % 2 + 64 + 1)


def train(
    run_jobs: Jobs,
    tmp_path: Path,
    *jobs: tuple[str, list[str]],
    num_ranks: int,
    in_full: bool = False,
) -> tuple[str, list[tuple[list[Any], Any]]]:
    """Run small jobs one after another, into the folder named with each.

    Returns all that was printed, and metrics and summary of each folder.
    """
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    printed = run_jobs.succeed(
        (num_ranks,),
        *(
            ["--data", str(text), "--out", str(tmp_path / name), *SMALL, *flags]
            for name, flags in jobs
        ),
        in_full=in_full,
    )
    folders = [tmp_path / name for name in dict.fromkeys(name for name, _ in jobs)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    return printed, [*zip(map(read_metrics, folders), summaries, strict=True)]


def test_bad_inputs_are_refused_by_both_ranks_and_named_by_the_first(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    shards = shards_with_late_ids(tmp_path / "shards")
    # What a flag's mistake is, no rank asks another: some show that both end.
    some = FLAGS[::9]
    cases = [*some, *DATA]
    flags = [[bad.arguments(tmp_path)] * 2 for bad in cases]
    for both in flags[len(some) :]:
        both[:] = [[*own, "--out", str(tmp_path / "out")] for own in both]
    # Found by one rank alone, but only after all have met.
    homes = [tmp_path / f"home-{rank}" for rank in (0, 1)]
    texts = {"other.txt": (TEXT, TEXT[::-1]), "shorter.txt": (TEXT, TEXT[:-9])}
    for name, own in (texts | {"binary": (TEXT, "\0")}).items():
        for rank, home in enumerate(homes):
            home.mkdir(exist_ok=True)
            (home / name).write_bytes(own[rank].encode().replace(b"\0", b"\xff"))
    good = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    further = [
        ("not UTF-8 text", ["--data", "binary"], ["--data", "binary"]),
        ("hash of a sample of the tokens", ["--data", "other.txt"], ["--data", "other.txt"]),
        ("length of the training split", ["--data", "shorter.txt"], ["--data", "shorter.txt"]),
        ("--steps is 3 on rank 0 and 5 on rank 1", ["--steps", "3"], ["--steps", "5"]),
        ("--grad-accum is 1 on rank 0 and 2 on rank 1", [], ["--grad-accum", "2"]),
        ("--seed is 0 on rank 0 and 2 on rank 1", [], ["--seed", "2"]),
        ("--cram is True on rank 0 and False on rank 1", ["--cram"], []),
        ("--qsdp-bits is 8 on rank 0 and unset on rank 1", ["--qsdp-bits", "8"], []),
        (
            "--replicas is 2, which leaves each replica one rank and nothing to shard",
            *2 * (["--replicas", "2", "--qsdp-bits", "8"],),
        ),
        (
            "holds the token id 50",
            *2 * (["--data", str(shards), "--steps", "50", "--batch-size", "1"],),
        ),
    ]
    flags += [[[*good, *own] for own in both] for _, *both in further]
    found = run_jobs.ends((2,), *flags, homes=homes)
    said = [*(bad.said for bad in cases), *(expected for expected, *_ in further)]
    assert len(found) == len(said) > 20
    for (first, second), expected in zip(found, said, strict=True):
        assert first.status == second.status == 2, first
        assert re.fullmatch(r"error: \S.*[^.]\.\n", first.complaint), first
        assert expected in first.complaint
        # A mistake in the flags could be this rank's alone, so it speaks, after its patience.
        assert re.fullmatch(r"(error on rank 1: \S.*[^.]\.\n)?", second.complaint), second


def test_a_mistake_of_one_rank_or_of_all_ends_a_launch_soon_with_one_sentence(
    tmp_path: Path,
) -> None:
    # One launch for both mistakes, since starting it takes longest: torchrun begins anew once.
    program = tmp_path / "mistaken.py"
    program.write_text(
        "import os\n"
        "from qsdp.commands import exit, train\n"
        "data = os.path.dirname(__file__)\n"
        f"exit._PATIENCE_S = {patience.seconds()}\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    exit._PATIENCE_S = 1.0\n"
        "    data = 'stdlib' if os.environ['RANK'] == '0' else 'missing.txt'\n"
        "out = os.path.join(os.path.dirname(__file__), 'out')\n"
        "exit.run(lambda: train.main(['--data', data, '--out', out]))\n"
    )
    job = start(program=str(program), launcher=("--standalone", "--max-restarts", "1"))
    assert job.wait() == 1
    one, both = job.output.split("error: ")  # which the first rank says, for all
    assert "error on rank 1: --data missing.txt does not exist" in one
    # Or the first rank would have given up its wait for the second: the launcher ended it sooner.
    assert "did not all meet" not in job.output
    assert "meta.json" in both
    assert "error on rank" not in both
    assert "mistaken.py FAILED" in both
    assert set(re.findall(r"exitcode *: (-?\d+)", job.output)) == {"2"}
    assert 'mistaken.py", line' not in job.output


def test_a_small_run_leaves_all_that_is_promised(run_jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--steps", "6", "--eval-every", "3", "--save-every", "2", "--grad-accum", "2"]
    flags += ["--qsdp-bits", "8", "--cram", "--warmup-steps", "100"]
    printed, [(lines, summary)] = train(
        run_jobs, tmp_path, ("out", flags), num_ranks=2, in_full=True
    )
    assert "pruned in one shot" in printed
    assert f"kernels: {native.capability()}" in printed
    assert summary["kernels"] == native.capability()

    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] > 0
        assert line["step_s"] > 0
        assert line["tokens_per_s"] > 0
        assert line["grad_norm"] > 0
        assert line["lr"] > 0
        assert 0 < line["wire_bytes_sent"] < 0.265 * line["wire_bytes_fp32"]
    assert lines[2]["val_loss"] > 0
    assert lines[2]["val_loss_quantized"] > 0

    assert list(summary["one_shot"]) == ["0.5", "0.7", "0.8", "0.9"]
    assert summary["world_size"] == 2
    assert summary["val_loss"] > 0
    assert summary["val_loss"] != summary["val_loss_quantized"]
    assert abs(summary["val_loss"] - summary["val_loss_quantized"]) < 0.1
    assert summary["step_s_median"] > 0
    assert 0 < summary["mfu"] < 1
    assert summary["versions"]["torch"]
    assert summary["wire"]["other_bytes_per_step"] > 0
    # Two passes, in each two micro-batches, which gather the blocks twice and the root once, and
    # one reduce.
    blocks, root = num_values(vocab_size=len(set(TEXT)))
    own = root - WIDTH * (len(set(TEXT)) % 2)  # in fp32 no padding counts
    gathers, reduces = 2 * 2 * (2 * blocks + own), 2 * (blocks + own)
    assert summary["wire"]["fp32_bytes_per_step"] == 4 * (gathers + reduces) / 2
    config = tomllib.loads((out / "config.toml").read_text())
    assert summary["config"] == config | {"resume": "auto", "take_over": False}
    assert config["qsdp_bits"] == 8
    names = {path.name for path in (out / "plots").iterdir()}
    plots = ("loss", "one_shot", "pruned", "wire", "step_time", "wire_time")
    assert names == {f"{plot}.png" for plot in plots}
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000006"}


def test_stock_fsdp2_runs_without_our_hooks_and_says_what_it_sends(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    flags = ["--steps", "2", "--precision", "bf16"]
    _, [(_, summary)] = train(run_jobs, tmp_path, ("out", flags), num_ranks=2)
    assert summary["val_loss_quantized"] is None
    blocks, root = num_values(vocab_size=len(set(TEXT)))
    wire = summary["wire"]
    # What is asked for in fp32 has no padded rows.
    own = root - WIDTH * (len(set(TEXT)) % 2)
    assert wire["fp32_bytes_per_step"] == 4 * (3 * blocks + 2 * own) / 2
    # Gathers in bf16; reduces in fp32, which gloo sends twice.
    assert wire["sent_bytes_per_step"] == (2 * (2 * blocks + root) + 8 * (blocks + root)) / 2
    assert "stock FSDP2" in wire["source"]
    assert wire["inter_node_bytes_per_step"] == {"gather": 0, "reduce": 0}
    assert set(wire["seconds_per_step"].values()) == {None}
    assert wire["kept_bytes"] == 0


def test_a_run_with_the_full_wire_says_what_it_took(run_jobs: Jobs, tmp_path: Path) -> None:
    flags = ["--qsdp-bits", "4", "--qsdp-gather", "once", "--qsdp-levels", "learned"]
    flags += ["--qsdp-level-steps", "2,5", "--qsdp-policy", "blocks.0.attn.*=8,*.mlp.*=6/3"]
    flags += ["--qsdp-warmup-steps", "1", "--qsdp-warmup-bits", "8", "--qsdp-errors", "--cram"]
    flags += ["--steps", "5", "--eval-every", "2", "--one-shot", "none"]
    printed, [(lines, summary)] = train(
        run_jobs, tmp_path, ("out", flags), num_ranks=2, in_full=True
    )
    assert "learned levels, gathered once" in printed
    assert "Time on the wire" in printed
    assert "between nodes" not in printed

    parts = [f"{d}_{p}_s" for d in ("gather", "reduce") for p in ("encode", "wire", "decode")]
    for line in lines:
        assert all(line[part] > 0 for part in parts)
        assert line["gather_bytes"] + line["reduce_bytes"] == line["wire_bytes_sent"]
        assert line["gather_inter_node_bytes"] == line["reduce_inter_node_bytes"] == 0
    assert sum(line[p] for line in lines for p in parts) < sum(line["step_s"] for line in lines)
    assert lines[0]["reduce_bytes"] > lines[1]["reduce_bytes"]  # the warm-up's
    wire = summary["wire"]
    assert wire["inter_node_bytes_per_step"] == {"gather": 0, "reduce": 0}
    assert wire["kept_bytes"] > 0
    assert wire["seconds_per_step"].keys() == set(parts)
    for part in parts:
        mean = sum(line[part] for line in lines) / len(lines)
        assert wire["seconds_per_step"][part] == pytest.approx(mean)

    # At each validation, that of the end included.
    assert [line["step"] for line in lines if "wire_errors" in line] == [2, 4, 5]
    for line in (lines[1], lines[3], lines[4]):
        errors = line["wire_errors"]
        assert len(errors) == 2 * 6 + 3
        for name, error in errors.items():
            if "norm" in name:
                assert error == {"weight": None, "grad": None}  # they travel raw
            else:
                assert 0 < error["weight"] < 0.5
                assert 0 < error["grad"] < 2
        attention = [errors[f"blocks.{block}.attn.qkv.weight"] for block in range(2)]
        for part in ("weight", "grad"):
            # 8 bits in the first block, 4 in the other.
            assert attention[0][part] < 0.3 * attention[1][part]
    names = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert {"wire_time.png", "errors.png"} < names


def test_nodes_that_do_not_divide_the_ranks_are_refused_by_the_flags_name(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--qsdp-bits", "8"]
    by_node = [*flags, "--qsdp-gather", "delta", "--qsdp-delta-codes", "node"]
    uneven = r"--qsdp-ranks-per-node is 3, .*split the 4 ranks.*"
    wrong = {
        uneven: [*flags, "--qsdp-reduce", "two-hop", "--qsdp-ranks-per-node", "3"],
        rf"{uneven} --qsdp-delta-codes node.*": [*by_node, "--qsdp-ranks-per-node", "3"],
        r"delta_codes is 'node', but .* do not fill several nodes of several ranks.*": by_node,
    }
    for said, ends in zip(wrong, run_jobs.ends((4,), *wrong.values()), strict=True):
        assert [end.status for end in ends] == [2, 2, 2, 2]
        first, *others = (end.complaint for end in ends)
        assert re.fullmatch(rf"error: {said}\.\n", first), first
        assert others == ["", "", ""]


@pytest.mark.heavy  # tests_distributed/comm/test_nodes.py counts the same
def test_two_hops_halve_what_leaves_a_node(run_jobs: Jobs, tmp_path: Path) -> None:
    flags = ["--steps", "2", "--one-shot", "0.5", "--qsdp-bits", "8", "--qsdp-ranks-per-node", "2"]
    flags += ["--qsdp-reduce"]
    jobs = [(reduce, [*flags, reduce]) for reduce in ("flat", "two-hop")]
    printed, found = train(run_jobs, tmp_path, *jobs, num_ranks=4)
    assert printed.count("of gradients, between nodes") == 2
    flat, two_hop = (summary["wire"]["inter_node_bytes_per_step"] for _, summary in found)
    for lines, summary in found:
        for direction, mean in summary["wire"]["inter_node_bytes_per_step"].items():
            assert mean == sum(line[f"{direction}_inter_node_bytes"] for line in lines) / 2
    # A ring over both nodes sends three payloads out of each, two hops send two; a flat reduce
    # sends four rows out of each node, two hops send two.
    assert two_hop["gather"] == pytest.approx(2 / 3 * flat["gather"])
    assert two_hop["reduce"] == pytest.approx(1 / 2 * flat["reduce"])


def test_replicas_train_as_one_model_sharded_over_all_ranks(run_jobs: Jobs, tmp_path: Path) -> None:
    stock = ["--steps", "2", "--one-shot", "0.5,2:4"]
    replicas = [*stock, "--replicas", "2"]
    printed, found = train(
        run_jobs,
        tmp_path,
        ("stock", stock),
        ("stock-replicas", replicas),
        ("raw-replicas", [*replicas, "--qsdp-bits", "32"]),
        ("coded-replicas", [*replicas, "--qsdp-bits", "8"]),
        num_ranks=4,
    )
    assert printed.count("2 replicas") == 3
    losses = [
        [line["loss"] for line in lines] + [summary["val_loss"], *summary["one_shot"].values()]
        for lines, summary in found
    ]
    expected, stock_replicas, raw_replicas, coded_replicas = losses
    assert stock_replicas == pytest.approx(expected, rel=1e-5)
    assert raw_replicas == pytest.approx(expected, rel=1e-5)
    assert coded_replicas == pytest.approx(expected, rel=1e-2)
    assert coded_replicas != raw_replicas
    # Two ranks share a replica; a shard is half the model, and the two replicas average it.
    blocks, root = num_values(vocab_size=len(set(TEXT)))
    gathered, reduced = (2 * blocks + root) / 2, (blocks + root) / 2
    _, stock_wire, raw_wire, coded_wire = (summary["wire"] for _, summary in found)
    own = root - WIDTH * (len(set(TEXT)) % 2)  # in fp32 no padding counts
    in_fp32 = 4 * ((2 * blocks + own) + 2 * (blocks + own)) / 2
    assert stock_wire["fp32_bytes_per_step"] == in_fp32
    # gloo's reduce-scatter moves twice as much.
    assert stock_wire["sent_bytes_per_step"] == 4 * (gathered + 3 * reduced)
    assert raw_wire["fp32_bytes_per_step"] == in_fp32
    assert coded_wire["sent_bytes_per_step"] < 0.265 * coded_wire["fp32_bytes_per_step"]


def test_a_run_goes_on_with_other_replicas_and_another_wire(run_jobs: Jobs, tmp_path: Path) -> None:
    flags, on = ["--one-shot", "none"], ["--resume", str(tmp_path / "out")]
    printed, [(lines, summary)] = train(
        run_jobs,
        tmp_path,
        ("out", [*flags, "--qsdp-budget", "4.5", "--replicas", "2", "--steps", "2"]),
        ("out", [*flags, "--qsdp-bits", "8", "--replicas", "1", "--steps", "3", *on]),
        ("out", [*flags, "--replicas", "2", "--steps", "5", *on]),
        num_ranks=4,
    )
    assert "qsdp_budget 4.5 -> unset, replicas 2 -> 1" in printed.replace("steps 2 -> 3", "")
    assert "qsdp_bits 8 -> unset, replicas 1 -> 2" in printed
    # Only the steps with these settings are measured.
    assert (summary["steps"], summary["steps_measured"]) == (5, 2)
    losses = [line["loss"] for line in lines]
    assert len(losses) == 5
    assert losses == pytest.approx([losses[0]] * 5, rel=0.2)


def test_a_run_on_two_ranks_is_compressed_by_one_and_evaluated_on_any_number(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run, export = tmp_path / "run", tmp_path / "export"
    targets = ["0.7", "2:4", "4bit"]
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(run), *SMALL, "--steps", "2"]
    flags += ["--one-shot", ",".join(targets), "--eval-batches", "3"]
    evaluation = ["evaluate", str(run), "--targets", ",".join(targets), "--out"]
    bad = ["evaluate", str(run), "--targets", "2:5"]
    good = [*evaluation, str(tmp_path / "two")]
    found = run_jobs.ends((2,), flags, good, bad, ["evaluate", str(tmp_path / "no")])
    assert [[end.status for end in ends] for ends in found] == [[0, 0], [0, 0], [2, 2], [2, 2]]
    (said, silence), (said_too, silence_too) = ([e.complaint for e in ends] for ends in found[2:])
    assert re.fullmatch(r"error: .*groups of 5.*\n", said)
    assert re.fullmatch(r"error: .*no complete checkpoint.*\n", said_too)
    assert silence == silence_too == ""

    # The run's checkpoint, written by two ranks, in this one process.
    compress.main([str(run), "--sparsity", "0.7", "--out", str(export)])
    source = open_trained_model(run)
    model = GPT(source.size)
    reader = TensorReader(source.path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
        prunable = Prunable.of(model)
        masks = prune_and_round_(prunable.shards(), Compression(sparsity=0.7), prunable.dims)
    written = load_file(export / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name].view(torch.int32), parameter.view(torch.int32))
    for name, mask in zip(prunable.names, masks, strict=True):
        assert torch.equal(read_mask(export, name), mask.unpack())

    summary = json.loads((run / "summary.json").read_text())
    assert losses(tmp_path / "two") == {None: summary["val_loss"], **summary["one_shot"]}
    alone = [*evaluation, str(tmp_path / "one")]
    exported = ["evaluate", str(export), "--out", str(tmp_path / "exported")]
    run_jobs.succeed((1,), alone, exported)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    loss = losses(tmp_path / "exported")[None]
    assert loss == losses(tmp_path / "one")["0.7"]
    assert loss == pytest.approx(summary["one_shot"]["0.7"], abs=1e-5)


def losses(folder: Path) -> dict[str | None, float]:
    """By target what evaluation.json in ``folder`` says."""
    rows = json.loads((folder / "evaluation.json").read_text())["results"]
    return {row["target"]: row["loss"] for row in rows}
