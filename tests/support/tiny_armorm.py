"""Make a tiny random model with the files of RLHFlow/ArmoRM-Llama3-8B-v0.1.

Names, config keys and template are as published; only the sizes are smaller.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from tests.unit.data.test_chat import llama

NUM_OBJECTIVES = 19
GATING_HIDDEN_SIZE = 32
NUM_GATING_LAYERS = 3
CONFIG = {
    "architectures": ["LlamaForRewardModelWithGating"],
    "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 330,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "pad_token_id": 4,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "num_objectives": NUM_OBJECTIVES,
    "gating_temperature": 10,
    "gating_hidden_dim": GATING_HIDDEN_SIZE,
    "gating_n_hidden": NUM_GATING_LAYERS,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
}


def tiny_armorm_weights(seed: int = 0) -> dict[str, Tensor]:
    """Return weights whose scores are about 1 and depend on every part of the model.

    The gate is far from uniform, the matrix is not symmetric, and the scale is not 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    decoder = LlamaModel(LlamaConfig.from_dict(CONFIG)).state_dict()
    state = {
        f"model.{name}": random(*weight.shape, scale=0.15) for name, weight in decoder.items() if "norm" not in name
    }
    state |= {
        f"model.{name}": 1 + random(*weight.shape, scale=0.1) for name, weight in decoder.items() if "norm" in name
    }
    state["regression_layer.weight"] = random(NUM_OBJECTIVES, 64, scale=0.3)
    state["reward_transform_matrix"] = torch.eye(NUM_OBJECTIVES) + random(NUM_OBJECTIVES, NUM_OBJECTIVES, scale=0.3)
    sizes = [64] + [GATING_HIDDEN_SIZE] * NUM_GATING_LAYERS + [NUM_OBJECTIVES]
    for i in range(NUM_GATING_LAYERS + 1):
        state[f"gating.layers.{i}.weight"] = random(sizes[i + 1], sizes[i], scale=2 / sizes[i] ** 0.5)
        state[f"gating.layers.{i}.bias"] = random(sizes[i + 1], scale=0.5)
    state["gating.logit_scale"] = torch.tensor([1.3])
    return state


def save_tiny_armorm(
    folder: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    config: dict[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_files: int = 1,
) -> Path:
    """Save the model to `folder`. `config` replaces single keys of its config.

    The code in the folder fails when it is imported, because it must never be imported.
    """
    folder.mkdir(parents=True)
    state = {name: weight.contiguous() for name, weight in (weights or tiny_armorm_weights()).items()}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "modeling_custom.py").write_text("raise SystemExit('code of the model was run')\n")
    (tokenizer or llama().tokenizer).save_pretrained(folder)
    if num_files == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    home = {name: names[i % num_files] for i, name in enumerate(sorted(state))}
    for file in names:
        save_file({name: state[name] for name in state if home[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder
