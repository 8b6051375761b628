"""Whatever is damaged in the folder of an export is noticed by all that read it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qsdp.checkpoint import crc32_of_bytes
from qsdp.commands.export import main
from qsdp.export import export_transformers, load_export, verify_export
from qsdp.models.gpt2.model import GPT
from qsdp.train.trained_model import open_trained_model
from tests.support.exports import edit_facts, make_older, small_export
from tests.support.small_gpt import SIZE

pytestmark = pytest.mark.usefixtures("gloo_of_one")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export in many files."""
    return small_export(tmp_path, file_bytes=8192)


def readers(export: Path) -> list[Callable[[], object]]:
    """All that read the weights of an export."""
    out = export.parent / "out"
    return [
        lambda: verify_export(export),
        lambda: load_export(export, GPT(SIZE)),
        lambda: open_trained_model(export).load(GPT(SIZE)),
        lambda: export_transformers(export, SIZE, out),
    ]


def assert_refused(export: Path, match: str) -> None:
    for read in readers(export):
        with pytest.raises(ValueError, match=match):
            read()
    assert not (export.parent / "out").exists()


def test_every_file_is_listed_with_the_checksum_of_what_is_on_disk(export: Path) -> None:
    stated = json.loads((export / "compression.json").read_text())["checksums"]
    files = {path.name: path for path in export.iterdir() if path.name != "compression.json"}
    assert len(files) > 5
    assert stated == {name: crc32_of_bytes(file.read_bytes()) for name, file in files.items()}


def test_one_flipped_bit_in_any_file_is_noticed_by_all_that_read_it(export: Path) -> None:
    for path in sorted(export.iterdir()):
        whole = path.read_bytes()
        altered = bytearray(whole)
        altered[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        for content in (bytes(altered), whole[:-1], whole + b"\0", None):
            path.unlink() if content is None else path.write_bytes(content)
            is_gone = content is None and path.name == "compression.json"
            assert_refused(export, "export" if is_gone else path.name)
            path.write_bytes(whole)
    for read in readers(export):
        read()


def test_any_flipped_bit_of_the_record_is_noticed(export: Path) -> None:
    path = export / "compression.json"
    whole = path.read_bytes()
    names = [whole.index(b'"checksum%b"' % end) + i for end in (b"", b"s") for i in range(1, 10)]
    for place in names + random.sample(range(len(whole)), 200):
        altered = bytearray(whole)
        altered[place] ^= 1 << random.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"compression\.json"):
            load_export(export, GPT(SIZE))


@pytest.mark.parametrize("old", ['"target": "0.5"', '"num_layers": 3', '"step": 7'])
def test_an_edited_record_is_noticed(
    export: Path, capfd: pytest.CaptureFixture[str], old: str
) -> None:
    path = export / "compression.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, old[:-1] + '9"' if old.endswith('"') else old[:-1] + "1"))
    assert_refused(export, r"compression\.json is damaged \(its checksum is not")
    with pytest.raises(SystemExit) as stop:
        main([str(export), "--out", str(export.parent / "out")])
    assert stop.value.code == 2
    assert "compression.json is damaged" in capfd.readouterr().err


def test_what_the_record_does_not_list_is_not_read(export: Path) -> None:
    (export / "tokenizer.json").unlink()
    edit_facts(export, lambda facts: facts["checksums"].pop("tokenizer.json"))
    (export / "tokenizer.json").write_text('{"kind": "byte"}')
    assert not open_trained_model(export).has_tokenizer
    export_transformers(export, SIZE, export.parent / "without")
    assert not (export.parent / "without" / "tokenizer.json").exists()
    part = next(export.glob("model-00001-*"))
    (export / "model.safetensors").write_bytes(part.read_bytes())  # which would be read alone
    with pytest.raises(ValueError, match=r"model\.safetensors is not listed in compression\.json"):
        load_export(export, GPT(SIZE))
    (export / "model.safetensors").unlink()
    edit_facts(export, lambda facts: facts["checksums"].update({"../out": "crc32:00000000"}))
    assert_refused(export, "was not written by qsdp compress")


def test_an_export_without_checksums_is_read_as_it_is(export: Path) -> None:
    before, after = GPT(SIZE), GPT(SIZE)
    load_export(export, before)
    make_older(export)
    for read in readers(export):
        read()
    load_export(export, after)
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)
    part = next(export.glob("model-00001-*"))
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_export(export, GPT(SIZE))
    part.unlink()
    with pytest.raises(ValueError, match=r"there is no .*: choose a complete folder of a model"):
        load_export(export, GPT(SIZE))


def test_all_bytes_that_are_read_are_counted(export: Path) -> None:
    told: list[tuple[int, int]] = []
    export_transformers(export, SIZE, export.parent / "out", progress=lambda *n: told.append(n))
    files = sum(path.stat().st_size for path in export.iterdir() if path.suffix == ".safetensors")
    assert len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1] > files
