"""Run TRL 1.16's RLOOTrainer in the RLOO bench, sampling with transformers.

Settings that `trl_settings` does not name have TRL's defaults. Each generation has one optimiser step: these are TRL's
defaults for steps_per_generation and num_iterations with a batch of all P * K completions. The prompts come in the same
order as ours. The step before the first round is not timed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from research.bench.rloo_ours import Work
from research.bench.rloo_policies import SEED, Policy
from research.bench.rloo_reward import reward_of
from research.bench.rloo_turns import Round, Turns
from rm_robust.data.token_files import TokenisedGroup, read_token_groups
from rm_robust.rloo.rollout import prompts_of_step

NUM_STEPS = 200
"""The steps of the run, more than all rounds have together."""


@dataclass(frozen=True)
class TrlRun:
    """One TRL run that takes part. TRL's own default is bfloat16 autocast with gradient checkpointing."""

    folder: Path
    policy: Policy
    work: Work
    num_threads: int
    bfloat16: bool = False


def trl_settings(run: TrlRun) -> dict[str, Any]:
    """Return the arguments of RLOOConfig."""
    return {
        "output_dir": str(run.folder / "trl"),
        "use_cpu": True,
        "bf16": run.bfloat16,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": run.work.num_completions,
        "num_generations": run.work.num_completions_per_prompt,
        "max_completion_length": run.work.max_new_tokens,
        "max_steps": NUM_STEPS,
        "shuffle_dataset": False,  # the prompts already have our order
        "learning_rate": run.work.learning_rate,
        "beta": run.work.kl_coefficient,
        "epsilon": run.work.clip_range,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,  # as in rm_robust
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train_with_trl(turns: Turns, run: TrlRun) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    torch.set_num_threads(run.num_threads)
    tokenizer = AutoTokenizer.from_pretrained(run.policy.model_dir, padding_side="left")
    prompts = _prompts(run)
    _require_same_ids(tokenizer, prompts[: run.work.num_prompts])
    clock = _Clock(turns)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.step_begins()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    def reward(completions: list[list[dict[str, str]]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.completion_tokens.append(fmean(map(len, completion_ids)))
        return [reward_of(completion[0]["content"]) for completion in completions]

    trainer = RLOOTrainer(
        model=str(run.policy.model_dir),
        reward_funcs=reward,
        args=RLOOConfig(**trl_settings(run)),
        train_dataset=Dataset.from_dict({"prompt": [prompt.prompt for prompt in prompts]}),
        processing_class=tokenizer,
        callbacks=[TakeTurns()],
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.model.dtype == torch.float32
    assert trainer.args.steps_per_generation == trainer.num_iterations == 1
    assert torch.get_num_threads() == run.num_threads, "TRL changed the number of threads"
    trainer.train()


class _Clock:
    """Wait before the first step of every round, and report after its last step. The very first step does not count."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._num_left = self._num_steps = 0
        self._done: Round | None = None
        self._is_warm = False
        self._started_s = 0.0
        self.completion_tokens: list[float] = []
        """The mean completion length of each step since the round began."""

    def step_begins(self) -> None:
        if self._is_warm and not self._num_left:
            self._num_left = self._num_steps = self._turns.next(self._done)
            self.completion_tokens = []
            self._started_s = time.perf_counter()

    def step_ended(self) -> None:
        self._is_warm = True
        if self._num_left:
            self._num_left -= 1
            if not self._num_left:
                self._done = Round(
                    (time.perf_counter() - self._started_s) / self._num_steps, fmean(self.completion_tokens)
                )


def _prompts(run: TrlRun) -> list[TokenisedGroup]:
    """Return the prompts of NUM_STEPS steps, in their order."""
    groups = read_token_groups(run.policy.prompts_dir / "scenario=rloo_prompts")
    return [
        prompt
        for step in range(NUM_STEPS)
        for prompt in prompts_of_step(groups, step, num_prompts=run.work.num_prompts, seed=SEED)
    ]


def _require_same_ids(tokenizer: Any, prompts: list[TokenisedGroup]) -> None:
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert ids == prompt.tokens.prompt_ids, f"TRL would sample from {ids}, we from {prompt.tokens.prompt_ids}"
