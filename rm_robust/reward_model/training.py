"""Reward-model training on preference pairs. `train_reward_model` runs on every worker of a group."""

from pathlib import Path

import torch

from rm_robust.chat import ChatFormat
from rm_robust.checkpoint import commit_checkpoint
from rm_robust.config import PipelineConfig
from rm_robust.packing import choose_layout, fill_bins, group_length, lay_out
from rm_robust.records import TokenGroup
from rm_robust.reward_model.model import PackedRewardModel, new_reward_model, score_head
from rm_robust.reward_model.step import StepSettings, gather_rows, reward_model_step
from rm_robust.run_layout import RunLayout
from rm_robust.token_files import read_token_groups
from rm_robust.train_engine import TrainEngine, create_engine, largest_over_ranks
from rm_robust.training_loop import LoopSettings, batch_indices, rank_share, run_loop, steps_in
from rm_robust.training_state import load_state, save_state
from rm_robust.worker_group import worker_device

LOGGED = ("reward_model/loss", "reward_model/accuracy", "reward_model/batch_mean_score", "reward_model/bsr_term", "reward_model/eval_accuracy")


def train_reward_model(config: PipelineConfig, run_dir: Path) -> dict[str, float]:
    """Train on top of the SFT model to checkpoints/reward_model, resuming from the last committed state. Returns the number of steps."""
    layout, settings = RunLayout(run_dir), config.reward_model
    device = worker_device()
    base_dir = settings.base_path or layout.sft_model_dir(config)
    chat = ChatFormat.load(base_dir)
    pairs = [row.tokens for row in read_token_groups(layout.preference_tokens / "scenario=train")]
    held_out = [row.tokens for row in read_token_groups(layout.preference_tokens / "scenario=in_domain")][: settings.num_evaluation_pairs]
    torch.manual_seed(config.seed)
    model = new_reward_model(base_dir, pad_id=chat.pad_id, seed=config.seed)
    packed = PackedRewardModel(model, choose_layout(model.config, device))
    engine = create_engine(packed, strategy=settings.strategy, optimizer=settings.optimizer, device=device)
    num_steps = steps_in(len(pairs), settings.batch_size, settings.num_epochs)
    step_settings = StepSettings(settings.objective, settings.bsr_coefficient, settings.bsr_scale, settings.max_tokens_per_micro_batch, chat.pad_id)
    first_step = load_state(engine, layout.reward_model_state)

    def train_step(step: int) -> dict[str, float]:
        rows = batch_indices(step, num_rows=len(pairs), batch_size=settings.batch_size, seed=config.seed)
        mine = [pairs[i] for i in rank_share(rows, rank=engine.rank, world_size=engine.world_size)]
        metrics = reward_model_step(engine, mine, step_settings, model=packed, device=device)
        return metrics | {"reward_model/head_norm": float(engine.full_parameter(score_head(model).weight).norm())}

    def evaluate(step: int) -> dict[str, float]:
        if step % settings.evaluate_every_steps and step != num_steps:
            return {}
        return {"reward_model/eval_accuracy": held_out_accuracy(engine, packed, held_out, step_settings, device=device)}

    run_loop(
        engine,
        LoopSettings("reward_model", num_steps, settings.optimizer, settings.checkpoint_every_steps, LOGGED),
        first_step=first_step,
        run_dir=run_dir,
        train_step=train_step,
        evaluate=evaluate,
        commit=lambda step: save_state(engine, layout.reward_model_state, step),
    )
    weights = engine.full_state_dict()
    if engine.rank == 0:
        state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}

        def write(folder: Path) -> None:
            model.save_pretrained(str(folder), state_dict=state)
            chat.tokenizer.save_pretrained(str(folder))

        training: dict[str, str | int | float] = {"objective": str(settings.objective), "num_steps": num_steps, "seed": config.seed}
        commit_checkpoint(layout.reward_model_checkpoint, write, kind="reward_model", template_sha256=chat.template_sha256, training=training)
    return {"num_steps": num_steps}


def held_out_accuracy(engine: TrainEngine, packed: PackedRewardModel, pairs: list[TokenGroup], settings: StepSettings, *, device: torch.device) -> float:
    """Fraction of held-out pairs with chosen strictly above rejected; each rank scores its share."""
    own = [pairs[i] for i in rank_share(list(range(len(pairs))), rank=engine.rank, world_size=engine.world_size)]
    bins = fill_bins([group_length(pair) for pair in own], settings.max_tokens_per_micro_batch)
    correct: list[float] = []
    for number in range(largest_over_ranks(len(bins), device)):
        members = [own[i] for i in bins[number]] if number < len(bins) else pairs[:1]  # an idle rank takes part in the forward pass
        batch = lay_out(members, packed.layout, pad_id=settings.pad_id).to(device)
        with torch.no_grad():
            chosen_B, rejected_B = engine.forward(batch).scores_N.view(-1, 2).unbind(1)
        if number < len(bins):
            correct += (chosen_B > rejected_B).float().tolist()
    all_correct, _ = gather_rows(torch.tensor(correct, device=device))
    return float(all_correct.mean())
