"""Prepare the preferences: build scenarios from named models' responses, or take ready-made files, and tokenise them.

Responses are jsonl or parquet rows with prompt, model, completion and gold_score. The stage leaves a manifest, and a
report of what it dropped.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import as_messages, check_text
from rm_robust.data.files import list_files
from rm_robust.data.pipeline import DataSource, check_sources, tokenise_sources
from rm_robust.data.records import NamedResponse
from rm_robust.data.row_texts import read_rows
from rm_robust.data.rows import COLUMNS, RowKind, finite_number
from rm_robust.data.scenarios import SCENARIOS, Scenarios, build_scenarios, choose_validation_prompts, manifest
from rm_robust.data.token_rows import TokenLimits
from rm_robust.errors import DataError
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout

SCENARIO_FILES = ("train", *SCENARIOS)


def prepare_preferences(config: PipelineConfig, run_dir: Path) -> dict[str, Any]:
    """Build the scenarios if needed, tokenise them for the reward model, and tokenise the RLOO prompts for the policy.

    Returns the counts.
    """
    layout, data = RunLayout(run_dir), config.data
    limits = token_limits(config)
    if data.source != "scenarios":
        scenarios = _build(config, layout)
        run_files.commit(layout.scenarios, lambda folder: _write_scenarios(folder, scenarios))
    report = tokenise_sources(
        preference_sources(config, layout),
        chat_dir=Path(layout.reward_model_base_dir(config)),
        out_dir=layout.preference_tokens,
        limits=limits,
        max_lost_fraction=data.max_lost_fraction,
        task_resources=data.task_resources,
    )
    counts = {"preferences": asdict(report)}
    return counts | prepare_rloo_prompts(config, run_dir)


def prepare_rloo_prompts(config: PipelineConfig, run_dir: Path) -> dict[str, Any]:
    """Tokenise the RLOO prompts for the policy, if the run has any, and return the counts."""
    layout = RunLayout(run_dir)
    prompt_source = rloo_prompt_source(config, layout)
    if prompt_source is None:
        return {}
    prompts = tokenise_sources(
        [prompt_source],
        chat_dir=Path(layout.sft_model_dir(config)),
        out_dir=layout.rloo_prompts,
        limits=token_limits(config),
        max_lost_fraction=config.data.max_lost_fraction,
        task_resources=config.data.task_resources,
    )
    return {"rloo_prompts": asdict(prompts)}


def check_preference_sources(config: PipelineConfig, run_dir: Path) -> None:
    """Raise DataError for a missing or empty file of the config. Needs no cluster."""
    layout, data = RunLayout(run_dir), config.data
    if data.source == "scenarios":
        check_sources(preference_sources(config, layout))
    if data.source == "responses":
        check_sources([DataSource("responses", tuple(data.responses), None)])
    if data.source != "embedded":
        if prompt_source := rloo_prompt_source(config, layout):
            check_sources([prompt_source])
        if config.sft.enabled:
            check_sources([DataSource("sft", tuple(data.sft), RowKind.DEMONSTRATION)])


def token_limits(config: PipelineConfig) -> TokenLimits:
    return TokenLimits(
        config.data.max_prompt_tokens,
        config.data.max_completion_tokens,
        config.data.max_dropped_fraction,
        config.data.overlong,
    )


def preference_sources(config: PipelineConfig, layout: RunLayout) -> list[DataSource]:
    """Return the sources of the scenarios: files that the run builds from responses, or the user's own files.

    Each entry of the user's data.train is a source of its own, because it has a weight of its own.
    """
    if config.data.source != "scenarios":
        return [DataSource(name, (str(layout.scenarios / f"{name}.jsonl"),), RowKind.RANKED) for name in SCENARIO_FILES]
    data = config.data
    train = [DataSource("train", (entry.path,), RowKind.TRAINING_PAIRS, entry.weight) for entry in data.train]
    validation = zip(
        SCENARIOS,
        (data.in_domain, data.prompt_disjoint, data.response_disjoint, data.mutual_disjoint),
        strict=True,
    )
    return train + [DataSource(name, tuple(paths), None) for name, paths in validation if paths]


def rloo_prompt_source(config: PipelineConfig, layout: RunLayout) -> DataSource | None:
    """Return the source of the RLOO prompts; None where the run has none and ends before RLOO."""
    paths = (
        (str(layout.world / "rloo_prompts.jsonl"),)
        if config.data.source == "embedded"
        else tuple(config.data.rloo_prompts)
    )
    return DataSource("rloo_prompts", paths, RowKind.PROMPT) if paths else None


def _build(config: PipelineConfig, layout: RunLayout) -> Scenarios:
    if config.data.source == "embedded":
        responses = read_named_responses([str(layout.world / "responses.jsonl")])
        split = json.loads((layout.world / "split.json").read_text())
        unseen_models, validation = set(split["unseen_models"]), set(split["validation_prompt_ids"])
    else:
        responses = read_named_responses(config.data.responses)
        unseen_models = set(config.data.unseen_models)
        validation = choose_validation_prompts(
            responses, fraction=config.data.validation_prompt_fraction, seed=config.seed
        )
    return build_scenarios(responses, unseen_models=unseen_models, validation_prompt_ids=validation, seed=config.seed)


def _write_scenarios(folder: Path, scenarios: Scenarios) -> None:
    for name, groups in scenarios.sets.items():
        rows = [
            {
                "prompt_id": group.group_id,
                "prompt": group.prompt,
                "completions": group.completions,
                "gold_scores": group.gold_scores,
                "models": group.models,
            }
            for group in groups
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    (folder / "manifest.json").write_text(json.dumps(manifest(scenarios), indent=2) + "\n")


def read_named_responses(paths: list[str]) -> list[NamedResponse]:
    """Read every row of every file.

    Raises DataError, with file and row, at the first row that cannot be read: a lost response would bias the split.
    """
    responses = [
        _parse(row, f"{file.path}, {'row' if file.suffix == '.parquet' else 'line'} {number}")
        for path in paths
        for file in list_files(path)
        for number, row in read_rows(file, COLUMNS)
    ]
    if not responses:
        raise DataError(f"{', '.join(paths)} hold no response: there is nothing to build scenarios from.")
    return responses


def _parse(row: Mapping[str, Any], where: str) -> NamedResponse:
    missing = [name for name in ("prompt", "model", "completion", "gold_score") if row.get(name) is None]
    if missing:
        raise DataError(f"{where} lacks {missing} (columns: {sorted(row)}).")
    if not isinstance(row["completion"], str):
        raise DataError(f"{where} has a {type(row['completion']).__name__} as completion; it must be text.")
    try:
        prompt, gold_score = as_messages(row["prompt"]), finite_number(row["gold_score"], "gold_score")
        check_text(row["completion"], "completion")
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    prompt_id = row.get("prompt_id")
    if prompt_id is None:
        prompt_id = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]
    return NamedResponse(str(prompt_id), prompt, str(row["model"]), row["completion"], gold_score)
