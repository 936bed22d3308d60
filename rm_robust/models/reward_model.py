"""The reward model: a decoder plus a float32 score head without bias, read at the end-of-turn token. Paper Eq. 2.

Shapes: N completions, H hidden, T columns of a packed batch.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rm_robust.config.shared import ComputeConfig
from rm_robust.errors import CheckpointError
from rm_robust.models.compute import EXACT, autocast
from rm_robust.models.last_layer import LAST_LAYER_MODEL_TYPES, compute_last_layer_at_scored_columns
from rm_robust.models.packing import Layout, PackedBatch, hidden_states, prepare_backbone


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of a batch (float32, raw), and the hidden states at the scored tokens (float32, no gradient).

    The hidden states are those before and after the decoder's final norm.
    """

    scores_N: Tensor
    hidden_before_final_norm_NH: Tensor
    hidden_after_final_norm_NH: Tensor

    def detached(self) -> "ScoredBatch":
        """Return the same numbers without the graph that keeps every activation."""
        return replace(self, scores_N=self.scores_N.detach())


def new_reward_model(base_dir: str | Path, *, pad_id: int, seed: int) -> PreTrainedModel:
    """Return a sequence-classification model on top of a causal language model.

    Each weight of the head is drawn from N(0, 1/(H+1)) (paper, after Eq. 2). A trained reward model keeps its head.
    Raises CheckpointError when the directory lacks a backbone weight or has another number of scores.
    """
    config = AutoConfig.from_pretrained(str(base_dir))
    config.num_labels = 1
    config.pad_token_id = pad_id
    model, info = AutoModelForSequenceClassification.from_pretrained(
        str(base_dir), config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if info["mismatched_keys"]:
        raise CheckpointError(
            f"{base_dir} has weights of other shapes: {sorted(info['mismatched_keys'])}; "
            "a reward model has one score (num_labels=1)."
        )
    missing = sorted(info["missing_keys"])
    if missing and missing != ["score.weight"]:
        raise CheckpointError(
            f"{base_dir} lacks trained weights for {missing}: they would be random. Save the whole model."
        )
    if not missing:
        return model  # type: ignore[no-any-return]
    generator = torch.Generator().manual_seed(seed)
    weight_1H = score_head(model).weight
    with torch.no_grad():
        weight_1H.copy_(torch.randn(weight_1H.shape, generator=generator) / math.sqrt(weight_1H.shape[1] + 1))
    return model  # type: ignore[no-any-return]


def load_reward_model(checkpoint_dir: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load a trained reward model as transformers does.

    Raises CheckpointError unless every weight, the head above all, comes from the files, and the model uses every
    weight of the files.
    """
    config = AutoConfig.from_pretrained(str(checkpoint_dir))
    if config.num_labels != 1:
        raise CheckpointError(
            f"{checkpoint_dir} has num_labels={config.num_labels}; a reward model has one score (num_labels=1)."
        )
    model, info = AutoModelForSequenceClassification.from_pretrained(
        str(checkpoint_dir), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if info["mismatched_keys"]:
        raise CheckpointError(
            f"{checkpoint_dir} has weights of other shapes than its config.json says: "
            f"{sorted(info['mismatched_keys'])}."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint_dir} lacks trained weights for {missing}: a score from them would be random. "
            "Save the whole model."
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        raise CheckpointError(
            f"{checkpoint_dir} has weights that {type(model).__name__} does not use: {unused}. "
            "It is not the model that its config.json names."
        )
    return model  # type: ignore[no-any-return]


def score_head(model: PreTrainedModel) -> nn.Linear:
    """Return the H -> 1 linear layer that is trained and read. Raises CheckpointError for a head of another shape."""
    head = getattr(model, "score", None)  # encoders (BERT) call their head otherwise
    if not isinstance(head, nn.Linear):
        from peft.utils.other import ModulesToSaveWrapper  # slow to import, and only adapters need it

        if isinstance(head, ModulesToSaveWrapper):  # it holds the untrained head beside the trained one
            head = head.modules_to_save[str(head.active_adapter)]
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise CheckpointError(
            f"{type(model).__name__} has the head {head}; only one bias-free linear layer `score` to a single score is "
            "known."
        )
    return head


class PackedRewardModel(nn.Module):
    """A transformers reward model over packed batches: DDP, DeepSpeed and plain inference call the same forward.

    The head becomes float32, whatever the backbone is. Every weight is used by calling its module, because ZeRO-3
    gathers a weight only then.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, compute: ComputeConfig = EXACT) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.compute = compute
        head = score_head(model)
        prepare_backbone(self.backbone, layout)
        final_norm_of(self.backbone)  # a decoder without one is refused now, not at its first batch
        self.scores_last_layer_alone = layout is Layout.SEGMENTS and model.config.model_type in LAST_LAYER_MODEL_TYPES
        if self.scores_last_layer_alone:
            compute_last_layer_at_scored_columns(self.backbone)
        head.float()

    @property
    def backbone(self) -> PreTrainedModel:
        backbone = self.model.base_model
        assert isinstance(backbone, PreTrainedModel)
        return backbone

    def forward(self, batch: PackedBatch) -> ScoredBatch:
        return self.score(batch, self.compute)

    def score(self, batch: PackedBatch, compute: ComputeConfig) -> ScoredBatch:
        """Return the scores and hidden states of a batch, computed in the precision that `compute` names."""
        with autocast(batch.input_ids_RT.device, compute):
            if self.scores_last_layer_alone:
                before_NH, scored_NH = states_around_final_norm(
                    self.backbone, batch, scored_index_N=batch.scored_index_N
                )
            else:
                before_NH, scored_NH = (
                    states_TH[batch.scored_index_N] for states_TH in states_around_final_norm(self.backbone, batch)
                )
        with torch.autocast(scored_NH.device.type, enabled=False):
            scores_N = score_head(self.model)(scored_NH.float()).squeeze(1)
        return ScoredBatch(scores_N, before_NH.float(), scored_NH.detach().float())


FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "language_model.norm", "decoder.final_layer_norm")
"""The names that transformers' decoders give to the norm after their last layer."""


def final_norm_of(backbone: PreTrainedModel) -> nn.Module:
    """Return the decoder's norm after its last layer.

    Raises CheckpointError for a decoder that has none under the names that transformers uses.
    """
    for name in FINAL_NORMS:
        with contextlib.suppress(AttributeError):
            return backbone.get_submodule(name)
    raise CheckpointError(
        f"{type(backbone).__name__} has no final norm under a known name ({', '.join(FINAL_NORMS)}), at which the "
        "norms of hidden states are read. Use another decoder family."
    )


def states_around_final_norm(
    backbone: PreTrainedModel, batch: PackedBatch, **for_layers: object
) -> tuple[Tensor, Tensor]:
    """Return the hidden states before the decoder's final norm (no gradient) and after it.

    Both are [R*T, H], or have one row for each column that the last layer computed.
    """
    before: list[Tensor] = []
    handle = final_norm_of(backbone).register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    try:
        hidden_TH = hidden_states(backbone, batch, **for_layers)
    finally:
        handle.remove()
    return before[0].detach().flatten(0, 1), hidden_TH
