"""The four-scenario table of a reward-model checkpoint.

The metric is accuracy on pairs and Kendall's tau-b on ranked completions (paper, section 3 and appendix B).
"""

import logging
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rm_robust.config.run import PipelineConfig
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.data.token_files import TokenisedGroup, read_token_groups
from rm_robust.errors import DataError
from rm_robust.models.scorer import RewardScorer, ScoredGroup
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.training.reward_model.metrics import ScenarioResult, mean_kendall_tau, pairwise_accuracy

logger = logging.getLogger(__name__)

_CHUNK = 64
"""The number of prompts scored between two steps of the progress bar."""


def evaluate_scenarios(
    config: PipelineConfig, run_dir: Path, *, device: str
) -> dict[str, dict[str, str | int | float]]:
    """Score every scenario that the run has, and write evaluation.json and evaluation/scores.parquet.

    Returns the table of evaluation.json. Raises DataError when the run has no scenario.
    """
    layout = RunLayout(run_files.refresh(run_dir))
    longest = config.data.max_prompt_tokens + config.data.max_completion_tokens
    scorer = RewardScorer.load(
        layout.reward_model_checkpoint, device=device, dtype="float32", max_length_tokens=longest
    )
    present = [name for name in SCENARIOS if (layout.preference_tokens / f"scenario={name}").is_dir()]
    if not present:
        raise DataError(
            f"{layout.preference_tokens} holds none of {', '.join(SCENARIOS)}: there is nothing to evaluate on."
        )
    table: dict[str, dict[str, str | int | float]] = {}
    rows: list[dict[str, str | int | float]] = []
    for scenario in present:
        groups = read_token_groups(layout.preference_tokens / f"scenario={scenario}")[
            : config.evaluation.max_prompts_per_scenario
        ]
        scored: list[ScoredGroup] = []
        for start in tqdm(range(0, len(groups), _CHUNK), desc=f"evaluate {scenario}", mininterval=5):
            chunk = [group.tokens for group in groups[start : start + _CHUNK]]
            scored += scorer.score_groups_with_norms(chunk, max_tokens_per_batch=config.evaluation.max_tokens_per_batch)
        result = scenario_result(groups, [s.scores for s in scored])
        table[scenario] = asdict(result)
        rows += _score_rows(scenario, groups, scored)
        logger.info(
            "evaluation %s: %s %.4f over %d prompts (%d undefined)",
            scenario,
            result.metric,
            result.value,
            result.num_prompts,
            result.num_undefined,
        )
    layout.evaluation_scores.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), layout.evaluation_scores)
    run_files.persist(layout.evaluation_scores)
    run_files.write_json(layout.evaluation_table, table)
    return table


def scenario_result(groups: list[TokenisedGroup], scores: list[list[float]]) -> ScenarioResult:
    """Return the accuracy when every group is a pair (gold scores 1 and 0), and tau-b otherwise."""
    if all(group.gold_scores == [1.0, 0.0] for group in groups):
        return pairwise_accuracy(scores)
    return mean_kendall_tau(scores, [group.gold_scores for group in groups])


def _score_rows(
    scenario: str, groups: list[TokenisedGroup], scored: list[ScoredGroup]
) -> list[dict[str, str | int | float]]:
    return [
        {
            "scenario": scenario,
            "prompt_id": group.group_id,
            "completion_index": index,
            "gold_score": group.gold_scores[index],
            "score": scored_group.scores[index],
            "hidden_norm_before_final_norm": scored_group.norms_before_final_norm[index],
            "hidden_norm_after_final_norm": scored_group.norms_after_final_norm[index],
        }
        for group, scored_group in zip(groups, scored, strict=True)
        for index in range(len(group.gold_scores))
    ]
