"""Take the stages of a run one after the other: command line, checks before any work, where the driver runs, exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from pipelines.stages import TWIN_STAGES, Stage, bt_twin_stage, name_of, rloo_stage
from rm_robust.cluster.capacity import Request, check_capacity, requests_of
from rm_robust.cluster.failures import LOST, origin_of
from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.cluster.session import connect_to_ray, head_does_no_work, keep_ray_datas_actors_here
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.config.loading import load_config
from rm_robust.data.chat import ChatFormat
from rm_robust.data.preferences import check_preference_sources
from rm_robust.errors import ConfigError, RmRobustError
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.runs.claim import claim_for_job, only_writer
from rm_robust.runs.directory import RESOLVED_NAME, Run, check_run_dir, choose_run_dir, claim_run_dir, require_shared
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.storage.copies import local_path, uri_of
from rm_robust.runs.storage.transfer import delete_uncommitted, pull_anew, pull_files
from rm_robust.runs.trackers import check_trackers

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = Path("pipelines/configs/tiny_cpu.toml")


def parse_run(description: str, default_config: Path, arguments: list[str] | None = None) -> Run:
    """Command line of every pipeline -> Run, whose directory may hold no run of another config. Raises ConfigError with the path, the value and the fix."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=default_config,
        help=f"TOML file (default: {DEFAULT_CONFIG}, which needs no data)",
    )
    parser.add_argument(
        "--run-dir", help="where this run's files go: a path, or a URI (s3://…, gs://…); the same again resumes the run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="DOTTED.NAME=VALUE",
        dest="overrides",
        help="e.g. --set rloo.num_steps=10",
    )
    parsed = parser.parse_args(arguments)
    config = load_config(parsed.config, parsed.overrides)
    local_path(config.serve.gold)  # a URI that holds a password is refused before it is written anywhere
    run_dir = choose_run_dir(config.name, parsed.run_dir)
    check_run_dir(run_dir, config)
    return Run(config, run_dir)


DRIVER_CPUS = 1.0
DRIVER_RESTARTS = 10
"""Of the task that runs the stages, when its node is lost: it goes on from what is committed."""
DRIVER_ENDS_S = 30.0


def main(description: str, stages: list[Stage]) -> int:
    """What every pipeline script does: parse, check everything that can be checked without a cluster, run its stages. Returns the exit code."""

    def work() -> None:
        start_logging()
        quieten_libraries()
        run = parse_run(description, repository_root() / DEFAULT_CONFIG)
        logger.info("run directory %s", run.run_dir)
        run_stages(run, stages)

    return exit_code_of(work)


def run_stages(run: Run, stages: list[Stage]) -> None:
    """One after the other: in this process, or on a cluster whose head does no work in a task on another node, which is started again when its node is lost."""
    ahead = stages_ahead(run, stages)
    if ahead and "RAY_ADDRESS" in os.environ:
        connect_to_ray()
    if ray.is_initialized() and head_does_no_work():
        drive_elsewhere(run, stages, ahead)
    else:
        drive(run, stages, ahead)


def drive_elsewhere(run: Run, stages: list[Stage], ahead: list[str]) -> None:
    claim_for_job(
        run.run_dir
    )  # at once: the driver's task may have to wait for a node, and the run may be over by then
    check_capacity(run.config, ahead, beside=[Request("the driver", 1, {"CPU": DRIVER_CPUS})])
    keep_ray_datas_actors_here()
    claim_run_dir(run.run_dir, run.config)
    remote: Any = ray.remote(drive_in_task)
    task = remote.options(num_cpus=DRIVER_CPUS, max_retries=DRIVER_RESTARTS, name=f"driver {run.config.name}").remote(
        run, stages
    )
    try:
        ray.get(task)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and the SIGTERM of `ray job stop`
        ray.cancel(task)
        ray.wait([task], timeout=DRIVER_ENDS_S)
        raise


def drive_in_task(run: Run, stages: list[Stage]) -> None:
    if uri_of(run.run_dir) is None:
        require_shared(run.run_dir / RESOLVED_NAME)
    drive(run, stages, [])


def stages_ahead(run: Run, stages: list[Stage]) -> list[str]:
    """Names of `stages` that ask the cluster for something and are not committed; those of the Bradley-Terry twin are a reward model's."""
    pull_files(run.run_dir)
    layout = RunLayout(run.run_dir)
    ahead = [name for name in map(name_of, stages) if name in requests_of(run.config) and not layout.is_done(name)]
    if bt_twin_stage in stages and run.config.reward_model.bt_twin:
        ahead += [
            name
            for name in map(name_of, TWIN_STAGES)
            if name not in ahead and not RunLayout(layout.bt_twin).is_done(name)
        ]
    return ahead


def drive(run: Run, stages: list[Stage], ahead: list[str]) -> None:
    """All stages, as the only one who writes the run directory. `ahead`: those that the cluster is asked for now, whether it can ever run them."""
    start_logging()
    quieten_libraries()
    with only_writer(run.run_dir):
        claim_run_dir(run.run_dir, run.config)
        check_inputs(run, stages)
        if ahead:
            connect_to_ray()
            check_capacity(run.config, ahead)
        delete_uncommitted(run.run_dir)
        pull_anew(run.run_dir)
        for stage in stages:
            lines_are_of(run.config.name, name_of(stage))
            stage(run)


def exit_code_of(work: Callable[[], None]) -> int:
    """0; 2 for what a user can mend, and 1 for training that failed or a node or process that was lost, each said in one line. Anything else is raised."""
    try:
        work()
    except (RmRobustError, RayError, TrainingFailedError) as error:
        origin = origin_of(error)
        if isinstance(origin, RmRobustError):
            print(f"error: {origin}", file=sys.stderr)
            return 2
        if isinstance(origin, LOST):
            print(f"error: {origin}\nThe same command again resumes from the last committed state.", file=sys.stderr)
            return 1
        raise
    return 0


def repository_root() -> Path:
    return Path(__file__).resolve().parent.parent


def check_inputs(run: Run, stages: list[Stage]) -> None:
    """Raise an RmRobustError for missing or empty files, for models that would make scores wrong, and where RLOO would have no prompts; before any work."""
    config = run.config
    check_trackers(config.tracking)
    check_preference_sources(config, run.run_dir)
    for path in {config.model.path, config.reward_model.base_path} - {None}:
        ChatFormat.load(str(path))
    if config.serve.gold != "embedded" and config.serve.gold_url is None:
        verify_checkpoint(local_path(config.serve.gold), "reward_model")
    if rloo_stage in stages and config.data.source != "embedded" and not config.data.rloo_prompts:
        raise ConfigError(
            "data.rloo_prompts is empty; name the prompts that RLOO samples from, or run the stages up to the reward model one by one."
        )
