"""Do the same optimiser steps with different trainers. Each has its own processes, which run only in its turn.

    parent ─"go"─► trainer: steps_per_round steps ─Round(seconds, losses)─► parent ─"go"─► the next trainer …

All trainers have the Bradley-Terry loss, AdamW with the same settings, gradient clipping at 1.0, float32, one thread
per process, and the same initial weights.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import datasets
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import RewardModelConfig
from rm_robust.data.records import PreferencePair, TokenGroup
from rm_robust.models.packing import choose_layout
from rm_robust.models.reward_model import PackedRewardModel, load_reward_model
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.engines.engine import new_optimizer
from rm_robust.training.loop import rank_share
from rm_robust.training.reward_model.losses import bradley_terry_losses
from rm_robust.training.reward_model.step import StepSettings, reward_model_step

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4, schedule="constant", warmup_fraction=0, weight_decay=0, max_gradient_norm=1
)
"""TRL's defaults except for the constant learning rate and for beta2 = 0.95.

rm_robust has this beta2 fixed, so TRL gets it too.
"""
MAX_TOKENS_PER_MICRO_BATCH = 8192


@dataclass(frozen=True)
class Work:
    """The work of a trainer: one batch of pairs for each optimiser step."""

    model_dir: Path
    batches: list[list[TokenGroup]]
    steps_per_round: int
    pad_id: int
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Round:
    """The result of one round."""

    seconds: float
    cpu_seconds: float
    """The CPU seconds of the process. On a busy machine they say more about the trainer than wall time does."""
    losses: list[float]


class Turns:
    """A trainer's end of the pipe. It waits before the first step of every round, and reports after the last one."""

    def __init__(self, connection: Connection, steps_per_round: int) -> None:
        self._connection = connection
        self._steps_per_round = steps_per_round
        self._losses: list[float] = []
        self._started_s = self._cpu_started_s = 0.0
        self._is_ready = False

    def step_begins(self) -> None:
        if not self._is_ready:  # now the libraries are imported, and model and data are loaded
            self._connection.send("ready")
            self._is_ready = True
        if not self._losses:
            self._connection.recv()
            self._started_s, self._cpu_started_s = time.perf_counter(), time.process_time()

    def step_ended(self, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) == self._steps_per_round:
            seconds, cpu_seconds = time.perf_counter() - self._started_s, time.process_time() - self._cpu_started_s
            self._connection.send(Round(seconds, cpu_seconds, self._losses))
            self._losses = []


Trainer = Callable[[Work, Turns], None]


def train_with_rm_robust(work: Work, turns: Turns) -> None:
    model = _load(work)
    packed = PackedRewardModel(model, choose_layout(model.config, CPU))
    engine = DdpEngine(packed, optimizer=OPTIMIZER, device=CPU)
    objective = RewardModelConfig(objective=Objective.BRADLEY_TERRY)
    settings = StepSettings(objective, MAX_TOKENS_PER_MICRO_BATCH, work.pad_id)
    for batch in work.batches:
        turns.step_begins()
        indices = rank_share(list(range(len(batch))), rank=engine.rank, world_size=engine.world_size)
        metrics = reward_model_step(
            engine, [PreferencePair(batch[i]) for i in indices], settings, model=packed, device=CPU
        )
        engine.step(OPTIMIZER.learning_rate)
        turns.step_ended(metrics["reward_model/loss"])


def train_one_sequence_at_a_time(work: Work, turns: Turns) -> None:
    """Train without padding, masks or sharing: in this form a plain transformers forward pass is fastest on a CPU."""
    model = _load(work)
    optimizer = new_optimizer(model, OPTIMIZER)
    for batch in work.batches:
        turns.step_begins()
        losses = []
        for pair in batch:
            chosen, rejected = (
                model(input_ids=torch.tensor([pair.prompt_ids + ids]), use_cache=False).logits[:, 0]
                for ids in pair.completion_ids
            )
            loss = bradley_terry_losses(chosen, rejected).sum() / len(batch)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step_ended(sum(losses))


def train_with_trl(work: Work, turns: Turns, *, gradient_checkpointing: bool) -> None:
    """Train with TRL's RewardTrainer on the same token ids in the same order.

    Settings that are not named here have TRL's defaults.
    """
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class RecordingTrainer(RewardTrainer):  # type: ignore[misc]
        last_loss = 0.0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Tensor = super().compute_loss(*args, **kwargs)
            self.last_loss = loss.item()
            return loss

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.step_begins()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step_ended(trainer.last_loss)

    pairs = [pair for batch in work.batches for pair in batch]
    rows = {
        "chosen_ids": [pair.prompt_ids + pair.completion_ids[0] for pair in pairs],
        "rejected_ids": [pair.prompt_ids + pair.completion_ids[1] for pair in pairs],
    }
    config = RewardConfig(
        output_dir=str(work.model_dir.parent / "trl"),
        per_device_train_batch_size=len(work.batches[0]),
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # the pairs come shuffled: every trainer has the same order
        gradient_checkpointing=gradient_checkpointing,
        bf16=False,  # TRL's default is bfloat16; this comparison is in float32
        use_cpu=True,
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=OPTIMIZER.max_gradient_norm,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(work.model_dir.parent / "base")
    trainer = RecordingTrainer(
        model=_load(work),
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[TakeTurns()],
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.model.dtype == torch.float32
    trainer.train()


TRL_DEFAULTS: Trainer = partial(train_with_trl, gradient_checkpointing=True)
TRL_WITHOUT_CHECKPOINTING: Trainer = partial(train_with_trl, gradient_checkpointing=False)


def _load(work: Work) -> PreTrainedModel:
    model = load_reward_model(work.model_dir, dtype=torch.float32)
    model.train()
    return model


class Contender:
    """The parent's end of a trainer. Its processes start at once, and are idle until `run_round`."""

    def __init__(self, name: str, trainer: Trainer, work: Work) -> None:
        self.name = name
        self.work = work
        self.rounds: list[Round] = []
        context = mp.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(work.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(trainer, replace(work, rank=rank), theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        for connection in self._connections:
            connection.recv()  # "ready"
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            if error:
                process.terminate()
            process.join()

    def run_round(self) -> None:
        for connection in self._connections:
            connection.send("go")
        results: list[Round] = [connection.recv() for connection in self._connections]
        slowest = max(results, key=lambda result: result.seconds)
        self.rounds.append(replace(slowest, cpu_seconds=sum(result.cpu_seconds for result in results)))

    @property
    def pairs_per_s(self) -> list[float]:
        return [num_pairs / done.seconds for num_pairs, done in zip(self._pairs_of_rounds(), self.rounds, strict=True)]

    @property
    def pairs_per_cpu_s(self) -> list[float]:
        """Pairs per CPU second of all workers together."""
        return [
            num_pairs / done.cpu_seconds for num_pairs, done in zip(self._pairs_of_rounds(), self.rounds, strict=True)
        ]

    @property
    def losses(self) -> list[float]:
        return [loss for done in self.rounds for loss in done.losses]

    def _pairs_of_rounds(self) -> list[int]:
        size = self.work.steps_per_round
        return [sum(map(len, self.work.batches[n * size : (n + 1) * size])) for n in range(len(self.rounds))]


def quiet() -> None:
    """Switch off the progress bars and reports of libraries, so that only the bench prints."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # accelerate imports deepspeed, which warns without this
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _run(trainer: Trainer, work: Work, connection: Connection) -> None:
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if work.world_size > 1:
        meeting = work.model_dir.parent / f"meeting_{os.getppid()}_{work.world_size}"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=work.rank, world_size=work.world_size)
    trainer(work, Turns(connection, work.steps_per_round))
    assert torch.get_num_threads() == 1, "a trainer changed the number of threads"
