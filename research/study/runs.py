"""Do one run of the study with the pipeline's own stages, and make its row.

<folder>/<world>/base_<seed>_<hash>             world, sft, preferences
<folder>/<world>/<variant>_<seed>_<hash>        the reward model
<folder>/<world>/<variant>_<seed>_rloo_<hash>   RLOO against it

All objectives of a seed share its base. They are twins: they start from the same weights and see the same batches.
The hash is that of the config, so runs with other settings do not collide.
"""

import logging
import threading
import time
from importlib.metadata import version
from pathlib import Path

from pipelines.stages import preferences_stage, reward_model_stage, rloo_stage, sft_stage, world_stage
from research.study.grid import Cell, base_config, digest, key_of, reward_model_config
from research.study.rmb_files import RMB_PAIRS, sha256_of, write_rmb_files
from research.study.rows import Row, reward_model_figures, rloo_figures
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import DataError
from rm_robust.evaluation.evaluate import EvaluationPlan, evaluate, read_data
from rm_robust.evaluation.suites import SUITES
from rm_robust.report.summary import write_summary
from rm_robust.runs.directory import Run, claim_run_dir
from rm_robust.runs.layout import RunLayout, share_stages
from rm_robust.runs.metrics import read_metrics
from rm_robust.scoring.checkpoint_scorer import CheckpointScorer

logger = logging.getLogger(__name__)

RMB_FILES = Path("runs/study_data/rmb")
"""The folder in which the configs look for RMB's files."""
SHARED = ["world", "sft", "preferences"]
LIBRARIES = ("torch", "transformers", "ray")
RM_BENCH = "rm_bench.parquet"
_BASE_LOCK = threading.Lock()
"""The lock that lets twins which start together make their base only once."""


def prepare_base(cell: Cell, config: PipelineConfig, folder: Path, data_dir: Path) -> Path:
    """Run the stages that all objectives of the cell's world and seed share, and return their run directory."""
    if cell.world == "rmb":
        write_rmb_files(data_dir, RMB_FILES)
    shared = base_config(config)
    base = Run(shared, folder / cell.world / f"base_{cell.seed}_{digest(shared, 'reward_model')}")
    claim_run_dir(base.run_dir, base.config)
    for stage in (world_stage, sft_stage, preferences_stage):
        stage(base)
    return base.run_dir


def run_cell(cell: Cell, config: PipelineConfig, folder: Path, data_dir: Path) -> Row:
    """Train the cell's model, unless an interrupted run already did, and measure it. Raises what the stages raise."""
    with _BASE_LOCK:
        base_dir = prepare_base(cell, config, folder, data_dir)
    logger.info("start %s", cell)
    counts = RunLayout(base_dir).stage_result("preferences")["preferences"]
    trained = _reward_model_run(
        cell, config, base_dir, steps_per_epoch=counts["num_kept"]["train"] // config.reward_model.batch_size
    )
    started = time.monotonic()
    if cell.part == "rloo":
        run = Run(config, base_dir.with_name(f"{cell.variant}_{cell.seed}_rloo_{digest(config, 'rloo')}"))
        share_stages(trained.run_dir, run.run_dir, [*SHARED, "reward_model"])
        claim_run_dir(run.run_dir, run.config)
        rloo_stage(run)
        write_summary(run.run_dir)
        seconds, (figures, curves) = _stage_seconds(run.run_dir, "rloo"), rloo_figures(run.run_dir)
    else:
        figures, curves = reward_model_figures(trained.run_dir, num_epochs=round(config.reward_model.num_epochs))
        figures |= rm_bench_figures(trained, data_dir) if cell.world == "rmb" else {}
        seconds = _training_seconds(trained.run_dir) + time.monotonic() - started
    return Row(
        key_of(cell, config),
        cell.part,
        cell.world,
        cell.variant,
        cell.seed,
        seconds,
        figures,
        curves,
        _about(base_dir, data_dir),
    )


def _reward_model_run(cell: Cell, config: PipelineConfig, base_dir: Path, *, steps_per_epoch: int) -> Run:
    """Train the cell's reward model, evaluate it after every epoch, and return its run."""
    without_later_stages = reward_model_config(config)
    settings = without_later_stages.reward_model.model_copy(update={"evaluate_every_steps": steps_per_epoch})
    run = Run(
        without_later_stages.model_copy(update={"reward_model": settings}),
        base_dir.with_name(f"{cell.variant}_{cell.seed}_{digest(without_later_stages, 'reward_model')}"),
    )
    share_stages(base_dir, run.run_dir, SHARED)
    claim_run_dir(run.run_dir, run.config)
    reward_model_stage(run)
    return run


def _training_seconds(run_dir: Path) -> float:
    """Return the seconds of all steps and evaluations, also of an interrupted run, without the start of the workers."""
    lines = read_metrics(run_dir, "reward_model")
    return sum(float(line["time/step_s"]) + float(line.get("time/evaluate_s", 0.0)) for line in lines)


def rm_bench_figures(run: Run, data_dir: Path) -> dict[str, float]:
    """Return RM-Bench's figures for the trained model.

    Cases that are longer than the model's positions are left out, and counted in rm_bench/num_refused.
    """
    evaluation = EvaluationPlan(
        "rm_bench", SUITES["rm_bench"], [str(data_dir / RM_BENCH)], run.run_dir / "rm_bench", leave_out_refused=True
    )
    scorer = CheckpointScorer(
        RunLayout(run.run_dir).reward_model_checkpoint, device="cpu", max_length_tokens=None, max_tokens_per_batch=8192
    )
    result = evaluate(evaluation, read_data(evaluation), scorer)
    counts = {"rm_bench/num_refused": float(result["num_refused"]), "rm_bench/num_cases": float(result["num_cases"])}
    return counts | {
        f"rm_bench/{name}": figure["value"] for name, figure in result["figures"].items() if figure["value"] is not None
    }


def _about(base_dir: Path, data_dir: Path) -> dict[str, str | int | float]:
    """Return the facts that the row keeps about its run.

    They are the numbers of pairs or rankings of every set, kept and dropped, the seconds that the base took, the
    checksums of real data, and the versions of libraries.
    """
    counts = RunLayout(base_dir).stage_result("preferences")["preferences"]
    about: dict[str, str | int | float] = {f"num_{name}": num for name, num in counts["num_kept"].items()}
    about |= {f"num_{name}_dropped": sum(reasons.values()) for name, reasons in counts["num_dropped"].items()}
    about["base_seconds"] = sum(_stage_seconds(base_dir, stage) for stage in ("sft", "preferences"))
    if base_dir.parent.name == "rmb":
        about |= {f"{name}_sha256": sha256 for name, sha256 in real_data(data_dir).items()}
    return about | {name: version(name) for name in LIBRARIES}


def real_data(data_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of real data, by name. Raises DataError if a file is missing."""
    checksums = {}
    for name in (RMB_PAIRS, RM_BENCH):
        path = data_dir / name
        if not path.is_file():
            raise DataError(
                f"There is no {name} in {data_dir}. Name the folder of real preference data (DATA=…), "
                "or leave that world out: --worlds embedded."
            )
        checksums[name] = sha256_of(path)
    return checksums


def _stage_seconds(run_dir: Path, stage: str) -> float:
    return float(RunLayout(run_dir).stage_result(stage)["seconds"])
