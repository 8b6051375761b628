"""What transformers loads of an exported folder is the model, its tokenizer and its zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qsdp import checkpoint
from qsdp.commands import compress
from qsdp.commands.export import main
from qsdp.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, Tokenizer, hash_of
from qsdp.export import export_transformers, load_export
from qsdp.models.generate import generate
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.family import GPT2
from qsdp.models.gpt2.model import GPT
from qsdp.models.huggingface.config import config_from_huggingface
from qsdp.models.huggingface.weights import export_huggingface
from qsdp.train.config import TrainConfig
from tests.support import command_line, patience
from tests.support.bad_inputs import BadInput

pytestmark = pytest.mark.usefixtures("gloo_of_one")

# Line ends, spaces that a clean-up would take, an accent apart, and what UTF-16 has surrogates for.
LINES = "A b\n\n\tc  d\r\n'll don't . \x00\x1f\u00a0\u00e9 e\u0301 \u2028\u4e2d\U0001f600\u200d"
ROOT = Path(__file__).parents[2]
END = "<|endoftext|>"
NUM_TOKENS = 9

FLAGS = [
    BadInput("no checkpoint", "{}/none", "none holds no complete checkpoint"),
    BadInput("a folder of something else", "{}/other", "holds no complete checkpoint"),
    BadInput("an unknown dtype", "{}/run --dtype fp8", "--dtype is 'fp8': choose one of fp32, bf"),
    BadInput("files of no size", "{}/run --max-file-gib 0", "--max-file-gib is 0"),
    BadInput("an unknown flag", "{}/run --dtyp fp16", "--dtyp"),
    BadInput(
        "a weight too large", "{}/run --dtype fp16", "norm_out.bias has a weight of magnitude"
    ),
]


def pairs_of_bytes() -> Tokenizer:
    """A BPE tokenizer with an end of a text, which it would put before each text."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([LINES, "the cat and the dog " * 9], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    return LibraryTokenizer(library.to_str())


def repeat_last(model: GPT) -> None:
    """Make the last token of the vocabulary the most likely one, always."""
    model.embed.weight[-1] *= 9
    model.norm_out.weight.zero_()
    model.norm_out.bias.copy_(model.embed.weight[-1])


def make_too_large(model: GPT) -> None:
    """Give a weight a value that fp16 has not."""
    model.norm_out.bias[3] = -70000.0


@dataclass
class Case:
    """A run, and the flags with which it is exported."""

    name: str
    tokenizer: Tokenizer | None
    size: dict[str, Any] = field(default_factory=dict)
    flags: str = ""
    pattern: str | None = None
    """What it is compressed to before."""
    end: int | None = None
    """The token at which generation ends."""
    change: Callable[[GPT], None] = lambda model: None
    """What is done to random weights."""

    def save(self, folder: Path) -> GPT:
        """The model, and its checkpoint in ``folder``/NAME/checkpoints, as a run leaves it."""
        size = {"num_layers": 2, "num_heads": 2, "width": 16, "context": 16} | self.size
        if self.tokenizer is not None:
            size = {"vocab_size": self.tokenizer.vocab_size} | size
        model = GPT(GPTConfig(**size))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.4 * torch.randn_like(parameter))
            self.change(model)
        text = "" if self.tokenizer is None else self.tokenizer.to_json()
        meta = {
            "config": TrainConfig().as_dict(),
            "fingerprint": {"model": asdict(model.config), "tokenizer": hash_of(text)},
            "world_size": 1,
        }
        files = {"tokenizer.json": text} if text else {}
        checkpoint.save(folder / self.name / "checkpoints", 3, model, None, meta, files=files)
        return model.eval()

    def export(self, folder: Path) -> GPT:
        """Write ``folder``/out/NAME. Returns the model that it holds."""
        model = self.save(folder)
        source, out = folder / self.name, folder / "out" / self.name
        if self.pattern is not None:
            pruned = folder / f"{self.name}-pruned"
            compress.main([str(source), "--pattern", self.pattern, "--out", str(pruned)])
            load_export(pruned, model)
            source = pruned
        main([str(source), *self.flags.split(), "--out", str(out)])
        if self.pattern is not None:
            record = (out / "qsdp_compression.json").read_bytes()
            assert record == (source / "compression.json").read_bytes()
        return model

    def asked(self, model: GPT, folder: Path) -> dict[str, Any]:
        """What the library is asked."""
        last = model.config.vocab_size - 1
        asked = {
            "folder": str(folder / "out" / self.name),
            "prompt": torch.tensor([[1, 5, last, 2]]),
            "num_tokens": NUM_TOKENS,
        }
        if self.tokenizer is None:
            return asked | {"texts": []}
        shuffled = "".join(LINES[i] for i in torch.randint(len(LINES), (200,)))
        texts = [LINES, shuffled, "\n", " ", "  A", "", "\U0001f600"]
        texts += [] if self.end is None else [f"b{END}c", END]
        size = self.tokenizer.vocab_size
        ids = [[*range(size)], torch.randint(size, (3000,)).tolist()]
        return asked | {"texts": texts, "ids": ids}


_FRESH = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for asked in torch.load("asked.pt"):
    model, info = AutoModelForCausalLM.from_pretrained(
        asked["folder"], torch_dtype="auto", output_loading_info=True
    )
    answer = {"dtype": model.dtype, "end": (model.config.bos_token_id, model.config.eos_token_id)}
    answer["odd"] = {what: sorted(map(str, names)) for what, names in info.items() if names}
    options = {"max_new_tokens": asked["num_tokens"], "do_sample": False}
    answer["generated"] = model.generate(asked["prompt"], **options).tolist()
    with torch.no_grad():
        answer["logits"] = model(asked["prompt"]).logits
        if asked["texts"]:
            tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
            answer["encoded"] = [tokenizer(text).input_ids for text in asked["texts"]]
            answer["decoded"] = [tokenizer.decode(ids) for ids in asked["ids"]]
            answer["limits"] = (tokenizer.model_max_length, tokenizer.eos_token_id)
            answer["logits_of_text"] = model(**tokenizer("A b", return_tensors="pt")).logits
    answers.append(answer)
torch.save(answers, "answers.pt")
"""


def in_a_fresh_process(asked: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What the transformers library answers, in a process without qsdp."""
    torch.save(asked, folder / "asked.pt")
    done = subprocess.run(
        [sys.executable, "-c", _FRESH],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = torch.load(folder / "answers.pt")
    return answers


@pytest.mark.slow
def test_transformers_loads_the_same_model_and_the_same_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    untied = {"tie_weights": False, "bias": False}
    cases = [
        Case("char", CharTokenizer(LINES), flags="--max-file-gib 0.00001"),
        Case("byte", ByteTokenizer(), untied, "--dtype fp32"),
        Case("pairs", pairs_of_bytes(), {"vocab_size": 320}, pattern="2:4", end=0),
        Case("shards", None, {"vocab_size": 50}, change=repeat_last),
        Case("half", ByteTokenizer(), {"bias": False}, "--dtype bf16"),
    ]
    models = [case.export(tmp_path) for case in cases]
    assert capfd.readouterr().out.count("without a tokenizer") == 1
    asked = [case.asked(model, tmp_path) for case, model in zip(cases, models, strict=True)]
    answers = in_a_fresh_process(asked, tmp_path)
    for case, model, ask, answer in zip(cases, models, asked, answers, strict=True):
        dtype = torch.bfloat16 if case.name == "half" else torch.float32
        assert (answer["dtype"], answer["end"], answer["odd"]) == (dtype, (case.end, case.end), {})
        if dtype == torch.float32:
            logits = model(ask["prompt"])[0]
            torch.testing.assert_close(answer["logits"], logits, rtol=1e-5, atol=1e-5)
            generated = generate(model, ask["prompt"], NUM_TOKENS, temperature=0).tolist()
            assert answer["generated"] == generated
            assert generated[0][4:] == [49] * NUM_TOKENS or case.name != "shards"
        if (tokenizer := case.tokenizer) is not None:
            assert answer["limits"] == (16, case.end)
            assert answer["encoded"] == [tokenizer.encode(text).tolist() for text in ask["texts"]]
            assert answer["decoded"] == [tokenizer.decode(ids) for ids in ask["ids"]]
        if tokenizer is not None and dtype == torch.float32:
            logits = model(torch.tensor(tokenizer.encode("A b").tolist())[None])[0]
            torch.testing.assert_close(answer["logits_of_text"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_what_is_written_is_the_export_of_the_whole_model_bit_for_bit(
    tmp_path: Path, bias: bool, tie_weights: bool, dtype: str
) -> None:
    size = {"vocab_size": 50257 if bias and tie_weights else 30, "bias": bias}
    flags = f"--dtype {dtype} --max-file-gib 0.00001" if dtype else ""
    case = Case("run", None, size | {"tie_weights": tie_weights}, flags)
    model, out = case.export(tmp_path), tmp_path / "out" / "run"
    model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype))
    export_huggingface(model, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = [load_file(file) for file in out.glob("*.safetensors")]
    assert (len(files) > 1) == (dtype != "")
    stored = {name: tensor for file in files for name, tensor in file.items()}
    assert sum(map(len, files)) == len(stored) == len(whole)
    torch.testing.assert_close(stored, whole, rtol=0, atol=0)
    assert ("lm_head.weight" in stored) == (not tie_weights)
    settings = json.loads((out / "config.json").read_text())
    end = 50256 if size["vocab_size"] == 50257 else None  # of GPT-2's own vocabulary
    assert settings["bos_token_id"] == settings["eos_token_id"] == end
    # config.json has no room for bias.
    assert asdict(config_from_huggingface(out)) == asdict(model.config) | {"bias": True}


def test_one_tensor_is_in_memory_at_a_time_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("run", None, {"vocab_size": 30})
    case.save(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    read, alive = checkpoint.TensorReader.read, []

    def watched(reader: checkpoint.TensorReader, name: str) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in alive)
        tensor = read(reader, name)
        alive.append(weakref.ref(tensor))
        if len(alive) == 5:
            raise KeyboardInterrupt
        return tensor

    monkeypatch.setattr(checkpoint.TensorReader, "read", watched)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert len(alive) == 5
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bad", FLAGS, ids=lambda bad: bad.name)
def test_a_mistake_is_refused_in_one_sentence(
    bad: BadInput, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    Case("run", None, {"vocab_size": 30}, change=make_too_large).save(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert bad.said in refused(bad.arguments(tmp_path), tmp_path / "out", capfd)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_damaged_in_use_or_of_another_kind_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("run", ByteTokenizer(), pattern="2:4")
    case.export(tmp_path)
    run, pruned, out = tmp_path / "run", tmp_path / "run-pruned", tmp_path / "new"
    assert "exists already" in refused([str(run)], tmp_path / "out" / "run", capfd)
    # A folder that transformers loads is not taken for one of ours, which evaluate opens alike.
    exported = refused([str(tmp_path / "out" / "run")], out, capfd)
    assert "run holds no complete checkpoint" in exported
    with monkeypatch.context() as patch:
        patch.setattr(GPT2, "transformers", None)
        assert "GPTConfig have no form in" in refused([str(run)], out, capfd)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "one process" in refused([str(run)], out, capfd)
    weights = pruned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors is damaged (its checksum" in refused([str(pruned)], out, capfd)
    (pruned / "tokenizer.json").write_text("{}")
    assert "is not the one that the model was" in refused([str(pruned)], out, capfd)
    shards = next(run.rglob("*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert "is damaged" in refused([str(run)], out, capfd)
    assert not out.exists()
    with pytest.raises(ValueError, match="file_bytes is 0: choose 1 or more"):
        export_transformers(run, GPTConfig.from_preset("tiny", vocab_size=9), out, file_bytes=0)


def refused(flags: list[str], out: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What the command says, in one sentence, of these ``flags`` and this ``--out``."""
    return command_line.refused([*flags, "--out", str(out)], capfd, main)
