"""The one line of docs/guides/peft.md in scripts of others: TRL's trainer with stock PEFT's layers, and with ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import HRAConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hra_export.training.layers import ReflectionLinear
from hra_export.training.tuner import accelerate_peft
from tests.train_scene import save_base, sums

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers warns of its own arguments
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|pin_memory).*:UserWarning"),
]
# Twelve steps of AdamW in float32 from the same start; see tests/oracle/test_tuner_against_peft.py.
RTOL = 1e-3


def trained(base: Path, output: Path, *, accelerated: bool) -> dict[str, torch.Tensor]:
    """The adapter that a script with `SFTTrainer` saves."""
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        completion_only_loss=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = HRAConfig(r=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(sums(48)), peft_config=config)
    if accelerated:
        accelerate_peft(trainer.model)
        assert any(isinstance(module, ReflectionLinear) for module in trainer.model.modules())
    trainer.train()
    trainer.save_model(str(output))
    return load_file(output / "adapter_model.safetensors")


def test_accelerated_sft_trainer_ends_with_the_adapter_of_stock_peft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    stock, fast = (trained(base, tmp_path / str(flag), accelerated=flag) for flag in (False, True))
    assert list(fast) == list(stock)
    for name, expected in stock.items():
        assert (fast[name] - expected).norm() < RTOL * expected.norm(), name
