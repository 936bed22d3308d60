"""Names of the objectives and of BSR's variants. No torch here: config.py and the scorers' processes read it."""

from enum import StrEnum


class Objective(StrEnum):
    """What a reward model is trained to minimise; formulas in losses.py."""

    BRADLEY_TERRY = "bt"
    MARGIN = "margin"
    """Bradley-Terry with a margin to reach, from the data's `margin` column or constant."""
    HINGE = "hinge"
    BT_NORM = "bt_norm"
    BT_DR = "bt_dr"
    CENTERING = "centering"
    BATCH_SUM_TO_ZERO = "bsr"


class BsrScale(StrEnum):
    """`pairs`: coefficient x pairs in scope, as the released code; `none`: the paper's formula as printed."""

    PAIRS = "pairs"
    NONE = "none"


class BsrScope(StrEnum):
    """`step`: the mean is over all pairs of the optimiser step; `micro`: over each block of `bsr_micro_pairs` pairs, as the released code."""

    STEP = "step"
    MICRO = "micro"
