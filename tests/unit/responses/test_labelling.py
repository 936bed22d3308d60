"""Gold scores of generated responses: what is kept, left out and counted, and what a second call does."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rm_robust.data.preferences import read_named_responses
from rm_robust.errors import DataError, RefusedInputError
from rm_robust.responses.labelling import label, num_left_out
from rm_robust.responses.response_files import Response, chunk_path, lines_of
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult

NUM_CHUNKS = 2
MODELS = ("short", "long")


class LengthScorer:
    """A scorer that refuses a request that has a completion of more than 20 characters."""

    def __init__(self, checkpoint: str = "sha256:one") -> None:
        self.checkpoint, self.num_scored = checkpoint, 0

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        if any(len(text) > 20 for item in inputs for text in item.completions):
            raise RefusedInputError("too long")
        self.num_scored += sum(len(item.completions) for item in inputs)
        results = [ScoreResult(scores=[float(len(text)) for text in item.completions]) for item in inputs]
        return ScoreReply(model="m", checkpoint=self.checkpoint, results=results)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two chunks of three prompts and return their folder.

    The first prompt is too long for `short`. `long` has an empty response to the second prompt and a response to the
    third that is too long for the scorer.
    """
    for chunk in range(NUM_CHUNKS):
        for model in MODELS:
            responses = []
            for number in range(3):
                completion: str | None = f"{model} answer {number}"
                if (model, number) == ("long", 1):
                    completion = " "
                elif (model, number) == ("long", 2):
                    completion = "very " * 10
                elif (model, number) == ("short", 0):
                    completion = None
                prompt_id = f"{chunk}-{number}"
                responses.append(
                    Response(
                        prompt_id,
                        [{"role": "user", "content": f"Prompt {prompt_id}?"}],
                        model,
                        completion,
                        3,
                        is_truncated=False,
                    )
                )
            path = chunk_path(tmp_path, model, chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines_of(responses))
    return tmp_path


def test_labelled_responses_are_what_the_scenarios_are_built_from(folder: Path) -> None:
    assert label(MODELS, NUM_CHUNKS, folder, LengthScorer()) == "sha256:one"
    rows = read_named_responses([str(folder / "labelled")])
    assert sorted((row.prompt_id, row.model, row.completion, row.gold_score) for row in rows) == [
        (f"{chunk}-{number}", model, f"{model} answer {number}", float(len(f"{model} answer {number}")))
        for chunk in range(NUM_CHUNKS)
        for number, model in ((0, "long"), (1, "short"), (2, "short"))
    ]
    assert num_left_out(folder) == {"prompt too long for the response model": 2, "empty": 2, "refused by the scorer": 2}


def test_what_is_labelled_is_not_scored_again_and_a_killed_chunk_is(folder: Path) -> None:
    label(MODELS, NUM_CHUNKS, folder, LengthScorer())
    first_content = (folder / "labelled" / "chunk_00001.jsonl").read_bytes()
    (folder / "labelled" / "chunk_00001.jsonl").unlink()
    rest = LengthScorer()
    label(MODELS, NUM_CHUNKS, folder, rest)
    assert rest.num_scored == 3
    assert (folder / "labelled" / "chunk_00001.jsonl").read_bytes() == first_content


def test_labels_of_two_checkpoints_are_not_mixed(folder: Path) -> None:
    label(MODELS, NUM_CHUNKS, folder, LengthScorer())
    (folder / "labelled" / "chunk_00001.jsonl").unlink()
    with pytest.raises(DataError, match="Chunk 1 has labels of sha256:two, those before it are of sha256:one"):
        label(MODELS, NUM_CHUNKS, folder, LengthScorer(checkpoint="sha256:two"))
    assert label(MODELS, NUM_CHUNKS, folder, LengthScorer()) == "sha256:one"  # nothing of the other was written


def test_a_chunk_without_any_response_is_labelled_too(folder: Path) -> None:
    for model in MODELS:
        chunk_path(folder, model, 0).write_text("")
    assert label(MODELS, NUM_CHUNKS, folder, LengthScorer()) == "sha256:one"
    assert json.loads((folder / "labelled" / "chunk_00000.report.json").read_text()) == {
        "checkpoint": "",
        "num_left_out": {},
    }
