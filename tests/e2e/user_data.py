"""Write small files and models such as a user brings, and a config that names them."""

import json
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerFast

from rm_robust.config.training import ModelConfig
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from tests.support.tiny_reward_model import text

TINY = ModelConfig(
    hidden_size=32, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1, max_position_embeddings=256
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    rng = Random(0)
    return make_tokenizer([text(rng, num_words=20) for _ in range(50)], vocab_size=320)


def save_tiny_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    save_base_model(folder, TINY, tokenizer, seed=0)
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(num_rows: int, *, seed: int = 0) -> list[dict[str, object]]:
    """Return random preference pairs with explicit prompts."""
    rng = Random(seed)
    return [
        {
            "prompt": text(rng, num_words=5),
            "chosen": f"{text(rng, num_words=6)} yes",
            "rejected": text(rng, num_words=4),
        }
        for _ in range(num_rows)
    ]


def write_config(
    path: Path, *, name: str, data: dict[str, object], model_dir: Path, gold: Path, rloo: str = ""
) -> Path:
    """Write the config of a run on the user's own files and models, without SFT and with the smallest training."""
    lines = [f'name = "{name}"', "", "[data]", *(f"{key} = {json.dumps(value)}" for key, value in data.items())]
    lines += ["", "[model]", f"path = {json.dumps(str(model_dir))}", "", "[sft]", "enabled = false"]
    lines += ["", "[reward_model]", "batch_size = 16", "checkpoint_every_steps = 2"]
    lines += ["", "[serve]", f"gold = {json.dumps(str(gold))}"]
    lines += ["proxy_replica = { num_cpus = 0.25 }", "gold_replica = { num_cpus = 0.25 }"]
    lines += [
        "",
        "[rloo]",
        "num_steps = 3",
        "num_prompts_per_step = 4",
        "num_completions_per_prompt = 2",
        "max_new_tokens = 16",
    ]
    lines += ["trainers = { num_workers = 1, num_cpus_per_worker = 0.5, num_threads_per_worker = 1 }", rloo]
    path.write_text("\n".join(lines) + "\n")
    return path
