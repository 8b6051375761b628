"""TRL's SFTTrainer with the wire and with CrAM, of whole models and of LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qsdp
from tests_distributed.integrations.test_transformers import quiet
from tests_distributed.support import leftovers
from tests_distributed.support.running import Run
from tests_distributed.support.trainer_toy import VOCAB, Tokens, arguments, tiny_llama

for name in ("accelerate", "trl", "peft", "datasets", "tokenizers"):
    pytest.importorskip(name, reason=f"TRL's trainers need {name}, which is not installed")
PRELOADED = ["trl.trainer.sft_trainer", "peft", "datasets"]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t2", unk_token="t2"
    )


def _trained(folder: Path, *, method: Any = None, wired: bool = True, lora: bool = False) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from qsdp.integrations.transformers import QSDPMixin

    class Wired(QSDPMixin, SFTTrainer):
        pass

    options: dict[str, Any] = {}
    if wired:
        options = {"wire": qsdp.QSDPConfig(bucket_size=64), "method": method}
    if lora:
        options["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
    leftovers.kept_open.add("datasets")  # Arrow keeps threads
    tokens = [row["input_ids"].tolist() for row in Tokens(64)]
    trainer = (Wired if wired else SFTTrainer)(
        model=tiny_llama(),
        args=arguments(
            str(folder),
            SFTConfig,
            max_steps=4,
            logging_steps=2,
            gradient_accumulation_steps=2,
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens}),
        processing_class=_tokenizer(),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _of(trainer: Any, key: str) -> Any:
    return pytest.approx([line[key] for line in trainer.state.log_history if key in line], abs=0.02)


def _cram(model: Any, base: Any, steps: int) -> Any:
    # Without an ascent or compression, both gradients are those of plain training.
    return qsdp.CrAM(model, base, sparsity=0.0, rho=0.0)


def _compared(folder: Path, lora: bool) -> None:
    """Each is as the stock trainer: losses, accuracies, and numbers of tokens, counted once."""
    with quiet():
        stock = _trained(folder, wired=False, lora=lora)
        for method in (None, _cram):
            wired = _trained(folder, method=method, lora=lora)
            for key in ("loss", "mean_token_accuracy", "entropy"):
                assert _of(wired, key).expected == _of(stock, key), key
            assert _of(wired, "num_tokens").expected == _of(stock, "num_tokens").expected
            assert wired._total_train_tokens == 4 * 2 * 2 * 2 * 16
            trained = [name for name, p in wired.model.named_parameters() if p.requires_grad]
            assert all("lora" in name for name in trained) == lora
        assert wired._made.num_steps == 4


@pytest.mark.parametrize("lora", [False, True])
def test_supervised_tuning_is_as_without_the_wire_and_counts_once(
    run: Run, tmp_path: Path, lora: bool
) -> None:
    run(2, _compared, tmp_path, lora)
