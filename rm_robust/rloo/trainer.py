"""The trainer actor of RLOO: one rank of the policy under training, and the frozen reference policy.

    measure(completions) ─► KL of every completion ─► (controller: scores, rewards, advantages)
        ─► update(advantages) ─► publish_weights(version)

The `old` log-probabilities are those of `measure`. When an update is one optimiser step on one micro-batch, it uses the
graph that `measure` kept. Shapes: N completions of this rank, M tokens.
"""

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rm_robust.cluster.environment import free_port, listen_where_ray_does
from rm_robust.cluster.workers import prepare_process, worker_device
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.models.compute import EXACT, prepare_for_training
from rm_robust.models.own_forward import check_policy
from rm_robust.models.packing import PackedBatch, choose_layout, lay_out, micro_batches
from rm_robust.models.policy import PackedPolicy, commit_policy, load_policy
from rm_robust.rloo.advantages import sequence_kl, token_kl
from rm_robust.rloo.losses import policy_loss
from rm_robust.rloo.rollout import Measurement, PromptCompletions, Update
from rm_robust.rloo.weights.broadcast import NamedWeights
from rm_robust.rloo.weights.probe import Probe, policy_probe, probe_batch, probe_token_ids
from rm_robust.rloo.weights.publisher import SyncReport, WeightPublisher
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.training.engines import create_engine
from rm_robust.training.engines.engine import largest_over_ranks
from rm_robust.training.state import load_state, save_state


@dataclass(frozen=True)
class _Measured:
    """This rank's completions of a step. The log-probabilities are one tensor per completion, in prompt-major order."""

    groups: list[TokenGroup]
    old_logprobs: tuple[Tensor, ...]
    sampler_logprobs: list[Tensor]
    live: tuple[PackedBatch, Tensor] | None
    """The only micro-batch and its log-probabilities with their graph; None when there is no graph to reuse."""


class PolicyTrainer:
    """One rank of the policy under training.

    actors.py makes this plain class a Ray actor. Every rank gets the same calls in the same order.
    """

    def __init__(self, config: PipelineConfig, run_dir: Path, *, rank: int) -> None:
        prepare_process(config.rloo.trainers.num_threads_per_worker)
        self.config, self.settings, self.layout, self.rank = config, config.rloo, RunLayout(run_dir), rank
        self.device = worker_device()
        self._measured: _Measured | None = None
        self._publisher: WeightPublisher | None = None
        self._gathered = NamedWeights({})
        """The whole weights of a sharded policy, as of the latest `publish_weights`."""
        self._probe_logprobs: list[float] = []
        """A sharded policy's log-probabilities of the probe, as of the latest `publish_weights`."""

    def rendezvous(self) -> tuple[str, int]:
        """Return the address of this node and a free port on it, where all ranks meet. Called on rank 0 only."""
        import ray

        return str(ray.util.get_node_ip_address()), free_port("")

    def start(self, master_address: str, master_port: int) -> int:
        """Join the other ranks, load policy and reference, and resume the last committed state.

        Returns the number of steps already done.
        """
        listen_where_ray_does()
        num_workers = self.settings.trainers.num_workers
        # a sharded policy needs a process group even when there is only one rank
        if num_workers > 1 or self.settings.strategy.kind != "ddp":
            os.environ |= {"MASTER_ADDR": master_address, "MASTER_PORT": str(master_port)}
            # DeepSpeed reads these; the local rank is 0 because an actor sees only its own GPU
            os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(num_workers), "LOCAL_RANK": "0"}
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=self.rank, world_size=num_workers, timeout=timedelta(minutes=10))
        sft_dir = self.layout.sft_model_dir(self.config)
        run_files.fetch(Path(sft_dir))
        self.chat = ChatFormat.load(sft_dir)
        torch.manual_seed(self.config.seed)
        temperature = self.settings.temperature
        model = load_policy(sft_dir, dtype=torch.float32)
        layout = choose_layout(model.config, self.device)
        self.policy = PackedPolicy(model, layout, temperature=temperature, compute=self.settings.compute)
        check_policy(self.policy, self.chat)
        prepare_for_training(model, self.settings.compute)
        reference = PackedPolicy(
            load_policy(sft_dir, dtype=torch.float32), layout, temperature=temperature, compute=self.settings.compute
        )
        self.reference = reference.to(self.device).eval().requires_grad_(False)
        self.engine = create_engine(
            self.policy, strategy=self.settings.strategy, optimizer=self.settings.optimizer, device=self.device
        )
        return load_state(self.engine, self.layout.rloo_state)

    def connect(self, engines: list[Any], timeout_s: float) -> None:
        """Send the weights to these engines from the next `publish_weights` on. Called on rank 0 only."""
        if self._publisher is not None:
            self._publisher.close()
        self._publisher = WeightPublisher(
            engines,
            self.policy.model if self._has_whole_weights else self._gathered,
            probe=policy_probe(self.policy)
            if self._has_whole_weights
            else Probe(probe_token_ids(self.policy), lambda: self._probe_logprobs),
            backend=self.settings.weight_transfer_backend,
            tensor_parallel_size=self.settings.tensor_parallel_size,
            timeout_s=timeout_s,
        )

    def publish_weights(self, version: int) -> SyncReport | None:
        """Send the current weights to every engine as `version`, and return the report on rank 0, None on the others.

        Raises RolloutError when an engine does not confirm the version.
        """
        if not self._has_whole_weights:
            whole_weights = self.engine.full_state_dict()
            self._probe_logprobs = self._probe_logprobs_of_sharded()
            names = [name for name, _ in self.policy.model.named_parameters() if self.rank == 0]  # tied ones once
            self._gathered.replace({name: whole_weights[f"model.{name}"] for name in names})
        if self.rank:
            return None
        assert self._publisher is not None, "connect first"
        return self._publisher.publish(version)

    def _probe_logprobs_of_sharded(self) -> list[float]:
        """Return the probe's log-probabilities, from a forward pass that all ranks take part in."""
        batch = probe_batch(self.policy).to(self.device)
        training_values = self.policy.temperature, self.policy.compute
        self.policy.temperature, self.policy.compute = 1.0, EXACT
        with torch.no_grad():
            logprobs_M, _ = self.engine.forward(batch)
        self.policy.temperature, self.policy.compute = training_values
        values: list[float] = logprobs_M.tolist()
        return values

    def measure(self, completions: list[PromptCompletions], *, keep_graph: bool = True) -> Measurement:
        """Compute the log-probabilities of the sampled tokens under policy and reference.

        Set `keep_graph` when `update` follows.
        """
        groups = [TokenGroup(p.prompt_ids, [c.token_ids for c in p.completions]) for p in completions]
        sampler = [torch.tensor(c.sampler_logprobs, device=self.device) for p in completions for c in p.completions]
        starts = _offsets(groups)
        rounds, bins = self._rounds(groups)
        is_one_update = self.settings.num_epochs_per_step * self.settings.num_minibatches_per_epoch == 1
        keeps_graph = keep_graph and is_one_update and len(rounds) == 1
        old: list[Tensor] = [torch.empty(0)] * starts[-1]
        kl, entropies, live = [0.0] * starts[-1], [], None
        for number, batch in enumerate(rounds):
            with torch.set_grad_enabled(keeps_graph):
                live_M, entropy_M = self.engine.forward(batch)
            if number >= len(bins):
                continue
            with torch.no_grad():
                reference_M, _ = self.reference(batch)
            rows = [n for i in bins[number] for n in range(starts[i], starts[i + 1])]
            old_M = live_M.detach()
            values = sequence_kl(
                old_M, reference_M, batch.completion_of_M, len(rows), estimator=self.settings.kl_estimator
            ).tolist()
            old_by_row = old_M.split([len(sampler[n]) for n in rows])
            for n, value, old_logprobs in zip(rows, values, old_by_row, strict=True):
                kl[n], old[n] = value, old_logprobs
            entropies.append(entropy_M)
            live = (batch, live_M) if keeps_graph else None
        self._measured = _Measured(groups, tuple(old), sampler, live)
        old_M, sampler_M = torch.cat(old), torch.cat(sampler)
        gap_M = (old_M - sampler_M).abs()
        return Measurement(
            kl=kl,
            num_tokens=len(gap_M),
            entropy_mean=float(torch.cat(entropies).mean()),
            sampler_gap_mean=float(gap_M.mean()),
            sampler_gap_max=float(gap_M.max()),
            sampler_kl_mean=float(token_kl(sampler_M, old_M, "k3").mean()),
        )

    def update(
        self, advantages: list[float], *, step: int, num_completions_all_ranks: int, learning_rate: float
    ) -> Update:
        """Do the optimiser steps of RLOO step `step` on the completions that `measure` got.

        The loss of an optimiser step is the mean over the completions of all ranks in it.
        """
        measured = self._measured
        assert measured is not None, "measure first"
        losses, norms, clipped = [], [], []
        for epoch in range(self.settings.num_epochs_per_step):
            for members in self._minibatches(len(measured.groups), step, epoch):
                divisor = num_completions_all_ranks / self.settings.num_minibatches_per_epoch
                loss, num_clipped = self._backward(measured, members, advantages, divisor)
                norms.append(self.engine.step(learning_rate))
                losses.append(loss)
                clipped.append(num_clipped / divisor)
        self._measured = None
        return Update(
            loss=statistics.fmean(losses),
            clip_fraction=statistics.fmean(clipped),
            gradient_norm=statistics.fmean(norms),
            learning_rate=learning_rate,
        )

    def _backward(
        self, measured: _Measured, members: list[int], advantages: list[float], divisor: float
    ) -> tuple[float, float]:
        """Compute the gradients of one optimiser step on the groups `members`.

        Returns this rank's part of the loss, and the sum of its completions' clipped shares.
        """
        starts = _offsets(measured.groups)
        if measured.live is not None:
            rounds, bins = [measured.live[0]], [members]
        else:
            rounds, bins = self._rounds([measured.groups[i] for i in members])
            bins = [[members[i] for i in indices] for indices in bins]
        loss = num_clipped = 0.0
        for number, batch in enumerate(rounds):
            with self.engine.micro_batch(is_last=number == len(rounds) - 1):
                new_M = measured.live[1] if measured.live is not None else self.engine.forward(batch)[0]
                if number >= len(bins):  # a repeated batch: it only makes the ranks' collective calls match
                    self.engine.backward(new_M.sum() * 0)
                    continue
                rows = [n for i in bins[number] for n in range(starts[i], starts[i + 1])]
                old_M = torch.cat([measured.old_logprobs[n] for n in rows])
                sampler_M = torch.cat([measured.sampler_logprobs[n] for n in rows])
                advantages_N = torch.tensor([advantages[n] for n in rows], device=self.device)
                batch_loss = policy_loss(new_M, old_M, sampler_M, advantages_N, batch.completion_of_M, self.settings)
                total = batch_loss.terms_N.sum() / divisor
                self.engine.backward(total)
            loss += float(total.detach())
            num_clipped += float(batch_loss.clipped_N.sum())
        return loss, num_clipped

    def _rounds(self, groups: list[TokenGroup]) -> tuple[list[PackedBatch], list[list[int]]]:
        """Return the micro-batches, and the indices of the groups in each.

        A rank with fewer micro-batches than another repeats its last one. The second list has no entry for the repeats.
        """
        bins = micro_batches(groups, self.policy.layout, self.settings.max_tokens_per_micro_batch)
        batches = [
            lay_out([groups[i] for i in members], self.policy.layout, pad_id=self.chat.pad_id).to(self.device)
            for members in bins
        ]
        return [*batches, *batches[-1:] * (largest_over_ranks(len(batches), self.device) - len(batches))], bins

    def _minibatches(self, num_groups: int, step: int, epoch: int) -> Iterator[list[int]]:
        """Yield the group indices of each minibatch; if there are several, each epoch has its own random order."""
        count = self.settings.num_minibatches_per_epoch
        order = list(range(num_groups))
        if count > 1:
            Random(f"{self.config.seed}:{step}:{epoch}:{self.rank}").shuffle(order)
        num_members = num_groups // count
        for number in range(count):
            yield sorted(order[number * num_members : (number + 1) * num_members])

    @property
    def _has_whole_weights(self) -> bool:
        return self.settings.strategy.kind == "ddp"

    def save(self, num_steps_done: int) -> None:
        """Commit the training state; all ranks take part."""
        save_state(self.engine, self.layout.rloo_state, num_steps_done)

    def commit(self, target: Path, num_steps_done: int) -> None:
        """Commit the policy as a checkpoint in `target`; all ranks take part, and rank 0 writes."""
        weights = self.engine.full_state_dict()
        if self.rank == 0:
            training: dict[str, str | int | float] = {
                "stage": "rloo",
                "num_steps": num_steps_done,
                "seed": self.config.seed,
            }
            commit_policy(target, self.policy.model, weights, self.chat, training=training)


def _offsets(groups: list[TokenGroup]) -> list[int]:
    """Return the number of completions before each group, and their total at the end."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.completion_ids))
    return starts
