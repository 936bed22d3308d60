"""Does one run of the study with the pipeline's own stages, and makes its row.

<folder>/<world>/base_<seed>        world, sft, preferences: shared by all objectives of a seed, which are therefore twins: same weights, same batches
<folder>/<world>/<variant>_<seed>   the reward model, and RLOO against it
"""

import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rm_robust.checkpoint import verify_checkpoint
from rm_robust.config import PipelineConfig
from rm_robust.config_loading import Run, claim_run_dir
from rm_robust.errors import DataError
from rm_robust.evaluation.checkpoint_source import CheckpointSource
from rm_robust.evaluation.evaluate import Evaluation, evaluate, read_data
from rm_robust.evaluation.suites import SUITES
from rm_robust.run_layout import RunLayout
from rm_robust.shared_stages import share_stages
from rm_robust.stages import preferences_stage, reward_model_stage, rloo_stage, sft_stage, world_stage
from rm_robust.study.grid import Cell, key_of
from rm_robust.study.measure import reward_model_figures, rloo_figures
from rm_robust.study.rmb_files import write_rmb_files
from rm_robust.study.rows import Row
from rm_robust.summary import write_summary

logger = logging.getLogger(__name__)

RMB_FILES = Path("runs/study_data/rmb")
"""Where the configs look for RMB's files."""
SHARED = ["world", "sft", "preferences"]
LIBRARIES = ("torch", "transformers", "ray")
RM_BENCH = "rm_bench.parquet"


def prepare_base(cell: Cell, config: PipelineConfig, folder: Path, data_dir: Path) -> Path:
    """The run whose first stages all objectives of the cell's world and seed share."""
    if cell.world == "rmb":
        write_rmb_files(data_dir, RMB_FILES)
    base = Run(config.model_copy(update={"reward_model": type(config.reward_model)(objective="bt")}), folder / cell.world / f"base_{cell.seed}")
    claim_run_dir(base.run_dir, base.config)
    for stage in (world_stage, sft_stage, preferences_stage):
        stage(base)
    return base.run_dir


def run_cell(cell: Cell, config: PipelineConfig, base_dir: Path, data_dir: Path) -> Row:
    """Train what the cell asks for, unless a run that was interrupted did already, and measure it. Raises what the stages raise."""
    counts = RunLayout(base_dir).stage_result("preferences")["preferences"]
    steps_per_epoch = counts["num_kept"]["train"] // config.reward_model.batch_size
    evaluated = config.model_copy(update={"reward_model": config.reward_model.model_copy(update={"evaluate_every_steps": steps_per_epoch})})
    run = Run(evaluated, base_dir.with_name(f"{cell.variant}_{cell.seed}"))
    share_stages(base_dir, run.run_dir, SHARED)
    claim_run_dir(run.run_dir, run.config)
    reward_model_stage(run)
    stages = ["reward_model"]
    if cell.part == "rloo":
        rloo_stage(run)
        write_summary(run.run_dir)
        stages, (figures, curves) = ["rloo"], rloo_figures(run.run_dir)
    else:
        figures, curves = reward_model_figures(run.run_dir, num_epochs=round(config.reward_model.num_epochs))
    started = time.monotonic()
    if (cell.part, cell.world) == ("reward_model", "rmb"):
        figures |= rm_bench_figures(run, data_dir)
    own_seconds = time.monotonic() - started + sum(float(RunLayout(run.run_dir).stage_result(stage)["seconds"]) for stage in stages)
    return Row(key_of(cell, config), cell.part, cell.world, cell.variant, cell.seed, own_seconds, figures, curves, _about(run, counts))


def rm_bench_figures(run: Run, data_dir: Path) -> dict[str, float]:
    """RM-Bench's figures of the trained model: what its positions do not hold is left out, and counted in rm_bench/num_refused."""
    if not (data_dir / RM_BENCH).is_file():
        raise DataError(f"There is no {RM_BENCH} in {data_dir}. Name the folder of real preference data: DATA=…")
    what = Evaluation("rm_bench", SUITES["rm_bench"], [str(data_dir / RM_BENCH)], run.run_dir / "rm_bench", leave_out_refused=True)
    source = CheckpointSource(RunLayout(run.run_dir).reward_model_checkpoint, device="cpu", max_length_tokens=None, max_tokens_per_batch=8192)
    result = evaluate(what, read_data(what), source)
    counts = {"rm_bench/num_refused": float(result["num_refused"]), "rm_bench/num_cases": float(result["num_cases"])}
    return counts | {f"rm_bench/{name}": own["value"] for name, own in result["figures"].items() if own["value"] is not None}


def _about(run: Run, counts: Mapping[str, Any]) -> dict[str, str | int | float]:
    training = verify_checkpoint(RunLayout(run.run_dir).reward_model_checkpoint, "reward_model").training
    return {
        "num_training_pairs": counts["num_kept"]["train"],
        "num_training_pairs_dropped": sum(counts["num_dropped"]["train"].values()),
        "num_steps": training["num_steps"],
        **{name: version(name) for name in LIBRARIES},
    }
