"""One optimiser step of reward-model training, exact over ranks and micro-batches.

    scores of every micro-batch ─gather over ranks─► objective over the whole batch ─► gradient by score ─► one backward a micro-batch

With one micro-batch its graph is kept and each token is computed once; with more, a first pass without gradient finds the scores.
Shapes: B pairs of the whole step, b of this rank.
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
from rm_robust.train_engine import TrainEngine


@dataclass(frozen=True)
class StepSettings:
    objective: Objective
    bsr_coefficient: float
    bsr_scale: BsrScale
    max_tokens_per_micro_batch: int
    pad_id: int


def reward_model_step(engine: TrainEngine, pairs: list[TokenGroup], settings: StepSettings, *, model: PackedRewardModel, device: torch.device) -> dict[str, float]:
    """Gradient of the objective over all ranks' pairs, left in the engine; returns the step's metrics (same on every rank)."""
    bins = fill_bins([group_length(pair) for pair in pairs], settings.max_tokens_per_micro_batch)
    batches = [lay_out([pairs[i] for i in members], model.layout, pad_id=settings.pad_id).to(device) for members in bins]
    if len(batches) == 1:
        with engine.micro_batch(is_last=True):
            scored = engine.forward(batches[0])
            return _finish([scored], engine, settings, lambda own: engine.backward((scored.scores_N * own[0]).sum()))
    with torch.no_grad():
        first_pass = [engine.forward(batch) for batch in batches]
    return _finish(first_pass, engine, settings, lambda own: _backward_each(engine, batches, own))


def _backward_each(engine: TrainEngine, batches: list[PackedBatch], gradients: list[Tensor]) -> None:
    for number, (batch, gradient_N) in enumerate(zip(batches, gradients, strict=True)):
        with engine.micro_batch(is_last=number == len(batches) - 1):
            engine.backward((engine.forward(batch).scores_N * gradient_N).sum())


def _finish(scored: list[ScoredBatch], engine: TrainEngine, settings: StepSettings, backward: Callable[[list[Tensor]], None]) -> dict[str, float]:
    own_scores_N = torch.cat([s.scores_N.detach() for s in scored])
    norms_N = torch.cat([s.norm_before_final_norm_N for s in scored])
    if not torch.isfinite(own_scores_N).all():
        raise ScoringError(f"The reward model gave non-finite scores {own_scores_N.tolist()[:8]} in training; lower the learning rate.")
    all_scores_N, start = gather_rows(own_scores_N)
    value = objective_value(all_scores_N.view(-1, 2), objective=settings.objective, bsr_coefficient=settings.bsr_coefficient, bsr_scale=settings.bsr_scale)
    own_gradient_N = value.gradient_B2.flatten()[start : start + len(own_scores_N)]
    backward(list(own_gradient_N.split([len(s.scores_N) for s in scored])))
    chosen_B, rejected_B = all_scores_N.view(-1, 2).unbind(1)
    all_norms_N, _ = gather_rows(norms_N)
    norms_b2 = norms_N.view(-1, 2)
    return {
        "reward_model/loss": value.loss,
        "reward_model/bradley_terry": value.bradley_terry,
        "reward_model/bsr_term": value.bsr_term,
        "reward_model/effective_bsr_coefficient": value.effective_bsr_coefficient,
        "reward_model/batch_mean_score": value.batch_mean_score,
        "reward_model/accuracy": float((chosen_B > rejected_B).float().mean()),
        "reward_model/margin_mean": float((chosen_B - rejected_B).mean()),
        "reward_model/score_std": float(all_scores_N.std()),
        "reward_model/hidden_norm_mean": float(all_norms_N.mean()),
        "reward_model/hidden_norm_std": float(all_norms_N.std()),
        "reward_model/hidden_norm_gap": float((norms_b2[:, 0] - norms_b2[:, 1]).mean()),
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
