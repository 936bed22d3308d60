"""Weighting, normalisation and clipping of scores, some of which failed. All expected values are worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.rloo.advantages import StepScores, normalised_scores, shaped_scores, weighted_scores
from rm_robust.rloo.metrics import score_metrics

NAN = math.nan


def same(actual: torch.Tensor, expected: list[list[float]]) -> bool:
    return torch.allclose(actual, torch.tensor(expected), equal_nan=True, atol=1e-6)


def test_the_score_is_the_weighted_sum_of_all_sources() -> None:
    weighted_PK = weighted_scores(
        {"proxy": [[1.0, 2.0], [3.0, 4.0]], "length": [[10.0, 20.0], [30.0, 40.0]]}, {"proxy": 2.0, "length": -0.1}
    )
    assert weighted_PK.dtype == torch.float32
    assert same(weighted_PK, [[1.0, 2.0], [3.0, 4.0]])


def test_a_proxy_of_weight_1_alone_is_the_reward() -> None:
    scores = [[0.1, -7.3], [1e-7, 55.5]]
    assert torch.equal(weighted_scores({"proxy": scores}, {"proxy": 1.0}), torch.tensor(scores))


def test_a_completion_without_a_score_from_one_weighted_source_has_no_reward() -> None:
    sources = {"proxy": [[1.0, NAN, 3.0, 4.0]], "rule": [[1.0, 1.0, NAN, 1.0]], "unused": [[NAN, 0.0, 0.0, 0.0]]}
    assert same(weighted_scores(sources, {"proxy": 1.0, "rule": 1.0, "unused": 0.0}), [[2.0, NAN, NAN, 5.0]])


def test_normalised_scores_have_mean_0_and_deviation_1_over_the_known_scores() -> None:
    """The known scores 1, 3, 5, 7 have mean 4 and population deviation sqrt(5)."""
    normalised_PK = normalised_scores(torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, 7.0]]))
    r = 5**0.5
    assert same(normalised_PK, [[-3 / r, -1 / r, NAN], [1 / r, NAN, 3 / r]])


@pytest.mark.parametrize("value", [0.1, -3e9, 1e-30])
def test_equal_scores_become_0_though_their_mean_is_not_exact(value: float) -> None:
    assert same(normalised_scores(torch.tensor([[value] * 7 + [NAN]])), [[0.0] * 7 + [NAN]])


def test_scores_that_all_failed_stay_nan() -> None:
    assert normalised_scores(torch.full((2, 2), NAN)).isnan().all()


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12), st.floats(0.5, 20), st.floats(-50, 50))
def test_scaling_and_shifting_the_scores_does_not_change_the_normalised_ones(
    scores: list[float], scale: float, shift: float
) -> None:
    scores_PK = torch.tensor([scores], dtype=torch.float64)
    if float(scores_PK.max() - scores_PK.min()) > 1e-3:
        assert torch.allclose(normalised_scores(scores_PK), normalised_scores(scale * scores_PK + shift), atol=1e-6)


def test_clipping_comes_after_normalisation_and_keeps_failed_scores_nan() -> None:
    """The scores 1, 3, 5, 7 are -1.34, -0.45, 0.45, 1.34 when normalised."""
    scores_PK = torch.tensor([[1.0, 3.0, NAN, 5.0, 7.0]])
    assert same(shaped_scores(scores_PK, normalise=False, clip_range=(2.0, 6.0)), [[2.0, 3.0, NAN, 5.0, 6.0]])
    r = 5**0.5
    assert same(shaped_scores(scores_PK, normalise=True, clip_range=(-1.0, 1.0)), [[-1.0, -1 / r, NAN, 1 / r, 1.0]])
    assert same(shaped_scores(scores_PK, normalise=False, clip_range=None), [[1.0, 3.0, NAN, 5.0, 7.0]])


def test_metrics_are_those_of_the_known_scores_and_failed_ones_are_counted() -> None:
    scores = StepScores(
        source_scores={"proxy": [[1.0, NAN], [5.0, 6.0]], "rule": [[0.0, 1.0], [1.0, NAN]]},
        gold=[[NAN, 1.0], [1.0, 1.0]],
        rewards_PK=torch.tensor([[1.0, NAN], [6.0, NAN]]),
        num_failed={"proxy": 1, "rule": 1, "gold": 1},
        checkpoints={"proxy": "sha256:a"},
        num_checkpoint_changes=2,
    )
    assert score_metrics(scores) == pytest.approx(
        {
            "rloo/proxy_score_mean": 4.0,
            "rloo/proxy_score_std": (14 / 3) ** 0.5,  # the scores differ from their mean by -3, 1, 2
            "rloo/reward/rule_mean": 2 / 3,
            "rloo/reward/rule_std": (2 / 9) ** 0.5,  # differences -2/3, 1/3, 1/3
            "rloo/gold_score_mean": 1.0,
            "rloo/gold_score_std": 0.0,
            "rloo/num_failed_scores": 3,
            "rloo/failed_score_fraction": 0.5,
            "rloo/num_checkpoint_changes": 2,
        }
    )
