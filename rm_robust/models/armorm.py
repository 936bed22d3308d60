"""ArmoRM (Wang et al. 2024, arXiv 2406.12845), the paper's gold model, read from its safetensors by our own code.

The published model is RLHFlow/ArmoRM-Llama3-8B-v0.1, a Llama decoder with two heads. At the last token of the
conversation, a linear layer gives the rewards of 19 objectives. At the first token of the last
"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n", which sees the prompt alone, a small network gives the
weight of each objective. The score is the weighted sum of the rewards, after a fixed matrix has removed the effect of
length from them.

The code follows modeling_custom.py, which is published beside the weights (the copy that we read does not name its
commit). The gating network is that of RLHFlow/RLHF-Reward-Modeling, armo-rm/stage-2_train.py at commit 4cc54482; the
token at which it is read is that of armo-rm/stage-2_prepare.py at 33e07d27. Two things differ from the published
example. The heads compute in float32, in which their weights are stored; the example casts them to bfloat16. A
completion is scored with the white space at its ends, which the published template would trim.

Shapes: N completions, J objectives, H hidden, L tokens of the assistant header, T columns and M completion tokens of a
packed batch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError, ScoringError
from rm_robust.models.packing import Layout, PackedBatch, prepare_backbone
from rm_robust.models.reward_model import ScoredBatch, states_around_final_norm

ARCHITECTURE = "LlamaForRewardModelWithGating"
GATE_TEXT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""The text at whose first token, the end of the user's turn, the gate is read."""


@dataclass(frozen=True)
class GateConfig:
    """The sizes of the gating network, and the temperature that divides its logits."""

    num_objectives: int
    hidden_size: int
    num_hidden_layers: int
    temperature: float

    @classmethod
    def read(cls, checkpoint_dir: Path) -> "GateConfig":
        """Read config.json, with the defaults of modeling_custom.py.

        Raises CheckpointError for a value that is not a positive number.
        """
        config: dict[str, Any] = json.loads((checkpoint_dir / "config.json").read_text())
        defaults = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3, "gating_temperature": 10}
        values = {name: config.get(name, default) for name, default in defaults.items()}
        for name, value in values.items():
            is_number = isinstance(value, int) or (name == "gating_temperature" and isinstance(value, float))
            if not is_number or not value > 0:
                raise CheckpointError(
                    f"{checkpoint_dir}/config.json has {name} = {value!r}; it must be a positive number. "
                    "Restore the published file."
                )
        return cls(*values.values())


class GatingNetwork(nn.Module):
    """The network that gives the weight of every objective from the hidden state at the end of the prompt."""

    def __init__(self, in_size: int, config: GateConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        sizes = [in_size] + [config.hidden_size] * config.num_hidden_layers + [config.num_objectives]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return the weights [N, J]. They are not negative, and each row adds up to logit_scale."""
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            hidden_NH = F.relu(layer(hidden_NH))
        return F.softmax(last(hidden_NH) / self.temperature, dim=1) * self.logit_scale[0]


class ArmoRM(nn.Module):
    """The decoder and the heads under their published names, without values until they are loaded."""

    def __init__(self, config: LlamaConfig, gate: GateConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, gate.num_objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.empty(gate.num_objectives, gate.num_objectives))
        self.gating = GatingNetwork(config.hidden_size, gate)

    def scores(self, scored_NH: Tensor, gate_NH: Tensor) -> Tensor:
        """Return the scores [N] from the hidden states at the end of the conversation and at the gate."""
        rewards_NJ: Tensor = self.regression_layer(scored_NH)
        coefficients_NJ: Tensor = self.gating(gate_NH) @ self.reward_transform_matrix.T
        return (coefficients_NJ * rewards_NJ).sum(1)


class PackedArmoRM(nn.Module):
    """ArmoRM over packed batches, with the same interface as PackedRewardModel.

    A prompt, and with it the gate's hidden state, is computed once for all its completions.
    """

    def __init__(self, model: ArmoRM, layout: Layout, header_ids: list[int]) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.header_ids_L: Tensor
        self.register_buffer("header_ids_L", torch.tensor(header_ids), persistent=False)
        prepare_backbone(self.backbone, layout)

    @property
    def backbone(self) -> PreTrainedModel:
        return self.model.model

    def forward(self, batch: PackedBatch) -> ScoredBatch:
        before_TH, hidden_TH = states_around_final_norm(self.backbone, batch)
        scored_NH = hidden_TH[batch.scored_index_N].float()
        scores_N = self.model.scores(scored_NH, hidden_TH[gate_index(batch, self.header_ids_L)].float())
        return ScoredBatch(scores_N, before_TH[batch.scored_index_N].float(), scored_NH.detach())


def gate_index(batch: PackedBatch, header_ids_L: Tensor) -> Tensor:
    """Return, for each completion, the column at which the assistant header starts that ends its prompt, [N].

    modeling_custom.py takes the last header of the conversation. It is this one, because chat.py makes no control token
    from the text of a completion. Raises ScoringError for a prompt that does not end in the header.
    """
    owners = torch.arange(len(batch.scored_index_N), device=batch.completion_of_M.device)
    prompt_end_N = batch.predictor_index_M[torch.searchsorted(batch.completion_of_M, owners)]
    start_N = prompt_end_N - (len(header_ids_L) - 1)
    columns_NL = start_N[:, None] + torch.arange(len(header_ids_L), device=start_N.device)
    is_header_N = (batch.input_ids_RT.flatten()[columns_NL.clamp_min(0)] == header_ids_L).all(1)
    # the header of a shorter prompt would start before the prompt
    is_header_N &= batch.position_ids_RT.flatten()[prompt_end_N] >= len(header_ids_L) - 1
    if not is_header_N.all():
        without_header = (~is_header_N).nonzero().flatten().tolist()
        raise ScoringError(
            f"The prompts of completions {without_header} of a batch do not end in the assistant header "
            f"{header_ids_L.tolist()}, where ArmoRM reads its gate. "
            "Make their token ids with the model's own chat template."
        )
    return start_N


def load_armorm(checkpoint_dir: Path, chat: ChatFormat, *, dtype: torch.dtype) -> ArmoRM:
    """Load ArmoRM with its decoder in `dtype` and its heads in float32.

    Raises CheckpointError unless the template writes the header at which the gate is read, and the files hold exactly
    the published weights by name and shape.
    """
    _check_header(checkpoint_dir, chat)
    config = LlamaConfig.from_pretrained(str(checkpoint_dir))
    with torch.device("meta"):  # shapes without values: a weight that the files lack cannot be used
        model = ArmoRM(config, GateConfig.read(checkpoint_dir))
    files = _weight_files(checkpoint_dir)
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    _compare_weights(checkpoint_dir, expected, {name: shape for path in files for name, shape in _shapes(path).items()})
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                state[name] = file.get_tensor(name).to(dtype if name.startswith("model.") else torch.float32)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed from the config, never stored
    return model.eval()


def _check_header(checkpoint_dir: Path, chat: ChatFormat) -> None:
    gate_ids = chat.tokenizer(GATE_TEXT, add_special_tokens=False)["input_ids"]
    if chat.header_ids != gate_ids or chat.text_after_turn:
        raise CheckpointError(
            f"ArmoRM reads its gate at {GATE_TEXT!r} {gate_ids} and its rewards at the <|eot_id|> that ends the "
            f"conversation; the chat template in {checkpoint_dir} ends a prompt in {chat.header_text!r} "
            f"{chat.header_ids} and writes {chat.text_after_turn!r} after the last turn. "
            "Save Llama 3's template there, with a generation prompt."
        )


def _weight_files(checkpoint_dir: Path) -> list[Path]:
    index = checkpoint_dir / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    missing = [name for name in names if not (checkpoint_dir / name).is_file()]
    if missing:
        raise CheckpointError(f"{checkpoint_dir} lacks {missing}. Download or copy the whole model.")
    return [checkpoint_dir / name for name in names]


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Download or copy it again."
        ) from error


def _compare_weights(checkpoint_dir: Path, expected: dict[str, list[int]], stored: dict[str, list[int]]) -> None:
    reshaped = [
        f"{name} {stored[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "of another shape": reshaped,
    }
    descriptions = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{', …' if names[5:] else ''}"
        for problem, names in problems.items()
        if names
    ]
    if descriptions:
        raise CheckpointError(
            f"{checkpoint_dir} is not the {ARCHITECTURE} that its config.json names. "
            f"Weights {'; '.join(descriptions)}. No weight is made up. Restore the published files."
        )
