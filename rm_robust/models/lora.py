"""Low-rank adapters on a reward model, through PEFT. The score head is always trained, saved and merged with them."""

from pathlib import Path

import peft
from torch import Tensor
from transformers import PreTrainedModel

from rm_robust.config.training import LoraConfig
from rm_robust.errors import CheckpointError

ADAPTER_DIR = "adapter"
"""The folder in a merged checkpoint that holds the adapter and the head alone, as PEFT loads them."""


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> peft.PeftModel:
    """Freeze `model` and put trainable adapters into it. Its head is trained whole.

    `model` itself then holds the adapters.
    """
    settings = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,
        # with dropout, scores would differ between the passes of one step, and between a run and its resumption
        lora_dropout=0.0,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules),
        modules_to_save=["score"],
    )
    return peft.PeftModelForSequenceClassification(model, settings)


def save_merged(adapted: peft.PeftModel, state: dict[str, Tensor], folder: Path) -> None:
    """Save the merged model as plain transformers loads it, and the adapter with its head in `folder`/adapter.

    `adapted` is a model with untrained adapters of the same shape, which is used up. `state` holds the trained weights
    under the names of its inner model. Raises CheckpointError when `state` lacks a weight, because an untrained head or
    adapter must not be saved.
    """
    problems = adapted.get_base_model().load_state_dict(state, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise CheckpointError(
            f"The trained weights do not fit the adapted model: missing {problems.missing_keys}, "
            f"unknown {problems.unexpected_keys}."
        )
    adapted.save_pretrained(str(folder / ADAPTER_DIR))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(str(folder))
