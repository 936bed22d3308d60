"""Start, call and end the Ray actors of RLOO: vLLM engines and policy trainers. No formula lives here."""

import contextlib
import logging
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from rm_robust.cluster.environment import cpu_environment
from rm_robust.cluster.log_lines import environment_of
from rm_robust.cluster.worker_server import runtime_env_of
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ClusterError
from rm_robust.rloo.engine import RolloutEngine
from rm_robust.rloo.rollout import ACTOR_LOST, Measurement, PromptCompletions, Update, split_evenly
from rm_robust.rloo.trainer import PolicyTrainer
from rm_robust.runs.layout import RunLayout

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800
"""Seconds to wait until the actors have started; an autoscaler may have to start their nodes first."""
SYNC_TIMEOUT_S = 300
"""Seconds to wait for one call or one broadcast of a weight update."""
ANSWER_TIMEOUT_S = 30
"""Seconds after which an idle engine that does not answer counts as lost."""
SHUTDOWN_TIMEOUT_S = 10
"""Seconds that the engines get to shut down before they are killed."""


class TrainersLostError(Exception):
    """A trainer is lost or failed to start, so the policy in memory is gone. Committed steps are not lost."""


class RlooActors:
    """Starts all actors, resumes the trainers, connects trainer rank 0 to the engines; kills every actor on exit.

    The constructor begins to start the actors, and entering the context waits until they are up.
    """

    def __init__(self, config: PipelineConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.engines: list[Any] = []
        self.trainers: list[Any] = []
        self.num_steps_done = 0
        """The number of steps that the trainers have resumed from; known inside the context."""
        try:
            self.engines = [_new_engine(config, run_dir, index) for index in range(config.rloo.num_engines)]
            self.trainers = [_new_trainer(config, run_dir, rank) for rank in range(config.rloo.trainers.num_workers)]
        except BaseException:
            self.kill()
            raise

    def measure(self, completions: list[PromptCompletions], *, keep_graph: bool = True) -> list[Measurement]:
        """Have each trainer measure its share of the prompts, in order. Set `keep_graph` when `update` follows."""
        shares = split_evenly(len(completions), len(self.trainers))
        return self._call_trainers("measure", [((completions[share],), {"keep_graph": keep_graph}) for share in shares])

    def update(self, advantages_PK: Tensor, *, step: int, learning_rate: float) -> dict[str, float]:
        """Run the optimiser steps of RLOO step `step` on all trainers and return the metrics of the update.

        `advantages_PK` is in the order of the completions that `measure` got.
        """
        shares = split_evenly(len(advantages_PK), len(self.trainers))
        common = {
            "step": step,
            "num_completions_all_ranks": advantages_PK.numel(),
            "learning_rate": learning_rate,
        }
        updates: list[Update] = self._call_trainers(
            "update", [((advantages_PK[share].flatten().tolist(),), common) for share in shares]
        )
        return {
            "rloo/loss": sum(update.loss for update in updates),
            "rloo/clip_fraction": sum(update.clip_fraction for update in updates),
            "rloo/gradient_norm": updates[0].gradient_norm,
            "rloo/learning_rate": updates[0].learning_rate,
        }

    def publish_weights(self, *, version: int) -> None:
        """Send the policy's weights to every engine as `version`. Raises RolloutError unless all engines confirm it."""
        report = self._call_trainers("publish_weights", [((version,), {})] * len(self.trainers))[0]
        logger.debug(
            "published version %d: %d bytes to %d engines in %.3f s",
            version,
            report.num_bytes,
            report.num_engines,
            report.seconds,
        )

    def lost_engines(self) -> list[Any]:
        """Return the engines that do not answer. Call it while no engine generates."""
        lost = []
        for engine, call in [(engine, engine.policy_version.remote()) for engine in self.engines]:
            try:
                ray.get(call, timeout=ANSWER_TIMEOUT_S)
            except ACTOR_LOST:
                lost.append(engine)
        return lost

    def replace_engines(self, lost: list[Any]) -> int:
        """Replace those of the `lost` engines that are still in use, and return how many these are.

        The new engines refuse to generate until the next `publish_weights`.
        """
        lost_indices = [index for index, engine in enumerate(self.engines) if any(engine is gone for gone in lost)]
        for index in lost_indices:
            ray.kill(self.engines[index])
            self.engines[index] = _new_engine(self.config, self.run_dir, index)
        if lost_indices:
            self._connect()
        return len(lost_indices)

    def save(self, num_steps_done: int) -> None:
        """Commit the training state."""
        self._call_trainers("save", [((num_steps_done,), {})] * len(self.trainers))

    def commit(self, target: Path, num_steps_done: int) -> None:
        """Commit the policy as a checkpoint in `target`."""
        self._call_trainers("commit", [((target, num_steps_done), {})] * len(self.trainers))

    def _connect(self) -> None:
        _started(self.trainers[0].connect.remote(self.engines, SYNC_TIMEOUT_S))

    def _call_trainers(self, method: str, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Call the method once on each trainer and return the answers in the order of the ranks.

        Raises TrainersLostError when one trainer is gone: the others would wait for it forever.
        """
        try:
            return ray.get(
                [
                    getattr(trainer, method).remote(*args, **kwargs)
                    for trainer, (args, kwargs) in zip(self.trainers, arguments, strict=True)
                ]
            )
        except ACTOR_LOST as error:
            raise TrainersLostError(f"A trainer was lost in {method} ({type(error).__name__}).") from error

    def close(self) -> None:
        """Shut the engines down and kill every actor."""
        with contextlib.suppress(RayError):
            ray.get([engine.shutdown.remote() for engine in self.engines], timeout=SHUTDOWN_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Kill every actor at once, even one that is working."""
        for actor in [*self.engines, *self.trainers]:
            ray.kill(actor)
        self.engines, self.trainers = [], []

    def __enter__(self) -> Self:
        try:
            address, port = _started(self.trainers[0].rendezvous.remote())
            steps_by_rank = _started([trainer.start.remote(address, port) for trainer in self.trainers])
            assert len(set(steps_by_rank)) == 1, f"trainers resumed at different steps: {steps_by_rank}"
            self.num_steps_done = steps_by_rank[0]
            self._connect()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # an engine that samples would answer too late: a job that is stopped has only seconds left
            self.kill()


def _started(calls: Any) -> Any:
    """Return the answers to `calls` of actors that are starting and may have to wait for a node.

    Raises ClusterError after START_TIMEOUT_S without an answer, and TrainersLostError when an actor ends instead.
    """
    try:
        return ray.get(calls, timeout=START_TIMEOUT_S)
    except GetTimeoutError as error:
        raise ClusterError(
            f"RLOO's trainers and engines were not all up after {START_TIMEOUT_S} s: the nodes that rloo.trainers and "
            "rloo.engine_* ask for did not come, or a model takes longer to load. `ray status` shows what is waiting; "
            "the same command resumes."
        ) from error
    except ACTOR_LOST as error:
        raise TrainersLostError(
            f"A trainer or engine ended while it started: {str(error).strip().splitlines()[-1].strip()}"
        ) from error


def _new_engine(config: PipelineConfig, run_dir: Path, index: int) -> Any:
    settings = config.rloo
    on_gpu = settings.engine_num_gpus > 0
    options: dict[str, Any] = {
        "num_cpus": settings.engine_num_cpus,
        "num_gpus": settings.engine_num_gpus,
        "resources": settings.engine_resources,
        "runtime_env": runtime_env_of(
            environment_of(config.name, "rloo", f"engine {index}")
            | ({} if on_gpu else cpu_environment(settings.engine_num_threads))
        ),
        "name": _actor_name(config, f"engine {index}"),
    }
    return (
        ray.remote(RolloutEngine)
        .options(**options)
        .remote(
            model_dir=RunLayout(run_dir).sft_model_dir(config),
            dtype=settings.engine_dtype,
            max_model_len=config.data.max_prompt_tokens + settings.max_new_tokens,
            seed=config.seed + index,
            device="cuda" if on_gpu else "cpu",
            kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
            max_num_seqs=settings.max_num_sequences,
            weight_transfer_backend=settings.weight_transfer_backend,
            tensor_parallel_size=settings.tensor_parallel_size,
        )
    )


def _new_trainer(config: PipelineConfig, run_dir: Path, rank: int) -> Any:
    workers = config.rloo.trainers
    options: dict[str, Any] = {
        "num_cpus": workers.num_cpus_per_worker,
        "num_gpus": workers.num_gpus_per_worker,
        "resources": workers.resources_per_worker,
        "runtime_env": {"env_vars": environment_of(config.name, "rloo", f"trainer {rank}")},
        "name": _actor_name(config, f"trainer {rank}"),
    }
    return ray.remote(PolicyTrainer).options(**options).remote(config, run_dir, rank=rank)


def _actor_name(config: PipelineConfig, role: str) -> str:
    """Return the name that Ray's dashboard and `ray list actors` show.

    A lost actor keeps its name until Ray removes it, so the name ends with random characters.
    """
    return f"{config.name} {role} {uuid.uuid4().hex[:6]}"
