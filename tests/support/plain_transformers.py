"""Score a tiny checkpoint without any of our code.

The text of the template is cut after the last end of turn, and goes through the model alone.
"""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_robust.data.records import Message
from rm_robust.scoring.contract import ScoreInput


class PlainTransformers:
    """A scorer that uses transformers alone, and remembers its scores."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint_dir, num_labels=1).eval()
        self._known: dict[str, float] = {}

    def score(self, prompt: str | list[Message], completion: str) -> float:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        rendered = self.tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": completion}], tokenize=False
        )
        if rendered not in self._known:
            ids = self.tokenizer(rendered.removesuffix("\n"), add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            with torch.inference_mode():
                self._known[rendered] = float(self.model(input_ids=ids).logits[0, 0])
        return self._known[rendered]

    def scores(self, item: ScoreInput) -> list[float]:
        return [self.score(item.prompt, completion) for completion in item.completions]
