"""With the grids of a checkpoint a run goes on bit for bit; other tensors are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import qsdp
from qsdp import checkpoint
from tests_distributed.support.delta import decoded, installed, sent_while, take_sgd_step
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run

CONFIG: dict[str, Any] = {"gather": "delta", "weight_bits": 4, "grad_bits": 8}
CONFIG |= {"weight_bucket_size": 16, "delta_redraw_every": 4}
WIDE = {"width": 32, "hidden": 64}
BEFORE, AFTER = 5, 4


@dataclass(frozen=True)
class Case:
    """A training that is saved and goes on."""

    ranks: int = 3
    config: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    replicas: str = ""
    """"native": FSDP2's own; "qsdp": those of ``install``."""
    masks: bool = False


class Training:
    """A sharded toy with a wire and AdamW; under masks if the case has some."""

    def __init__(self, case: Case) -> None:
        self.case, self.is_dense, mesh, replicate = case, True, None, None
        if case.replicas:
            names = ("replicate", "shard")
            mesh = init_device_mesh("cpu", (2, case.ranks // 2), mesh_dim_names=names)
            if case.replicas == "qsdp":
                mesh, replicate = mesh["shard"], mesh["replicate"]
        self.model = shard(make_model(1, **{"num_layers": 1, **case.model}), mesh=mesh)
        config = qsdp.QSDPConfig(**{**CONFIG, **case.config})
        self.handle = qsdp.install(self.model, config, replicate_mesh=replicate)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.03)

    def prune(self) -> None:
        """Let the largest weights of the blocks' matrices alone be kept, and travel."""
        masks: dict[nn.Parameter, Tensor] = {}
        for name, p in self.model.named_parameters():
            if self.case.masks and name.startswith("blocks.") and p.dim() == 2:
                masks[p] = (p.to_local().abs() > 0.1) if self.is_dense else p.to_local() != 0
        self.masks = masks
        self.zero()
        if masks:
            self.handle.set_support(masks)

    @torch.no_grad()
    def zero(self) -> None:
        """Set what is pruned to zero."""
        for p, mask in self.masks.items():
            p.to_local().masked_fill_(~mask, 0.0)

    def take(self, step: int) -> float:
        loss: Any = self.model(*make_batch(self.model, step))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.zero()
        return float(loss.detach())

    def save(self, folder: Path) -> Path:
        meta = {"wire": self.handle.state_dict()}
        return checkpoint.save(
            folder, 1, self.model, self.optimizer, meta, tensors=self.handle.grids()
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, as docs/usage.md has it."""
        checkpoint.load(path, self.model, self.optimizer)
        self.is_dense = False
        self.prune()
        state = checkpoint.read_meta(path)["wire"]
        self.handle.load_state_dict(state)
        assert state["grids"] == self.handle.state_dict()["grids"] != ""
        grids = self.handle.grids()
        assert all(each.isnan().all() for name, each in local(grids) if name.endswith(".min"))
        checkpoint.load_tensors(path, grids)
        self.handle.load_grids(grids)

    def rest(self) -> list[Any]:
        """Losses from a checkpoint on, and all that is there at the end."""
        losses = [self.take(step) for step in range(BEFORE, BEFORE + AFTER)]
        tensors = [*decoded(self.model).items(), *local(self.handle.grids())]
        return [losses, self.handle.state_dict(), {name: raw(each) for name, each in tensors}]


def local(grids: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    assert all(isinstance(each, DTensor) for each in grids.values())
    return [(name, each.to_local()) for name, each in grids.items() if isinstance(each, DTensor)]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _goes_on(case: Case, folder: Path) -> tuple[bool, bool, dict[str, int]]:
    """Whether a run with and one without grids equals one that was not interrupted.

    And what loading the grids has counted.
    """
    whole = Training(case)
    whole.prune()
    for step in range(BEFORE):
        whole.take(step)
    path = whole.save(folder)
    expected = whole.rest()
    again = Training(case)
    counts = sent_while(again.handle, lambda: again.load(path))
    goes_on = again.rest() == expected
    anew = Training(case)
    anew.load(path)
    anew.handle.load_grids({})
    return goes_on, anew.rest()[0] == expected[0], counts


CASES = {
    "plain": Case(),
    "frozen and tied": Case(2, {"rounding": "nearest"}, {"frozen": True, "tied": True}),
    "masks": Case(2, {"weight_bits": 3}, masks=True),
    "budget": Case(2, {"weight_bucket_size": 128, "budget": 5.5, "warmup_steps": 1}, WIDE),
    "what gradients learn": Case(
        2, {"grad_budget": 4.5, "levels": "learned", "level_steps": (2, BEFORE + 2)}
    ),
    "warm-up": Case(2, {"warmup_steps": BEFORE + 1}),
    "native replicas": Case(4, replicas="native"),
    "replicas": Case(4, {"reduce": "two-hop", "ranks_per_node": 1}, replicas="qsdp"),
}


HEAVY = ("plain", "masks", "frozen and tied", "warm-up", "native replicas")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in HEAVY)) for n in CASES]
)
def test_a_run_goes_on_bit_for_bit_with_the_grids_of_its_checkpoint(
    run: Run, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    everyone = run(case.ranks, _goes_on, case, tmp_path)
    assert [goes_on for goes_on, *_ in everyone] == [True] * case.ranks
    if name != "warm-up":  # of which nothing was drawn yet
        assert not any(goes_on for _, goes_on, _ in everyone)
    for *_, counts in everyone:
        assert counts["gather_sent_bytes"] > 0
        assert counts["changed_codes"] == counts["redrawn_buckets"] == 0


# --- what grids are -----------------------------------------------------------------------------


def _described() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Tensor]]]:
    """How grids are cut on two replicas of two ranks, their least and greatest steps, copies."""
    training = Training(Case(4, replicas="native"))
    training.prune()
    unsent = training.handle.grids()
    training.take(0)
    training.take(1)
    grids = training.handle.grids()
    for _, each in local(grids):
        each.fill_(9)
    again = training.handle.grids()
    cut = {
        name: (each.dtype, tuple(each.shape), each.placements)
        for name, each in again.items()
        if isinstance(each, DTensor)
    }
    steps = {n: sorted({*each.tolist()}) for n, each in local(again) if n.endswith(".epoch")}
    return cut, steps, [dict(local(each)) for each in (unsent, again)]


def test_grids_are_dtensors_cut_as_the_parameters_are(run: Run) -> None:
    everyone = run(4, _described)
    qkv = "blocks.0.qkv.weight"
    for cut, steps, (unsent, again) in everyone:
        assert cut == everyone[0][0]
        # 30 rows of 10 on two ranks: 150 values in buckets of 16, the last one short.
        placements = (Replicate(), Shard(0))
        assert cut[f"{qkv}.min"] == (torch.float32, (20,), placements)
        assert cut[f"{qkv}.scale"] == (torch.float32, (20,), placements)
        assert cut[f"{qkv}.epoch"] == (torch.int32, (20,), placements)
        assert not any(name.startswith("norm.") for name in cut)  # it travels raw
        assert steps[f"{qkv}.epoch"] in ([0], [0, 1])
        assert unsent.keys() == again.keys() == cut.keys()
        for name, values in unsent.items():
            assert values.isnan().all() if name.endswith(".min") else not values.any()
        assert again[f"{qkv}.min"].isfinite().all()
    # Seven rows of ten on the first rank, six on the second: it has a bucket less.
    rows = [each[2][1]["embed.weight.min"].isnan().tolist() for each in everyone]
    assert rows == [[False] * 5, [False] * 4 + [True]] * 2


def _empty(gather: str) -> tuple[dict[str, Tensor], str]:
    model, handle = installed(2, {"gather": gather, "weight_bits": 4, "grad_bits": 32})
    take_sgd_step(model, 0, 0.1)
    grids = handle.grids()
    handle.load_grids(grids)
    text: str = handle.state_dict()["grids"]
    return grids, text


@pytest.mark.parametrize(("ranks", "gather"), [(1, "delta"), (2, "once"), (2, "twice")])
def test_where_nothing_is_kept_there_are_no_grids(run: Run, ranks: int, gather: str) -> None:
    for grids, text in run(ranks, _empty, gather):
        assert grids == {}
        assert text == ""


# --- refusals -----------------------------------------------------------------------------------

QKV = "blocks.0.qkv.weight"
Change = Callable[[dict[str, Tensor]], Any]


def _with(name: str, tensor: Callable[[DTensor], Any]) -> Change:
    return lambda grids: {**grids, name: tensor(grids[name])}  # type: ignore[arg-type]


def _other(values: Tensor, of: DTensor, placement: Any = None) -> DTensor:
    return DTensor.from_local(values, of.device_mesh, [placement or Shard(0)])


WRONG: dict[str, tuple[Change, str]] = {
    "no dict": (lambda grids: [*grids], r"grids is \[.*\]: give the dict that handle\.grids"),
    "missing": (lambda grids: {n: t for n, t in grids.items() if n != f"{QKV}.scale"}, "lack"),
    "odd": (lambda grids: grids | {"norm.weight.min": grids[f"{QKV}.min"]}, "norm.weight.min"),
    "plain": (_with(f"{QKV}.min", lambda t: t.to_local()), f"{QKV}.min is torch.float32"),
    "short": (_with(f"{QKV}.min", lambda t: _other(t.to_local()[1:], t)), r"shape \(18,\)"),
    "dtype": (_with(f"{QKV}.epoch", lambda t: t.long()), "torch.int64"),
    "whole": (_with(f"{QKV}.min", lambda t: _other(t.to_local(), t, Replicate())), "cut as its"),
    "late": (_with(f"{QKV}.epoch", lambda t: t + 7), "the clock is at step 1"),
    "early": (_with(f"{QKV}.epoch", lambda t: t - 1), "holds step -1"),
}


def _refused(odd: int | None) -> tuple[dict[str, str], bool]:
    """What is said of wrong grids on all ranks or one, and whether anything was changed."""
    model, handle = installed(2, CONFIG)
    take_sgd_step(model, 0, 0.1)
    grids, said = handle.grids(), {}
    before = handle.traffic.snapshot()
    for name, (change, _) in WRONG.items():
        wrong = change(grids) if odd in (None, dist.get_rank()) else grids
        with pytest.raises((ValueError, RuntimeError)) as raised:
            handle.load_grids(wrong)
        said[name] = f"{raised.type.__name__}: {raised.value}"
    same = handle.traffic.snapshot() == before
    same &= [raw(t) for _, t in local(handle.grids())] == [raw(t) for _, t in local(grids)]
    return said, same


@pytest.mark.parametrize("odd", [None, 1])
def test_other_tensors_are_refused_on_all_ranks(run: Run, odd: int | None) -> None:
    for rank, (said, same) in enumerate(run(2, _refused, odd)):
        assert same
        for name, (_, words) in WRONG.items():
            is_mine = odd in (None, rank)
            assert said[name].startswith("ValueError: " if is_mine else "FactsDiffer: rank 1 ")
            assert re.search(words, said[name]), (name, said[name])
            assert said[name].endswith(".")
            assert "\n" not in said[name]


def _with_another_gather() -> str:
    model, handle = installed(2, CONFIG)
    grids = handle.grids()
    handle.remove()
    handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=4, grad_bits=4))
    with pytest.raises(ValueError) as raised:
        handle.load_grids(grids)
    return str(raised.value)


def test_grids_are_refused_where_no_changes_are_sent(run: Run) -> None:
    for sentence in run(2, _with_another_gather):
        assert "embed.weight.min" in sentence
        assert "delta" in sentence


def _apart() -> tuple[str, bool]:
    """What is said where one rank gives none, and whether training goes on after it."""
    model, handle = installed(2, CONFIG)
    take_sgd_step(model, 0, 0.1)
    grids = handle.grids()
    with pytest.raises(RuntimeError) as raised:
        handle.load_grids({} if dist.get_rank() else grids)
    return str(raised.value), math.isfinite(take_sgd_step(model, 1, 0.1))


def test_ranks_that_give_other_grids_say_so(run: Run) -> None:
    for sentence, goes_on in run(2, _apart):
        assert sentence.startswith("rank 1 is at handle.load_grids with grids none, but rank 0")
        assert goes_on


def _states() -> list[bool]:
    """Whether a state's text is that of another handle's."""
    texts = []
    for config in ({}, {}, {"weight_bits": 5}, {"weight_bucket_size": 32}, {"rounding": "nearest"}):
        _, handle = installed(2, {**CONFIG, **config})
        state = json.loads(json.dumps(handle.state_dict()))
        older = {key: value for key, value in state.items() if key != "grids"}
        handle.load_state_dict(older)
        for wrong in (None, 3):
            with pytest.raises(ValueError, match="the state's grids is"):
                handle.load_state_dict({**state, "grids": wrong})
        texts.append(state["grids"])
    return [text == texts[0] for text in texts]


def test_a_state_says_how_rows_are_laid_out(run: Run) -> None:
    assert run(2, _states) == [[True, True, False, False, False]] * 2
