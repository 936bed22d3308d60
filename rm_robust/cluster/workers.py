"""Ray Train shell: run one plain function on every worker of a group, with torch.distributed ready. No formula lives here."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from rm_robust.cluster.environment import listen_where_ray_does
from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import WorkersConfig
from rm_robust.errors import RmRobustError
from rm_robust.runs.storage.copies import uri_of
from rm_robust.runs.storage.transfer import forget_uncommitted, pull

WorkerFunction = Callable[[PipelineConfig, Path], dict[str, float]]

MAX_WORKER_FAILURES = 2
"""Restarts of a worker group before a stage fails; a restart continues from the last committed state. None for what a user can mend (errors.py)."""
MAX_ELASTIC_FAILURES = 20
"""Of an elastic one, which was made to lose nodes."""


def run_on_workers(
    function: WorkerFunction, *, stage: str, config: PipelineConfig, run_dir: Path, workers: WorkersConfig
) -> dict[str, float]:
    """Run `function(config, run_dir)` on `workers` through Ray Train V2; returns what rank 0 returned. Raises ray.train.TrainingFailedError."""
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    trainer = _trainer_class()(
        _work,
        train_loop_config={
            "function": function,
            "stage": stage,
            "config": config,
            "run_dir": run_dir,
            "num_threads": workers.num_threads_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers
            if workers.min_workers is None
            else (workers.min_workers, workers.num_workers),
            elastic_resize_monitor_interval_s=workers.resize_every_s,
            use_gpu=workers.num_gpus_per_worker > 0,
            resources_per_worker={
                "CPU": workers.num_cpus_per_worker,
                **gpu_request(workers.num_gpus_per_worker),
                **workers.resources_per_worker,
            },
        ),
        torch_config=_torch_config_class()(
            backend="cpu:gloo,cuda:nccl" if workers.num_gpus_per_worker else "gloo"
        ),  # offloaded shards meet on the CPU
        run_config=RunConfig(
            name=stage,
            storage_path=f"{uri_of(run_dir) or run_dir}/ray_train",
            failure_config=FailureConfig(
                max_failures=MAX_WORKER_FAILURES if workers.min_workers is None else MAX_ELASTIC_FAILURES
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    returned = trainer.fit().return_value
    assert isinstance(returned, dict), f"rank 0 of {stage} returned {returned!r}"
    return returned


def gpu_request(num_gpus: float) -> dict[str, float]:
    """The GPU part of a resource request; none on CPU."""
    return {"GPU": num_gpus} if num_gpus else {}


def worker_device() -> torch.device:
    """This worker's device: its GPU when it was given one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quieten_libraries() -> None:
    """What libraries say of their own insides at INFO, and bars for files that load in a blink; warnings of substance stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers imports deepspeed to save a model, and deepspeed warns of a machine without GPU


def prepare_process(num_threads: int) -> None:
    """Threads and logging of a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(num_threads)
    quieten_libraries()
    start_logging(force=True)


_is_train_worker = False


def is_reclaimed() -> bool:
    """Whether a machine of this worker group is about to be taken away (spot instances): the same answer on every rank, which meet here.

    False outside Ray Train, and where RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0 says that nobody watches.
    """
    if not _is_train_worker or os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return False
    import ray.train

    return ray.train.get_preemption_info() is not None


def own_copy(run_dir: Path) -> Path:
    """Of a run in an object store, as it is committed, before any rank of this node writes to it."""
    if uri_of(run_dir) is not None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            forget_uncommitted(run_dir)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    return pull(run_dir)


def _trainer_class() -> Any:
    """TorchTrainer that starts no worker again after an error that a user can mend, and without Ray's PlacementGroupCleaner.

    That looks its controller up in whatever Ray it finds first on the machine, and takes the workers' resources away when another Ray answers that it
    knows no such controller (Ray 2.60). Ours needs no cleaning: it ends with the driver.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rm_robust.cluster.failures import origin_of

    class FailurePolicy(DefaultFailurePolicy):
        def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
            is_mendable = isinstance(origin_of(training_failed_error), RmRobustError)
            return not is_mendable and super()._is_retryable_error(training_failed_error)

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["failure_policy"] = FailurePolicy(settings["failure_policy"].failure_config)
            return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]  # annotated as Train V1's trainer

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # annotated as Train V1's trainer
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    return Trainer


def _torch_config_class() -> Any:
    """TorchConfig whose workers know gloo's interface before Ray makes their process group, which is before it calls `_work`."""
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # a class that is known at run time only
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(listen_where_ray_does)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Any]:
            return Backend

    return Config


def _work(settings: dict[str, Any]) -> dict[str, float]:
    global _is_train_worker
    _is_train_worker = True
    import ray.train

    from rm_robust.cluster.failures import log_own_errors_in_one_line

    log_own_errors_in_one_line()
    prepare_process(settings["num_threads"])
    lines_are_of(settings["config"].name, settings["stage"], f"rank {ray.train.get_context().get_world_rank()}")
    result: dict[str, float] = settings["function"](settings["config"], own_copy(settings["run_dir"]))
    return result
