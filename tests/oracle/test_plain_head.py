"""The loss that CPUs compute from a few positions' logits is TRL's own, in value and gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import HRAConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from hra_export.training.causal import PlainHeadTrainer
from hra_export.training.tuner import get_hra_model
from tests.train_scene import chats, save_base, sums

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
# Two ways to add up the same float32 numbers, 96 of them a token.
RTOL = 1e-5


def loss_and_gradients(kind: Any, base: Path, output: Path, rows: list[Any], items: int | None) -> list[Tensor]:
    arguments = trl.SFTConfig(
        output_dir=str(output), per_device_train_batch_size=len(rows), report_to="none", use_cpu=True, bf16=False
    )
    torch.manual_seed(0)
    config = HRAConfig(r=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    model = get_hra_model(AutoModelForCausalLM.from_pretrained(base), config).train()
    trainer = kind(model, args=arguments, train_dataset=Dataset.from_list(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    return [loss.detach(), *(value.grad for value in model.parameters() if value.requires_grad)]


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("rows", [sums(5), chats(5), [{"text": "one plus two is three"}, {"text": "good and bad"}]],
                         ids=["completions", "messages", "texts"])  # fmt: skip
def test_loss_is_that_of_trl(tmp_path: Path, rows: list[Any], items: int | None) -> None:
    base = save_base(tmp_path / "base")
    ours, theirs = (
        loss_and_gradients(kind, base, tmp_path / "run", rows, items) for kind in (PlainHeadTrainer, trl.SFTTrainer)
    )
    assert len(ours) == len(theirs) > 10
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=RTOL, atol=RTOL * float(expected.abs().max()))
