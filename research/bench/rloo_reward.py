"""The reward that both trainers of the RLOO bench maximise. It is cheap, and depends on the completion's text alone."""

from collections.abc import Sequence

from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult

TARGET_WORDS = 12


def reward_of(completion: str) -> float:
    """Return 0 for TARGET_WORDS words, and 0.1 less for every word more or fewer."""
    return -abs(len(completion.split()) - TARGET_WORDS) / 10


class WordCountScorer:
    """A Scorer whose scores are `reward_of` the completions."""

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        results = [ScoreResult(scores=[reward_of(completion) for completion in item.completions]) for item in inputs]
        return ScoreReply(model="word_count", checkpoint="none", results=results)
