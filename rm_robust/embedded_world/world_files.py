"""Writes the embedded world as the files that user sources have: jsonl rows, a split and the mean gold score of every response model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rm_robust.checkpoint import commit_directory
from rm_robust.config import WorldConfig
from rm_robust.embedded_world.corpus import World, make_world


def write_world(target: Path, config: WorldConfig, *, seed: int) -> dict[str, Any]:
    """Commit sft.jsonl, responses.jsonl, rloo_prompts.jsonl, split.json and response_models.json below `target`. Returns counts."""
    world = make_world(
        seed=seed,
        num_sft_examples=config.num_sft_examples,
        num_training_prompts=config.num_training_prompts,
        num_validation_prompts=config.num_validation_prompts,
        num_rloo_prompts=config.num_rloo_prompts,
    )
    commit_directory(target, lambda folder: _write(folder, world))
    return {"num_sft_examples": len(world.sft_examples), "num_responses": len(world.responses), "num_rloo_prompts": len(world.rloo_prompts)}


def _write(folder: Path, world: World) -> None:
    _write_rows(folder / "sft.jsonl", ({"prompt": e.prompt, "completion": e.completion} for e in world.sft_examples))
    _write_rows(
        folder / "responses.jsonl",
        ({"prompt_id": r.prompt_id, "prompt": r.prompt, "model": r.model, "completion": r.completion, "gold_score": r.gold_score} for r in world.responses),
    )
    _write_rows(folder / "rloo_prompts.jsonl", ({"prompt_id": prompt_id, "prompt": prompt} for prompt_id, prompt in world.rloo_prompts))
    split = {"unseen_models": sorted(world.unseen_models), "validation_prompt_ids": sorted(world.validation_prompt_ids)}
    (folder / "split.json").write_text(json.dumps(split) + "\n")
    means = {"training": _mean_gold(world, world.training_models), "unseen": _mean_gold(world, world.unseen_models)}
    (folder / "response_models.json").write_text(json.dumps(means, indent=2) + "\n")


def _mean_gold(world: World, models: Iterable[str]) -> dict[str, float]:
    scores: dict[str, list[float]] = {model: [] for model in models}
    for response in world.responses:
        if response.model in scores:
            scores[response.model].append(response.gold_score)
    return {model: sum(values) / len(values) for model, values in scores.items() if values}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
