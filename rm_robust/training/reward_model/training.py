"""Reward-model training on preference pairs. `train_reward_model` runs on every worker of a group."""

from pathlib import Path

import torch

from rm_robust.cluster.workers import is_reclaimed, worker_device
from rm_robust.config.objectives import Objective
from rm_robust.config.run import PipelineConfig
from rm_robust.config.training import RewardModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import PreferencePair
from rm_robust.data.token_files import TokenisedGroup, read_token_groups
from rm_robust.errors import DataError
from rm_robust.models.compute import flops_per_token, prepare_for_training
from rm_robust.models.export import commit_reward_model
from rm_robust.models.lora import add_adapters
from rm_robust.models.own_forward import check_reward_model
from rm_robust.models.packing import choose_layout
from rm_robust.models.reward_model import PackedRewardModel, new_reward_model, score_head
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.trackers import open_trackers
from rm_robust.training.engines import create_engine
from rm_robust.training.loop import BestStep, LoopSettings, batch_indices, rank_share, run_loop, steps_in
from rm_robust.training.reward_model.held_out import held_out_metrics
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from rm_robust.training.state import load_best, load_state, save_state

LOGGED = (
    "reward_model/loss",
    "reward_model/accuracy",
    "reward_model/batch_mean_score",
    "reward_model/penalty",
    "reward_model/in_domain_accuracy",
)


def train_reward_model(config: PipelineConfig, run_dir: Path) -> dict[str, float]:
    """Train on top of the SFT model to checkpoints/reward_model, resuming from the last committed state.

    Returns the number of steps.
    """
    layout, settings = RunLayout(run_dir), config.reward_model
    device = worker_device()
    base_dir = str(run_files.fetch(Path(layout.reward_model_base_dir(config))))
    chat = ChatFormat.load(base_dir)
    pairs = training_pairs(read_token_groups(layout.preference_tokens / "scenario=train"), settings)
    held_out = {
        name: read_token_groups(layout.preference_tokens / f"scenario={name}")[: settings.num_evaluation_pairs]
        for name in settings.evaluation_sets
    }
    torch.manual_seed(config.seed)
    model = new_reward_model(base_dir, pad_id=chat.pad_id, seed=config.seed)
    if settings.lora:
        add_adapters(model, settings.lora)
    packed = PackedRewardModel(model, choose_layout(model.config, device), settings.compute)
    check_reward_model(packed, chat)
    prepare_for_training(model, settings.compute)
    engine = create_engine(packed, strategy=settings.strategy, optimizer=settings.optimizer, device=device)
    num_steps = steps_in(len(pairs), settings.batch_size, settings.num_epochs)
    step_settings = StepSettings(settings, settings.max_tokens_per_micro_batch, chat.pad_id)
    first_step = load_state(engine, layout.reward_model_state)

    def train_step(step: int) -> dict[str, float]:
        rows = batch_indices(step, num_rows=len(pairs), batch_size=settings.batch_size, seed=config.seed)
        rank_pairs = [pairs[i] for i in rank_share(rows, rank=engine.rank, world_size=engine.world_size)]
        metrics = reward_model_step(engine, rank_pairs, step_settings, model=packed, device=device)
        return metrics | {"reward_model/head_norm": float(engine.full_parameter(score_head(model).weight).norm())}

    def evaluate(step: int) -> dict[str, float]:
        if step % settings.evaluate_every_steps and step != num_steps:
            return {}
        metrics: dict[str, float] = {}
        for name, rows in held_out.items():
            figures = held_out_metrics(engine, packed, rows, step_settings, device=device)
            metrics |= {f"reward_model/{name}_{key}": value for key, value in figures.items()}
        return metrics

    best = (
        BestStep(f"reward_model/{settings.best_metric}", settings.early_stopping_evaluations)
        if settings.best_metric
        else None
    )
    workers = settings.workers
    num_done = run_loop(
        engine,
        LoopSettings(
            "reward_model",
            num_steps,
            settings.optimizer,
            settings.checkpoint_every_steps,
            LOGGED,
            flops_per_token=flops_per_token(model),
            peak_flops=workers.peak_flops_per_worker and workers.peak_flops_per_worker * engine.world_size,
        ),
        first_step=first_step,
        run_dir=run_dir,
        train_step=train_step,
        evaluate=evaluate,
        commit=lambda step: save_state(
            engine,
            layout.reward_model_state,
            step,
            num_kept=settings.num_kept_checkpoints,
            best_step=None if best is None else best.step,
        ),
        best=best,
        is_reclaimed=is_reclaimed,
        trackers=lambda: open_trackers(config, run_dir, "reward_model"),
    )
    if best is not None and best.step is not None:
        load_best(engine, layout.reward_model_state, best.step)
        num_done = best.step
    calibration = {}
    if held_out:
        figures = held_out_metrics(engine, packed, next(iter(held_out.values())), step_settings, device=device)
        calibration = {key: figures[key] for key in ("score_mean", "score_std")}
    weights = engine.full_state_dict()
    if engine.rank == 0:
        state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        training: dict[str, str | int | float] = {
            "objective": str(settings.objective),
            "num_steps": num_done,
            "seed": config.seed,
            **calibration,
        }
        commit_reward_model(
            layout.reward_model_checkpoint, model, state, chat, base_dir=base_dir, lora=settings.lora, training=training
        )
    return {"num_steps": num_done}


def training_pairs(rows: list[TokenisedGroup], config: RewardModelConfig) -> list[PreferencePair]:
    """Return the pairs with the margins that the objective reads.

    Raises DataError when the objective reads the margins of the data and a row has none.
    """
    reads_column = config.objective is Objective.MARGIN and config.margin is None
    without = [row.group_id for row in rows if row.margin is None]
    if reads_column and without:
        raise DataError(
            f'objective = "margin" takes each pair\'s own margin, and {len(without)} of {len(rows)} training pairs '
            f"have none (first: {without[0]}). "
            "Give the column `margin`, or one margin for all with reward_model.margin."
        )
    return [
        PreferencePair(
            row.tokens, margin=(row.margin or 0.0) if reads_column else (config.margin or 0.0), weight=row.weight
        )
        for row in rows
    ]
