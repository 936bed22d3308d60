"""The Ray actors of RLOO: vLLM engines and policy trainers, their resources, and calls to all of them. No formula lives here."""

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
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ClusterError
from rm_robust.rloo.engine import RolloutEngine
from rm_robust.rloo.rollout import ACTOR_LOST, Measurement, PromptCompletions, Update, split_evenly
from rm_robust.rloo.trainer import PolicyTrainer
from rm_robust.runs.layout import RunLayout

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800
"""An autoscaler may have to start the nodes first."""
SYNC_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 30
SHUTDOWN_TIMEOUT_S = 10


class TrainersLostError(Exception):
    """The policy under training is gone, or never came to be; what was committed is not lost."""


class RlooActors:
    """Starts all actors, resumes the trainers, connects trainer rank 0 to the engines; kills every actor on exit."""

    def __init__(self, config: PipelineConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.engines: list[Any] = []
        self.trainers: list[Any] = []
        try:
            self.engines = [_new_engine(config, run_dir, index) for index in range(config.rloo.num_engines)]
            self.trainers = [_new_trainer(config, run_dir, rank) for rank in range(config.rloo.trainers.num_workers)]
            address, port = _started(self.trainers[0].rendezvous.remote())
            done = _started([trainer.start.remote(address, port) for trainer in self.trainers])
            assert len(set(done)) == 1, f"trainers resumed at different steps: {done}"
            self.num_steps_done: int = done[0]
            self._connect()
        except BaseException:
            self.kill()
            raise

    def measure(self, completions: list[PromptCompletions], *, keep_graph: bool = True) -> list[Measurement]:
        """Each trainer measures its share of the prompts, in order; `keep_graph` where `update` comes next."""
        shares = split_evenly(len(completions), len(self.trainers))
        return self._of_trainers("measure", [((completions[share],), {"keep_graph": keep_graph}) for share in shares])

    def update(self, advantages_PK: Tensor, *, step: int, learning_rate_factor: float) -> dict[str, float]:
        """The optimiser steps of one step over all trainers; `advantages_PK` in the order of `measure`."""
        shares = split_evenly(len(advantages_PK), len(self.trainers))
        common = {
            "step": step,
            "num_completions_all_ranks": advantages_PK.numel(),
            "learning_rate_factor": learning_rate_factor,
        }
        updates: list[Update] = self._of_trainers(
            "update", [((advantages_PK[share].flatten().tolist(),), common) for share in shares]
        )
        return {
            "rloo/loss": sum(update.loss for update in updates),
            "rloo/clip_fraction": sum(update.clip_fraction for update in updates),
            "rloo/gradient_norm": updates[0].gradient_norm,
            "rloo/learning_rate": updates[0].learning_rate,
        }

    def publish(self, *, version: int) -> None:
        """Every engine has confirmed `version` when this returns. Raises RolloutError when one has not."""
        report = self._of_trainers("publish", [((version,), {})] * len(self.trainers))[0]
        logger.debug(
            "published version %d: %d bytes to %d engines in %.3f s",
            version,
            report.num_bytes,
            report.num_engines,
            report.seconds,
        )

    def lost_engines(self) -> list[Any]:
        """Those that do not answer. No engine may be generating."""
        lost = []
        for engine, call in [(engine, engine.policy_version.remote()) for engine in self.engines]:
            try:
                ray.get(call, timeout=ANSWER_TIMEOUT_S)
            except ACTOR_LOST:
                lost.append(engine)
        return lost

    def replace_engines(self, lost: list[Any]) -> int:
        """New engines for those of `lost` that are still in use; they refuse to generate until the next `publish`. Returns their number."""
        places = [place for place, engine in enumerate(self.engines) if any(engine is gone for gone in lost)]
        for place in places:
            ray.kill(self.engines[place])
            self.engines[place] = _new_engine(self.config, self.run_dir, place)
        if places:
            self._connect()
        return len(places)

    def save(self, num_steps_done: int) -> None:
        self._of_trainers("save", [((num_steps_done,), {})] * len(self.trainers))

    def commit(self, target: Path, num_steps_done: int) -> None:
        self._of_trainers("commit", [((target, num_steps_done), {})] * len(self.trainers))

    def _connect(self) -> None:
        _started(self.trainers[0].connect.remote(self.engines, SYNC_TIMEOUT_S))

    def _of_trainers(self, method: str, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """One call to each, and their answers in order. Raises TrainersLostError when one has gone: the others then wait for it in vain."""
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
        """Shut the engines down and kill every actor; nothing is left behind."""
        with contextlib.suppress(RayError):
            ray.get([engine.shutdown.remote() for engine in self.engines], timeout=SHUTDOWN_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Every actor, whatever it is at."""
        for actor in [*self.engines, *self.trainers]:
            ray.kill(actor)
        self.engines, self.trainers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # an engine that samples would answer late, and a job that is stopped has seconds
            self.kill()


def _started(calls: Any) -> Any:
    """The answers of actors that may wait for a node first. Raises ClusterError when none comes, TrainersLostError for an actor that ends instead."""
    try:
        return ray.get(calls, timeout=START_TIMEOUT_S)
    except GetTimeoutError as error:
        raise ClusterError(
            f"RLOO's trainers and engines were not all up after {START_TIMEOUT_S} s: the nodes that rloo.trainers and rloo.engine_* ask for did not come, "
            "or a model takes longer to load. `ray status` shows what waits; the same command resumes."
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
        "runtime_env": {
            "env_vars": environment_of(config.name, "rloo", f"engine {index}")
            | ({} if on_gpu else cpu_environment(settings.engine_num_threads))
        },
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
    """As Ray's dashboard and `ray list actors` show it. An actor that Ray has not buried yet, of before a loss, still has its name, hence the last part."""
    return f"{config.name} {role} {uuid.uuid4().hex[:6]}"
