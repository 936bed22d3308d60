"""A user's files and models replace the embedded world: pairs and ranked completions, or responses of named models."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Launcher, SmokeRun
from tests.e2e.pipeline_process import RUN_DEADLINE_S
from tests.e2e.user_data import write_config, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_DEADLINE_S)]

SCENARIOS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")


def groups(smoke_run: SmokeRun, scenario: str) -> list[dict[str, object]]:
    """Return the rows of one scenario of the smoke run, as real text for a user's files."""
    return [
        json.loads(line)
        for line in (smoke_run.run_dir / "preferences" / "scenarios" / f"{scenario}.jsonl").read_text().splitlines()
    ]


def explicit_pair(group: dict[str, object]) -> dict[str, object]:
    """Return a pair with the prompt as text, the best and the worst completion, and the optional columns."""
    completions, gold, models = group["completions"], group["gold_scores"], group["models"]
    best, worst = max(range(len(gold)), key=gold.__getitem__), min(range(len(gold)), key=gold.__getitem__)
    text = group["prompt"][-1]["content"]
    named = {"chosen_model": models[best], "rejected_model": models[worst], "margin": gold[best] - gold[worst]}
    return {"prompt": text, "chosen": completions[best], "rejected": completions[worst], **named}


def implicit_pair(group: dict[str, object]) -> dict[str, object]:
    """Return a pair of whole conversations with a common beginning."""
    pair = explicit_pair(group)
    return {side: [*group["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}


def ranked_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(
        pa.Table.from_pylist([{name: row[name] for name in ("prompt", "completions", "gold_scores")} for row in rows]),
        path,
    )
    return path


def own_config(smoke_run: SmokeRun, folder: Path, data: dict[str, object]) -> list[str]:
    """Return the arguments of a run on the smoke run's models.

    Its SFT checkpoint is the user's model, and its reward model is the user's gold judge.
    """
    checkpoints = smoke_run.run_dir / "checkpoints"
    data = data | {"rloo_prompts": [str(smoke_run.run_dir / "world" / "rloo_prompts.jsonl")]}
    config = write_config(
        folder / "own.toml", name="own", data=data, model_dir=checkpoints / "sft", gold=checkpoints / "reward_model"
    )
    return ["--config", str(config), "--run-dir", str(folder / "run")]


def test_own_pairs_and_rankings_run_to_the_end(smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path) -> None:
    train = [
        explicit_pair(group) if number % 2 else implicit_pair(group)
        for number, group in enumerate(groups(smoke_run, "train"))
    ]
    train.insert(50, {"prompt": "No answer is the better one", "chosen": "Both."})
    data: dict[str, object] = {
        "source": "scenarios",
        "train": [str(write_rows(tmp_path / "train.jsonl", train))],
        "in_domain": [
            str(
                write_rows(
                    tmp_path / "in_domain.jsonl", [explicit_pair(group) for group in groups(smoke_run, "in_domain")]
                )
            )
        ],
        "prompt_disjoint": [
            str(ranked_parquet(tmp_path / "prompt_disjoint.parquet", groups(smoke_run, "prompt_disjoint")))
        ],
    }
    running = launcher.pipeline("full_rlhf.py", *own_config(smoke_run, tmp_path, data))
    assert running.wait() == 0, running.output()[-4000:]
    run_dir = tmp_path / "run"
    report = json.loads((run_dir / "preferences" / "tokens" / "report.json").read_text())
    assert report["num_dropped"]["train"] == {"malformed": 1}
    assert "rejected" in report["examples"][0]["reason"]
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert {name: row["metric"] for name, row in evaluation.items()} == {
        "in_domain": "accuracy",
        "prompt_disjoint": "kendall_tau_b",
    }
    assert not (run_dir / "checkpoints" / "sft").exists()
    AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints" / "policy")
    assert json.loads((run_dir / "summary.json").read_text())["rloo"]["gold_score"]["last_step"] is not None
    assert (run_dir / "report.html").exists()


def test_pairs_alone_report_accuracy_on_every_set(smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path) -> None:
    """The scripts of the stages run one after the other."""
    data: dict[str, object] = {"source": "scenarios"}
    for name in ("train", *SCENARIOS):
        data[name] = [
            str(write_rows(tmp_path / f"{name}.jsonl", [explicit_pair(group) for group in groups(smoke_run, name)]))
        ]
    for script in ("prepare_preferences.py", "train_reward_model.py", "evaluate_reward_model.py"):
        running = launcher.pipeline(script, *own_config(smoke_run, tmp_path, data))
        assert running.wait() == 0, running.output()[-4000:]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {name: row["metric"] for name, row in evaluation.items()} == dict.fromkeys(SCENARIOS, "accuracy")


def test_named_responses_become_the_four_scenarios(smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path) -> None:
    world = smoke_run.run_dir / "world"
    split = json.loads((world / "split.json").read_text())
    data: dict[str, object] = {
        "source": "responses",
        "responses": [str(world / "responses.jsonl")],
        "unseen_models": split["unseen_models"],
    }
    running = launcher.pipeline("prepare_preferences.py", *own_config(smoke_run, tmp_path, data))
    assert running.wait() == 0, running.output()[-4000:]
    manifest = json.loads((tmp_path / "run" / "preferences" / "scenarios" / "manifest.json").read_text())
    for name in ("train", *SCENARIOS):
        models = set(manifest[name]["models"])
        assert manifest[name]["num_groups"] > 0
        assert (
            models <= set(split["unseen_models"])
            if name in ("response_disjoint", "mutual_disjoint")
            else not models & set(split["unseen_models"])
        )
