"""Any file of pairs or ranked completions: JudgeBench, LLMBar, RMB, a run's own scenarios.

    accuracy            share of pairs with chosen strictly above rejected; a tie is wrong
    accuracy_longer_chosen, accuracy_shorter_chosen       where length (characters) speaks for chosen, and where it speaks against it
    longer_wins         share of pairs of unlike length whose longer completion has the higher score, whatever is right: 0.5 shows no bias only where the
                        longer one is right in half of them
    brier               mean of (1 - sigma(margin))^2 over pairs, the Brier score of the Bradley-Terry probability; 0.25 for equal scores
    calibration_error   expected calibration error: pairs in NUM_BINS bins of confidence sigma(|margin|), 0.5 to 1; sum over bins of their share times
                        |accuracy - mean confidence| (Guo et al. 2017, Eq. 3). Noise raises it, and a resample has more: it gets no interval
    kendall_tau         mean over prompts of tau-b on ranked completions; constant scores count as 0, prompts of constant gold have none
    best_of_N           mean gold score of the completion that the model likes best among N drawn from a prompt's K without replacement, its expectation over
                        all draws (Nakano et al. 2021, section 3.2); N = 1, 2, 4, … up to K
    tied_scores         share of prompts on which the model tells no two completions apart

Each for every subset, and for all prompts together as `all`.
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
"""The subset of rows that name none."""
SUBSET_COLUMNS = ("subset", "source")
"""The first of them that a row has names its subset, unless the user names a column."""
NUM_BINS = 10
GAPS = [f"calibration_gap_{index}" for index in range(NUM_BINS)]
"""Of each pair and bin: accuracy minus confidence if it lies there, else 0. A bin's mean is its share times its gap."""
BIASED_BY_RESAMPLING = frozenset({"calibration_error"})


def parse(row: Mapping[str, Any], *, by: str | None) -> Case:
    """A row of rm_robust.data.rows. Raises DataError with the reason."""
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
    """All rows, and where there are several subsets each of them, with a column for whatever some case of it has."""
    rows = [
        {"tied_scores": float(len(set(own)) == 1)} | (_of_pair(case, own) if case.is_pair else _of_ranking(case, own))
        for case, own in zip(cases, scores, strict=True)
    ]
    everything = [stratum(ALL, cases, rows)]
    return everything if {case.subset for case in cases} == {UNNAMED} else everything + strata_by_subset(cases, rows)


def combine(means: Means) -> dict[str, Array]:
    """`<subset>.<figure>` and `all.<figure>`."""
    figures: dict[str, Array] = {}
    for subset, own in means.items():
        figures |= {f"{subset}.{name}": mean_B for name, mean_B in own.items() if name not in GAPS}
        if GAPS[0] in own:
            figures[f"{subset}.calibration_error"] = np.abs(np.stack([own[name] for name in GAPS])).sum(axis=0)
    return figures


def reliability(cases: Sequence[CaseFacts], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The reliability curve of the pairs: for each bin of confidence that has some, their number, mean confidence and accuracy (Guo et al. 2017, section 2).

    A pair counts in the bin that `calibration_error` counts it in.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for case, own in zip(cases, scores, strict=True):
        if case.is_pair:
            confidence = _sigmoid(abs(own[0] - own[1]))
            bins.setdefault(_bin_of(confidence), []).append((confidence, float(own[0] > own[1])))
    rows = [
        {
            "num_pairs": len(members),
            "mean_confidence": _mean([own for own, _ in members]),
            "accuracy": _mean([right for _, right in members]),
        }
        for _, members in sorted(bins.items())
    ]
    return {"reliability": rows} if rows else {}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bin_of(confidence: float) -> int:
    return min(NUM_BINS - 1, int((confidence - 0.5) * 2 * NUM_BINS))


def _of_pair(case: CaseFacts, scores: Sequence[float]) -> dict[str, float]:
    margin = scores[0] - scores[1]
    is_right = float(margin > 0)
    confidence = _sigmoid(abs(margin))
    outcomes = {"accuracy": is_right, "brier": (1 - _sigmoid(margin)) ** 2} | dict.fromkeys(GAPS, 0.0)
    outcomes[GAPS[_bin_of(confidence)]] = is_right - confidence
    longer = case.num_characters[0] - case.num_characters[1]
    if longer:
        outcomes["accuracy_longer_chosen" if longer > 0 else "accuracy_shorter_chosen"] = is_right
        outcomes["longer_wins"] = float(margin * longer > 0)
    return outcomes


def _of_ranking(case: CaseFacts, scores: Sequence[float]) -> dict[str, float]:
    outcomes = (
        {} if len(set(case.gold_scores)) == 1 else {"kendall_tau": kendall_tau_b(list(scores), list(case.gold_scores))}
    )
    return outcomes | {f"best_of_{n}": best_of_n(scores, case.gold_scores, n) for n in _powers_of_two(len(scores))}


def best_of_n(scores: Sequence[float], gold_scores: Sequence[float], n: int) -> float:
    """Expected gold score of the highest scored of n completions drawn without replacement; equal scores share. Nakano et al. 2021 (WebGPT), section 3.2.

    Of K completions in the order of their scores, the i-th from below (from 0) is the best of C(i, n - 1) of the C(K, n) draws.
    """
    num = len(scores)
    ways = [math.comb(rank, n - 1) for rank in range(num)]
    expected, at = 0.0, 0
    order = sorted(range(num), key=lambda index: scores[index])
    while at < num:
        tied = [index for index in order[at:] if scores[index] == scores[order[at]]]
        expected += sum(ways[at : at + len(tied)]) * math.fsum(gold_scores[index] for index in tied) / len(tied)
        at += len(tied)
    return expected / math.comb(num, n)


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
