"""The causal language model of SFT and RLOO over packed batches.

Shapes: M completion tokens, T columns.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rm_robust.config.shared import ComputeConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import commit_checkpoint
from rm_robust.models.compute import EXACT, autocast
from rm_robust.models.packing import Layout, PackedBatch, completion_logits, prepare_backbone, token_logprobs


class PackedPolicy(nn.Module):
    """A transformers causal language model over packed batches.

    A batch gives the log-probabilities and entropies of its completion tokens, [M] float32 nats.
    """

    def __init__(
        self, model: PreTrainedModel, layout: Layout, *, temperature: float, compute: ComputeConfig = EXACT
    ) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.temperature = temperature
        self.compute = compute
        prepare_backbone(model.base_model, layout)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with autocast(batch.input_ids_RT.device, self.compute):
            logits_MV = completion_logits(self.model, batch)
            return token_logprobs(logits_MV, batch.target_ids_M, temperature=self.temperature)


def load_policy(model_dir: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model as transformers does.

    Raises CheckpointError unless every weight comes from the files.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=dtype, output_loading_info=True)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{model_dir} lacks weights for {missing}; they would be random. Save the whole model.")
    return model  # type: ignore[no-any-return]


def commit_policy(
    target: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    chat: ChatFormat,
    *,
    training: dict[str, str | int | float],
) -> None:
    """Commit a policy checkpoint from an engine's whole weights, whose names are PackedPolicy's ("model." in front)."""
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), state_dict=state)
        chat.tokenizer.save_pretrained(str(folder))

    commit_checkpoint(target, write, kind="policy", template_sha256=chat.template_sha256, training=training)
