"""Score completions with a served reward model, over HTTP. Neither torch nor Ray is imported."""

from rm_robust.scoring.client import AsyncRewardClient, ClientOptions, RewardClient
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult

__all__ = ["AsyncRewardClient", "ClientOptions", "RewardClient", "ScoreInput", "ScoreReply", "ScoreResult"]
