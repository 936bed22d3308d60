"""Train reward models that stay right on text that they were not trained on, judge them, serve them, and use them.

    from rm_robust import RewardModel

    prompt = "Today Mia bought a brown pear. Please tell me only the thing."
    RewardModel.load("runs/tiny_cpu").score(prompt, ["The answer is pear.", "It is brown."])

Importing this package loads neither torch nor Ray.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rm_robust.scoring.reward_model import RewardModel

__all__ = ["RewardModel"]


if not TYPE_CHECKING:  # type checkers would take every name as one of this package

    def __getattr__(name: str) -> object:
        """Import what __all__ names when it is first used, so that importing one of the submodules stays quick."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from rm_robust.scoring.reward_model import RewardModel

        return RewardModel
