"""Score token groups with a committed reward-model checkpoint: the one inference path of evaluation and serving."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError, ScoringError
from rm_robust.models.architectures import ScoringModel, load_packed_reward_model
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.models.packing import lay_out, micro_batches, num_positions


@dataclass(frozen=True)
class ScoredGroup:
    """Raw float32 scores of a prompt's K completions, and the hidden norms at the scored tokens."""

    scores: list[float]
    norms_before_final_norm: list[float]
    norms_after_final_norm: list[float]


class RewardScorer:
    """A loaded reward model with its chat format and its identity."""

    def __init__(
        self,
        model: ScoringModel,
        chat: ChatFormat,
        *,
        checkpoint_id: str,
        model_name: str,
        device: torch.device,
        max_length_tokens: int,
    ) -> None:
        self.model = model
        self.chat = chat
        self.checkpoint_id = checkpoint_id
        self.model_name = model_name
        self.device = device
        self.max_length_tokens = max_length_tokens

    @classmethod
    def load(
        cls, checkpoint_dir: Path, *, device: str, dtype: str, max_length_tokens: int | None, model_name: str = ""
    ) -> "RewardScorer":
        """Load and verify a committed checkpoint.

        `max_length_tokens` bounds a prompt with one completion; None: the model's positions bound it. Raises
        CheckpointError for a checkpoint that was altered, is foreign or has too few positions, and when its template is
        not the one with which it was trained.
        """
        manifest = verify_checkpoint(checkpoint_dir, "reward_model")
        chat = ChatFormat.load(checkpoint_dir)
        if chat.template_sha256 != manifest.template_sha256:
            raise CheckpointError(
                f"{checkpoint_dir} was trained with template {manifest.template_sha256}, "
                f"its tokenizer now has {chat.template_sha256}."
            )
        model = load_packed_reward_model(checkpoint_dir, chat, dtype=getattr(torch, dtype), device=torch.device(device))
        limit = num_positions(model.backbone.config)
        if max_length_tokens is None:
            max_length_tokens = limit
        if max_length_tokens is None:
            raise CheckpointError(
                f"{checkpoint_dir}/config.json does not say max_position_embeddings; give max_length_tokens."
            )
        if limit is not None and max_length_tokens > limit:
            raise CheckpointError(
                f"max_length_tokens={max_length_tokens} exceeds the {limit} positions of {checkpoint_dir}; lower it."
            )
        return cls(
            model,
            chat,
            checkpoint_id=manifest.content_sha256,
            model_name=model_name or checkpoint_dir.name,
            device=torch.device(device),
            max_length_tokens=max_length_tokens,
        )

    def score_groups(self, groups: list[TokenGroup], *, max_tokens_per_batch: int = 8192) -> list[list[float]]:
        """Return raw scores, one list for each group, in order.

        Raises ScoringError for an over-long input or a non-finite score.
        """
        return [
            scored.scores for scored in self.score_groups_with_norms(groups, max_tokens_per_batch=max_tokens_per_batch)
        ]

    def score_groups_with_norms(self, groups: list[TokenGroup], *, max_tokens_per_batch: int) -> list[ScoredGroup]:
        """Do the same as score_groups, and return the hidden norms too.

        A batch holds at most `max_tokens_per_batch` tokens, or one group.
        """
        for index, group in enumerate(groups):
            longest = len(group.prompt_ids) + max(len(ids) for ids in group.completion_ids)
            if longest > self.max_length_tokens:
                raise ScoringError(
                    f"Input {index} has {longest} tokens (prompt + completion), the limit is {self.max_length_tokens}."
                )
        results: dict[int, ScoredGroup] = {}
        for members in micro_batches(groups, self.model.layout, max_tokens_per_batch):
            batch = lay_out([groups[i] for i in members], self.model.layout, pad_id=self.chat.pad_id).to(self.device)
            with torch.inference_mode():
                scored = self.model(batch)
            columns = [
                t.cpu()
                for t in (
                    scored.scores_N,
                    scored.hidden_before_final_norm_NH.norm(dim=1),
                    scored.hidden_after_final_norm_NH.norm(dim=1),
                )
            ]
            start = 0
            for i in members:
                end = start + len(groups[i].completion_ids)
                if not torch.isfinite(columns[0][start:end]).all():
                    raise ScoringError(
                        f"Input {i} got the scores {columns[0][start:end].tolist()} from {self.model_name}: not finite."
                    )
                results[i] = ScoredGroup(*(column[start:end].tolist() for column in columns))
                start = end
        return [results[i] for i in range(len(groups))]
