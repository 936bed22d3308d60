"""Figures of a reward model in training on held-out prompts, one scenario at a time.

Each rank scores its share of the prompts, and every rank gets the same figures.

Shapes: N completions, H hidden.
"""

import torch
from torch import Tensor

from rm_robust.data.token_files import TokenisedGroup
from rm_robust.models.packing import lay_out, micro_batches
from rm_robust.models.reward_model import PackedRewardModel
from rm_robust.training.engines.engine import TrainEngine, largest_over_ranks
from rm_robust.training.loop import rank_share
from rm_robust.training.reward_model.metrics import (
    correlation,
    effective_rank,
    kendall_tau_b,
    ordered_alike,
    skewness,
    squared_errors,
)
from rm_robust.training.reward_model.step import StepSettings, gather_rows


def held_out_metrics(
    engine: TrainEngine,
    packed: PackedRewardModel,
    rows: list[TokenisedGroup],
    settings: StepSettings,
    *,
    device: torch.device,
) -> dict[str, float]:
    """Return figures of the prompts' completions.

    They are in score units. Hidden norms are those before the decoder's final norm, unless they are named final.

    `accuracy`  fraction of pairs of completions with different gold scores that the model orders alike (strictly)
    `brier`  mean squared error of sigmoid(score difference) as the probability of the gold order, over the same pairs
    `kendall_tau_b`  mean over prompts with different gold scores; only where a prompt has more than two completions
    `score_mean`, `score_std` (population), `score_length_correlation` (Pearson, with the completion's tokens)
    `hidden_norm_mean`, `hidden_norm_std`, `hidden_norm_skewness`, `final_hidden_norm_mean`, `final_hidden_norm_std`,
    `effective_rank`: figures of the hidden states that are scored
    """
    rank_rows = [rows[i] for i in rank_share(list(range(len(rows))), rank=engine.rank, world_size=engine.world_size)]
    bins = micro_batches([row.tokens for row in rank_rows], packed.layout, settings.max_tokens_per_micro_batch)
    is_right: list[float] = []
    errors: list[float] = []
    taus: list[float] = []
    columns = [torch.zeros(0, 4, device=device)]
    hidden: list[Tensor] = [torch.zeros(0, device=device)]
    for number in range(largest_over_ranks(len(bins), device)):
        # a rank without a batch of its own still takes part in the forward pass, which is collective
        members = [rank_rows[i] for i in bins[number]] if number < len(bins) else rows[:1]
        batch = lay_out([row.tokens for row in members], packed.layout, pad_id=settings.pad_id).to(device)
        with torch.no_grad():
            scored = engine.forward(batch)
        if number >= len(bins):
            continue
        scores = [
            row_scores.tolist() for row_scores in scored.scores_N.split([len(row.gold_scores) for row in members])
        ]
        for row, row_scores in zip(members, scores, strict=True):
            is_right += map(float, ordered_alike(row_scores, row.gold_scores))
            errors += squared_errors(row_scores, row.gold_scores)
            if len(set(row.gold_scores)) > 1:
                taus.append(kendall_tau_b(row_scores, row.gold_scores))
        lengths_N = torch.tensor(
            [float(len(ids)) for row in members for ids in row.tokens.completion_ids], device=device
        )
        norms = [
            states_NH.float().norm(dim=1)
            for states_NH in (scored.hidden_before_final_norm_NH, scored.hidden_after_final_norm_NH)
        ]
        columns.append(torch.stack([scored.scores_N.float(), lengths_N, *norms], dim=1))
        hidden.append(scored.hidden_after_final_norm_NH.flatten())
    means = {name: _mean(values, device) for name, values in (("accuracy", is_right), ("brier", errors))}
    if any(len(row.gold_scores) > 2 for row in rows):
        means["kendall_tau_b"] = _mean(taus, device)
    scores_N, lengths_N, before_N, after_N = gather_rows(torch.cat(columns).flatten())[0].view(-1, 4).unbind(1)
    all_hidden, _ = gather_rows(torch.cat(hidden))
    return means | {
        "effective_rank": effective_rank(all_hidden.view(len(scores_N), -1)),
        "score_mean": float(scores_N.mean()),
        "score_std": float(scores_N.std(correction=0)),
        "score_length_correlation": correlation(scores_N, lengths_N),
        "hidden_norm_mean": float(before_N.mean()),
        "hidden_norm_std": float(before_N.std(correction=0)),
        "hidden_norm_skewness": skewness(before_N),
        "final_hidden_norm_mean": float(after_N.mean()),
        "final_hidden_norm_std": float(after_N.std(correction=0)),
    }


def _mean(rank_values: list[float], device: torch.device) -> float:
    """Return the mean over the values of all ranks."""
    return float(gather_rows(torch.tensor(rank_values, device=device))[0].mean())
