"""Supervised fine-tuning: next-token loss on completions only. `train_sft` runs on every worker of a group."""

from pathlib import Path

import torch
import torch.distributed as dist

from rm_robust.cluster.workers import is_reclaimed, worker_device
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.data.token_files import read_token_groups
from rm_robust.models.compute import prepare_for_training
from rm_robust.models.own_forward import check_policy
from rm_robust.models.packing import choose_layout, group_length, lay_out, micro_batches
from rm_robust.models.policy import PackedPolicy, commit_policy, load_policy
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.trackers import open_trackers
from rm_robust.training.engines import create_engine
from rm_robust.training.engines.engine import TrainEngine, largest_over_ranks
from rm_robust.training.loop import LoopSettings, batch_indices, rank_share, run_loop, steps_in
from rm_robust.training.state import load_state, save_state

LOGGED = ("sft/loss", "sft/entropy", "sft/learning_rate", "throughput/tokens_per_s")


def train_sft(config: PipelineConfig, run_dir: Path) -> dict[str, float]:
    """Train from the base model to checkpoints/sft, resuming from the last committed state.

    Returns the number of steps.
    """
    layout, sft = RunLayout(run_dir), config.sft
    device = worker_device()
    base_dir = str(run_files.fetch(Path(layout.base_model_dir(config))))
    chat = ChatFormat.load(base_dir)
    groups = [row.tokens for row in read_token_groups(layout.sft_tokens / "scenario=sft")]
    torch.manual_seed(config.seed)
    model = load_policy(base_dir, dtype=torch.float32)
    policy = PackedPolicy(model, choose_layout(model.config, device), temperature=1.0, compute=sft.compute)
    check_policy(policy, chat)
    prepare_for_training(model, sft.compute)
    engine = create_engine(policy, strategy=sft.strategy, optimizer=sft.optimizer, device=device)
    num_steps = steps_in(len(groups), sft.batch_size, sft.num_epochs)
    first_step = load_state(engine, layout.sft_state)

    def train_step(step: int) -> dict[str, float]:
        rows = batch_indices(step, num_rows=len(groups), batch_size=sft.batch_size, seed=config.seed)
        rank_groups = [groups[i] for i in rank_share(rows, rank=engine.rank, world_size=engine.world_size)]
        return sft_step(
            engine,
            rank_groups,
            policy=policy,
            pad_id=chat.pad_id,
            max_tokens=sft.max_tokens_per_micro_batch,
            device=device,
        )

    run_loop(
        engine,
        LoopSettings("sft", num_steps, sft.optimizer, sft.checkpoint_every_steps, LOGGED),
        first_step=first_step,
        run_dir=run_dir,
        train_step=train_step,
        evaluate=None,
        commit=lambda step: save_state(engine, layout.sft_state, step),
        is_reclaimed=is_reclaimed,
        trackers=lambda: open_trackers(config, run_dir, "sft"),
    )
    weights = engine.full_state_dict()
    if engine.rank == 0:
        commit_policy(
            layout.sft_checkpoint,
            model,
            weights,
            chat,
            training={"stage": "sft", "num_steps": num_steps, "seed": config.seed},
        )
    return {"num_steps": num_steps}


def sft_step(
    engine: TrainEngine,
    groups: list[TokenGroup],
    *,
    policy: PackedPolicy,
    pad_id: int,
    max_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Run forward and backward of one optimiser step, and return its metrics.

    The loss is the mean negative log-likelihood (nats) over the completion tokens of all ranks.
    """
    num_tokens = torch.tensor(float(sum(len(ids) for g in groups for ids in g.completion_ids)), device=device)
    num_columns = torch.tensor(float(sum(group_length(g) for g in groups)), device=device)
    sums = torch.zeros(2, device=device)
    _sum_over_ranks(num_tokens)
    bins = micro_batches(groups, policy.layout, max_tokens)
    num_rounds = largest_over_ranks(len(bins), device)
    for number in range(num_rounds):
        weight = float(number < len(bins))  # a rank with fewer micro-batches repeats its last one with weight 0
        batch = lay_out([groups[i] for i in bins[min(number, len(bins) - 1)]], policy.layout, pad_id=pad_id).to(device)
        with engine.micro_batch(is_last=number == num_rounds - 1):
            logprobs_M, entropy_M = engine.forward(batch)
            engine.backward(-weight * logprobs_M.sum() / num_tokens)
        sums += weight * torch.stack([-logprobs_M.detach().sum(), entropy_M.sum()])
    _sum_over_ranks(sums)
    _sum_over_ranks(num_columns)
    return {
        "sft/loss": float(sums[0] / num_tokens),
        "sft/entropy": float(sums[1] / num_tokens),
        "sft/num_tokens": float(num_columns),
    }


def _sum_over_ranks(tensor: torch.Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)
