"""Compare the policy with the SFT policy by gold score, on prompts that no step trains on.

The results are the win rate, and the win rate at equal length. Shapes: Q prompts that both policies answered, M pairs
of completions (each completion of one policy with each of the other's, prompt by prompt).
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from rm_robust.config.rloo import RlooConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.token_files import TokenisedGroup
from rm_robust.errors import RolloutError
from rm_robust.rloo.actors import RlooActors
from rm_robust.rloo.reward_requests import PromptRow, ask_in_parts, ask_scorer, completions_of, too_many_failed
from rm_robust.rloo.rollout import GenerationRequest, PromptCompletions, generation_requests, score_input
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.scoring.contract import Scorer

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
RIDGE = 0.01
"""Ridge penalty on both regression coefficients; the pairs of a prompt have a total weight of 1.

It keeps the coefficients finite when the data are separable (every longer completion wins).
"""
BASELINE_STEP = -1
"""The step number in the seeds of evaluation requests: both policies get the same seeds, which no training step has."""


@dataclass(frozen=True)
class JudgedCompletions:
    """Gold scores and lengths (tokens) of one policy's completions, by prompt. Both leave out failed scores."""

    gold_scores: list[list[float]]
    num_tokens: list[list[int]]


@dataclass(frozen=True)
class PolicyComparison:
    """The comparison of the policy with the SFT policy; every prompt counts the same."""

    gold_mean: float
    sft_gold_mean: float
    win_rate: float
    """Fraction of pairs in which the policy's completion has the higher gold score; a tie is half a win."""
    win_rate_se: float
    """Standard error of the win rate over prompts."""
    length_controlled_win_rate: float
    completion_tokens_mean: float
    sft_completion_tokens_mean: float
    num_prompts: int
    """Number of prompts compared; a prompt is left out unless both policies have a scored completion of it."""

    def metrics(self) -> dict[str, float]:
        """Return the fields under their names in metrics.jsonl: rloo/eval/<field>."""
        return {f"rloo/eval/{name}": value for name, value in asdict(self).items()}


def compare_policies(policy: JudgedCompletions, sft: JudgedCompletions) -> PolicyComparison:
    """Compare two policies on the same prompts, given in the same order.

    The policies may have different numbers of completions per prompt. Raises RolloutError when fewer than 2 prompts
    have a scored completion of both: there would be no standard error.
    """
    num_given = len(policy.gold_scores)
    assert num_given == len(policy.num_tokens) == len(sft.gold_scores) == len(sft.num_tokens), (
        "both policies answer the same prompts"
    )
    kept = [q for q in range(num_given) if policy.gold_scores[q] and sft.gold_scores[q]]
    if len(kept) < 2:
        raise RolloutError(
            f"Policies can be compared on 2 prompts or more, but of {num_given} only {len(kept)} have gold scores for "
            "both. Look at the gold judge's errors, or raise rloo.evaluation.num_prompts."
        )
    score_differences = [_all_differences(policy.gold_scores[q], sft.gold_scores[q]) for q in kept]
    length_differences = [_all_differences(policy.num_tokens[q], sft.num_tokens[q]) for q in kept]
    preferences = [0.5 * (np.sign(differences) + 1) for differences in score_differences]
    weights_M = np.concatenate([np.full(len(pairs), 1 / len(pairs)) for pairs in preferences])
    by_prompt_Q = np.array([pairs.mean() for pairs in preferences])
    return PolicyComparison(
        gold_mean=fmean(fmean(policy.gold_scores[q]) for q in kept),
        sft_gold_mean=fmean(fmean(sft.gold_scores[q]) for q in kept),
        win_rate=float(by_prompt_Q.mean()),
        win_rate_se=float(by_prompt_Q.std(ddof=1) / np.sqrt(len(kept))),
        length_controlled_win_rate=length_controlled_win_rate(
            np.concatenate(preferences), np.concatenate(length_differences), weights_M
        ),
        completion_tokens_mean=fmean(fmean(policy.num_tokens[q]) for q in kept),
        sft_completion_tokens_mean=fmean(fmean(sft.num_tokens[q]) for q in kept),
        num_prompts=len(kept),
    )


def length_controlled_win_rate(preferences_M: Floats, length_differences_M: Floats, weights_M: Floats) -> float:
    """Estimate the win rate at equal length. Dubois et al. 2024 (AlpacaEval 2), section 3.

    A logistic regression predicts the preference (1 win, 0.5 tie, 0 loss) from a constant and tanh(length difference /
    its standard deviation); the result is its prediction at difference 0. Two things differ from the source: there is
    no term for the difficulty of a prompt, because that is estimated from the answers of many models and there are only
    two policies here; and a ridge penalty replaces the penalty towards the baseline. Where one policy is longer in
    every pair, length and quality cannot be told apart, and the ridge gives half of the log-odds to each.
    """
    mean_difference = np.average(length_differences_M, weights=weights_M)
    spread = np.sqrt(np.average((length_differences_M - mean_difference) ** 2, weights=weights_M))
    length_M = np.tanh(length_differences_M / spread) if spread > 0 else np.sign(length_differences_M)
    design_M2 = np.stack([np.ones_like(length_M), length_M], axis=1)
    shares_M, ridge = weights_M / weights_M.sum(), RIDGE / weights_M.sum()

    def penalised_loss(coefficients: Floats) -> tuple[float, Floats]:
        log_odds_M = design_M2 @ coefficients
        losses_M = np.logaddexp(0, log_odds_M) - preferences_M * log_odds_M
        gradient = design_M2.T @ (shares_M * (expit(log_odds_M) - preferences_M)) + ridge * coefficients
        return float(shares_M @ losses_M + ridge / 2 * coefficients @ coefficients), gradient

    def hessian(coefficients: Floats) -> Floats:
        wins_M = expit(design_M2 @ coefficients)
        curvature: Floats = (design_M2 * (shares_M * wins_M * (1 - wins_M))[:, None]).T @ design_M2 + ridge * np.eye(2)
        return curvature

    fit = minimize(penalised_loss, np.zeros(2), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-7})
    assert fit.success, f"a strictly convex fit did not converge: {fit.message}"
    return float(expit(fit.x[0]))


def _all_differences(policy_values: list[float] | list[int], sft_values: list[float] | list[int]) -> Floats:
    """Return policy_values[i] - sft_values[j] for every i and j of one prompt, as a flat array."""
    differences: Floats = np.subtract.outer(
        np.asarray(policy_values, dtype=np.float64), np.asarray(sft_values, dtype=np.float64)
    ).ravel()
    return differences


class PolicyEvaluation:
    """Compares the current policy with the SFT policy on one completion per prompt.

    The SFT policy is version 0. Its answers are judged once, before the first step, and kept on disk for resumed runs.
    """

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
        """Make the requests for `prompts`; `sample` returns completions of the current policy."""
        self._path, self._prompts, self._chat, self._gold, self._sample, self._actors = (
            layout.rloo_baseline,
            prompts,
            chat,
            gold,
            sample,
            actors,
        )
        self._max_failed_fraction = settings.max_failed_score_fraction
        self._requests = generation_requests(
            prompts, settings, step=BASELINE_STEP, seed=seed, stop_token_id=chat.end_of_turn_id, num_completions=1
        )

    def sample_baseline(self, version: int) -> None:
        """Sample and judge the SFT policy's answers, unless their scores are on disk.

        Raises RolloutError when they are not, although training has begun: the policy is no longer the SFT policy.
        """
        if not self._prompts or self._path.exists():
            return
        if version > 0:
            raise RolloutError(
                f"{self._path} is missing, and the policy is already at step {version}. Restore the file, or start the "
                "RLOO stage again from its beginning."
            )
        judged, _, _ = self._judged()
        run_files.write_json(self._path, {"gold_scores": judged.gold_scores, "num_tokens": judged.num_tokens})

    def metrics(self) -> dict[str, float]:
        """Return the rloo/eval/… metrics of the current policy."""
        judged, completions, num_failed = self._judged()
        baseline = json.loads(self._path.read_text())
        comparison = compare_policies(judged, JudgedCompletions(baseline["gold_scores"], baseline["num_tokens"]))
        kl = [value for measurement in self._actors.measure(completions, keep_graph=False) for value in measurement.kl]
        return comparison.metrics() | {"rloo/eval/kl_mean": fmean(kl), "rloo/eval/num_failed_gold_scores": num_failed}

    def _judged(self) -> tuple[JudgedCompletions, list[PromptCompletions], int]:
        """Sample one completion of each prompt and judge it; return the judgement, the completions, and the failures.

        Raises RolloutError when more than max_failed_score_fraction of them have no gold score.
        """
        completions = self._sample(self._requests)
        asked = [
            at
            for index, (prompt, answer) in enumerate(zip(self._prompts, completions, strict=True))
            for at in completions_of(index, score_input(prompt, answer, self._chat), PromptRow(prompt.group_id))
        ]
        scores: list[list[float]] = [[] for _ in completions]
        lengths: list[list[int]] = [[] for _ in completions]
        reasons: list[str] = []
        for part, answer in ask_in_parts(partial(ask_scorer, self._gold), asked):
            for at, score in zip(part, answer.scores, strict=True):
                if isinstance(score, float):
                    scores[at.index].append(score)
                    lengths[at.index].append(len(completions[at.index].completions[at.k].token_ids))
                else:
                    reasons.append(str(score))
        self._refuse_too_many(reasons, len(asked))
        return JudgedCompletions(scores, lengths), completions, len(reasons)

    def _refuse_too_many(self, reasons: list[str], num_asked: int) -> None:
        if not reasons:
            return
        logger.warning(
            "%d of %d gold scores of the evaluation failed and are left out; the last one: %s",
            *(len(reasons), num_asked, reasons[-1]),
        )
        if len(reasons) / num_asked > self._max_failed_fraction:
            raise too_many_failed(
                "gold", len(reasons), of=num_asked, max_fraction=self._max_failed_fraction, reason=reasons[-1]
            )
