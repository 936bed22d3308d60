"""The stages of a run in their order, each skipped when this run has committed it. The only place where stages, Ray and serving meet.

world ─► sft ─► preferences ─► reward_model ─► evaluation ─► (Bradley-Terry twin) ─► rloo (with proxy and gold served) ─► summary and report
"""

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from rm_robust.chat import ChatFormat
from rm_robust.checkpoint import verify_checkpoint
from rm_robust.cluster_capacity import Request, check_capacity, requests_of
from rm_robust.config import PipelineConfig, ReplicaConfig
from rm_robust.config_loading import DEFAULT_CONFIG, RESOLVED_NAME, Run, claim_run_dir, parse_run, require_shared
from rm_robust.embedded_world.world_files import write_world
from rm_robust.errors import ConfigError, RmRobustError
from rm_robust.experiment_trackers import check_trackers
from rm_robust.log_lines import lines_are_of, start_logging
from rm_robust.object_storage.copies import local_path, shown, uri_of
from rm_robust.object_storage.pulls import pull_anew, pull_files
from rm_robust.object_storage.puts import delete_uncommitted
from rm_robust.preferences.preparation import check_preference_sources, prepare_preferences, token_limits
from rm_robust.ray_session import connect_to_ray, head_does_no_work, is_local, keep_ray_datas_actors_here
from rm_robust.remote_errors import LOST, origin_of
from rm_robust.reward_model.evaluation import evaluate_scenarios
from rm_robust.reward_model.training import train_reward_model
from rm_robust.rloo.controller import run_rloo
from rm_robust.run_claim import claim_for_job, only_writer
from rm_robust.run_layout import RunLayout
from rm_robust.score_contract import Scorer
from rm_robust.scoring import RewardClient
from rm_robust.sft.preparation import prepare_sft
from rm_robust.sft.training import train_sft
from rm_robust.shared_stages import share_stages
from rm_robust.summary import summary_lines, write_summary
from rm_robust.worker_group import quieten_libraries, run_on_workers

if TYPE_CHECKING:
    from serve.settings import ModelSettings

logger = logging.getLogger(__name__)

Stage = Callable[[Run], None]

DRIVER_CPUS = 1.0
DRIVER_RESTARTS = 10
"""Of the task that runs the stages, when its node is lost: it goes on from what is committed."""
DRIVER_ENDS_S = 30.0
SERVED_WITHIN_S = 1800.0
"""An autoscaler may have to start the nodes first."""


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
    claim_for_job(run.run_dir)  # at once: the driver's task may have to wait for a node, and the run may be over by then
    check_capacity(run.config, ahead, beside=[Request("the driver", 1, {"CPU": DRIVER_CPUS})])
    keep_ray_datas_actors_here()
    claim_run_dir(run.run_dir, run.config)
    remote: Any = ray.remote(drive_in_task)
    task = remote.options(num_cpus=DRIVER_CPUS, max_retries=DRIVER_RESTARTS, name=f"driver {run.config.name}").remote(run, stages)
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
        ahead += [name for name in map(name_of, TWIN_STAGES) if name not in ahead and not RunLayout(layout.bt_twin).is_done(name)]
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


def name_of(stage: Stage) -> str:
    return stage.__name__.removesuffix("_stage")


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
        raise ConfigError("data.rloo_prompts is empty; name the prompts that RLOO samples from, or run the stages up to the reward model one by one.")


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
        return counts | run_on_workers(train_sft, stage="sft", config=config, run_dir=run.run_dir, workers=config.sft.workers)

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
        return run_on_workers(train_reward_model, stage="reward_model", config=config, run_dir=run.run_dir, workers=config.reward_model.workers)

    _announce(RunLayout(run.run_dir), "reward_model", work)


def evaluation_stage(run: Run) -> None:
    settings = run.config.evaluation

    def work() -> dict[str, Any]:
        connect_to_ray()
        remote: Any = ray.remote(evaluate_in_task)  # type: ignore[arg-type]  # Ray's annotations know no keyword-only parameters
        name = f"evaluation of {run.config.name}"
        task = remote.options(name=name, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, resources=settings.resources)
        return {"evaluation": ray.get(task.remote(run.config, run.run_dir, device="cuda" if settings.num_gpus else "cpu"))}

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


@contextlib.contextmanager
def served_scorers(run: Run) -> Iterator[tuple[Scorer, Scorer]]:
    """Serve the proxy reward model and the gold judge in this cluster, and reach them without HTTP; a gold judge elsewhere is reached over HTTP.

    The service is deleted afterwards. It has no HTTP side of its own; below a Serve that has one its single key is thrown away.
    """
    from serve.cluster_scorer import ClusterScorer
    from serve.keys import new_key
    from serve.launch import delete_service, deploy_inside, start_serve_without_http
    from serve.run_service import end_unused_serve, end_with_this_job, forget_job
    from serve.settings import ServiceLimits, ServiceSettings

    config = run.config
    proxy = served_model(config.serve.proxy_replica, "proxy", RunLayout(run.run_dir).reward_model_checkpoint)
    gold = served_model(config.serve.gold_replica, "gold", None if config.serve.gold == "embedded" else local_path(config.serve.gold).absolute())
    gold_url, timeout_s = config.serve.gold_url, config.serve.request_timeout_s
    app_name, is_on_cluster = service_name(run), not is_local()
    start_serve_without_http()
    settings = ServiceSettings(models=(proxy,) if gold_url else (proxy, gold), api_keys=(new_key("run")[1],), limits=ServiceLimits(request_timeout_s=timeout_s))
    if is_on_cluster:
        end_with_this_job(app_name)
    try:
        deploy_inside(settings, app_name=app_name, deadline_s=SERVED_WITHIN_S)
        with contextlib.ExitStack() as stack:
            if gold_url:
                yield ClusterScorer(app_name, "proxy"), stack.enter_context(RewardClient(gold_url, timeout_s=timeout_s))
            else:
                yield ClusterScorer(app_name, "proxy"), ClusterScorer(app_name, "gold")
    finally:
        delete_service(app_name)
        if is_on_cluster:
            forget_job(app_name)
            end_unused_serve()


def service_name(run: Run) -> str:
    """Of this run's directory alone: two runs of one name in a cluster must not replace each other's models."""
    return f"{run.config.name}-{hashlib.sha256(shown(run.run_dir).encode()).hexdigest()[:8]}"


def served_model(replica: ReplicaConfig, model_name: str, checkpoint_dir: Path | None) -> "ModelSettings":
    """The embedded judge, without a checkpoint."""
    from serve.settings import ModelSettings

    return ModelSettings(
        **replica.model_dump(),
        model_name=model_name,
        checkpoint_dir=checkpoint_dir,
        embedded_judge=checkpoint_dir is None,
        device="cuda" if replica.num_gpus else "cpu",
    )


def _announce(layout: RunLayout, stage: str, work: Callable[[], dict[str, Any]]) -> None:
    logger.info("stage %s", stage if not layout.is_done(stage) else f"{stage}: already committed, skipped")
    layout.run_stage(stage, work)


TWIN_STAGES: tuple[Stage, ...] = (reward_model_stage, evaluation_stage)
ALL_STAGES: list[Stage] = [world_stage, sft_stage, preferences_stage, reward_model_stage, evaluation_stage, bt_twin_stage, rloo_stage, report_stage]
REWARD_MODEL_STAGES: list[Stage] = [stage for stage in ALL_STAGES if stage is not rloo_stage]
