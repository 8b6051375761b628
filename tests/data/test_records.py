"""Promises of JSONL and parquet: each record a document, encoded in parallel, read as a stream."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qsdp.commands.evaluate import main as evaluate
from qsdp.commands.prepare import main as prepare
from qsdp.commands.train import main as train
from qsdp.data import pieces, records, tokenizer
from qsdp.data.corpus import Corpus, load_corpus
from qsdp.data.records import read_documents, record_bytes
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.data.tokenizer import LibraryTokenizer, load_tokenizer
from qsdp.report import progress
from tests.support.bad_inputs import DEEP
from tests.support.command_line import refused, small_run

END = "<|endoftext|>"
TEXTS = ["to be or\n not to be", "", "é—あ🜂\r\n", "that\0is " * 40, "the question", "x", "y", "z"]
SUFFIXES = [".jsonl", ".jsonl.gz", ".parquet"]


def write(path: Path, texts: Sequence[Any], field: str = "text", **options: Any) -> Path:
    """A file of records, one for each text, in the kind that its name says."""
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table({"number": list(range(len(texts))), field: texts})
        parquet.write_table(table, path, **options)
        return path
    lines = [json.dumps({"number": i, field: text}) + "\n" for i, text in enumerate(texts)]
    data = "\n".join(lines).encode()  # with blank lines between
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def decoded(corpus: Corpus) -> tuple[str, str]:
    assert corpus.tokenizer is not None
    return corpus.tokenizer.decode(corpus.train[:]), corpus.tokenizer.decode(corpus.val[:])


def is_same(one: Corpus, other: Corpus) -> bool:
    return np.array_equal(one.train[:], other.train[:]) and np.array_equal(one.val[:], other.val[:])


@pytest.fixture(scope="module")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of the tokenizers library with an end of a text."""
    library = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    library.train_from_iterator(
        ["to be or not to be, that is the question"] * 9,
        vocab_size=290,
        special_tokens=["<pad>", END],
        show_progress=False,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "library.json"
    library.save(str(path))
    return path


class TestDocuments:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_file_holds_what_was_written_and_counts_its_bytes(
        self, tmp_path: Path, suffix: str
    ) -> None:
        path = write(tmp_path / f"a{suffix}", TEXTS, "body", **_groups(suffix, 3))
        texts, positions = zip(*read_documents(path, "body"), strict=True)
        assert list(texts) == TEXTS
        assert list(positions) == sorted({*positions}), "each record has bytes of its own"
        assert positions[-1] == record_bytes(path, "body")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("kind", ["char", "byte", "library"])
    def test_ids_are_those_of_each_document_and_then_its_end(
        self,
        tmp_path: Path,
        suffix: str,
        kind: str,
        library_file: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        spec = library_file if kind == "library" else kind
        path = write(tmp_path / f"a{suffix}", TEXTS, **_groups(suffix, 2))
        monkeypatch.setattr(pieces, "_BATCH_PIECES", 3)
        prepare_shards([path], tmp_path / "out", spec, val_fraction=0.1, shard_tokens=100)
        shards, corpus = load_corpus(tmp_path / "out"), load_corpus(path, spec)
        assert is_same(shards, corpus), "trained on at once or prepared, it is the same"
        end = END if kind == "library" else "\n"
        train, val = decoded(shards)
        assert train + val == "".join(text + end for text in TEXTS)
        assert train.endswith(end), "cut between documents"
        assert shards.tokenizer is not None
        ids = np.concatenate([shards.tokenizer.encode(t) for text in TEXTS for t in (text, end)])
        assert np.array_equal(np.concatenate([shards.train[:], shards.val[:]]), ids)
        assert kind != "library" or len(shards.tokenizer.encode(END)) == 1

    @pytest.mark.parametrize("end", ["", "|"])
    def test_an_end_that_is_given_follows_every_document(self, tmp_path: Path, end: str) -> None:
        (tmp_path / "b.txt").write_text("text file")
        paths = [write(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "b.txt"]
        prepare_shards(paths, tmp_path / "out", "char", val_fraction=0.3, document_end=end)
        assert "".join(decoded(load_corpus(tmp_path / "out"))) == f"one{end}two{end}text file{end}"

    def test_kinds_mix_and_only_records_have_an_end_by_default(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        (tmp_path / "text.txt").write_text("plain " * 20)
        paths = [write(tmp_path / f"a{s}", [s, "body " * 20], "body") for s in SUFFIXES]
        paths.insert(2, tmp_path / "text.txt")
        seen: list[tuple[int, int]] = []
        prepare_shards(
            paths,
            tmp_path / "out",
            "byte",
            val_fraction=0.3,
            text_field="body",
            progress=lambda *done_and_total: seen.append(done_and_total),
        )
        parts = [f"{suffix}\n{'body ' * 20}\n" for suffix in SUFFIXES]
        parts.insert(2, "plain " * 20)
        train, val = decoded(load_corpus(tmp_path / "out"))
        assert train + val == "".join(parts)
        assert train.endswith(("\n", "plain " * 20))
        num_bytes = sum(p.num_bytes for p in (pieces.file_source(path, "body") for path in paths))
        assert seen[0] == (0, num_bytes)
        assert seen[-1] == (num_bytes, num_bytes)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_validates_is_the_given_part_of_the_bytes(
        self, tmp_path: Path, suffix: str
    ) -> None:
        rng = random.Random(0)
        texts = ["".join(rng.choices("abcdef ", k=rng.randrange(400))) for _ in range(500)]
        path = write(tmp_path / f"a{suffix}", texts, **_groups(suffix, 120))
        num_tokens = prepare_shards([path], tmp_path / "out", "byte", val_fraction=0.25)
        assert num_tokens["val"] / sum(num_tokens.values()) == pytest.approx(0.25, abs=0.02)

    def test_a_long_document_is_cut_as_a_text_is(
        self, tmp_path: Path, library_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
        text = "".join(random.choices("to be\n é", k=1000))
        (tmp_path / "a.txt").write_bytes(text.encode())
        path = write(tmp_path / "a.jsonl", [text, "the end " * 99])
        plain = load_corpus(tmp_path / "a.txt", library_file)
        corpus = load_corpus(path, library_file)
        assert decoded(corpus) == (text + END, "the end " * 99 + END)
        # The text file is cut at 90 % too.
        prefix = plain.train[: len(plain.train) // 2]
        assert np.array_equal(prefix, corpus.train[: len(prefix)])

    def test_a_long_text_has_the_ids_of_its_shards_and_a_short_one_stays_whole(
        self, tmp_path: Path, library_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(("question " * 199 + "é").encode())
        whole = load_corpus(path, library_file)
        assert whole.tokenizer is not None
        ids = whole.tokenizer.encode(path.read_text(encoding="utf-8"))
        assert np.array_equal(np.concatenate([whole.train[:], whole.val[:]]), ids)
        monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
        prepare_shards([path], tmp_path / "out", library_file)
        shards, cut = load_corpus(tmp_path / "out"), load_corpus(path, library_file)
        both = [np.concatenate([c.train[:], c.val[:]]) for c in (shards, cut)]
        assert np.array_equal(*both)
        assert len(both[0]) > len(ids), "cut, or this test is of nothing"
        assert decoded(cut)[0] + decoded(cut)[1] == path.read_bytes().decode()


def _groups(suffix: str, rows: int) -> dict[str, int]:
    return {"row_group_size": rows} if suffix == ".parquet" else {}


class TestStreams:
    def test_of_jsonl_lines_are_read_one_by_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "a.jsonl", ["x" * 100] * 5000)
        opened: list[Any] = []
        real = Path.open

        def recorded(self: Path, *options: Any) -> Any:
            opened.append(real(self, *options))
            return opened[-1]

        monkeypatch.setattr(Path, "open", recorded)
        assert len(list(islice(read_documents(path), 10))) == 10
        (file,) = opened
        assert file.closed or file.tell() < path.stat().st_size // 10

    def test_of_parquet_few_rows_of_one_column_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parquet = pytest.importorskip("pyarrow.parquet")
        path = write(tmp_path / "a.parquet", ["x" * 100] * 5000, row_group_size=2000)
        rows: list[int] = []
        real = parquet.ParquetFile.iter_batches

        def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
            assert options["columns"] == ["text"]
            for batch in real(self, *arguments, **options):
                rows.append(batch.num_rows)
                yield batch

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", recorded)
        assert len(list(islice(read_documents(path), 65))) == 65
        assert rows == [64, 64]
        rows.clear()
        assert sum(1 for _ in read_documents(path)) == sum(rows) == 5000

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_is_encoded_at_once_is_bounded(
        self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / f"a{suffix}", ["x" * 50] * 300 + ["y\n" * 2000])
        monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
        monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 1000)
        batches: list[int] = []
        real = tokenizer.ByteTokenizer.encode_batch

        def recorded(self: Any, texts: Sequence[str]) -> Any:
            batches.append(sum(map(len, texts)))
            return real(self, texts)

        monkeypatch.setattr(tokenizer.ByteTokenizer, "encode_batch", recorded)
        prepare_shards([path], tmp_path / "out", "byte")
        assert sum(batches) == 300 * 50 + 4000
        assert max(batches) <= 1100

    def test_a_line_without_an_end_is_not_read_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(records, "MAX_LINE_BYTES", 50)
        path = write(tmp_path / "a.jsonl", ["short", "x" * 100])
        with pytest.raises(ValueError, match=r"line 3 of .*a.jsonl is longer than 50 bytes: "):
            list(read_documents(path))


class TestParallel:
    @pytest.mark.parametrize("kind", ["char", "byte", "library"])
    def test_a_batch_has_the_ids_of_each_text(self, kind: str, library_file: Path) -> None:
        spec = library_file if kind == "library" else kind
        one = load_tokenizer(spec, "".join(TEXTS))
        for texts in ([], TEXTS):
            batch = one.encode_batch(texts)
            assert [ids.tolist() for ids in batch] == [one.encode(text).tolist() for text in texts]
            assert {ids.dtype for ids in batch} <= {np.dtype(np.uint16)}

    def test_a_batch_that_cannot_be_encoded_is_refused(self, library_file: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot encode the text .*: give a tokenizer"):
            load_tokenizer(library_file).encode_batch(["fine", "\ud800"])

    @pytest.mark.parametrize(
        ("ranks", "given", "threads"),
        [("1", None, None), ("4", None, "4"), ("99", None, "1"), ("2", None, "6"), ("4", "9", "9")],
    )
    def test_ranks_of_a_node_share_its_cores_unless_told_otherwise(
        self,
        ranks: str,
        given: str | None,
        threads: str | None,
        library_file: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: 16)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {*range(6)}, raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("RAYON_NUM_THREADS", given or "")
        if given is None:
            monkeypatch.delenv("RAYON_NUM_THREADS")
        one = load_tokenizer(library_file)
        assert isinstance(one, LibraryTokenizer)
        one.encode_batch(["a", "b"])
        assert tokenizer.os.environ.get("RAYON_NUM_THREADS") == threads


def _parquet_of(make: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write_it(path: Path) -> None:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table(make(arrow)), path)

    return write_it


def _damaged_parquet(path: Path) -> None:
    write(path, ["some text"] * 100)
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    path.write_bytes(data[:4] + b"\xff" * (len(data) - footer - 4) + data[-footer:])


def _not_utf8(arrow: Any) -> Any:
    data = arrow.array([b"fine", b"a\xff"])
    return {"text": arrow.Array.from_buffers(arrow.string(), 2, data.buffers())}


BAD: list[tuple[str, bytes | Callable[[Path], None], str]] = [
    ("a.jsonl", b"", "a.jsonl is empty: leave it out"),
    ("a.jsonl", b"\n \n", "a.jsonl holds no record: leave it out"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', r"line 3 of .*a.jsonl is not JSON \(.*\): write"),
    ("a.jsonl", DEEP, r"line 1 of .*a.jsonl is not JSON \("),
    ("a.jsonl", b'["text"]\n', "line 1 of .*a.jsonl is a list: write one JSON object a line"),
    ("a.jsonl", b'"text"\n', "line 1 of .*a.jsonl is text: write one JSON object a line"),
    (
        "a.jsonl",
        b'{"title": "a", "body": "b"}\n',
        "line 1 of .*a.jsonl has no field 'text', only 'title', 'body': name one of them by",
    ),
    ("a.jsonl", b"{}\n", "has no field 'text', only none: name"),
    ("a.jsonl", b'{"text": null}\n', "the field 'text' in line 1 of .*a.jsonl is null, no text: "),
    ("a.jsonl", b'{"text": true}\n', "in line 1 of .*a.jsonl is true or false, no text: "),
    ("a.jsonl", b'{"text": 1.5}\n', "in line 1 of .*a.jsonl is a number, no text: "),
    ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 of .*a.jsonl is not UTF-8 text \(byte 10 of the"),
    ("a.jsonl", b'{"text": "a\\ud800"}\n', r"the text in line 1 of .* holds '\\ud800', which"),
    ("a.jsonl.gz", b'{"text": "plain"}\n', r"a.jsonl.gz is no gzip, or is damaged \(.*\): copy"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 99)[:-20],
        r"a.jsonl.gz is no gzip, or is damaged \(.*\): copy",
    ),
    ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz holds no record: leave it out"),
    ("a.parquet", b"", "a.parquet is empty: leave it out"),
    ("a.parquet", b"PAR1" * 9, r"a.parquet is no parquet, or is damaged \(.*\): copy"),
    ("a.parquet", _damaged_parquet, r"a.parquet is no parquet, or is damaged \(.*\): copy"),
    (
        "a.parquet",
        _parquet_of(lambda arrow: {"text": arrow.array([], arrow.string())}),
        "a.parquet holds no record: leave it out",
    ),
    (
        "a.parquet",
        _parquet_of(lambda arrow: {"id": [1], "body": ["b"]}),
        "a.parquet has no field 'text', only 'id', 'body': name one of them by --text-field",
    ),
    (
        "a.parquet",
        _parquet_of(lambda arrow: {"text": [1, 2]}),
        "the field 'text' of .*a.parquet is of the type int64, no text: name another field",
    ),
    (
        "a.parquet",
        _parquet_of(lambda arrow: {"text": ["a", None]}),
        "the field 'text' in row 2 of .*a.parquet is null, no text: ",
    ),
    ("a.parquet", _parquet_of(_not_utf8), r"row 2 of .*a.parquet is not UTF-8 text \(byte 1 of"),
]


@pytest.fixture
def bad_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    name, content, said = request.param
    path = tmp_path / name
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path, said


class TestBadInputs:
    @pytest.mark.parametrize("bad_file", BAD, indirect=True)
    def test_each_is_told_with_its_place(
        self, bad_file: tuple[Path, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        path, said = bad_file
        with pytest.raises(ValueError, match=said):
            load_corpus(path, "byte")
        told = refused(["--texts", str(path), "--out", str(path.parent / "out")], capfd, prepare)
        assert [*path.parent.iterdir()] == [path], told

    @pytest.mark.usefixtures("world_of_one")
    @pytest.mark.parametrize("bad_file", [BAD[2], BAD[6], BAD[-6], BAD[-4]], indirect=True)
    def test_the_trainer_refuses_it_in_one_sentence(
        self, bad_file: tuple[Path, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        path, said = bad_file
        told = refused(small_run(path.parent, "--data", str(path)), capfd)
        assert re.search(said, told)

    @pytest.mark.parametrize("name", ["a.json", "a.csv", "a.TSV", "a.txt.gz", "a.jsonl.zst"])
    @pytest.mark.usefixtures("world_of_one")
    def test_a_kind_that_is_not_read_is_refused(
        self, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / name).write_text('{"text": "a"}')
        data = str(tmp_path / name)
        for told in (
            refused(small_run(tmp_path, "--data", data), capfd),
            refused(["--texts", data, "--out", str(tmp_path / "shards")], capfd, prepare),
        ):
            assert "of a kind that is not read" in told
            assert all(kind in told for kind in (*SUFFIXES, ".txt"))

    def test_a_file_that_is_not_there_is_told_with_what_may_be(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        told = refused(["--data", str(tmp_path / "a.json")], capfd)
        assert "does not exist: give stdlib, a file of text, JSONL" in told
        with pytest.raises(ValueError, match=r"a.jsonl cannot be read .*: choose 'stdlib', a file"):
            load_corpus(tmp_path / "a.jsonl")

    def test_a_field_without_records_is_refused(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.txt").write_text("abc" * 100)
        data, field = str(tmp_path / "a.txt"), ("--text-field", "body")
        told = refused(["--texts", data, "--out", str(tmp_path / "out"), *field], capfd, prepare)
        assert "--text-field is 'body', but no file is JSONL or parquet" in told
        for given in (data, "stdlib", str(tmp_path)):
            told = refused(["--data", given, *field], capfd)
            assert f"--text-field is 'body', but --data {given} is neither JSONL" in told
            with pytest.raises(ValueError, match=r"text_field is 'body', but .* is neither JSONL"):
                load_corpus(given, text_field="body")
        assert "--text-field is empty" in refused(["--data", "a.jsonl", "--text-field="], capfd)

    def test_without_pyarrow_parquet_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "a.parquet"
        path.write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        told = refused(["--texts", str(path), "--out", str(tmp_path / "out")], capfd, prepare)
        assert "pyarrow is not installed: run 'pip install qsdp[data]'" in told

    def test_one_document_cannot_be_split(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", ["all there is"])
        with pytest.raises(ValueError, match=r"the first document of .* is more than 90% of it"):
            load_corpus(path)
        with pytest.raises(ValueError, match="too short to be split, as 0 tokens would be left"):
            prepare_shards([path], tmp_path / "out", "byte")


@pytest.mark.slow
@pytest.mark.usefixtures("world_of_one", "brief_ends")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_are_trained_on_and_evaluated_on(
    tmp_path: Path, suffix: str, library_file: Path
) -> None:
    texts = ["to be or not to be", "that is the question"] * 40
    path = write(tmp_path / f"a{suffix}", texts, "body")
    flags = ["--data", str(path), "--tokenizer", str(library_file), "--text-field", "body"]
    train(small_run(tmp_path, *flags))
    checkpoint = str(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 'text_field = "body"' in (tmp_path / "out" / "config.toml").read_text()

    other = write(tmp_path / "other.jsonl", texts, "content")
    (tmp_path / "plain.txt").write_text("\n".join(texts))
    losses = []
    for name, more in (
        ("own", []),
        ("other", ["--data", str(other), "--text-field", "content"]),
        ("plain", ["--data", str(tmp_path / "plain.txt")]),
    ):
        out = tmp_path / f"of_{name}"
        evaluate([checkpoint, "--targets", "none", "--out", str(out), "--eval-batches", "0", *more])
        results = json.loads((out / "evaluation.json").read_text())["results"]
        losses.append(results[0]["loss"])
    assert len(losses) == 3
    if suffix == ".jsonl":  # parquet counts its bytes otherwise, so it is cut elsewhere
        assert losses[0] == losses[1]
    assert losses[2] != losses[0]


def test_the_bar_is_for_a_large_corpus_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for is_terminal, is_shown, total in (
        (True, True, 1 << 30),
        (True, True, 1 << 20),
        (True, False, 1 << 30),
        (False, True, 1 << 30),
    ):
        monkeypatch.setattr(
            progress, "Console", lambda t=is_terminal: Console(force_terminal=t, width=80)
        )
        with progress.encoding_bar(is_shown=is_shown) as show:
            show(0, total)
            show(total // 2, total)
        has_bar = "encoding" in capfd.readouterr().out
        assert has_bar == (is_terminal and is_shown and total == 1 << 30)
