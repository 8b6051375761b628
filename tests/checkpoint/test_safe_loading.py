"""Nothing that is loaded runs: what is made to run code on load is refused in one sentence."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta
from torch.distributed.device_mesh import DeviceMesh

from qsdp import checkpoint
from qsdp.checkpoint import dcp_table
from qsdp.checkpoint.meta_json import sealed
from qsdp.commands import compress, evaluate, train
from qsdp.data.corpus import load_corpus
from qsdp.data.token_shards import read_shards
from qsdp.export import load_export, read_mask
from qsdp.models.load_safetensors import find_tensors
from tests.support.bad_inputs import DEEP, TEXT
from tests.support.command_line import assert_is_one_sentence
from tests.support.tricks import TRICKS, Evil, named, text

pytestmark = pytest.mark.usefixtures("world_of_one")
TENSOR = MetadataIndex("model.weight", torch.Size([0, 0]))
VALUE = MetadataIndex("optimizer.param_groups.0.lr")
FURTHER = MetadataIndex("tensors.grid", torch.Size([0]))


@contextmanager
def a_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make(lr: Any = 0.1, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with a_world():
        grids = {"grid": torch.ones(3)}
        return checkpoint.save(tmp_path_factory.mktemp("saved"), 1, *make(), {}, tensors=grids)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run over it of one step in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setattr("qsdp.train.validate.Evaluator.sample", lambda evaluator: None)
        patch.setattr("qsdp.train.after_training.write_plots", lambda *_: [])
        train.main(training(folder))
    return folder


def training(folder: Path, *flags: str) -> list[str]:
    return [
        *("--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--steps", "1"),
        *("--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1", *flags),
    ]


def seal(folder: Path) -> None:
    """Let the checksums be those of the files, as whoever makes them by hand would."""
    meta = json.loads((folder / "meta.json").read_text())
    for name in meta["checksums"]:
        meta["checksums"][name] = f"crc32:{zlib.crc32((folder / name).read_bytes()):08x}"
    (folder / "meta.json").write_text(sealed(meta))


def change_table(folder: Path, change: Callable[[Any], None]) -> None:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    seal(folder)


def trick_the_table(folder: Path, operations: bytes) -> None:
    """Put the work of ``operations`` before the table, which is read as ever after it."""
    table = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(b"\x80\x04" + operations + b"0" + table)
    seal(folder)


def trick_an_entry(folder: Path, index: MetadataIndex, blob: bytes) -> None:
    """Let the data files hold ``blob`` as the entry of ``index``."""
    file = next(folder.glob("*.distcp"))
    begin = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(blob)

    def point_there(table: Any) -> None:
        place = table.storage_data[index]
        table.storage_data[index] = replace(place, offset=begin, length=len(blob))

    change_table(folder, point_there)


def refused(folder: Path, *, whole: bool = True, further: bool = False) -> str:
    """What every way of loading says of the checkpoint.

    ``whole``: also those that read no more than the model. ``further``: those alone that read what
    is beside model and optimizer.
    """
    model, optimizer = make()
    said = []
    with a_world():
        ways: list[Callable[[], object]] = [lambda: checkpoint.load(folder, model, optimizer)]
        if whole:
            ways.append(lambda: checkpoint.load_model(folder, model))
            ways.append(lambda: checkpoint.TensorReader(folder).read("weight"))
        if further:
            ways = [lambda: checkpoint.load_tensors(folder, {"grid": torch.zeros(3)})]
        for load in ways:
            with pytest.raises(ValueError, match=folder.name) as error:
                load()
            said.append(str(error.value))
            assert "\n" not in said[-1]
            assert len(said[-1]) < 500
    return said[0]


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_table_that_calls_is_refused(copy: Path, trick: str) -> None:
    canary = copy.parent / "canary"
    trick_the_table(copy, TRICKS[trick](canary))
    said = refused(copy)
    assert ".metadata" in said
    assert "name another checkpoint" in said
    assert not canary.exists()
    # The trick works: it is the reader that does not fall for it.
    with (copy / ".metadata").open("rb") as file:
        pickle.load(file)
    assert canary.exists()


def test_a_table_that_holds_an_object_is_refused(copy: Path) -> None:
    canary = copy.parent / "canary"
    change_table(copy, lambda table: setattr(table.storage_meta, "modules", [Evil(canary)]))
    assert "posix.system" in refused(copy)
    assert not canary.exists()


def test_a_table_cannot_change_the_classes_that_it_names(copy: Path) -> None:
    stain = text("stained") + b"\x88"
    operations = named("torch.distributed.checkpoint.metadata", "StorageMeta")
    trick_the_table(copy, operations + b"(N}" + stain + b"stb")
    refused(copy)
    assert not hasattr(StorageMeta, "stained")


@pytest.mark.parametrize("index", [VALUE, TENSOR, FURTHER], ids=["value", "tensor", "further"])
@pytest.mark.parametrize("form", ["torch.save", "pickle", "dotted", "bytes"])
def test_an_entry_that_calls_is_refused(copy: Path, index: MetadataIndex, form: str) -> None:
    canary = copy.parent / "canary"
    blob = io.BytesIO()
    torch.save(Evil(canary), blob)
    written = {
        "torch.save": blob.getvalue(),
        "pickle": pickle.dumps(Evil(canary), protocol=2),
        "dotted": b"\x80\x04" + TRICKS["a dotted name"](canary) + b".",
        "bytes": b"\x80\x04" + TRICKS["torch.storage"](canary) + b".",
    }
    trick_an_entry(copy, index, written[form])
    said = refused(copy, whole=index is TENSOR, further=index is FURTHER)
    if form == "torch.save":
        assert "posix.system" in said
        assert "run code" in said
    assert "weights_only" not in said  # torch's own advice is to load it all the same
    assert not canary.exists()


class Mesh:
    """Is unpickled as a mesh, which opens a process group where there is none."""

    def __reduce__(self) -> Any:
        return DeviceMesh, ("cpu", [0])


def test_what_torch_itself_would_make_is_made_of_no_entry(copy: Path) -> None:
    blob = io.BytesIO()
    torch.save(Mesh(), blob)
    assert DeviceMesh in torch.serialization.get_safe_globals()
    trick_an_entry(copy, VALUE, blob.getvalue())
    assert "run code" in refused(copy, whole=False)
    assert DeviceMesh in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("boxes", "is_full"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], True),
        ([((0, 0), (1, 3)), ((1, 0), (3, 2)), ((1, 2), (3, 1))], True),  # uneven, in two dimensions
        ([((0, 0), (1, 1)), ((1, 0), (3, 1)), ((0, 1), (4, 2))], True),  # columns first
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], False),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3)), ((2, 0), (1, 2))], False),
        ([((0, 0), (4, 3)), ((0, 0), (4, 3))], False),
        ([((0, 0), (5, 3))], False),
    ],
)
def test_chunks_fill_a_tensor_once(boxes: Any, is_full: bool) -> None:
    assert dcp_table._fill(boxes, range(2), torch.Size([4, 3])) is is_full


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", "fast"), ("lr", {"a": 1}), ("params", 5), ("params", [[1], {}])],
)
def test_values_of_another_kind_are_refused(copy: Path, name: str, value: Any) -> None:
    blob = io.BytesIO()
    torch.save(value, blob)
    trick_an_entry(copy, MetadataIndex(f"optimizer.param_groups.0.{name}"), blob.getvalue())
    refused(copy, whole=False)


@pytest.mark.parametrize("place", ["table", "tensor", "value"])
def test_the_commands_refuse_what_calls_in_one_sentence(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "step-00000001"
    shutil.copytree(run / "run" / "checkpoints" / folder.name, folder)
    blob = io.BytesIO()
    torch.save(Evil(canary), blob)
    if place == "table":
        trick_the_table(folder, TRICKS["os.system"](canary))
    elif place == "tensor":
        index = MetadataIndex("model.embed.weight", torch.Size([0, 0]))
        trick_an_entry(folder, index, blob.getvalue())
    else:
        trick_an_entry(folder, VALUE, blob.getvalue())
    flags = training(run, "--resume", str(folder), "--steps", "2")
    flags[flags.index("--out") + 1] = str(tmp_path / "out")
    commands: list[Callable[[], None]] = [lambda: train.main(flags)]
    if place != "value":  # they read the model alone
        export = ["--sparsity", "0.5", "--out", str(tmp_path / "export")]
        commands.append(lambda: compress.main([str(folder), *export]))
        commands.append(lambda: evaluate.main([str(folder), "--targets", "none"]))
    for command in commands:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2
        printed = capfd.readouterr().err
        assert_is_one_sentence(printed)
        assert "run code" in printed
    assert not canary.exists()
    assert not (tmp_path / "export").exists()


def _grow(table: Any) -> None:
    stored = table.state_dict_metadata["model.weight"]
    stored.size = stored.chunks[0].sizes = torch.Size([10**8, 10**8])


def _overlap(table: Any) -> None:
    """As many values as there are, half of them twice."""
    stored = table.state_dict_metadata["model.weight"]
    rows, columns = stored.size
    assert rows * columns == 15
    sizes = [torch.Size([1, columns])] * rows
    stored.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), each) for each in sizes]


def _uncover(table: Any) -> None:
    table.state_dict_metadata["model.weight"].chunks.clear()


def _lead_to(path: str) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        for index, place in table.storage_data.items():
            table.storage_data[index] = replace(place, relative_path=path)

    return change


def _as_bytes(table: Any) -> None:
    table.state_dict_metadata["model.weight"] = table.state_dict_metadata[VALUE.fqn]
    table.storage_data[MetadataIndex("model.weight")] = table.storage_data[VALUE]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_grow, id="a tensor beyond all memory"),
        pytest.param(_uncover, id="a tensor of no chunks"),
        pytest.param(_overlap, id="a tensor of chunks that overlap"),
        pytest.param(_as_bytes, id="a number for a tensor"),
        pytest.param(_lead_to("../elsewhere.distcp"), id="a file above"),
        pytest.param(_lead_to("/etc/hostname"), id="a file elsewhere"),
        pytest.param(_lead_to("meta.json"), id="a file beside the list"),
    ],
)
def test_a_table_that_misleads_is_refused(copy: Path, change: Callable[[Any], None]) -> None:
    shutil.copy(next(copy.glob("*.distcp")), copy.parent / "elsewhere.distcp")
    change_table(copy, change)
    refused(copy)


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(b"", id="empty"),
        pytest.param(pickle.dumps([1, 2]), id="a list"),
        pytest.param(pickle.dumps(torch.float32), id="a dtype"),
        pytest.param(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", id="deep"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".", id="bytes beyond all memory"),
        pytest.param(None, id="truncated"),
    ],
)
def test_a_table_that_is_none_is_refused(copy: Path, table: bytes | None) -> None:
    file = copy / ".metadata"
    file.write_bytes(file.read_bytes()[:-40] if table is None else table)
    seal(copy)
    assert "cannot be read" in refused(copy)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "a/b", "a\\b", "a\0b", ""])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(copy: Path, name: str) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    meta["checksums"][name] = "crc32:00000000"
    (copy / "meta.json").write_text(sealed(meta))
    assert "not the name of a file" in refused(copy)


def test_a_manifest_without_the_table_is_refused(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    del meta["checksums"][".metadata"]
    (copy / "meta.json").write_text(sealed(meta))
    assert "does not list .metadata" in refused(copy)


class Choice(Enum):
    ONE = 1


@pytest.mark.parametrize("value", [SimpleNamespace(a=1), Choice.ONE, {1: [Choice.ONE]}, len, Evil])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any) -> None:
    model, optimizer = make()
    optimizer.param_groups[0]["extra"] = value
    with a_world(), pytest.raises(ValueError, match=r"param_groups\.0\.extra\S* is or holds"):
        checkpoint.save(tmp_path, 1, model, optimizer, {})
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(0.25)},
        {"lr": np.float64(0.25), "betas": (np.float64(0.5), 0.75), "eps": np.float32(0.5)},
        {"betas": [0.5, 0.75], "foreach": None, "fused": False, "eps": 1},
    ],
    ids=["a tensor", "numbers of NumPy", "plain values"],
)
def test_the_settings_of_optimizers_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer = make(**options)
    group = optimizer.param_groups[0]
    group |= {"note": "a", "kinds": {"x": (torch.bfloat16, 1 + 2j)}, "extra": [None, True, b"b"]}
    again, again_optimizer = make(**options | {"foreach": False})
    again_optimizer.param_groups[0] |= {"note": "", "kinds": {"x": ()}, "extra": []}
    with a_world():
        checkpoint.load(checkpoint.save(tmp_path, 1, model, optimizer, {}), again, again_optimizer)
    loaded = again_optimizer.param_groups[0]
    assert {k: v for k, v in loaded.items() if k != "params"} == {
        k: v for k, v in group.items() if k != "params"
    }


def test_token_shards_are_numbers_whatever_they_hold(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(Evil(canary))
    for split in ("train", "val"):
        (tmp_path / f"{split}-0.bin").write_bytes(data + b"." * (len(data) % 2))
    meta: dict[str, Any] = {"dtype": "uint16", "vocab_size": 1 << 16}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert bytes(read_shards(tmp_path)[0][:].tobytes()).startswith(data)
    meta["num_tokens"] = {"train-/../../outside.bin": 1}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"lacks train-/\.\./\.\./outside\.bin"):
        read_shards(tmp_path)
    for tokenizer in (
        {"kind": "tokenizers", "definition": {"model": {"type": "posix.system"}}},
        {"kind": "!!python/object/apply:os.system"},
        [DEEP.decode()],
    ):
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "tokenizer": tokenizer}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_corpus(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "..", "", 3, None])
def test_an_export_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "compression.json").write_text('{"format": "qsdp-compressed-1"}')
    for stem in ("model", "masks"):
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": file}}))
    loads: list[Callable[[], object]] = [
        lambda: find_tensors(folder),
        lambda: load_export(folder, nn.Linear(1, 1)),
        lambda: read_mask(folder, "weight"),
    ]
    for load in loads:
        with pytest.raises(ValueError, match="not the name of a file beside it"):
            load()


def test_an_export_of_pickles_is_refused(
    tmp_path: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    canary, export = tmp_path / "canary", tmp_path / "export"
    compress.main([str(run / "run"), "--sparsity", "0.5", "--out", str(export)])
    (export / "model.safetensors").write_bytes(pickle.dumps(Evil(canary)))
    whole = json.loads((export / "compression.json").read_text())
    del whole["checksums"], whole["checksum"]  # a stranger's are right
    deep = '{"format": "qsdp-compressed-1", "model": ' + DEEP.decode()
    for facts in (
        json.dumps(whole),
        json.dumps(whole | {"config": whole["config"] | {"data": ["__import__('os')"]}}),
        json.dumps(whole | {"model": whole["model"] | {"width": "__import__('os')"}}),
        json.dumps(whole | {"source": {"step": float("inf")}}),
        deep,
    ):
        (export / "compression.json").write_text(facts)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(export)])
        assert stop.value.code == 2
        assert_is_one_sentence(capfd.readouterr().err)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    ["model = \"__import__('os')\"", 'data = ["!!python/object/apply:os.system"]', DEEP.decode()],
)
def test_a_config_is_read_as_values(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "config.toml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert_is_one_sentence(capfd.readouterr().err)
