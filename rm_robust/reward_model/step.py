"""One optimiser step of reward-model training, exact over ranks and micro-batches.

    scores of every micro-batch ─gather over ranks─► objective over the whole batch ─► gradient by score ─► one backward a micro-batch

With one micro-batch its graph is kept and each token is computed once; with more, a first pass without gradient finds the scores.
Shapes: B pairs of the whole step; N = 2B scores, chosen and rejected in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rm_robust.errors import ScoringError
from rm_robust.packing import PackedBatch, fill_bins, group_length, lay_out
from rm_robust.records import TokenGroup
from rm_robust.reward_model.losses import BsrScale, Objective, objective_value
from rm_robust.reward_model.model import PackedRewardModel, ScoredBatch
from rm_robust.train_engine import TrainEngine, largest_over_ranks


@dataclass(frozen=True)
class StepSettings:
    """What one step needs of the config and the tokenizer."""

    objective: Objective
    bsr_coefficient: float
    bsr_scale: BsrScale
    max_tokens_per_micro_batch: int
    pad_id: int


def reward_model_step(
    engine: TrainEngine, pairs: list[TokenGroup], settings: StepSettings, *, model: PackedRewardModel, device: torch.device
) -> dict[str, float]:
    """Gradient of the objective over all ranks' pairs, left in the engine; returns the step's metrics (same on every rank).

    Raises ScoringError, on every rank, when any score is not finite.
    """
    bins = fill_bins([group_length(pair) for pair in pairs], settings.max_tokens_per_micro_batch)
    batches = [lay_out([pairs[i] for i in members], model.layout, pad_id=settings.pad_id).to(device) for members in bins]
    num_rounds = largest_over_ranks(len(batches), device)
    if num_rounds == 1:
        with engine.micro_batch(is_last=True):
            scored = engine.forward(batches[0])
            metrics = _finish([scored], settings, lambda gradients: engine.backward((scored.scores_N * gradients[0]).sum()))
    else:
        # a rank with fewer micro-batches repeats its last one, which then counts for nothing
        rounds = [*batches, *batches[-1:] * (num_rounds - len(batches))]
        with torch.no_grad():
            first_pass = [engine.forward(batch) for batch in rounds]
        metrics = _finish(first_pass[: len(batches)], settings, lambda gradients: _backward_each(engine, rounds, gradients))
    num_tokens, _ = gather_rows(torch.tensor([float(sum(map(group_length, pairs)))], device=device))
    return metrics | {"reward_model/num_tokens": float(num_tokens.sum())}


def _backward_each(engine: TrainEngine, rounds: list[PackedBatch], gradients: list[Tensor]) -> None:
    for number, batch in enumerate(rounds):
        with engine.micro_batch(is_last=number == len(rounds) - 1):
            scores_N = engine.forward(batch).scores_N
            gradient_N = gradients[number] if number < len(gradients) else torch.zeros_like(scores_N)
            engine.backward((scores_N * gradient_N).sum())


def _finish(scored: list[ScoredBatch], settings: StepSettings, backward: Callable[[list[Tensor]], None]) -> dict[str, float]:
    own_scores_N = torch.cat([s.scores_N.detach() for s in scored])
    all_scores_N, start = gather_rows(own_scores_N)
    if not torch.isfinite(all_scores_N).all():
        raise ScoringError(f"The reward model gave non-finite scores {all_scores_N.tolist()[:8]} in training; lower the learning rate.")
    value = objective_value(all_scores_N.view(-1, 2), objective=settings.objective, bsr_coefficient=settings.bsr_coefficient, bsr_scale=settings.bsr_scale)
    own_gradient_N = value.gradient_B2.flatten()[start : start + len(own_scores_N)]
    backward(list(own_gradient_N.split([len(s.scores_N) for s in scored])))
    chosen_B, rejected_B = all_scores_N.view(-1, 2).unbind(1)
    norms_N, _ = gather_rows(torch.cat([s.norm_before_final_norm_N for s in scored]))
    norms_B2 = norms_N.view(-1, 2)
    return {
        "reward_model/loss": value.loss,
        "reward_model/bradley_terry": value.bradley_terry,
        "reward_model/bsr_term": value.bsr_term,
        "reward_model/effective_bsr_coefficient": value.effective_bsr_coefficient,
        "reward_model/batch_mean_score": value.batch_mean_score,
        "reward_model/accuracy": float((chosen_B > rejected_B).float().mean()),
        "reward_model/margin_mean": float((chosen_B - rejected_B).mean()),
        "reward_model/score_std": float(all_scores_N.std()),
        "reward_model/hidden_norm_mean": float(norms_N.mean()),
        "reward_model/hidden_norm_std": float(norms_N.std()),
        "reward_model/hidden_norm_gap": float((norms_B2[:, 0] - norms_B2[:, 1]).mean()),
    }


def gather_rows(own_N: Tensor) -> tuple[Tensor, int]:
    """Every rank's values in rank order (ranks may hold different numbers), and where this rank's begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own_N, 0
    world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=own_N.device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(own_N)], device=own_N.device))
    sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), dtype=own_N.dtype, device=own_N.device)
    padded[: len(own_N)] = own_N
    gathered = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    return torch.cat([values[:size] for values, size in zip(gathered, sizes, strict=True)]), sum(sizes[:rank])
