"""Prompts, models and a scorer become responses, labels and a manifest, with a real vLLM under a real Ray Data."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.command import main
from rm_robust.data.preferences import read_named_responses
from rm_robust.responses.response_files import chunk_path, read_responses
from tests.support.local_serve import local_ray
from tests.support.tiny_reward_model import save_tiny_reward_model

NUM_PROMPTS = 5
LONG_PROMPT_INDEX = 3
"""The prompt that leaves no room for a response in the engine's context."""
CHUNK_PROMPTS = 2
MAX_NEW_TOKENS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


def test_responses_are_generated_and_labelled_and_a_lost_file_is_made_again_the_same(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny_reward_model(tmp_path / "judge")
    base = tmp_path / "judge_base"  # the language model that save_tiny_reward_model starts from
    prompts = [
        {"prompt": "apple " * (200 if number == LONG_PROMPT_INDEX else number + 1)} for number in range(NUM_PROMPTS)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "config.toml").write_text(f"""
name = "test"
prompts = ["{tmp_path / "prompts.jsonl"}"]
chunk_prompts = {CHUNK_PROMPTS}
sampling = {{ max_new_tokens = {MAX_NEW_TOKENS} }}
engines = {{ dtype = "float32", max_model_len = 64, kv_cache_memory_bytes = 16777216 }}
labels = {{ checkpoint = "{checkpoint}" }}
models = [
    {{ name = "cool", path = "{base}", temperature = 0.5 }},
    {{ name = "hot", path = "{base}", temperature = 2.0 }},
]
""")
    out = tmp_path / "out"
    arguments = ["generate-responses", "--config", str(tmp_path / "config.toml"), "--out", str(out)]
    assert main(arguments) == 0, capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    paths = [chunk_path(out, model, number) for model in ("cool", "hot") for number in range(3)]
    responses = [response for path in paths for response in read_responses(path)]
    assert [response.completion is None for response in responses] == [
        number == LONG_PROMPT_INDEX for number in range(NUM_PROMPTS)
    ] * 2
    for model in ("cool", "hot"):
        counts = manifest["responses"][model]
        assert (counts["num_responses"], counts["num_prompts_too_long"]) == (NUM_PROMPTS - 1, 1)
        assert 0 < counts["mean_tokens"] <= MAX_NEW_TOKENS
        assert counts["num_truncated"] == sum(
            response.is_truncated
            for response in responses
            if response.model == model and response.completion is not None
        )
    assert {response.completion for response in responses if response.model == "cool"} != {
        response.completion for response in responses if response.model == "hot"
    }
    labelled = read_named_responses([str(out / "labelled")])
    num_empty = sum(manifest["responses"][model]["num_empty"] for model in ("cool", "hot"))
    assert len(labelled) == 2 * (NUM_PROMPTS - 1) - num_empty
    assert len({row.gold_score for row in labelled}) > 1
    assert manifest["labels"]["checkpoint"].startswith("sha256:")

    lost = chunk_path(out, "hot", 1)
    content = lost.read_bytes()
    kept_at = chunk_path(out, "cool", 1).stat().st_mtime_ns
    lost.unlink()
    assert main(arguments) == 0, capsys.readouterr().err
    assert lost.read_bytes() == content, "a prompt's response depends on its own seed alone"
    assert chunk_path(out, "cool", 1).stat().st_mtime_ns == kept_at

    assert main([*arguments, "--set", "seed=1"]) == 2
    assert "seed" in capsys.readouterr().err
