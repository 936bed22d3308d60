"""The trainer actor of RLOO: one rank of the policy under training, with the frozen reference beside it.

    measure(completions) ─► KL of every completion ─► (controller: scores, rewards, advantages) ─► update(advantages) ─► publish(version)

With one micro-batch the forward pass of `measure` keeps its graph for `update`; with more, `update` runs it again.
Shapes: N completions of this rank, M tokens.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rm_robust.chat import ChatFormat
from rm_robust.compute import prepare_for_training
from rm_robust.config import PipelineConfig
from rm_robust.packing import PackedBatch, choose_layout, lay_out, micro_batches
from rm_robust.policy_model import PackedPolicy, commit_policy, load_policy
from rm_robust.records import PromptCompletions, TokenGroup
from rm_robust.rloo.advantages import sequence_kl, sum_by_completion
from rm_robust.rloo.losses import clipped_policy_loss_terms
from rm_robust.rloo.rollout import Measurement
from rm_robust.rloo.weight_sync import SyncReport, WeightPublisher
from rm_robust.run_layout import RunLayout
from rm_robust.train_engine import create_engine, learning_rate_at
from rm_robust.training_state import load_state, save_state
from rm_robust.worker_group import prepare_process, worker_device


@dataclass(frozen=True)
class _MicroBatch:
    batch: PackedBatch
    members: list[int]
    old_logprobs_M: Tensor
    live_logprobs_M: Tensor | None
    """With its graph, when it is the only micro-batch."""


class PolicyTrainer:
    """Plain class, made a Ray actor by the controller. Every rank gets the same calls in the same order."""

    def __init__(self, config: PipelineConfig, run_dir: Path, *, rank: int) -> None:
        prepare_process(config.rloo.trainers.num_threads_per_worker)
        self.config, self.layout, self.rank = config, RunLayout(run_dir), rank
        self.device = worker_device()
        self._micro_batches: list[_MicroBatch] = []
        self._publisher: WeightPublisher | None = None

    def node_address(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def start(self, master_address: str, master_port: int) -> int:
        """Join the other ranks, load policy and reference, resume the last committed state; returns the steps already done."""
        num_workers = self.config.rloo.trainers.num_workers
        if num_workers > 1:
            os.environ |= {"MASTER_ADDR": master_address, "MASTER_PORT": str(master_port)}
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=self.rank, world_size=num_workers, timeout=timedelta(minutes=10))
        sft_dir = self.layout.sft_model_dir(self.config)
        self.chat = ChatFormat.load(sft_dir)
        torch.manual_seed(self.config.seed)
        temperature = self.config.rloo.temperature
        model = load_policy(sft_dir, dtype=torch.float32)
        layout = choose_layout(model.config, self.device)
        self.policy = PackedPolicy(model, layout, temperature=temperature, compute=self.config.rloo.compute)
        prepare_for_training(model, self.config.rloo.compute)
        reference = PackedPolicy(load_policy(sft_dir, dtype=torch.float32), layout, temperature=temperature, compute=self.config.rloo.compute)
        self.reference = reference.to(self.device).eval().requires_grad_(False)
        self.engine = create_engine(self.policy, strategy=self.config.rloo.strategy, optimizer=self.config.rloo.optimizer, device=self.device)
        return load_state(self.engine, self.layout.rloo_state)

    def connect(self, engines: list[Any], timeout_s: float) -> None:
        """Rank 0: the engines that `publish` sends to."""
        self._publisher = WeightPublisher(
            engines,
            self.policy.model,
            backend=self.config.rloo.weight_transfer_backend,
            tensor_parallel_size=self.config.rloo.tensor_parallel_size,
            timeout_s=timeout_s,
        )

    def publish(self, version: int) -> SyncReport:
        """Rank 0: bring every engine to the current weights as `version`; raises RolloutError when one does not confirm."""
        assert self._publisher is not None, "connect first"
        return self._publisher.publish(version)

    def measure(self, completions: list[PromptCompletions]) -> Measurement:
        """Log-probabilities of the sampled tokens under policy and reference; must precede `update`."""
        groups = [TokenGroup(p.prompt_ids, [c.token_ids for c in p.completions]) for p in completions]
        starts = _offsets([len(g.completion_ids) for g in groups])
        bins = micro_batches(groups, self.policy.layout, self.config.rloo.max_tokens_per_micro_batch)
        self._micro_batches = []
        kl = [0.0] * starts[-1]
        entropies, gaps = [], []
        for members in bins:
            batch = lay_out([groups[i] for i in members], self.policy.layout, pad_id=self.chat.pad_id).to(self.device)
            with torch.set_grad_enabled(len(bins) == 1):
                live_M, entropy_M = self.engine.forward(batch)
            with torch.no_grad():
                reference_M, _ = self.reference(batch)
            old_M = live_M.detach()
            rows = [n for i in members for n in range(starts[i], starts[i + 1])]
            for n, value in zip(rows, sequence_kl(old_M, reference_M, batch.completion_of_M, len(rows)).tolist(), strict=True):
                kl[n] = value
            sampler_M = torch.tensor([x for i in members for c in completions[i].completions for x in c.sampler_logprobs], device=self.device)
            gaps.append((old_M - sampler_M).abs())
            entropies.append(entropy_M)
            self._micro_batches.append(_MicroBatch(batch, rows, old_M, live_M if len(bins) == 1 else None))
        gap_M = torch.cat(gaps)
        return Measurement(kl, len(gap_M), float(torch.cat(entropies).mean()), float(gap_M.mean()), float(gap_M.max()))

    def update(self, advantages: list[float], *, step: int, num_completions_all_ranks: int) -> dict[str, float]:
        """One optimiser step on what `measure` saw; the loss is the mean over all ranks' completions. Returns loss, gradient norm, learning rate."""
        loss = 0.0
        for number, micro in enumerate(self._micro_batches):
            advantages_N = torch.tensor([advantages[n] for n in micro.members], device=self.device)
            with self.engine.micro_batch(is_last=number == len(self._micro_batches) - 1):
                new_M = micro.live_logprobs_M if micro.live_logprobs_M is not None else self.engine.forward(micro.batch)[0]
                owner_M, count = micro.batch.completion_of_M, len(micro.members)
                terms_N = clipped_policy_loss_terms(
                    sum_by_completion(new_M, owner_M, count),
                    sum_by_completion(micro.old_logprobs_M, owner_M, count),
                    advantages_N,
                    clip_range=self.config.rloo.clip_range,
                )
                total = terms_N.sum() / num_completions_all_ranks
                self.engine.backward(total)
            loss += float(total.detach())
        self._micro_batches = []
        learning_rate = learning_rate_at(step, self.config.rloo.num_steps, self.config.rloo.optimizer)
        gradient_norm = self.engine.step(learning_rate)
        return {"rloo/loss": loss, "rloo/gradient_norm": gradient_norm, "rloo/learning_rate": learning_rate}

    def save(self, num_steps_done: int) -> None:
        """Commit the training state (all ranks)."""
        save_state(self.engine, self.layout.rloo_state, num_steps_done)

    def commit(self, num_steps_done: int) -> None:
        """Commit checkpoints/policy (all ranks take part, rank 0 writes)."""
        weights = self.engine.full_state_dict()
        if self.rank == 0:
            training: dict[str, str | int | float] = {"stage": "rloo", "num_steps": num_steps_done, "seed": self.config.seed}
            commit_policy(self.layout.policy_checkpoint, self.policy.model, weights, self.chat, training=training)


def _offsets(counts: list[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
