"""Bad inputs to launch/train_gpt.py, and what the one sentence about each must say.

In the flags, {} is the test's folder, where text.txt holds ``TEXT``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
DEEP = b"[" * 100_000
# A tokenizer of words, which has no id for the words of TEXT.
WORDS = b"""{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
"normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
"decoder": null, "model": {"type": "WordLevel", "vocab": {"cat": 0}, "unk_token": "[UNK]"}}"""


def shards_with_late_ids(folder: Path) -> Path:
    """A folder of token shards with ids outside its vocabulary where no check at the start looks.

    They are neither among the first of a file nor in the samples that ranks compare.
    """
    positions = np.arange(63 * 6000 + 1024)
    is_wrong = (positions >= 1 << 16) & (positions % 6000 >= 1024)
    folder.mkdir()
    (folder / "meta.json").write_text('{"dtype": "uint16", "vocab_size": 50}')
    np.where(is_wrong, 50, 7).astype("<u2").tofile(folder / "train-0.bin")
    np.full(1000, 7, dtype="<u2").tofile(folder / "val-0.bin")
    return folder


@dataclass(frozen=True)
class BadInput:
    name: str
    flags: str
    said: str
    file: tuple[str, bytes] | None = None
    """A further file in the test's folder: name and content."""

    def arguments(self, folder: Path) -> list[str]:
        """Make the file and return the flags for ``folder``."""
        if self.file is not None:
            name, content = self.file
            (folder / name).write_bytes(content)
        return self.flags.replace("{}", str(folder)).split()


# Refused by the flags alone.
FLAGS = [
    BadInput("a missing data file", "--data {}/none.txt", "none.txt does not exist"),
    BadInput("a missing file as it was given", "--data ./no.txt", "--data ./no.txt does not exist"),
    BadInput("a missing tokenizer", "--tokenizer {}/none.json", "none.json does not exist"),
    BadInput("a missing config file", "--config {}/none.toml", "cannot be read"),
    BadInput("a missing checkpoint", "--resume {}/none", "none does not exist"),
    BadInput("1 bit", "--qsdp-bits 1", "--qsdp-bits is 1"),
    BadInput("9 bits", "--qsdp-weight-bits 9", "--qsdp-weight-bits is 9"),
    BadInput("bits in words", "--qsdp-grad-bits four", "is 'four': give an integer"),
    BadInput(
        "bits with a point", "--qsdp-bits 8.0", "--qsdp-bits is '8.0': give an integer or auto"
    ),
    BadInput(
        "bits to choose and bits",
        "--qsdp-bits auto --qsdp-grad-bits 4",
        "--qsdp-grad-bits is given beside",
    ),
    BadInput(
        "bits to choose and a gather",
        "--qsdp-bits auto --qsdp-gather once",
        "--qsdp-gather is given beside --qsdp-bits auto",
    ),
    BadInput(
        "bits to choose and replicas", "--qsdp-bits auto --replicas 2", "--replicas is 2 beside"
    ),
    BadInput("a rate in words", "--min-lr=low", "--min-lr is 'low': give a number"),
    BadInput("no tokenizer's name", "--tokenizer=", "--tokenizer is '': choose"),
    BadInput("no data's name", "--data=", "--data is '': give"),
    BadInput("a name that is not UTF-8", "--out {}/\udcff", "\\udcff': give UTF-8 text"),
    BadInput("a config file that is a folder", "--config {}", "is not a file: give a TOML file"),
    BadInput(
        "a config file nested without end",
        "--config {}/deep.toml",
        "deep.toml is not a TOML file",
        ("deep.toml", b"steps = " + DEEP),
    ),
    BadInput("a bucket of 0", "--qsdp-bits 8 --qsdp-bucket-size 0", "--qsdp-bucket-size is 0"),
    BadInput("an unknown rounding", "--qsdp-bits 8 --qsdp-rounding up", "--qsdp-rounding is 'up'"),
    BadInput("a sparsity of 1.2", "--cram --cram-sparsity 0.5,1.2", "--cram-sparsity is"),
    BadInput("a sparsity in words", "--cram --cram-sparsity half", "--cram-sparsity"),
    BadInput("a pattern of 5:4", "--cram --cram-targets 5:4", "--cram-targets: pattern is 5:4"),
    BadInput("an unknown target", "--one-shot half", "--one-shot: the target 'half'"),
    BadInput(
        "AC/DC's flag alone", "--acdc-sparsity 0.5", "--acdc-sparsity is given without --acdc"
    ),
    BadInput("CrAM's flag alone", "--no-cram-plus", "--no-cram-plus is given without --cram"),
    BadInput(
        "AC/DC's flag alone, as by default",
        "--acdc-sparsity 0.9",
        "--acdc-sparsity is given without --acdc",
    ),
    BadInput("CrAM's flag for CrAM", "--cram-plus", "--cram-plus is given without --cram"),
    BadInput(
        "CrAM's sparsities as by default, and targets",
        "--cram --cram-targets 2:4 --cram-sparsity 0.5,0.7,0.9",
        "--cram-sparsity is given beside --cram-targets",
    ),
    BadInput(
        "AC/DC's sparsity as by default, and a target",
        "--acdc --acdc-sparsity=0.9 --acdc-target=2:4",
        "--acdc-sparsity is given beside --acdc-target",
    ),
    BadInput(
        "bits of all and of both directions",
        "--qsdp-bits 8 --qsdp-weight-bits 4 --qsdp-grad-bits 4",
        "--qsdp-bits is 8 beside --qsdp-weight-bits 4",
    ),
    BadInput(
        "a mask of gradients, as by default, for targets without one",
        "--cram --cram-targets 4bit,8bit --cram-sparse-grad",
        "--cram-sparse-grad is for targets that prune, but 4bit and 8bit",
    ),
    BadInput("patterns of nothing", "--prunable * --one-shot none", "--prunable is '*', but no"),
    BadInput("a rate after the end", "--min-lr 0 --steps 9 --warmup-steps 9", "--min-lr is 0, but"),
    BadInput(
        "errors of a wire without codes",
        "--qsdp-bits 16 --qsdp-errors",
        "--qsdp-errors is for values of 8 bits or fewer",
    ),
    BadInput(
        "a file that says bits twice",
        "--config {}/twice.toml",
        "--qsdp-bits is 6 beside",
        ("twice.toml", b"qsdp_bits = 6\nqsdp_weight_bits = 4\nqsdp_grad_bits = 2\n"),
    ),
    BadInput("CrAM's targets alone", "--cram-targets=2:4", "--cram-targets is given without"),
    BadInput(
        "a list as by default",
        "--cram_sparsity 0.5,0.7,0.9",
        "--cram-sparsity is given without --cram",
    ),
    BadInput(
        "no sparsity",
        "--config {}/empty.toml",
        "--cram-sparsity is (): give numbers from 0",
        ("empty.toml", b"cram_sparsity = []\n"),
    ),
    BadInput("GMP's flag under AC/DC", "--acdc --gmp-every 5", "--gmp-every is given without"),
    BadInput("SAM's flag alone", "--sam-rho 0.05", "--sam-rho is given without --sam"),
    BadInput("an empty pattern", "--prunable=", "--prunable is empty"),
    BadInput("an empty target", "--acdc --acdc-target=", "--acdc-target is empty"),
    BadInput("two methods", "--cram --gmp", "--cram and --gmp are both given"),
    BadInput("bits under a mask", "--acdc --acdc-target 4bit", "--acdc-target is '4bit'"),
    BadInput("AC/DC from the start", "--acdc --acdc-warmup 0", "--acdc-warmup is 0"),
    BadInput("phases too long", "--acdc --steps 9 --acdc-last-dense 9", "--acdc: warmup"),
    BadInput("falling sparsity", "--gmp --gmp-initial 0.95", "--gmp: gradual pruning goes"),
    BadInput(
        "a rounding of nothing", "--qsdp-bits 32 --qsdp-rounding shift", "--qsdp-rounding is for"
    ),
    BadInput("levels of 8 bits", "--qsdp-bits 8 --qsdp-levels learned", "--qsdp-levels is for"),
    BadInput(
        "levels after the end",
        "--qsdp-bits 4 --qsdp-levels learned --qsdp-level-steps 5 --steps 5",
        "--qsdp-level-steps begins with 5",
    ),
    BadInput(
        "a budget after the end",
        "--qsdp-budget 4 --qsdp-warmup-steps 9 --steps 9",
        "--qsdp-budget is allotted after",
    ),
    BadInput("a negative rho", "--cram --cram-rho=-0.1", "--cram-rho is -0.1"),
    BadInput("an unknown preset", "--model gpt5", "--model is 'gpt5'"),
    BadInput("no steps", "--steps 0", "--steps is 0"),
    BadInput("no bad step", "--max-bad-steps 0", "--max-bad-steps is 0: choose 1 or more"),
    BadInput("no time to wait", "--timeout-s 0", "--timeout-s is 0"),
    BadInput("half a step", "--steps 1.5", "--steps"),
    BadInput("an unknown flag", "--stepz 3", "--stepz"),
    BadInput("a flag without its value", "--lr", "--lr"),
    BadInput("a learning rate that is no number", "--lr nan", "--lr is nan"),
    BadInput("a minimum above the rate", "--lr 1e-5 --min-lr 1e-4", "--min-lr is 0.0001"),
    BadInput("an unknown backend", "--backend mpi", "--backend is 'mpi'"),
    BadInput("an unknown precision", "--precision fp8", "--precision is 'fp8'"),
    BadInput("a negative seed", "--seed -1", "--seed is -1"),
    BadInput("steps beyond all integers", f"--steps {1 << 63}", "--steps is"),
    BadInput("a name too long for data", "--data {}/" + 300 * "x", "File name too long"),
    BadInput("a name too long for results", "--out {}/" + 300 * "x", "File name too long"),
    BadInput("a tokenizer's name too long", f"--tokenizer {300 * 'x'}", "File name too long"),
    BadInput("a checkpoint's name too long", f"--resume {300 * 'x'}", "File name too long"),
    BadInput("a budget of 2 bits", "--qsdp-budget 2", "--qsdp-budget is 2"),
    BadInput("a budget that is no number", "--qsdp-budget nan", "--qsdp-budget is nan"),
    BadInput(
        "1 bit for embeddings",
        "--qsdp-bits 8 --qsdp-embedding-bits 1",
        "--qsdp-embedding-bits is 1",
    ),
    BadInput(
        "an unknown gather", "--qsdp-bits 8 --qsdp-gather thrice", "--qsdp-gather is 'thrice'"
    ),
    BadInput("an unknown reduce", "--qsdp-bits 8 --qsdp-reduce tree", "--qsdp-reduce is 'tree'"),
    BadInput("unknown levels", "--qsdp-bits 4 --qsdp-levels good", "--qsdp-levels is 'good'"),
    BadInput(
        "levels learned before the first step",
        "--qsdp-bits 4 --qsdp-levels learned --qsdp-level-steps 10,0",
        "--qsdp-level-steps holds 0",
    ),
    BadInput("level steps in words", "--qsdp-level-steps ten", "--qsdp-level-steps"),
    BadInput(
        "level steps of a uniform grid",
        "--qsdp-bits 4 --qsdp-level-steps 10",
        "--qsdp-level-steps is given without --qsdp-levels learned",
    ),
    BadInput(
        "bits for a warm-up of no length",
        "--qsdp-bits 4 --qsdp-warmup-bits 8",
        "--qsdp-warmup-bits is given without --qsdp-warmup-steps",
    ),
    BadInput(
        "a warm-up at 12 bits",
        "--qsdp-bits 4 --qsdp-warmup-steps 3 --qsdp-warmup-bits 12",
        "--qsdp-warmup-bits is 12",
    ),
    BadInput(
        "bits for a hop that is not taken",
        "--qsdp-bits 4 --qsdp-reduce flat --qsdp-local-grad-bits 8",
        "--qsdp-local-grad-bits is given without --qsdp-reduce two-hop",
    ),
    BadInput(
        "a quantized wire's gather without bits",
        "--qsdp-gather once",
        "--qsdp-gather is given without --qsdp-bits",
    ),
    BadInput(
        "buckets without bits",
        "--qsdp-bucket-size 64",
        "--qsdp-bucket-size is given without --qsdp-bits",
    ),
    BadInput(
        "errors of a wire that has none",
        "--qsdp-errors",
        "--qsdp-errors is given without --qsdp-bits",
    ),
    BadInput(
        "no ranks a node",
        "--qsdp-bits 8 --qsdp-ranks-per-node 0",
        "--qsdp-ranks-per-node holds 0",
    ),
    BadInput(
        "a policy without bits",
        "--qsdp-bits 8 --qsdp-policy blocks.0.*",
        "--qsdp-policy holds 'blocks.0.*'",
    ),
    BadInput(
        "a policy of three widths",
        "--qsdp-bits 8 --qsdp-policy blocks.0.*=8,*.attn.*=8/4/2",
        "--qsdp-policy holds '*.attn.*=8/4/2'",
    ),
    BadInput(
        "a policy of 9 bits",
        "--qsdp-bits 8 --qsdp-policy *=8/9",
        "--qsdp-policy for '*' is 9",
    ),
    BadInput("no replicas", "--replicas 0", "--replicas is 0"),
    BadInput("a folder that is a file", "--out {}/text.txt", "text.txt is a file"),
    BadInput(
        "a number beyond all floats",
        "--config {}/big.toml",
        "beyond all floats",
        ("big.toml", b"lr = 1" + 400 * b"0"),
    ),
]

# Refused once the data are read.
DATA = [
    BadInput(
        "a batch larger than the data", "--data {}/text.txt --batch-size 900", "smaller batch size"
    ),
    BadInput(
        "names that are not there",
        "--data {}/text.txt --cram --one-shot none --prunable mlp",
        "--prunable: the prunable pattern 'mlp' matches no parameter",
    ),
    BadInput(
        "a pattern for norms",
        "--data {}/text.txt --prunable *.weight --one-shot 0.5,2:4",
        "--one-shot: blocks.0",
    ),
    BadInput(
        "a pattern that does not fit",
        "--data {}/text.txt --one-shot 3:7",
        "--one-shot: blocks.0",
    ),
    BadInput(
        "replicas that do not divide the ranks",
        "--data {}/text.txt --replicas 3",
        "--replicas is 3",
    ),
    BadInput(
        "a policy that matches nothing",
        "--data {}/text.txt --qsdp-bits 8 --qsdp-policy layers.*=4",
        "'layers.*' matches no parameter",
    ),
    BadInput(
        "a budget below 2 bits and their metadata",
        "--data {}/text.txt --qsdp-budget 2.2",
        "the budget is 2.2 bits a value, but weights take 2.5",
    ),
    BadInput(
        "a budget for a raw wire",
        "--data {}/text.txt --qsdp-budget 5 --qsdp-bits 32",
        "the budget is 5 bits a value, but there is nothing to allot",
    ),
    BadInput(
        "sequences longer than the context", "--data {}/text.txt --seq-len 65", "--seq-len is 65"
    ),
    BadInput(
        "too little to validate on",
        "--data {}/short.txt",
        "validation split",
        ("short.txt", TEXT[:400].encode()),
    ),
    BadInput("an empty file", "--data {}/empty.txt", "empty.txt", ("empty.txt", b"")),
    BadInput(
        "a file that is no text", "--data {}/binary", "not UTF-8 text", ("binary", b"\xff\xfe\x00")
    ),
    BadInput("a folder without shards", "--data {}", "meta.json"),
    BadInput(
        "a damaged tokenizer",
        "--data {}/text.txt --tokenizer {}/t.json",
        "t.json is not a JSON file",
        ("t.json", b"{"),
    ),
    BadInput(
        "a tokenizer nested without end",
        "--data {}/text.txt --tokenizer {}/deep.json",
        "deep.json is not a JSON file",
        ("deep.json", DEEP),
    ),
    BadInput(
        "a tokenizer that lacks words",
        "--data {}/text.txt --tokenizer {}/words.json",
        "words.json cannot encode the text",
        ("words.json", WORDS),
    ),
    BadInput(
        "a resume without checkpoints",
        "--data {}/text.txt --resume {}",
        "holds no complete checkpoint",
    ),
]
