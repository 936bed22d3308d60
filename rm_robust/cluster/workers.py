"""Run one plain function on every worker of a Ray Train group, with torch.distributed ready."""

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
from rm_robust.runs import files as run_files

WorkerFunction = Callable[[PipelineConfig, Path], dict[str, float]]

MAX_WORKER_FAILURES = 2
"""Restarts of a worker group before a stage fails. Each restart continues from the last committed state. A group is not
restarted after an error that a user can correct (rm_robust/errors.py)."""
MAX_ELASTIC_FAILURES = 20
"""Restarts of an elastic worker group, which is expected to lose nodes."""


def run_on_workers(
    function: WorkerFunction, *, stage: str, config: PipelineConfig, run_dir: Path, workers: WorkersConfig
) -> dict[str, float]:
    """Run `function(config, run_dir)` on `workers` through Ray Train V2, and return what rank 0 returned.

    `stage` names the Ray Train run and its log lines. Raises ray.train.TrainingFailedError.
    """
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
        # Gloo is needed beside nccl, because the ranks exchange offloaded shards on the CPU.
        torch_config=_torch_config_class()(backend="cpu:gloo,cuda:nccl" if workers.num_gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=stage,
            storage_path=f"{run_files.shown(run_dir)}/ray_train",
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
    """Return the GPU part of a resource request; it is empty without GPUs."""
    return {"GPU": num_gpus} if num_gpus else {}


def worker_device() -> torch.device:
    """Return this worker's current GPU when torch sees a GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quieten_libraries() -> None:
    """Turn off progress bars, the warnings of transformers, and the routine log lines of ray.data and httpx."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Transformers imports deepspeed to save a model, and deepspeed warns when a machine has no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_process(num_threads: int) -> None:
    """Set up the threads and the logging of a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(num_threads)
    quieten_libraries()
    start_logging(force=True)


_is_train_worker = False


def is_reclaimed() -> bool:
    """Return whether a machine of this worker group is about to be taken away (spot instances).

    All ranks call this together and get the same answer. It is False outside Ray Train, and where
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0 turns off Ray's watcher.
    """
    if not _is_train_worker or os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return False
    import ray.train

    return ray.train.get_preemption_info() is not None


def refreshed_run_dir(run_dir: Path) -> Path:
    """Bring this node's view of the run directory to what is committed, and return the directory.

    Every rank calls it, before any rank of the node writes to the directory.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        run_files.forget_uncommitted(run_dir)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return run_files.refresh(run_dir)


def _trainer_class() -> Any:
    """Return a TorchTrainer class that does not restart after a user's error, has no PlacementGroupCleaner, and leaves
    Ctrl-C to this process (interrupts.py).

    A user's error is one that a user can correct (rm_robust/errors.py).

    Ray's PlacementGroupCleaner looks up its controller in whichever Ray it finds first on the machine. When that is
    another Ray, which knows no such controller, the cleaner takes the workers' resources away (Ray 2.60). Our
    controller needs no cleaning, because it ends with the driver.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rm_robust.cluster.failures import origin_of

    class FailurePolicy(DefaultFailurePolicy):
        def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
            is_correctable = isinstance(origin_of(training_failed_error), RmRobustError)
            return not is_correctable and super()._is_retryable_error(training_failed_error)

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave Ctrl-C alone. Ray 2.60's handler swallows it from then on, also in later stages."""

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["failure_policy"] = FailurePolicy(settings["failure_policy"].failure_config)
            return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]  # annotated as Train V1's trainer

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # annotated as Train V1's trainer
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    return Trainer


def _torch_config_class() -> Any:
    """Return a TorchConfig whose workers set gloo's interface before Ray makes their process group.

    Ray makes the process group before it calls `_work`, so `_work` would set the interface too late.
    """
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # the class is known only at run time
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(listen_where_ray_does)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Any]:
            return Backend

    return Config


def _work(settings: dict[str, Any]) -> dict[str, float]:
    """Run the worker function in a worker process. `settings` is the `train_loop_config` of `run_on_workers`."""
    global _is_train_worker
    _is_train_worker = True
    import ray.train

    from rm_robust.cluster.failures import log_own_errors_in_one_line

    log_own_errors_in_one_line()
    prepare_process(settings["num_threads"])
    lines_are_of(settings["config"].name, settings["stage"], f"rank {ray.train.get_context().get_world_rank()}")
    result: dict[str, float] = settings["function"](settings["config"], refreshed_run_dir(settings["run_dir"]))
    return result
