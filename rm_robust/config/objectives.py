"""Names of the objectives and of BSR's variants. This file must not import torch, because every config imports it."""

from enum import StrEnum


class Objective(StrEnum):
    """What a reward model is trained to minimise. RewardModelConfig.objective says what each is.

    rm_robust/training/reward_model/losses.py has the formulas.
    """

    BRADLEY_TERRY = "bt"
    MARGIN = "margin"
    HINGE = "hinge"
    BT_NORM = "bt_norm"
    BT_DR = "bt_dr"
    CENTERING = "centering"
    BATCH_SUM_TO_ZERO = "bsr"


class BsrScale(StrEnum):
    """The factor of BSR's penalty. RewardModelConfig.bsr_scale says what each is."""

    PAIRS = "pairs"
    NONE = "none"


class BsrScope(StrEnum):
    """The pairs over which BSR takes its mean. RewardModelConfig.bsr_scope says what each is."""

    STEP = "step"
    MICRO = "micro"
