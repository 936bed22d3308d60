"""The four-scenario table of a reward-model checkpoint. Accuracy on pairs, Kendall's tau-b on ranked completions (paper, section 3 and appendix B)."""

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
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.storage.commits import write_json_atomic
from rm_robust.runs.storage.transfer import pull, put_file
from rm_robust.training.reward_model.metrics import ScenarioResult, mean_kendall_tau, pairwise_accuracy

logger = logging.getLogger(__name__)

_CHUNK = 64


def evaluate_scenarios(
    config: PipelineConfig, run_dir: Path, *, device: str
) -> dict[str, dict[str, str | int | float]]:
    """Score every scenario that the run has; writes evaluation.json and evaluation/scores.parquet. Raises DataError when there is none."""
    layout = RunLayout(pull(run_dir))
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
    put_file(layout.evaluation_scores)
    write_json_atomic(layout.evaluation_table, table)
    return table


def scenario_result(groups: list[TokenisedGroup], scores: list[list[float]]) -> ScenarioResult:
    """Accuracy when every group is a pair (gold 1, 0); tau-b otherwise."""
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
            "score": own.scores[index],
            "hidden_norm_before_final_norm": own.norms_before_final_norm[index],
            "hidden_norm_after_final_norm": own.norms_after_final_norm[index],
        }
        for group, own in zip(groups, scored, strict=True)
        for index in range(len(group.gold_scores))
    ]
