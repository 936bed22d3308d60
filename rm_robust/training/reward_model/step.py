"""One optimiser step of reward-model training, exact over ranks and micro-batches.

    scores of every micro-batch ─gather over ranks─► objective over the whole batch ─► gradient by score
                                                                                      ─► one backward a micro-batch

With one micro-batch, its graph is kept and each token is computed once. With more, a batch-coupled objective (BSR,
centering) needs a first pass without gradient that computes all scores. The other objectives are sums over pairs, whose
gradient each micro-batch knows by itself.

Shapes: B pairs of the whole step (b of this rank); N = 2b completions, chosen and rejected in turn; H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from rm_robust.data.records import PreferencePair
from rm_robust.errors import ScoringError
from rm_robust.models.packing import PackedBatch, group_length, lay_out, micro_batches
from rm_robust.models.reward_model import PackedRewardModel, ScoredBatch
from rm_robust.training.engines.engine import TrainEngine, largest_over_ranks
from rm_robust.training.reward_model.losses import SUMS_OVER_PAIRS, ObjectiveSettings, ObjectiveValue, objective_value
from rm_robust.training.reward_model.metrics import correlation, skewness


@dataclass(frozen=True)
class StepSettings:
    """What one step needs from the config and the tokenizer."""

    objective: ObjectiveSettings
    max_tokens_per_micro_batch: int
    pad_id: int


@dataclass(frozen=True)
class _PairColumns:
    """What every rank learns about every pair of the step; [B, 2] is (chosen, rejected)."""

    scores_B2: Tensor
    norms_before_B2: Tensor
    norms_after_B2: Tensor
    lengths_B2: Tensor
    """Number of tokens of each completion."""
    distance_before_B: Tensor
    """The distance |h_chosen - h_rejected| before the final norm."""
    distance_after_B: Tensor
    margins_B: Tensor
    weights_B: Tensor
    num_tokens_B: Tensor
    """Number of tokens of each pair, with the prompt counted once."""
    num_repeated_tokens_B: Tensor
    """Number of tokens of each pair, with the prompt counted twice, as a trainer computes it without shared prompts."""


def reward_model_step(
    engine: TrainEngine,
    pairs: list[PreferencePair],
    settings: StepSettings,
    *,
    model: PackedRewardModel,
    device: torch.device,
) -> dict[str, float]:
    """Leave the gradient of the objective over all ranks' pairs in the engine; return the step's metrics.

    The metrics are the same on every rank.

    Raises ScoringError, on every rank, when any score is not finite.
    """
    bins = micro_batches([pair.tokens for pair in pairs], model.layout, settings.max_tokens_per_micro_batch)
    batches = [
        lay_out([pairs[i].tokens for i in members], model.layout, pad_id=settings.pad_id).to(device) for members in bins
    ]
    num_rounds = largest_over_ranks(len(batches), device)
    if num_rounds == 1:
        with engine.micro_batch(is_last=True):
            scored = engine.forward(batches[0])
            columns, value, gradients = _objective([scored], bins, pairs, settings, device)
            engine.backward((scored.scores_N * gradients[0]).sum())
        return _metrics(columns, value)
    # a rank with fewer micro-batches repeats its last one with a zero gradient
    rounds = [*batches, *batches[-1:] * (num_rounds - len(batches))]
    if settings.objective.objective in SUMS_OVER_PAIRS:
        scored_rounds = _forward_and_backward_each(engine, rounds, bins, pairs, settings, device)
        columns, value, _ = _objective(scored_rounds, bins, pairs, settings, device)
    else:
        with torch.no_grad():
            first_pass = [engine.forward(batch) for batch in rounds]
        columns, value, gradients = _objective(first_pass[: len(batches)], bins, pairs, settings, device)
        _backward_each(engine, rounds, gradients)
    return _metrics(columns, value)


def _forward_and_backward_each(
    engine: TrainEngine,
    rounds: list[PackedBatch],
    bins: list[list[int]],
    pairs: list[PreferencePair],
    settings: StepSettings,
    device: torch.device,
) -> list[ScoredBatch]:
    """Run one pass over this rank's micro-batches.

    The term of a micro-batch is its own loss times its share of the weight of all ranks' pairs.
    """
    all_weights_B, _ = gather_rows(torch.tensor([pair.weight for pair in pairs], device=device))
    scored_rounds: list[ScoredBatch] = []
    for number, batch in enumerate(rounds):
        with engine.micro_batch(is_last=number == len(rounds) - 1):
            scored = engine.forward(batch)
            gradient_N = torch.zeros_like(scored.scores_N)
            if number < len(bins):
                members = [pairs[i] for i in bins[number]]
                weights_b = torch.tensor([pair.weight for pair in members], device=device)
                margins_b = torch.tensor([pair.margin for pair in members], device=device)
                value = objective_value(
                    scored.scores_N.view(-1, 2), settings.objective, margins_B=margins_b, weights_B=weights_b
                )
                gradient_N = value.gradient_B2.flatten() * (weights_b.sum() / all_weights_B.sum())
                scored_rounds.append(scored.detached())
            engine.backward((scored.scores_N * gradient_N).sum())
    return scored_rounds


def _backward_each(engine: TrainEngine, rounds: list[PackedBatch], gradients: list[Tensor]) -> None:
    for number, batch in enumerate(rounds):
        with engine.micro_batch(is_last=number == len(rounds) - 1):
            scores_N = engine.forward(batch).scores_N
            gradient_N = gradients[number] if number < len(gradients) else torch.zeros_like(scores_N)
            engine.backward((scores_N * gradient_N).sum())


def _objective(
    scored: list[ScoredBatch],
    bins: list[list[int]],
    pairs: list[PreferencePair],
    settings: StepSettings,
    device: torch.device,
) -> tuple[_PairColumns, ObjectiveValue, list[Tensor]]:
    """Return all ranks' columns, the objective, and its gradient by score for each of this rank's micro-batches."""
    order_b = torch.tensor([i for members in bins for i in members], device=device)
    columns, start = _gather_columns(scored, order_b, pairs, device)
    if not torch.isfinite(columns.scores_B2).all():
        raise ScoringError(
            f"The reward model gave non-finite scores {columns.scores_B2.tolist()[:4]} in training; "
            "lower the learning rate."
        )
    value = objective_value(
        columns.scores_B2, settings.objective, margins_B=columns.margins_B, weights_B=columns.weights_B
    )
    rank_gradient_b2 = value.gradient_B2[start : start + len(pairs)][order_b]
    return (
        columns,
        value,
        [gradient_b2.flatten() for gradient_b2 in rank_gradient_b2.split([len(members) for members in bins])],
    )


def _gather_columns(
    scored: list[ScoredBatch], order_b: Tensor, pairs: list[PreferencePair], device: torch.device
) -> tuple[_PairColumns, int]:
    """Return the columns of all pairs (rank 0's in their order, then rank 1's, …) and where this rank's pairs start.

    One gather brings all columns. All ranks must call it.
    """
    position_b = torch.argsort(order_b)  # micro-batches hold the pairs in another order
    before_NH, after_NH = (
        torch.cat([s.hidden_before_final_norm_NH for s in scored]),
        torch.cat([s.hidden_after_final_norm_NH for s in scored]),
    )
    scores_N = torch.cat([s.scores_N.detach() for s in scored])

    def column(values: Sequence[Sequence[int] | float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    rank_columns = _PairColumns(
        scores_B2=scores_N.view(-1, 2)[position_b],
        norms_before_B2=before_NH.norm(dim=1).view(-1, 2)[position_b],
        norms_after_B2=after_NH.norm(dim=1).view(-1, 2)[position_b],
        lengths_B2=column([[len(ids) for ids in p.tokens.completion_ids] for p in pairs]),
        distance_before_B=(before_NH[0::2] - before_NH[1::2]).norm(dim=1)[position_b],
        distance_after_B=(after_NH[0::2] - after_NH[1::2]).norm(dim=1)[position_b],
        margins_B=column([p.margin for p in pairs]),
        weights_B=column([p.weight for p in pairs]),
        num_tokens_B=column([group_length(p.tokens) for p in pairs]),
        num_repeated_tokens_B=column([group_length(p.tokens) + len(p.tokens.prompt_ids) for p in pairs]),
    )
    names = [field.name for field in fields(rank_columns)]
    parts = [getattr(rank_columns, name).view(len(pairs), -1) for name in names]
    widths = [part.shape[1] for part in parts]
    gathered, start = gather_rows(torch.cat(parts, dim=1).flatten())
    gathered_parts = gathered.view(-1, sum(widths)).split(widths, dim=1)
    columns = _PairColumns(**{name: part.squeeze(1) for name, part in zip(names, gathered_parts, strict=True)})
    return columns, start // sum(widths)


def _metrics(columns: _PairColumns, value: ObjectiveValue) -> dict[str, float]:
    scores_N = columns.scores_B2.flatten()
    chosen_B, rejected_B = columns.scores_B2.unbind(1)
    return {
        "reward_model/loss": value.loss,
        "reward_model/pair_loss": value.pair_loss,
        "reward_model/penalty": value.penalty,
        "reward_model/effective_coefficient": value.effective_coefficient,
        "reward_model/batch_mean_score": value.batch_mean_score,
        "reward_model/accuracy": float((chosen_B > rejected_B).float().mean()),
        "reward_model/margin_mean": float((chosen_B - rejected_B).mean()),
        "reward_model/score_std": float(scores_N.std(correction=0)),
        "reward_model/score_skewness": skewness(scores_N),
        "reward_model/score_min": float(scores_N.min()),
        "reward_model/score_max": float(scores_N.max()),
        "reward_model/score_length_correlation": correlation(scores_N, columns.lengths_B2.flatten()),
        "reward_model/hidden_norm_mean": float(columns.norms_before_B2.mean()),
        "reward_model/hidden_norm_std": float(columns.norms_before_B2.std(correction=0)),
        "reward_model/final_hidden_norm_mean": float(columns.norms_after_B2.mean()),
        "reward_model/final_hidden_norm_std": float(columns.norms_after_B2.std(correction=0)),
        "reward_model/hidden_distance_mean": float(columns.distance_before_B.mean()),
        "reward_model/final_hidden_distance_mean": float(columns.distance_after_B.mean()),
        "reward_model/final_hidden_distance_std": float(columns.distance_after_B.std(correction=0)),
        "reward_model/final_hidden_distance_skewness": skewness(columns.distance_after_B),
        "reward_model/num_tokens": float(columns.num_tokens_B.sum()),
        "reward_model/num_repeated_tokens": float(columns.num_repeated_tokens_B.sum()),
    }


def gather_rows(rank_values_N: Tensor) -> tuple[Tensor, int]:
    """Return every rank's values in rank order, and where this rank's values start.

    Ranks may hold different numbers of values. All ranks must call it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rank_values_N, 0
    world_size, rank = dist.get_world_size(), dist.get_rank()
    device = rank_values_N.device
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(rank_values_N)], device=device))
    sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), dtype=rank_values_N.dtype, device=device)
    padded[: len(rank_values_N)] = rank_values_N
    gathered = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    return torch.cat([values[:size] for values, size in zip(gathered, sizes, strict=True)]), sum(sizes[:rank])
