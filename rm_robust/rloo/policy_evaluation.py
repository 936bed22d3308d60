"""The policy against the SFT policy, on prompts that no step trains on, by the gold judge."""

import json
from collections.abc import Callable
from statistics import fmean

from rm_robust.chat import ChatFormat
from rm_robust.config_rloo import RlooConfig
from rm_robust.errors import RolloutError
from rm_robust.records import GenerationRequest, PromptCompletions
from rm_robust.rloo.actors import RlooActors
from rm_robust.rloo.policy_comparison import JudgedCompletions, compare_policies
from rm_robust.rloo.rollout import generation_requests, score_input
from rm_robust.run_layout import RunLayout
from rm_robust.score_contract import Scorer
from rm_robust.token_files import TokenisedGroup
from rm_robust.tracking import write_json_atomic

BASELINE_STEP = -1
"""Of the requests' seeds: both policies answer with the same ones, and no step has them."""


class PolicyEvaluation:
    """One completion a prompt. The SFT policy is version 0: its answers are judged once, before the first step, and kept for resumed runs."""

    def __init__(
        self,
        layout: RunLayout,
        prompts: list[TokenisedGroup],
        settings: RlooConfig,
        *,
        chat: ChatFormat,
        seed: int,
        gold: Scorer,
        sample: Callable[[list[GenerationRequest]], list[PromptCompletions]],
        actors: RlooActors,
    ) -> None:
        """`sample` answers with completions of the current policy."""
        self._path, self._prompts, self._chat, self._gold, self._sample, self._actors = layout.rloo_baseline, prompts, chat, gold, sample, actors
        self._requests = generation_requests(prompts, settings, step=BASELINE_STEP, seed=seed, stop_token_id=chat.end_of_turn_id, num_completions=1)

    def sample_baseline(self, version: int) -> None:
        """Judge the SFT policy's answers, unless that was done. Raises RolloutError when it cannot be done any more."""
        if not self._prompts or self._path.exists():
            return
        if version > 0:
            raise RolloutError(f"{self._path} is missing, and the policy is at step {version} already. Restore it, or start the RLOO stage anew.")
        judged, _ = self._judged()
        write_json_atomic(self._path, {"gold_scores": judged.gold_scores, "num_tokens": judged.num_tokens})

    def metrics(self) -> dict[str, float]:
        """rloo/eval/…, of the current policy."""
        judged, completions = self._judged()
        baseline = json.loads(self._path.read_text())
        comparison = compare_policies(judged, JudgedCompletions(baseline["gold_scores"], baseline["num_tokens"]))
        kl = [value for measurement in self._actors.measure(completions, keep_graph=False) for value in measurement.kl]
        return comparison.metrics() | {"rloo/eval/kl_mean": fmean(kl)}

    def _judged(self) -> tuple[JudgedCompletions, list[PromptCompletions]]:
        completions = self._sample(self._requests)
        inputs = [score_input(prompt, answer, self._chat) for prompt, answer in zip(self._prompts, completions, strict=True)]
        lengths = [[len(c.token_ids) for c in answer.completions] for answer in completions]
        return JudgedCompletions(self._gold.score(inputs).scores, lengths), completions
