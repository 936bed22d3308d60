"""The stages of a run in their order, each skipped when this run has committed it. The only place where stages, Ray and serving meet.

world ─► sft ─► preferences ─► reward_model ─► evaluation ─► (Bradley-Terry twin) ─► rloo (with proxy and gold served) ─► summary and report
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.cluster.session import connect_to_ray
from rm_robust.cluster.workers import quieten_libraries, run_on_workers
from rm_robust.config.run import PipelineConfig
from rm_robust.data.demonstrations import prepare_sft
from rm_robust.data.preferences import prepare_preferences, token_limits
from rm_robust.data.world.corpus import write_world
from rm_robust.evaluation.scenarios import evaluate_scenarios
from rm_robust.report.summary import summary_lines, write_summary
from rm_robust.rloo.controller import run_rloo
from rm_robust.runs.directory import Run, claim_run_dir
from rm_robust.runs.layout import RunLayout, share_stages
from rm_robust.training.reward_model.training import train_reward_model
from rm_robust.training.sft import train_sft
from serve.run_service import served_scorers

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)
Stage = Callable[[Run], None]


def name_of(stage: Stage) -> str:
    return stage.__name__.removesuffix("_stage")


def world_stage(run: Run) -> None:
    layout = RunLayout(run.run_dir)
    if run.config.data.source == "embedded":
        layout.run_stage("world", lambda: write_world(layout.world, run.config.world, seed=run.config.seed))


def sft_stage(run: Run) -> None:
    config, layout = run.config, RunLayout(run.run_dir)
    if not config.sft.enabled:
        return

    def work() -> dict[str, Any]:
        connect_to_ray()
        counts = prepare_sft(config, run.run_dir, token_limits(config))
        return counts | run_on_workers(
            train_sft, stage="sft", config=config, run_dir=run.run_dir, workers=config.sft.workers
        )

    _announce(layout, "sft", work)


def preferences_stage(run: Run) -> None:
    def work() -> dict[str, Any]:
        connect_to_ray()
        return prepare_preferences(run.config, run.run_dir)

    _announce(RunLayout(run.run_dir), "preferences", work)


def reward_model_stage(run: Run) -> None:
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

    _announce(RunLayout(run.run_dir), "reward_model", work)


def evaluation_stage(run: Run) -> None:
    settings = run.config.evaluation

    def work() -> dict[str, Any]:
        connect_to_ray()
        remote: Any = ray.remote(evaluate_in_task)  # type: ignore[arg-type]  # Ray's annotations know no keyword-only parameters
        name = f"evaluation of {run.config.name}"
        task = remote.options(
            name=name, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, resources=settings.resources
        )
        return {
            "evaluation": ray.get(task.remote(run.config, run.run_dir, device="cuda" if settings.num_gpus else "cpu"))
        }

    _announce(RunLayout(run.run_dir), "evaluation", work)


def evaluate_in_task(config: PipelineConfig, run_dir: Path, *, device: str) -> dict[str, dict[str, str | int | float]]:
    start_logging()
    quieten_libraries()
    lines_are_of(config.name, "evaluation")
    return evaluate_scenarios(config, run_dir, device=device)


def bt_twin_stage(run: Run) -> None:
    """Where the config asks for it: the Bradley-Terry twin of the reward model, trained and evaluated alike, in a run directory below this one."""
    if not run.config.reward_model.bt_twin:
        return
    config = run.config.model_copy(update={"reward_model": run.config.reward_model.as_bt_twin()})
    # Its record keeps the run's name; its lines, gauges and tracked runs are told from the run's own.
    twin = Run(config.model_copy(update={"name": f"{config.name}/bt_twin"}), RunLayout(run.run_dir).bt_twin)
    share_stages(run.run_dir, twin.run_dir, ["sft", "preferences"])
    claim_run_dir(twin.run_dir, config)
    for stage in TWIN_STAGES:
        lines_are_of(twin.config.name, name_of(stage))
        logger.info("Bradley-Terry twin:")
        stage(twin)
    write_summary(twin.run_dir)


def rloo_stage(run: Run) -> None:
    def work() -> dict[str, Any]:
        connect_to_ray()
        with served_scorers(run) as (proxy, gold):
            return run_rloo(run.config, run.run_dir, proxy=proxy, gold=gold)

    _announce(RunLayout(run.run_dir), "rloo", work)


def report_stage(run: Run) -> None:
    """Always done: it only reads the run's own files."""
    summary = write_summary(run.run_dir)
    print("\n".join(summary_lines(summary)))


def _announce(layout: RunLayout, stage: str, work: Callable[[], dict[str, Any]]) -> None:
    logger.info("stage %s", stage if not layout.is_done(stage) else f"{stage}: already committed, skipped")
    layout.run_stage(stage, work)


TWIN_STAGES: tuple[Stage, ...] = (reward_model_stage, evaluation_stage)
ALL_STAGES: list[Stage] = [
    world_stage,
    sft_stage,
    preferences_stage,
    reward_model_stage,
    evaluation_stage,
    bt_twin_stage,
    rloo_stage,
    report_stage,
]
REWARD_MODEL_STAGES: list[Stage] = [stage for stage in ALL_STAGES if stage is not rloo_stage]
