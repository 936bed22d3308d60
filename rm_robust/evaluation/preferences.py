"""The suite preferences: any file of pairs or ranked completions (JudgeBench, LLMBar, RMB, a run's own scenarios).

    accuracy            share of pairs with chosen strictly above rejected; a tie is wrong
    accuracy_longer_chosen, accuracy_shorter_chosen
                        accuracy on the pairs whose chosen completion is the longer or the shorter one (in characters)
    longer_wins         share of pairs of different length whose longer completion has the higher score, right or wrong;
                        0.5 shows no bias only where the longer completion is right in half of these pairs
    brier               mean of (1 - sigma(margin))^2 over pairs, the Brier score of the Bradley-Terry probability;
                        0.25 for equal scores
    calibration_error   expected calibration error: pairs in NUM_BINS bins of confidence sigma(|margin|), 0.5 to 1;
                        sum over bins of their share times |accuracy - mean confidence| (Guo et al. 2017, Eq. 3). Noise
                        raises it, and a resample has more noise, so it gets no interval
    kendall_tau         mean over prompts of tau-b on ranked completions; a prompt whose scores are all equal counts as
                        0, and one whose gold scores are all equal is left out
    best_of_N           mean gold score of the completion that the model scores highest among N of a prompt's K
                        completions, drawn without replacement: the expectation over all draws (Nakano et al. 2021,
                        section 3.2); N = 1, 2, 4, … up to K
    tied_scores         share of prompts whose completions all have the same score

Every figure is reported for each subset, and for all prompts together as `all`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rm_robust.data.rows import RowKind, parse_row, resolved_kind
from rm_robust.errors import DataError
from rm_robust.evaluation.bootstrap import Array, Means, Stratum
from rm_robust.evaluation.cases import Case, CaseFacts, strata_by_subset, stratum
from rm_robust.training.reward_model.metrics import kendall_tau_b

ALL = "all"
UNNAMED = "unnamed"
"""The subset of rows that name no subset."""
SUBSET_COLUMNS = ("subset", "source")
"""The columns that can name a row's subset, unless the user names a column. The first one that the row has is used."""
NUM_BINS = 10
GAPS = [f"calibration_gap_{index}" for index in range(NUM_BINS)]
"""One column per bin of confidence: a pair has accuracy minus confidence in its own bin, and 0 in the others.

The mean of a column is therefore the bin's share of the pairs times the bin's gap.
"""
BIASED_BY_RESAMPLING = frozenset({"calibration_error"})
"""Figures that get no interval, because resampling alone raises them."""


def parse(row: Mapping[str, Any], *, by: str | None) -> Case:
    """Return the case of a row (see rm_robust.data.rows).

    The column `by` names the subset of the row; with None, the first of SUBSET_COLUMNS that the row has does. Raises
    DataError with the reason when the row is neither a pair nor a ranking.
    """
    if by is not None and row.get(by) is None:
        raise DataError(f"there is no {by!r}, which --by names; the columns are {', '.join(sorted(row))}")
    group = parse_row(row, None)
    columns = SUBSET_COLUMNS if by is None else (by,)
    subset = next((str(row[column]) for column in columns if row.get(column) is not None), UNNAMED)
    if subset == ALL:
        raise DataError(f"a subset may not be called {ALL!r}, which stands for all rows")
    return Case(
        group.prompt, group.completions, group.gold_scores, subset, is_pair=resolved_kind(row, None) is RowKind.PAIR
    )


def strata(cases: Sequence[CaseFacts], scores: Sequence[Sequence[float]]) -> list[Stratum]:
    """Return a stratum of all rows, and one for each subset where any row names one.

    A stratum has a column for every figure that some case of it has.
    """
    rows = [
        {"tied_scores": float(len(set(case_scores)) == 1)}
        | (_pair_values(case, case_scores) if case.is_pair else _ranking_values(case, case_scores))
        for case, case_scores in zip(cases, scores, strict=True)
    ]
    everything = [stratum(ALL, cases, rows)]
    return everything if {case.subset for case in cases} == {UNNAMED} else everything + strata_by_subset(cases, rows)


def combine(means: Means) -> dict[str, Array]:
    """Return the figures `<subset>.<figure>` and `all.<figure>`."""
    figures: dict[str, Array] = {}
    for subset, columns in means.items():
        figures |= {f"{subset}.{name}": mean_B for name, mean_B in columns.items() if name not in GAPS}
        if GAPS[0] in columns:
            figures[f"{subset}.calibration_error"] = np.abs(np.stack([columns[name] for name in GAPS])).sum(axis=0)
    return figures


def reliability(cases: Sequence[CaseFacts], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the reliability curve of the pairs (Guo et al. 2017, section 2).

    Every bin of confidence that is not empty has its number of pairs, mean confidence and accuracy. The bins are those
    of `calibration_error`.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for case, case_scores in zip(cases, scores, strict=True):
        if case.is_pair:
            chosen, rejected = case_scores
            confidence = _sigmoid(abs(chosen - rejected))
            bins.setdefault(_bin_of(confidence), []).append((confidence, float(chosen > rejected)))
    rows = [
        {
            "num_pairs": len(members),
            "mean_confidence": _mean([confidence for confidence, _ in members]),
            "accuracy": _mean([is_right for _, is_right in members]),
        }
        for _, members in sorted(bins.items())
    ]
    return {"reliability": rows} if rows else {}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bin_of(confidence: float) -> int:
    return min(NUM_BINS - 1, int((confidence - 0.5) * 2 * NUM_BINS))


def _pair_values(case: CaseFacts, scores: Sequence[float]) -> dict[str, float]:
    margin = scores[0] - scores[1]
    is_right = float(margin > 0)
    confidence = _sigmoid(abs(margin))
    outcomes = {"accuracy": is_right, "brier": (1 - _sigmoid(margin)) ** 2} | dict.fromkeys(GAPS, 0.0)
    outcomes[GAPS[_bin_of(confidence)]] = is_right - confidence
    num_more_characters = case.num_characters[0] - case.num_characters[1]
    if num_more_characters:
        outcomes["accuracy_longer_chosen" if num_more_characters > 0 else "accuracy_shorter_chosen"] = is_right
        outcomes["longer_wins"] = float(margin * num_more_characters > 0)
    return outcomes


def _ranking_values(case: CaseFacts, scores: Sequence[float]) -> dict[str, float]:
    outcomes = (
        {} if len(set(case.gold_scores)) == 1 else {"kendall_tau": kendall_tau_b(list(scores), list(case.gold_scores))}
    )
    return outcomes | {f"best_of_{n}": best_of_n(scores, case.gold_scores, n) for n in _powers_of_two(len(scores))}


def best_of_n(scores: Sequence[float], gold_scores: Sequence[float], n: int) -> float:
    """Return the expected gold score of the best scored of n completions drawn without replacement.

    Source: Nakano et al. 2021 (WebGPT), section 3.2. When K completions are sorted by score, the one at rank i, counted
    from 0 at the lowest score, is the best of C(i, n - 1) of the C(K, n) draws. Completions with equal scores share the
    draws of their ranks equally.
    """
    num_completions = len(scores)
    num_draws_won = [math.comb(rank, n - 1) for rank in range(num_completions)]
    expected, rank = 0.0, 0
    order = sorted(range(num_completions), key=lambda index: scores[index])
    while rank < num_completions:
        tied = [index for index in order[rank:] if scores[index] == scores[order[rank]]]
        num_draws = sum(num_draws_won[rank : rank + len(tied)])
        expected += num_draws * math.fsum(gold_scores[index] for index in tied) / len(tied)
        rank += len(tied)
    return expected / math.comb(num_completions, n)


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
