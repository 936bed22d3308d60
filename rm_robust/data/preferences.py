"""The preferences stage: scenarios from named models' responses (or ready-made files), tokenised through Ray Data.

Responses are jsonl or parquet rows with prompt, model, completion and gold_score. The stage leaves a manifest and a report of what it dropped.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import as_messages, check_text
from rm_robust.data.files import list_files, read_rows
from rm_robust.data.pipeline import Source, check_sources, tokenise_sources
from rm_robust.data.records import NamedResponse
from rm_robust.data.rows import RowKind, finite_number
from rm_robust.data.scenarios import Scenarios, build_scenarios, choose_validation_prompts, manifest
from rm_robust.data.token_rows import TokenLimits
from rm_robust.errors import DataError
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.storage.commits import commit_directory

SCENARIO_FILES = ("train", "in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")


def prepare_preferences(config: PipelineConfig, run_dir: Path) -> dict[str, Any]:
    """Build (if needed) and tokenise every scenario for the reward model, and the RLOO prompts for the policy. Returns the counts."""
    layout, data = RunLayout(run_dir), config.data
    limits = token_limits(config)
    if data.source != "scenarios":
        scenarios = _build(config, layout)
        commit_directory(layout.scenarios, lambda folder: _write_scenarios(folder, scenarios))
    report = tokenise_sources(
        preference_sources(config, layout),
        chat_dir=Path(reward_model_base_dir(config, layout)),
        out_dir=layout.preference_tokens,
        limits=limits,
        task_resources=data.task_resources,
    )
    found = {"preferences": asdict(report)}
    if prompt_source := rloo_prompt_source(config, layout):
        prompts = tokenise_sources(
            [prompt_source],
            chat_dir=Path(layout.sft_model_dir(config)),
            out_dir=layout.rloo_prompts,
            limits=limits,
            task_resources=data.task_resources,
        )
        found["rloo_prompts"] = asdict(prompts)
    return found


def check_preference_sources(config: PipelineConfig, run_dir: Path) -> None:
    """Raise DataError for a missing or empty file of the config, before any cluster work."""
    layout, data = RunLayout(run_dir), config.data
    if data.source == "scenarios":
        check_sources(preference_sources(config, layout))
    if data.source == "responses":
        check_sources([Source("responses", tuple(data.responses), None)])
    if data.source != "embedded":
        if prompt_source := rloo_prompt_source(config, layout):
            check_sources([prompt_source])
        if config.sft.enabled:
            check_sources([Source("sft", tuple(data.sft), RowKind.DEMONSTRATION)])


def token_limits(config: PipelineConfig) -> TokenLimits:
    return TokenLimits(
        config.data.max_prompt_tokens,
        config.data.max_completion_tokens,
        config.data.max_dropped_fraction,
        config.data.overlong,
    )


def preference_sources(config: PipelineConfig, layout: RunLayout) -> list[Source]:
    """The files built from responses, one source a scenario; or the user's own: one source for each entry of data.train, since they have weights."""
    if config.data.source != "scenarios":
        return [Source(name, (str(layout.scenarios / f"{name}.jsonl"),), RowKind.RANKED) for name in SCENARIO_FILES]
    data = config.data
    train = [Source("train", (entry.path,), RowKind.TRAINING_PAIRS, entry.weight) for entry in data.train]
    validation = zip(
        SCENARIO_FILES[1:],
        (data.in_domain, data.prompt_disjoint, data.response_disjoint, data.mutual_disjoint),
        strict=True,
    )
    return train + [Source(name, tuple(paths), None) for name, paths in validation if paths]


def rloo_prompt_source(config: PipelineConfig, layout: RunLayout) -> Source | None:
    """None: the run has no prompts for RLOO and ends before it."""
    paths = (
        (str(layout.world / "rloo_prompts.jsonl"),)
        if config.data.source == "embedded"
        else tuple(config.data.rloo_prompts)
    )
    return Source("rloo_prompts", paths, RowKind.PROMPT) if paths else None


def reward_model_base_dir(config: PipelineConfig, layout: RunLayout) -> str:
    """The model that the reward model grows from; its tokenizer tokenises the preferences."""
    return config.reward_model.base_path or layout.sft_model_dir(config)


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
                "prompt_id": g.group_id,
                "prompt": g.prompt,
                "completions": g.completions,
                "gold_scores": g.gold_scores,
                "models": g.models,
            }
            for g in groups
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    (folder / "manifest.json").write_text(json.dumps(manifest(scenarios), indent=2) + "\n")


def read_named_responses(paths: list[str]) -> list[NamedResponse]:
    """Every row of every file. Raises DataError naming file and row for the first one that cannot be read: a lost response would bias the split."""
    responses = [
        _parse(row, f"{file.path}, {'row' if file.suffix == '.parquet' else 'line'} {number}")
        for path in paths
        for file in list_files(path)
        for number, row in read_rows(file)
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
