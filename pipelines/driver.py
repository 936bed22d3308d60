"""Run the stages one after the other: checks before any work, where the driver runs, exit codes."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from pipelines.checks import check_inputs, refuse_glob_characters
from pipelines.stages import ALL_STAGES, BT_TWIN, REPORT, STAGES_OF_TWIN, Stage, requests_of, stages_of
from rm_robust.cluster.capacity import ResourceRequest, check_capacity
from rm_robust.cluster.failures import LOST, origin_of
from rm_robust.cluster.interrupts import Interrupted, interruptible
from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.cluster.session import connect_to_ray, head_does_no_work, keep_ray_datas_actors_here
from rm_robust.cluster.terminal import Terminal
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import RmRobustError
from rm_robust.report.summary import read_summary, summary_lines
from rm_robust.runs import files as run_files
from rm_robust.runs.claim import claim_for_job, only_writer
from rm_robust.runs.directory import (
    RESOLVED_NAME,
    Run,
    check_run_dir,
    choose_run_dir,
    claim_run_dir,
    new_log,
    reopened_by,
    require_shared,
)
from rm_robust.runs.layout import RunLayout

logger = logging.getLogger(__name__)

DRIVER_CPUS = 1.0
DRIVER_RESTARTS = 10
"""Most restarts of the driver's task after its node is lost. Each goes on from what is committed."""
DRIVER_ENDS_S = 5.0
"""Seconds that a cancelled driver task gets to end."""
STOPPING = "Stopping. The same command goes on from the last committed state. Ctrl-C again stops at once."


def run_of(options: argparse.Namespace) -> Run:
    """Return the run that the options of a command name: `config`, `run_dir` and `overrides`.

    Raises ConfigError, with the path, the value and the fix, for a wrong config, and for a run directory that holds a
    run of another config.
    """
    config = load_config(options.config, options.overrides)
    check_gold_address(config)
    run_dir = choose_run_dir(config.name, options.run_dir)
    refuse_glob_characters(run_dir, "--run-dir")
    check_run_dir(run_dir, config, options.again)
    return Run(config, run_dir, tuple(options.again))


def check_gold_address(config: PipelineConfig) -> None:
    """Raise DataError for an address of the judge that holds a password or cannot hold a run.

    It is called before the config is written anywhere.
    """
    run_files.refuse_password(config.serve.gold)
    if config.serve.gold_url is None:
        run_files.locate(config.serve.gold)


def main(options: argparse.Namespace) -> int:
    """Run the stages whose names are `options.stages`, and return the exit code."""
    return work_on(options, [stage for stage in ALL_STAGES if stage.name in options.stages])


def work_on(options: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Check what can be checked without a cluster, run the stages, print the summary, and return the exit code."""
    table: list[str] = []

    def work(terminal: Terminal) -> None:
        quieten_libraries()
        run = run_of(options)
        logger.info("run directory %s", run.run_dir)
        run_stages(run, stages_of(run.config, stages), terminal)
        if REPORT in stages:
            run_files.refresh_records(run.run_dir)
            table.extend(summary_lines(read_summary(run.run_dir)))

    exit_code = on_a_terminal(work, is_verbose=options.verbose)
    if table:
        print("\n".join(table))
    return exit_code


def on_a_terminal(work: Callable[[Terminal], None], *, is_verbose: bool) -> int:
    """Do `work` with a terminal that shows its progress, and return the exit code.

    Ctrl-C and SIGTERM end it with 130 and 143. The other codes are those of exit_code_of.
    """

    def work_in_terminal() -> None:
        with Terminal(is_verbose=is_verbose) as terminal, interruptible(terminal.say, STOPPING):
            try:
                work(terminal)
            except Exception:
                terminal.save(traceback.format_exc())
                raise

    try:
        return exit_code_of(work_in_terminal)
    except Interrupted as interrupted:
        return interrupted.exit_code


def run_stages(run: Run, stages: Sequence[Stage], terminal: Terminal) -> None:
    """Run the stages in this process, or in a task on another node where the head of the cluster does no work.

    Ray starts that task again when its node is lost.
    """
    ahead = stages_ahead(run, stages)
    if ahead and "RAY_ADDRESS" in os.environ:
        connect_to_ray()
    if ray.is_initialized() and head_does_no_work():
        drive_elsewhere(run, stages, ahead, terminal)
    else:
        drive(run, stages, ahead, terminal)


def drive_elsewhere(run: Run, stages: Sequence[Stage], ahead: Sequence[Stage], terminal: Terminal) -> None:
    """Run the stages in a task on a node that does work, and end the task when this process is told to end."""
    claim_for_job(run.run_dir)  # at once: the driver's task may have to wait for a node
    check_capacity(requests_of(run.config, ahead), beside=[ResourceRequest("the driver", 1, {"CPU": DRIVER_CPUS})])
    keep_ray_datas_actors_here()
    claim_run_dir(run.run_dir, run.config, run.again)
    run = replace(run, again=())  # a driver that Ray starts again goes on
    terminal.log_to(new_log(run.run_dir))
    remote: Any = ray.remote(drive_in_task)
    task = remote.options(num_cpus=DRIVER_CPUS, max_retries=DRIVER_RESTARTS, name=f"driver {run.config.name}").remote(
        run, stages
    )
    try:
        ray.get(task)
    except KeyboardInterrupt:
        ray.cancel(task)
        ray.wait([task], timeout=DRIVER_ENDS_S)
        raise


def drive_in_task(run: Run, stages: Sequence[Stage]) -> None:
    """Run the stages: the body of the driver's Ray task. Its log lines are shown where the command was given."""
    start_logging()
    quieten_libraries()
    require_shared(run.run_dir / RESOLVED_NAME)
    drive(run, stages, [], None)  # nothing is `ahead`: drive_elsewhere has checked the capacity


def stages_ahead(run: Run, stages: Sequence[Stage]) -> list[Stage]:
    """Return the `stages` that ask the cluster for something and are not done.

    The Bradley-Terry twin runs the reward model's stages again, so they also count as ahead until the twin's are done.
    """
    run_files.refresh_records(run.run_dir)
    layout = RunLayout(run.run_dir)
    reopened = {*run.again, *reopened_by(run.run_dir, run.config, run.again)}
    ahead = [
        stage
        for stage in stages
        if stage.requests is not None and (stage.name in reopened or not layout.is_done(stage.name))
    ]
    if BT_TWIN in stages and run.config.reward_model.bt_twin:
        twin = RunLayout(layout.bt_twin)
        ahead += [stage for stage in STAGES_OF_TWIN if stage not in ahead and not twin.is_done(stage.name)]
    return ahead


def drive(run: Run, stages: Sequence[Stage], ahead: Sequence[Stage], terminal: Terminal | None) -> None:
    """Run all stages, as the only process that writes the run directory.

    The cluster is first asked whether it can ever run the stages that are `ahead`. `terminal` is the one of this
    process, if it has one.
    """
    with only_writer(run.run_dir):
        claim_run_dir(run.run_dir, run.config, run.again)
        if terminal is not None:
            terminal.log_to(new_log(run.run_dir))
        check_inputs(run, stages)
        if ahead:
            connect_to_ray()
            check_capacity(requests_of(run.config, ahead))
        run_files.begin(run.run_dir)
        for stage in stages:
            lines_are_of(run.config.name, stage.name)
            stage.run(run)


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code.

    0: done; 1: training failed, or a node or process was lost; 2: an error that a user can correct. The reason is
    printed without a traceback. Any other error is raised.
    """
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
    """Return the folder that holds pipelines/."""
    return Path(__file__).resolve().parent.parent
