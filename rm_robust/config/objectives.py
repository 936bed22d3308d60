"""Names of the objectives and of BSR's variants. This file must not import torch, because every config imports it."""

from enum import StrEnum


class Objective(StrEnum):
    """What a reward model is trained to minimise; rm_robust/training/reward_model/losses.py has the formulas."""

    BRADLEY_TERRY = "bt"
    MARGIN = "margin"
    """Bradley-Terry with a margin that a pair must reach: a constant, or the data's `margin` column."""
    HINGE = "hinge"
    """The margin minus the score difference where that is positive, else 0."""
    BT_NORM = "bt_norm"
    """Bradley-Terry on the score difference divided by the length of the vector (chosen, rejected)."""
    BT_DR = "bt_dr"
    """Bradley-Terry, with further losses that push chosen scores above 0 and rejected scores below 0."""
    CENTERING = "centering"
    """Bradley-Terry, with a penalty on the mean square of chosen + rejected."""
    BATCH_SUM_TO_ZERO = "bsr"
    """Bradley-Terry, with a penalty on the square of the mean of all scores."""


class BsrScale(StrEnum):
    """The factor of BSR's penalty.

    `pairs`: the coefficient times the number of pairs in scope, as in the released code. `none`: the coefficient alone,
    as the paper prints it.
    """

    PAIRS = "pairs"
    NONE = "none"


class BsrScope(StrEnum):
    """The pairs over which BSR takes its mean.

    `step`: all pairs of the optimiser step. `micro`: each block of `bsr_micro_pairs` pairs, as in the released code.
    """

    STEP = "step"
    MICRO = "micro"
