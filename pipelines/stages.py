"""The stages of a run, in their order. A stage that this run has committed is skipped.

This is the only place where stages, Ray and serving meet. What each stage leaves is in rm_robust/runs/layout.py.

world ─► sft ─► preferences ─► reward_model ─► evaluation ─► (Bradley-Terry twin) ─► rloo (with served scorers) ─►
report
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from rm_robust.cluster.capacity import ResourceRequest, request_of, request_of_replicas, request_of_workers
from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.cluster.session import connect_to_ray
from rm_robust.cluster.terminal import BEGINS, DONE
from rm_robust.cluster.workers import quieten_libraries, run_on_workers
from rm_robust.config.run import PipelineConfig
from rm_robust.data.demonstrations import prepare_sft
from rm_robust.data.preferences import prepare_preferences, prepare_rloo_prompts, token_limits
from rm_robust.data.world.corpus import write_world
from rm_robust.evaluation.scenarios import evaluate_scenarios
from rm_robust.report.summary import write_summary
from rm_robust.rloo.actors import RlooActors
from rm_robust.rloo.controller import run_rloo
from rm_robust.rloo.proxy import check_proxy, record_proxy, require_policy
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import Run, claim_run_dir
from rm_robust.runs.layout import TWIN_STAGES, RunLayout, share_stages
from rm_robust.runs.metrics import log_stage
from rm_robust.runs.resume import delete_states_of_done
from rm_robust.runs.status import duration
from rm_robust.scoring.find_checkpoint import find_reward_model
from rm_robust.training.reward_model.training import train_reward_model
from rm_robust.training.sft import train_sft
from serve.run_service import served_scorers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage of a run, or a step between stages that records nothing."""

    name: str
    """The name of the stage in rm_robust.runs.layout.STAGES, if it records that it is done."""
    run: Callable[[Run], None]
    """Does the stage's work, unless the run has done it before."""
    requests: Callable[[PipelineConfig], list[ResourceRequest]] | None = None
    """What the stage asks of the cluster, all at once; None for one that asks for nothing of its own."""


def world_stage(run: Run) -> None:
    """Write the embedded world's data, where the run uses it."""
    layout = RunLayout(run.run_dir)
    if run.config.data.source == "embedded":
        _run_unless_done(layout, "world", lambda: write_world(layout.world, run.config.world, seed=run.config.seed))


def sft_stage(run: Run) -> None:
    """Tokenise the demonstrations and train the policy on them, unless SFT is off."""
    config, layout = run.config, RunLayout(run.run_dir)
    if not config.sft.enabled:
        return

    def work() -> dict[str, Any]:
        connect_to_ray()
        counts = prepare_sft(config, run.run_dir, token_limits(config))
        return counts | run_on_workers(
            train_sft, stage="sft", config=config, run_dir=run.run_dir, workers=config.sft.workers
        )

    _run_unless_done(layout, "sft", work)
    delete_states_of_done(layout, config, "sft")


def preferences_stage(run: Run) -> None:
    """Build the preference pairs and the four scenarios, and tokenise them and the prompts of RLOO."""

    def work() -> dict[str, Any]:
        connect_to_ray()
        return prepare_preferences(run.config, run.run_dir)

    _run_unless_done(RunLayout(run.run_dir), "preferences", work)


def reward_model_stage(run: Run) -> None:
    """Train the reward model."""
    config = run.config

    def work() -> dict[str, Any]:
        connect_to_ray()
        return run_on_workers(
            train_reward_model,
            stage="reward_model",
            config=config,
            run_dir=run.run_dir,
            workers=config.reward_model.workers,
        )

    _run_unless_done(RunLayout(run.run_dir), "reward_model", work)
    delete_states_of_done(RunLayout(run.run_dir), config, "reward_model")


def evaluation_stage(run: Run) -> None:
    """Score the four scenarios with the reward model, in a Ray task on a node with the resources of its config."""
    settings = run.config.evaluation

    def work() -> dict[str, Any]:
        connect_to_ray()
        # Ray's annotations know no keyword-only parameters.
        remote: Any = ray.remote(evaluate_in_task)  # type: ignore[arg-type]
        name = f"evaluation of {run.config.name}"
        task = remote.options(
            name=name, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, resources=settings.resources
        )
        return {
            "evaluation": ray.get(task.remote(run.config, run.run_dir, device="cuda" if settings.num_gpus else "cpu"))
        }

    _run_unless_done(RunLayout(run.run_dir), "evaluation", work)


def evaluate_in_task(config: PipelineConfig, run_dir: Path, *, device: str) -> dict[str, dict[str, str | int | float]]:
    """Return the table of the four scenarios: the body of the evaluation's Ray task."""
    start_logging()
    quieten_libraries()
    lines_are_of(config.name, "evaluation")
    torch.set_num_threads(max(1, int(config.evaluation.num_cpus)))
    return evaluate_scenarios(config, run_dir, device=device)


def bt_twin_stage(run: Run) -> None:
    """Train and evaluate the reward model's Bradley-Terry twin, where the config asks for it.

    The twin has a run directory of its own, below this one.
    """
    if not run.config.reward_model.bt_twin:
        return
    config = run.config.model_copy(update={"reward_model": run.config.reward_model.as_bt_twin()})
    # The twin's log lines, gauges and tracked runs get a name of their own. Its config keeps the run's name.
    twin = Run(config.model_copy(update={"name": f"{config.name}/bt_twin"}), RunLayout(run.run_dir).bt_twin)
    share_stages(run.run_dir, twin.run_dir, ["sft", "preferences"])
    claim_run_dir(twin.run_dir, config)
    for stage in STAGES_OF_TWIN:
        lines_are_of(twin.config.name, stage.name)
        stage.run(twin)
    write_summary(twin.run_dir)


def rloo_stage(run: Run) -> None:
    """Serve the reward model and the gold judge, and train the policy against them."""

    def work() -> dict[str, Any]:
        proxy_dir: Path | None = RunLayout(run.run_dir).reward_model_checkpoint
        counts: dict[str, Any] = {}
        if run.config.rloo.proxy is not None:
            proxy_dir, counts = _prepare_for_given_proxy(run)
        connect_to_ray()
        actors = RlooActors(run.config, run.run_dir)  # they start while the scorers are deployed
        with contextlib.ExitStack() as stack:
            stack.callback(actors.kill)  # where serving fails
            served = stack.enter_context(served_scorers(run, proxy_dir=proxy_dir))
            return counts | run_rloo(
                run.config,
                run.run_dir,
                proxy=served.proxy,
                gold=served.gold,
                first_actors=actors,
                wait_for_scorers=served.wait_until_up,
            )

    _run_unless_done(RunLayout(run.run_dir), "rloo", work)
    delete_states_of_done(RunLayout(run.run_dir), run.config, "rloo")


def _prepare_for_given_proxy(run: Run) -> tuple[Path | None, dict[str, Any]]:
    """Check and record rloo.proxy, and tokenise the prompts: the stages of the run's own reward model are left out.

    Returns the proxy's checkpoint (None: a service has it), and the counts.
    """
    config = run.config
    identity = check_proxy(config, run.run_dir, policy_dir=require_policy(config, run.run_dir))
    record_proxy(run.run_dir, identity)
    proxy_dir = None if config.rloo.proxy_url else find_reward_model(identity.proxy).absolute()
    counts: dict[str, Any] = {"proxy": asdict(identity)}
    if not run_files.is_reachable(RunLayout(run.run_dir).rloo_prompts):
        connect_to_ray()
        counts |= prepare_rloo_prompts(config, run.run_dir)
    return proxy_dir, counts


def report_stage(run: Run) -> None:
    """Write the summary and the report. This runs every time, because it needs only the run's own files."""
    write_summary(run.run_dir)


def _run_unless_done(layout: RunLayout, stage: str, work: Callable[[], dict[str, Any]]) -> None:
    """Do the work of a stage and record its result, unless the run has done it before; log which."""
    is_done = layout.is_done(stage)
    if not is_done and layout.stage_record(stage).exists():
        logger.warning("%s is missing or damaged, so stage %s runs again", layout.damaged_file(stage), stage)
    log_stage(stage, "already committed, skipped" if is_done else BEGINS)
    if layout.run_stage(stage, work):
        result = layout.stage_result(stage)
        figures = [f"{name} {row['value']:.3f}" for name, row in result.get("evaluation", {}).items()]
        log_stage(stage, ", ".join([f"{DONE} in {duration(result['seconds'])}", *figures]))


def sft_requests(config: PipelineConfig) -> list[ResourceRequest]:
    return [request_of_workers("sft.workers.num_workers", config.sft.workers)] if config.sft.enabled else []


def preferences_requests(config: PipelineConfig) -> list[ResourceRequest]:
    return [request_of("data.task_resources", 1, 1.0, 0.0, config.data.task_resources)]


def reward_model_requests(config: PipelineConfig) -> list[ResourceRequest]:
    return [request_of_workers("reward_model.workers.num_workers", config.reward_model.workers)]


def evaluation_requests(config: PipelineConfig) -> list[ResourceRequest]:
    evaluation = config.evaluation
    return [request_of("evaluation", 1, evaluation.num_cpus, evaluation.num_gpus, evaluation.resources)]


def rloo_requests(config: PipelineConfig) -> list[ResourceRequest]:
    rloo, serve = config.rloo, config.serve
    requests = [
        request_of_workers("rloo.trainers.num_workers", rloo.trainers),
        request_of(
            "rloo.num_engines", rloo.num_engines, rloo.engine_num_cpus, rloo.engine_num_gpus, rloo.engine_resources
        ),
    ]
    if rloo.proxy_url is None:
        requests.append(request_of_replicas("serve.proxy_replica.num_replicas", serve.proxy_replica))
    if serve.gold_url is None:
        requests.append(request_of_replicas("serve.gold_replica.num_replicas", serve.gold_replica))
    return requests


WORLD = Stage("world", world_stage)
SFT = Stage("sft", sft_stage, sft_requests)
PREFERENCES = Stage("preferences", preferences_stage, preferences_requests)
REWARD_MODEL = Stage("reward_model", reward_model_stage, reward_model_requests)
EVALUATION = Stage("evaluation", evaluation_stage, evaluation_requests)
BT_TWIN = Stage("bt_twin", bt_twin_stage)
RLOO = Stage("rloo", rloo_stage, rloo_requests)
REPORT = Stage("report", report_stage)

ALL_STAGES = (WORLD, SFT, PREFERENCES, REWARD_MODEL, EVALUATION, BT_TWIN, RLOO, REPORT)
REWARD_MODEL_STAGES = tuple(stage for stage in ALL_STAGES if stage is not RLOO)
STAGES_OF_TWIN = tuple(stage for stage in ALL_STAGES if stage.name in TWIN_STAGES)


def stages_of(config: PipelineConfig, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages to run where RLOO trains against another reward model than the run's own.

    Those of the run's own are left out, and the embedded world, from which the prompts come, is made.
    """
    if config.rloo.proxy is None or RLOO not in stages:
        return list(stages)
    world = [WORLD] if config.data.source == "embedded" and WORLD not in stages else []
    return world + [stage for stage in stages if stage not in (PREFERENCES, REWARD_MODEL, EVALUATION, BT_TWIN)]


def requests_of(config: PipelineConfig, stages: Sequence[Stage] = ALL_STAGES) -> dict[str, list[ResourceRequest]]:
    """Return what each stage asks of the cluster, by the stage's name; stages that ask for nothing are left out."""
    return {stage.name: stage.requests(config) for stage in stages if stage.requests is not None}
