"""Promises of tokenizers, corpora, token shards and batches."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qsdp.commands.prepare import main
from qsdp.data import pieces
from qsdp.data.batches import Batches, eval_batches
from qsdp.data.corpus import load_corpus
from qsdp.data.token_shards import TokenShards
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.data.tokenizer import TokenArray, load_tokenizer, tokenizer_from_json
from tests.support import patience
from tests.support.bad_inputs import DEEP

ROOT = Path(__file__).parents[2]
# Characters of one to four bytes, line ends of both kinds, and one that UTF-16 writes in two parts.
ALPHABET = "abc \n\r\t\0é—あ🜂" + chr(0x10FFFF)


def random_text(num_characters: int) -> str:
    return "".join(random.choices(ALPHABET, k=num_characters))


def numbers(count: int) -> TokenArray:
    """Tokens that tell their own position."""
    return np.arange(count, dtype=np.uint32)


@pytest.fixture
def library_file(tmp_path: Path) -> Path:
    """A small byte-level BPE tokenizer of the tokenizers library, as a file."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["to be or not to be, that is the question"] * 9,
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    path = tmp_path / "library.json"
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(path))
    return path


class TestTokenizers:
    @pytest.mark.parametrize("spec", ["char", "byte"])
    @pytest.mark.parametrize("length", [0, 1, 1000])
    def test_text_comes_back_as_it_was(self, spec: str, length: int) -> None:
        text = random_text(length)
        tokenizer = load_tokenizer(spec, text or ALPHABET)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.uint16
        assert ids.max(initial=0) < tokenizer.vocab_size

    def test_chars_are_numbered_in_order_and_bytes_are_themselves(self) -> None:
        assert load_tokenizer("char", "hello").encode("hello").tolist() == [1, 0, 2, 2, 3]
        assert load_tokenizer("byte").encode("hé").tolist() == [104, 195, 169]

    @pytest.mark.parametrize("unknown", ["z", "\x01", "😀", chr(0x10FFFE)])
    def test_a_character_outside_the_vocabulary_is_refused_by_name(self, unknown: str) -> None:
        tokenizer = load_tokenizer("char", ALPHABET)
        with pytest.raises(ValueError) as info:
            tokenizer.encode(f"abc{unknown}abc")
        assert f"{unknown!r} at character 3" in str(info.value)
        assert f"the {len(ALPHABET)} characters" in str(info.value)

    def test_a_lone_surrogate_is_refused_by_the_byte_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="at character 1, which UTF-8 cannot express"):
            load_tokenizer("byte").encode("a\ud800")

    def test_sampled_bytes_that_are_no_text_still_decode(self) -> None:
        assert load_tokenizer("byte").decode([104, 195]) == "h\ufffd"

    @pytest.mark.parametrize("wrong", [-1, 256])
    def test_an_id_outside_the_vocabulary_is_refused(self, wrong: int) -> None:
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the tokenizer's 0..255"):
            load_tokenizer("byte").decode([0, wrong])

    def test_a_library_tokenizer_does_what_its_file_says(self, library_file: Path) -> None:
        tokenizer = load_tokenizer(library_file)
        text = "to be or not to be<|endoftext|>that is é"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 4 < len(ids) < len(text), "compressed, and not truncated"
        assert ids.max() < tokenizer.vocab_size == 280

    @pytest.mark.parametrize("kind", ["char", "byte", "library"])
    def test_a_saved_tokenizer_is_the_same(
        self, kind: str, library_file: Path, tmp_path: Path
    ) -> None:
        tokenizer = load_tokenizer(library_file if kind == "library" else kind, ALPHABET)
        path = tmp_path / "saved.json"
        path.write_text(tokenizer.to_json(), encoding="utf-8")
        for again in (tokenizer_from_json(tokenizer.to_json()), load_tokenizer(path)):
            text = random_text(100)
            assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert again.vocab_size == tokenizer.vocab_size
            assert again.to_json() == tokenizer.to_json()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "there is no tokenizer"),
            ("not json", "not a JSON file"),
            ("{}", "no tokenizer that the tokenizers library can read"),
            ('{"kind": "word"}', "was not written by qsdp, or is damaged"),
            ('{"kind": "char"}', "was not written by qsdp, or is damaged"),
        ],
    )
    def test_a_bad_tokenizer_file_is_refused(
        self, tmp_path: Path, content: str | None, message: str
    ) -> None:
        if content == "{}":
            pytest.importorskip("tokenizers")
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)

    def test_a_char_tokenizer_needs_text(self) -> None:
        with pytest.raises(ValueError, match="given no text"):
            load_tokenizer("char")


class TestCorpus:
    def test_a_text_file_is_split_nine_to_one(self, tmp_path: Path) -> None:
        text = random_text(1234)
        (tmp_path / "a.txt").write_bytes(text.encode())
        corpus = load_corpus(tmp_path / "a.txt")
        assert corpus.tokenizer is not None
        assert corpus.tokenizer.decode(corpus.train[:]) == text[:1110]
        assert corpus.tokenizer.decode(corpus.val[:]) == text[1110:]
        assert corpus.vocab_size == corpus.tokenizer.vocab_size == len(set(text))

    def test_the_standard_library_is_the_same_each_time_and_as_long_as_asked(self) -> None:
        first, again = (load_corpus("stdlib", "byte", stdlib_bytes=300_000) for _ in range(2))
        assert np.array_equal(first.train[:], again.train[:])
        assert np.array_equal(first.val[:], again.val[:])
        assert 250_000 < len(first.train) + len(first.val) <= 300_000
        assert first.tokenizer is not None
        assert "import " in first.tokenizer.decode(first.train[:])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read"),
            (b"", "holds no text"),
            (b"abc\xff", r"is not UTF-8 text \(byte 3\)"),
        ],
    )
    def test_a_bad_text_file_is_refused(
        self, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(tmp_path / "a.txt", "byte")


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder made from 1000 characters, 300 tokens a file."""
        (tmp_path / "a.txt").write_text("".join(random.choices("abcd\n", k=1000)))
        prepare_shards([tmp_path / "a.txt"], tmp_path / "shards", "char", shard_tokens=300)
        return tmp_path / "shards"

    def test_slices_cross_the_borders_of_shards(self) -> None:
        whole = numbers(20)
        shards = TokenShards(
            [whole[:3], whole[3:3], whole[3:4], whole[4:15], whole[15:], whole[:0]]
        )
        assert len(shards) == 20
        for start in range(22):
            for stop in range(22):
                assert shards[start:stop].tolist() == whole[start:stop].tolist()
        assert shards[:].tolist() == whole.tolist()
        assert shards[-3:].tolist() == whole[-3:].tolist()

    def test_prepared_shards_are_the_corpus_of_their_text(self, folder: Path) -> None:
        text = load_corpus(folder.parent / "a.txt", "char")
        shards = load_corpus(folder)
        assert sorted(file.name for file in folder.iterdir()) == [
            "meta.json",
            *(f"train-0000{i}.bin" for i in range(3)),
            "val-00000.bin",
        ]
        assert np.array_equal(shards.train[:], text.train[:])
        assert np.array_equal(shards.val[:], text.val[:])
        assert shards.tokenizer is not None
        assert text.tokenizer is not None
        assert shards.tokenizer.to_json() == text.tokenizer.to_json()
        assert shards.vocab_size == text.vocab_size

    @pytest.mark.parametrize("spec", ["char", "byte", "library"])
    def test_no_token_is_lost_between_pieces_files_and_splits(
        self, tmp_path: Path, library_file: Path, spec: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 16)
        texts = [random_text(count) for count in (700, 1, 90)]
        paths = [tmp_path / f"{i}.txt" for i in range(3)]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode())
        seen: list[tuple[int, int]] = []
        num_tokens = prepare_shards(
            paths,
            tmp_path / "out",
            library_file if spec == "library" else spec,
            val_fraction=0.25,
            shard_tokens=100,
            document_end="<|endoftext|>",
            progress=lambda *done_and_total: seen.append(done_and_total),
        )
        corpus = load_corpus(tmp_path / "out")
        assert num_tokens == {"train": len(corpus.train), "val": len(corpus.val)}
        assert corpus.tokenizer is not None
        train, val = (corpus.tokenizer.decode(tokens[:]) for tokens in (corpus.train, corpus.val))
        assert train + val == "".join(text + "<|endoftext|>" for text in texts)
        num_bytes = sum(path.stat().st_size for path in paths)
        assert seen[-1] == (num_bytes, num_bytes)
        assert seen == sorted(seen)
        assert 0 <= round(0.75 * num_bytes) - len(train.encode()) < 4, "cut at a character's start"

    def test_a_large_vocabulary_is_kept_in_four_bytes(self, tmp_path: Path) -> None:
        text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
        (tmp_path / "a.txt").write_bytes(text.encode())
        prepare_shards([tmp_path / "a.txt"], tmp_path / "out", "char")
        corpus = load_corpus(tmp_path / "out")
        assert corpus.val[-1:].dtype == np.uint32
        assert corpus.val[-1:].tolist() == [69_999]

    def test_a_folder_made_elsewhere_needs_only_dtype_and_vocabulary(self, tmp_path: Path) -> None:
        (tmp_path / "meta.json").write_text('{"dtype": "uint16", "vocab_size": 256}')
        for split in ("train", "val"):
            (tmp_path / f"{split}-a.bin").write_bytes(bytes([7, 0, 9, 0]))
        corpus = load_corpus(tmp_path)
        assert corpus.train[:].tolist() == [7, 9]
        assert corpus.tokenizer is None
        byte = load_corpus(tmp_path, "byte").tokenizer
        assert byte is not None
        assert byte.decode(corpus.train[:]) == "\a\t"

    def test_the_folders_tokenizer_may_be_named_but_not_changed(
        self, folder: Path, library_file: Path
    ) -> None:
        assert load_corpus(folder, "char").tokenizer is not None
        for other in ("byte", library_file):
            with pytest.raises(ValueError, match=r"is not the one that .* was made with"):
                load_corpus(folder, other)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("meta.json", None, "has no meta.json"),
            ("meta.json", b"{", "not readable JSON"),
            ("meta.json", b'{"dtype": "int8", "vocab_size": 9}', "lacks a dtype"),
            ("meta.json", b'{"dtype": "uint16", "vocab_size": 2}', "holds the token id 4"),
            ("meta.json", b'{"dtype": "uint16", "vocab_size": true}', "lacks a dtype"),
            ("meta.json", b'{"dtype": "uint16", "vocab_size": 65537}', "lacks a dtype"),
            (
                "meta.json",
                b'{"dtype": "uint32", "vocab_size": 1%s}' % (b"0" * 30),
                "lacks a dtype",
            ),
            ("meta.json", DEEP, "not readable JSON"),
            ("train-00001.bin", None, "lacks train-00001.bin"),
            ("val-00000.bin", None, "lacks val-00000.bin"),
            ("train-00000.bin", b"\0" * 598, "has 598 bytes, but should hold 300 ids of 2 bytes"),
        ],
    )
    def test_a_damaged_folder_is_refused(
        self, folder: Path, file: str, content: bytes | None, message: str
    ) -> None:
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(folder)

    def test_a_folder_in_place_of_a_shard_is_refused(self, folder: Path) -> None:
        (folder / "train-00000.bin").unlink()
        (folder / "train-00000.bin").mkdir()
        with pytest.raises(ValueError, match="is not a file of token ids: copy"):
            load_corpus(folder)

    def test_an_id_outside_the_vocabulary_is_told_of_and_not_handed_out(self) -> None:
        ids = numbers(20)
        shards = TokenShards([ids[:7], ids[7:]], vocab_size=10, origin="It")
        assert shards[3:10].tolist() == ids[3:10].tolist()
        assert shards.mistake is None
        assert shards[5:15].tolist() == [5, 6, 7, 8, 9, 0, 0, 0, 0, 0]
        assert shards.mistake is not None
        assert "It holds the token id 14 (token 14)" in shards.mistake

    def test_a_failed_preparation_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"abc" * 100)
        (tmp_path / "b.txt").write_bytes(b"\xff" * 100)
        for paths, message in (
            (["a.txt", "b.txt"], r"b.txt is not UTF-8 text \(byte 0\)"),
            (["a.txt", "c.txt"], "the text .* does not exist"),
            ([], "no text file was given"),
        ):
            with pytest.raises(ValueError, match=message):
                prepare_shards([tmp_path / p for p in paths], tmp_path / "out", "byte")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]

    def test_a_folder_in_use_is_not_overwritten(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="exists already"):
            prepare_shards([folder.parent / "a.txt"], folder, "char")


class TestBatches:
    def test_targets_are_the_next_tokens(self) -> None:
        inputs, targets = Batches(numbers(500), 8, 16, seed=0).get(3)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (8, 16)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))

    def test_a_batch_is_a_function_of_seed_step_micro_and_rank(self) -> None:
        def get(seed: int, step: int, micro: int, rank: int) -> list[int]:
            batches = Batches(numbers(100_000), 2, 16, seed, rank, world_size=3, grad_accum=2)
            batches.get(random.randrange(100))
            return batches.get(step, micro)[0][:, 0].tolist()

        key = (5, 7, 1, 2)
        assert get(*key) == get(*key)
        for changed in ((6, 7, 1, 2), (5, 8, 1, 2), (5, 7, 0, 2), (5, 7, 1, 1)):
            assert get(*key) != get(*changed)

    @pytest.mark.parametrize(
        ("world_size", "batch_size", "grad_accum"),
        [(1, 12, 1), (2, 6, 1), (3, 4, 1), (4, 3, 1), (2, 3, 2), (1, 1, 12), (12, 1, 1)],
    )
    def test_the_data_of_a_step_depend_on_the_global_batch_alone(
        self, world_size: int, batch_size: int, grad_accum: int
    ) -> None:
        rows = []
        for micro in range(grad_accum):
            for rank in range(world_size):
                batches = Batches(
                    numbers(5000), batch_size, 16, 3, rank, world_size, grad_accum=grad_accum
                )
                rows.append(batches.get(4, micro)[0])
        assert torch.equal(torch.cat(rows), Batches(numbers(5000), 12, 16, 3).get(4)[0])

    def test_windows_start_everywhere_with_equal_chance(self) -> None:
        num_starts, draws = 10, 20_000
        batches = Batches(numbers(num_starts + 20), 1, 20, seed=random.getrandbits(64))
        starts = torch.cat([batches.get(step)[0][:, 0] for step in range(draws)])
        counts = torch.bincount(starts, minlength=num_starts).double()
        expected = draws / num_starts
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert len(counts) == num_starts, "the last window is the last of the split"
        # 9 degrees of freedom: above 45 one time in a million.
        assert chi_squared < 45

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": numbers(16)}, "training split has 16 tokens, but one sequence of 16"),
            ({"batch_size": 0}, "a batch of 0 sequences"),
            ({"seq_len": 0}, "sequences of 0 tokens"),
            ({"grad_accum": 0}, "grad_accum is 0"),
            ({"seed": -1}, "the seed is -1"),
            ({"batch_size": 20}, "takes 640 tokens, but the training split has only 500"),
        ],
    )
    def test_a_batch_that_cannot_be_is_refused(
        self, changes: dict[str, object], message: str
    ) -> None:
        arguments = {"tokens": numbers(500), "batch_size": 2, "seq_len": 16, "seed": 0}
        with pytest.raises(ValueError, match=message):
            Batches(**(arguments | {"world_size": 2} | changes))  # type: ignore[arg-type]


class TestEvalBatches:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    @pytest.mark.parametrize("num_tokens", [9, 17, 18, 100, 101, 200])
    @pytest.mark.parametrize("num_batches", [None, 1, 2, 100])
    def test_ranks_share_the_windows_up_to_the_end_of_the_split(
        self, world_size: int, num_tokens: int, num_batches: int | None
    ) -> None:
        seen = []
        counts = set()
        for rank in range(world_size):
            batches = list(eval_batches(numbers(num_tokens), 3, 8, num_batches, rank, world_size))
            counts.add(len(batches))
            for inputs, targets, num_counted in batches:
                assert torch.equal(targets, inputs + 1)
                assert len(inputs) >= 1
                assert num_counted in (0, inputs.numel())
                if num_counted:
                    seen += inputs.flatten().tolist()
        assert len(counts) == 1, "every rank yields as many"
        num_windows = (num_tokens - 1) // 8
        if num_batches is not None:
            num_windows = min(num_windows, num_batches * 3 * world_size)
        assert sorted(seen) == list(range(8 * num_windows))

    def test_a_split_that_is_too_short_is_refused_at_the_call(self) -> None:
        with pytest.raises(
            ValueError, match="validation split has 8 tokens, but one sequence of 8"
        ):
            eval_batches(numbers(8), 1, 8)
        with pytest.raises(ValueError, match="num_batches is 0"):
            eval_batches(numbers(80), 1, 8, 0)


class TestCommandLine:
    def prepare(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qsdp", "prepare", *arguments],
            capture_output=True,
            text=True,
            timeout=patience.seconds(),
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )

    @pytest.mark.slow
    def test_it_makes_a_folder_that_can_be_trained_on(self, tmp_path: Path) -> None:
        text = random_text(5000)
        (tmp_path / "a.txt").write_bytes(text.encode())
        done = self.prepare(
            "--texts", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "char"
        )
        assert done.returncode == 0, done.stderr
        corpus = load_corpus(tmp_path / "out")
        assert f"{len(corpus.train):,} tokens to train on" in done.stdout
        assert len(corpus.train) + len(corpus.val) == 5000
        assert json.loads((tmp_path / "out" / "meta.json").read_text())["format"] == "qsdp-tokens-1"

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--out", "{}/a.txt/below"], r"below cannot be made .*: choose a folder"),
            (["--out", "{}/out", "--shard-tokens", "x"], "--shard-tokens"),
            (["--out", "{}/out", "--shardz", "1"], "--shardz"),
            (["--out", "{}/out", "--shard-tokens", "0"], "--shard-tokens is 0"),
            (["--out", "{}/out", "--val-fraction", "2"], r"--val-fraction is 2\.0"),
            (["--out", "{}/out", "--texts", "{}/b.txt"], "--texts is given twice"),
            (["--out", "{}/out", "--texts={}/b.txt"], "--texts is given twice"),
            ([], "--out"),
            (["{}", "--out", "{}/out"], "is not a file: give files that exist"),
            (
                ["{}/absent.txt", "--out", "{}/out"],
                r"the text .*absent\.txt does not exist: give files that exist\.",
            ),
        ],
    )
    def test_each_mistake_is_one_sentence(
        self,
        tmp_path: Path,
        flags: list[str],
        said: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "a.txt").write_text("abc" * 100)
        flags = [flag.format(tmp_path) for flag in flags]
        with pytest.raises(SystemExit) as stop:
            main(["--texts", str(tmp_path / "a.txt"), *flags])
        assert stop.value.code == 2
        told = capfd.readouterr().err
        assert re.search(said, told)
        assert re.fullmatch(r"error: [^A-Z].*[^.]\.\n", told), told
