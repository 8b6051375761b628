"""Two hops and replicas: what each promises beside its numbers.

tests_distributed/simulation/test_combinations.py compares the numbers with the simulation.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import assert_same_run, train


def _hops(ranks_per_node: int, mesh: bool, bits: int) -> Any:
    model = shard(make_model())
    config = qsdp.QSDPConfig(
        weight_bits=bits,
        grad_bits=bits,
        bucket_size=16,
        reduce="two-hop",
        ranks_per_node=None if mesh else ranks_per_node,
    )
    nodes = init_device_mesh("cpu", (4 // ranks_per_node, ranks_per_node)) if mesh else None
    handle = qsdp.install(model, config, node_mesh=nodes)
    result = train(model)
    report = str(handle.report())
    handle.remove()
    train(model, steps=1)
    return result, report


@selection("ranks_per_node", [(2,)], [1, 2, 4])
def test_nodes_are_taken_from_a_mesh_as_from_a_number(run: Run, ranks_per_node: int) -> None:
    by_number = run(4, _hops, ranks_per_node, False, 5)
    by_mesh = run(4, _hops, ranks_per_node, True, 5)
    for (found, report), (expected, _) in zip(by_mesh, by_number, strict=True):
        assert_same_run(found, expected)
        assert f"two hops over {4 // ranks_per_node} nodes of {ranks_per_node} ranks" in report


def _pointless(reduce: str, ranks_per_node: int, replicas: int, grad_bits: int) -> Any:
    mesh = None
    if replicas > 1:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=names)
    model = shard(make_model(), mesh=mesh)
    config = qsdp.QSDPConfig(grad_bits=grad_bits, reduce=reduce, ranks_per_node=ranks_per_node)
    handle = qsdp.install(model, config)
    result = train(model)
    return result, handle.traffic.snapshot(), handle.report().remarks


@pytest.mark.parametrize(
    ("ranks_per_node", "replicas"),
    [pytest.param(4, 1, marks=pytest.mark.heavy), (1, 1), (2, 2)],
)
def test_two_hops_of_which_one_has_nothing_to_do_are_flat_and_the_report_says_so(
    run: Run, ranks_per_node: int, replicas: int
) -> None:
    hops = run(4, _pointless, "two-hop", ranks_per_node, replicas, 4)
    flat = run(4, _pointless, "flat", ranks_per_node, replicas, 4)
    for (found, counts, remarks), (expected, flat_counts, others) in zip(hops, flat, strict=True):
        assert_same_run(found, expected)
        assert counts == flat_counts
        num_nodes = 4 // replicas // ranks_per_node
        said = f"two hops over {num_nodes} nodes of {ranks_per_node} ranks would save nothing"
        assert [*others, f"{said}: reduces and gathers are flat"] == [*remarks]


def _refused(options: dict[str, Any], launched: list[int] | None = None) -> str:
    model = shard(make_model())
    with _launched(launched), pytest.raises(ValueError) as caught:
        qsdp.install(model, qsdp.QSDPConfig(reduce="two-hop", **options))
    return str(caught.value)


def test_ranks_that_do_not_fill_nodes_are_refused(run: Run) -> None:
    for sentence in run(3, _refused, {"ranks_per_node": 2}):
        assert "do not fill nodes of 2 evenly" in sentence


def _nodes_said_twice() -> str:
    mesh = init_device_mesh("cpu", (1, 2))
    with pytest.raises(ValueError) as caught:
        qsdp.install(shard(make_model()), qsdp.QSDPConfig(ranks_per_node=2), node_mesh=mesh)
    return str(caught.value)


def test_nodes_that_are_said_twice_are_refused(run: Run) -> None:
    for sentence in run(2, _nodes_said_twice):
        assert "ranks_per_node is 2 and a node_mesh is given" in sentence


def _launched(sizes: list[int] | None) -> Any:
    """As if launchers had started this many ranks on the node of each rank."""
    size = {} if sizes is None else {"LOCAL_WORLD_SIZE": str(sizes[dist.get_rank()])}
    return mock.patch.dict(os.environ, size)


def _apart(reduce: str, sizes: list[int], ranks_per_node: int | None = None) -> Any:
    model = shard(make_model())
    with _launched(sizes):
        config = qsdp.QSDPConfig(reduce=reduce, ranks_per_node=ranks_per_node)
        handle = qsdp.install(model, config)
    result = train(model, steps=1)
    return result, handle.traffic.snapshot()


def test_launchers_with_different_numbers_of_ranks_train_flat(run: Run) -> None:
    expected = run(3, _apart, "flat", [1, 1, 1])
    one_node = run(3, _apart, "flat", [3, 3, 3])
    for reduce in ("flat", "auto"):
        for sizes, first in (([2, 2, 1], 0), ([1, 2, 2], 1)):
            for rank, (found, counts) in enumerate(run(3, _apart, reduce, sizes)):
                assert_same_run(found, expected[rank][0])
                pair = (first, first + 1)
                # All that a rank gathers goes to the next one, a reduce sends to each the same.
                inside = rank in pair and (rank + 1) % 3 in pair
                sent = one_node[rank][1]["gather_intra_node_bytes"]
                assert counts["gather_intra_node_bytes"] == sent * inside
                assert counts["gather_inter_node_bytes"] == sent * (not inside)
                sent = one_node[rank][1]["reduce_intra_node_bytes"]
                assert counts["reduce_intra_node_bytes"] == sent // 2 * (rank in pair)
                assert counts["reduce_sent_bytes"] == sent
    # What the config says counts, whatever the launchers say.
    for (found, _), (wanted, _) in zip(
        run(3, _apart, "two-hop", [2, 2, 1], 3), expected, strict=True
    ):
        assert_same_run(found, wanted)


def test_two_hops_need_nodes_of_one_size_and_launchers_that_make_sense(run: Run) -> None:
    for sentence in run(3, _refused, {}, [2, 2, 1]):
        assert "these nodes have 2 or 1 ranks" in sentence
    for sentence in run(3, _refused, {}, [3, 2, 2]):
        assert "LOCAL_WORLD_SIZE is [3, 2, 2] on the ranks [0, 1, 2]" in sentence


def _counted(reduce: str, is_mesh: bool, replicas: int) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=("all", "shard"))
    nodes = init_device_mesh("cpu", (replicas, 2 // replicas, 2), mesh_dim_names=("all", "n", "r"))
    options: dict[str, Any] = {"node_mesh": nodes["n", "r"]} if is_mesh else {}
    options |= {"replicate_mesh": mesh["all"]} if replicas > 1 else {}
    model = shard(make_model(), mesh=mesh["shard"])
    config = qsdp.QSDPConfig(reduce=reduce, ranks_per_node=None if is_mesh else 2)
    # The mesh knows nothing of other replicas' ranks: there the launcher is believed.
    with _launched([4 // replicas] * 4):
        handle = qsdp.install(model, config, **options)
    train(model, steps=1)
    return handle.traffic.snapshot()


@selection(
    "reduce, replicas",
    [("flat", 2), ("auto", 1)],
    ["flat", "auto", "two-hop"],
    [1, 2],
)
def test_the_counters_take_nodes_from_a_mesh(run: Run, reduce: str, replicas: int) -> None:
    by_mesh, by_number = (run(4, _counted, reduce, mesh, replicas) for mesh in (True, False))
    assert by_mesh == by_number
    assert any(counts["reduce_inter_node_bytes"] for counts in by_mesh)


def _with_a_wrong_mesh(reduce: str) -> str:
    model = shard(make_model())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError) as caught:
        qsdp.install(model, qsdp.QSDPConfig(reduce=reduce), node_mesh=mesh)
    return str(caught.value)


def test_a_mesh_of_nodes_is_checked_for_a_flat_reduce_too(run: Run) -> None:
    for sentence in run(2, _with_a_wrong_mesh, "flat"):
        assert "give a 2-D mesh [nodes, ranks of a node]" in sentence


def _replicated(bits: int, is_native: bool) -> Any:
    mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = make_model()
    if is_native:
        shard(model, mesh=mesh)
        qsdp.install(model, qsdp.QSDPConfig(weight_bits=8, grad_bits=bits, bucket_size=16))
    else:
        shard(model, mesh=mesh["shard"])
        config = qsdp.QSDPConfig(weight_bits=8, grad_bits=bits, bucket_size=16)
        qsdp.install(model, config, replicate_mesh=mesh["replicate"])
    return train(model)


def test_replicas_stay_bit_identical_under_a_quantized_all_reduce(run: Run) -> None:
    results = run(4, _replicated, 3, False)
    assert results[0][0] != results[2][0]  # replicas see different data
    for result in results[1:]:
        for name, value in results[0][1].items():
            assert torch.equal(value, result[1][name]), name


def test_at_full_precision_quantized_replicas_train_as_native_ones(run: Run) -> None:
    native, own = run(4, _replicated, 32, True), run(4, _replicated, 32, False)
    for (_, expected), (_, found) in zip(native, own, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def _installed_again_beside_other_groups() -> list[str]:
    dist.new_group([0, 1])  # the user's own, which only its ranks know
    model = shard(make_model())
    remarks = []
    for step in range(3):
        handle = qsdp.install(model, qsdp.QSDPConfig(reduce="two-hop", ranks_per_node=2))
        torch.autograd.backward(model(*make_batch(model, step)))
        _, *remarks_of_wire = handle.report().remarks
        remarks += remarks_of_wire
        handle.remove()
    return remarks


def test_two_hops_meet_beside_groups_that_not_all_ranks_know_and_again_after_a_removal(
    run: Run,
) -> None:
    for remarks in run(4, _installed_again_beside_other_groups):
        assert len(remarks) == 3
        assert all("two hops over 2 nodes of 2 ranks" in remark for remark in remarks)
