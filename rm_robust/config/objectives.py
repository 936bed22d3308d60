"""Names of the objectives and of BSR's variants. The scorers' processes import this file, so it does without torch."""

from enum import StrEnum


class Objective(StrEnum):
    """What a reward model is trained to minimise; rm_robust/training/reward_model/losses.py has the formulas."""

    BRADLEY_TERRY = "bt"
    MARGIN = "margin"
    """Bradley-Terry with a margin that a pair must reach: a constant, or the data's `margin` column."""
    HINGE = "hinge"
    BT_NORM = "bt_norm"
    BT_DR = "bt_dr"
    CENTERING = "centering"
    BATCH_SUM_TO_ZERO = "bsr"


class BsrScale(StrEnum):
    """The factor of BSR's term.

    `pairs`: coefficient x pairs in scope, as in the released code. `none`: the paper's formula as printed.
    """

    PAIRS = "pairs"
    NONE = "none"


class BsrScope(StrEnum):
    """The pairs over which BSR takes its mean.

    `step`: all pairs of the optimiser step. `micro`: each block of `bsr_micro_pairs` pairs, as in the released code.
    """

    STEP = "step"
    MICRO = "micro"
