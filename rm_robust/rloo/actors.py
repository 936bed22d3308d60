"""The Ray actors of RLOO: vLLM engines and policy trainers, their resources, and calls to all of them. No formula lives here."""

import contextlib
import logging
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError
from torch import Tensor

from rm_robust.config import PipelineConfig
from rm_robust.records import PromptCompletions
from rm_robust.rloo.policy_trainer import PolicyTrainer
from rm_robust.rloo.rollout import Measurement, split_evenly
from rm_robust.rloo.vllm_engine import RolloutEngine, cpu_environment
from rm_robust.run_layout import RunLayout

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600
SYNC_TIMEOUT_S = 300


class RlooActors:
    """Starts all actors, resumes the trainers, connects trainer rank 0 to the engines; kills every actor on exit."""

    def __init__(self, config: PipelineConfig, run_dir: Path) -> None:
        self.config = config
        self.engines: list[Any] = []
        self.trainers: list[Any] = []
        try:
            self.engines = [_new_engine(config, run_dir, index) for index in range(config.rloo.num_engines)]
            self.trainers = [_new_trainer(config, run_dir, rank) for rank in range(config.rloo.trainers.num_workers)]
            address = ray.get(self.trainers[0].node_address.remote(), timeout=START_TIMEOUT_S)
            port = _free_port()
            done = ray.get([trainer.start.remote(address, port) for trainer in self.trainers], timeout=START_TIMEOUT_S)
            assert len(set(done)) == 1, f"trainers resumed at different steps: {done}"
            self.num_steps_done: int = done[0]
            ray.get(self.trainers[0].connect.remote(self.engines, SYNC_TIMEOUT_S), timeout=START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def measure(self, completions: list[PromptCompletions]) -> list[Measurement]:
        """Each trainer measures its share of the prompts, in order."""
        shares = split_evenly(len(completions), len(self.trainers))
        return ray.get([trainer.measure.remote(completions[share]) for trainer, share in zip(self.trainers, shares, strict=True)])

    def update(self, advantages_PK: Tensor, *, step: int) -> dict[str, float]:
        """One optimiser step over all trainers; `advantages_PK` in the order of `measure`."""
        shares = split_evenly(len(advantages_PK), len(self.trainers))
        calls = [
            trainer.update.remote(advantages_PK[share].flatten().tolist(), step=step, num_completions_all_ranks=advantages_PK.numel())
            for trainer, share in zip(self.trainers, shares, strict=True)
        ]
        results: list[dict[str, float]] = ray.get(calls)
        return results[0] | {"rloo/loss": sum(result["rloo/loss"] for result in results)}

    def publish(self, *, version: int) -> None:
        """Every engine has confirmed `version` when this returns."""
        report = ray.get(self.trainers[0].publish.remote(version))
        logger.debug("published version %d: %d bytes to %d engines in %.3f s", version, report.num_bytes, report.num_engines, report.seconds)

    def save(self, num_steps_done: int) -> None:
        ray.get([trainer.save.remote(num_steps_done) for trainer in self.trainers])

    def commit(self, num_steps_done: int) -> None:
        ray.get([trainer.commit.remote(num_steps_done) for trainer in self.trainers])

    def close(self) -> None:
        """Shut the engines down and kill every actor; nothing is left behind."""
        with contextlib.suppress(RayError):
            ray.get([engine.shutdown.remote() for engine in self.engines], timeout=10)
        for actor in [*self.engines, *self.trainers]:
            ray.kill(actor)
        self.engines, self.trainers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _new_engine(config: PipelineConfig, run_dir: Path, index: int) -> Any:
    settings = config.rloo
    on_gpu = settings.engine_num_gpus > 0
    options: dict[str, Any] = {
        "num_cpus": settings.engine_num_cpus,
        "num_gpus": settings.engine_num_gpus,
        "resources": settings.engine_resources,
        "runtime_env": {"env_vars": {} if on_gpu else cpu_environment(settings.engine_num_threads)},
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
    options: dict[str, Any] = {"num_cpus": workers.num_cpus_per_worker, "num_gpus": workers.num_gpus_per_worker, "resources": workers.resources_per_worker}
    return ray.remote(PolicyTrainer).options(**options).remote(config, run_dir, rank=rank)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
