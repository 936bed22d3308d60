"""reward-bench 0.1.4, with the transformers 4.51 that it pins, loads our checkpoints (make test-compat).

The tests run its own command in its own environment.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.models.scorer import RewardScorer
from tests.support.trained_reward_model import NUM_PAIRS, ROPE_THETA, texts, train_and_commit

REPOSITORY = Path(__file__).parents[2]
BIN = REPOSITORY / ".venv-compat" / "bin"
REWARD_BENCH_ON_CPU = """
import torch, transformers
to = transformers.BatchEncoding.to
def to_device(self, device, **kwargs):
    return to(self, device if torch.cuda.is_available() else "cpu", **kwargs)
transformers.BatchEncoding.to = to_device
from rewardbench.rewardbench import main
main()
"""
"""The `rewardbench` command with one change: version 0.1.4 always moves every batch to "cuda", also without a GPU."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_commit(tmp_path_factory.mktemp("checkpoint"), with_lora=request.param)


def run(*command: str, folder: Path) -> str:
    environment = (
        {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        | OFFLINE
        | {"HF_HOME": str(folder / "hf")}
    )
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_reward_bench_gives_our_scores(checkpoint: Path, tmp_path: Path) -> None:
    rows = []
    for prompt, chosen, rejected in map(texts, range(NUM_PAIRS)):
        user = {"role": "user", "content": prompt}
        rows.append(
            {
                "chosen": [user, {"role": "assistant", "content": chosen}],
                "rejected": [user, {"role": "assistant", "content": rejected}],
            }
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").symlink_to(checkpoint)  # reward-bench names its results after the model's path
    run(
        str(BIN / "python"), "-c", REWARD_BENCH_ON_CPU, "--model", "model", "--dataset", "pairs.jsonl", "--load_json",
        "--not_quantized", "--torch_dtype", "float32", "--batch_size", "4", "--output_dir", "results/", folder=tmp_path,
    )  # fmt: skip
    theirs = [json.loads(line) for line in (tmp_path / "results" / "model_outputs.jsonl").read_text().splitlines()]
    scorer = RewardScorer.load(checkpoint, device="cpu", dtype="float32", max_length_tokens=128)
    chat = scorer.chat
    ours = scorer.score_groups(
        [
            TokenGroup(chat.prompt_ids(p), [chat.completion_ids(c), chat.completion_ids(r)])
            for p, c, r in map(texts, range(NUM_PAIRS))
        ]
    )
    assert max(map(max, ours)) - min(map(min, ours)) > 0.5
    for row, scores in zip(theirs, ours, strict=True):
        assert [row["scores_chosen"], row["scores_rejected"]] == pytest.approx(scores, abs=1e-4)


@pytest.mark.timeout(300)
def test_transformers_4_reads_rope_and_token_ids_as_we_do(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from transformers import AutoConfig, AutoTokenizer, __version__\n"
        "tokenizer, config = (auto.from_pretrained(sys.argv[1]) for auto in (AutoTokenizer, AutoConfig))\n"
        "def turns(prompt, completion):\n"
        "    return [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': completion}]\n"
        "ids = [tokenizer.apply_chat_template(turns(p, c)) for p, c in json.loads(sys.argv[2])]\n"
        "print(json.dumps([__version__, config.rope_theta, ids, tokenizer.pad_token_id]))"
    )
    chat = ChatFormat.load(checkpoint)
    conversations = [(prompt, chosen) for prompt, chosen, _ in map(texts, range(NUM_PAIRS))]
    printed = run(str(BIN / "python"), "-c", code, str(checkpoint), json.dumps(conversations), folder=tmp_path)
    version, theta, ids, pad_id = json.loads(printed.splitlines()[-1])
    assert (version, theta, pad_id) == ("4.51.0", ROPE_THETA, chat.pad_id)
    assert ids == [chat.prompt_ids(prompt) + chat.completion_ids(chosen) for prompt, chosen in conversations]
