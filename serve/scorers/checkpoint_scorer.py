"""Score token groups with a committed reward-model checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from rm_robust.data.records import TokenGroup
from rm_robust.errors import ScoringError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.models.packing import share_prompts
from rm_robust.models.scorer import RewardScorer
from rm_robust.scoring.contract import ScoreInput
from serve.settings import ModelSettings
from serve.work import ServedModel

logger = logging.getLogger(__name__)


class CheckpointScorer:
    """A BatchScorer (serve/work.py) for the reward model of a checkpoint, in a replica."""

    def __init__(self, settings: ModelSettings, checkpoint_dir: Path, generation: int) -> None:
        """Load the checkpoint. Raises CheckpointError if it is missing, altered or not a reward model."""
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._scorer = RewardScorer.load(
            checkpoint_dir,
            device=settings.device,
            dtype=settings.dtype,
            max_length_tokens=settings.max_length_tokens,
            model_name=settings.model_name,
        )
        self.served = ServedModel(
            settings.model_name,
            self._scorer.checkpoint_id,
            self._scorer.chat.template_sha256,
            settings.max_length_tokens,
            calibration=read_manifest(checkpoint_dir).calibration,
            checkpoint_dir=str(checkpoint_dir),
            generation=generation,
            max_batch_tokens=settings.max_batch_tokens,
        )

    def score(self, contents: Sequence[TokenGroup | ScoreInput]) -> list[list[float] | str]:
        groups = [content for content in contents if isinstance(content, TokenGroup)]
        assert len(groups) == len(contents), "a checkpoint scores token ids"
        try:
            return list(self._score(groups))
        except ScoringError as error:
            if len(groups) > 1:
                return [outcome for group in groups for outcome in self.score([group])]
            logger.error("an input was refused: %s", error)
            return [str(error)]

    def _score(self, groups: list[TokenGroup]) -> list[list[float]]:
        if not self._settings.share_prompts:
            return self._scorer.score_groups(groups, max_tokens_per_batch=self._settings.max_batch_tokens)
        shared_groups, positions = share_prompts(groups)
        scores = self._scorer.score_groups(shared_groups, max_tokens_per_batch=self._settings.max_batch_tokens)
        return [
            scores[index][first : first + len(group.completion_ids)]
            for (index, first), group in zip(positions, groups, strict=True)
        ]
