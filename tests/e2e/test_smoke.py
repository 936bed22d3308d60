"""One run of smoke.toml from end to end: its files, its data, and that a repeated command does nothing."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rm_robust.data.chat import ChatFormat
from rm_robust.runs.trackers import gauge_name
from tests.e2e.conftest import WITH_TWIN, Launcher, SmokeRun
from tests.e2e.pipeline_process import REPOSITORY, RUN_DEADLINE_S, SMOKE_CONFIG

pytestmark = pytest.mark.timeout(RUN_DEADLINE_S + 120)

SCENARIOS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")
LOGPROB_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-4


MAX_TERMINAL_LINES = 80


def metric_lines(run_dir: Path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def final_table(output: str) -> str:
    """Return what a pipeline prints last: from the scenario table and the scores to the report's path."""
    return output[output.index("scenario            metric") :].strip()


def test_the_dashboard_asks_for_metrics_that_a_run_has(smoke_run: SmokeRun) -> None:
    areas = {stage: metric_lines(smoke_run.run_dir, stage) for stage in ("sft", "reward_model", "rloo")}
    keys = {
        key if key.startswith(f"{stage}/") else f"{stage}_{key}"
        for stage, lines in areas.items()
        for line in lines
        for key in line
        if "/" in key
    }
    exported = {f"ray_{gauge_name(key)}" for key in (*keys, "sft/step", "reward_model/step", "rloo/step")}
    asked = set(
        re.findall(r"ray_rm_robust_[a-z0-9_]+(?={run=)", (REPOSITORY / "deploy/grafana_dashboard.json").read_text())
    )
    assert len(asked) > 15
    assert asked <= exported


def test_the_run_ends_well_and_says_so_on_the_terminal(smoke_run: SmokeRun) -> None:
    assert smoke_run.exit_status == 0, smoke_run.output[-4000:]
    assert "Traceback" not in smoke_run.output
    (log,) = [path.read_text() for path in (smoke_run.run_dir / "logs").iterdir()]
    for log_prefix in (
        "[smoke sft rank 0]",
        "[smoke reward_model rank 0]",
        "[smoke/bt_twin reward_model rank 0]",
        "[smoke rloo]",
    ):
        assert f" INFO {log_prefix} rm_robust." in log
    assert len(smoke_run.output.splitlines()) <= MAX_TERMINAL_LINES, smoke_run.output
    table = final_table(smoke_run.output)
    for expected in (
        *SCENARIOS,
        "proxy_score: first tenth",
        "gold_score: first tenth",
        f"report: {smoke_run.run_dir}/report.html",
    ):
        assert expected in table


def test_the_run_directory_is_complete(smoke_run: SmokeRun) -> None:
    run_dir = smoke_run.run_dir
    assert json.loads((run_dir / "config.resolved.json").read_text())["rloo"]["num_completions_per_prompt"] == 2
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["scenarios"]) == set(SCENARIOS)
    assert {"proxy_score", "gold_score"} <= set(summary["rloo"])
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert set(evaluation) == set(SCENARIOS)
    assert [evaluation[name]["metric"] for name in SCENARIOS] == [
        "accuracy",
        "kendall_tau_b",
        "kendall_tau_b",
        "kendall_tau_b",
    ]
    for row in evaluation.values():
        assert row["num_prompts"] > 0
        assert row["num_undefined"] >= 0
        assert -1 <= row["value"] <= 1


def test_the_bradley_terry_twin_begins_with_the_same_weights_on_the_same_batches_and_is_in_the_table(
    smoke_run: SmokeRun,
) -> None:
    own, twin = (
        metric_lines(smoke_run.run_dir, "reward_model"),
        metric_lines(smoke_run.run_dir / "bt_twin", "reward_model"),
    )
    assert len(own) == len(twin) > 1
    assert own[0]["reward_model/pair_loss"] == pytest.approx(twin[0]["reward_model/pair_loss"], rel=1e-6)
    assert [line["reward_model/num_tokens"] for line in own] == [line["reward_model/num_tokens"] for line in twin]
    assert all(line["reward_model/penalty"] == 0 for line in twin)
    assert any(line["reward_model/penalty"] > 0 for line in own)
    evaluation = json.loads((smoke_run.run_dir / "bt_twin" / "evaluation.json").read_text())
    assert set(evaluation) == set(SCENARIOS)
    table = final_table(smoke_run.output).splitlines()
    assert table[0].endswith("BT twin")
    for name in SCENARIOS:
        assert any(line.startswith(name) and line.endswith(f"{evaluation[name]['value']:.4f}") for line in table)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "rloo"])
def test_every_step_is_one_line_of_metrics_and_a_tensorboard_event(smoke_run: SmokeRun, stage: str) -> None:
    lines = metric_lines(smoke_run.run_dir, stage)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["num_steps"] for line in lines} == {len(lines)}
    keys = [key for line in lines for key in line if key not in ("stage", "step", "num_steps", "time")]
    assert keys
    assert all(re.fullmatch(r"[a-z_]+(/[a-z_0-9]+){1,2}", key) for key in keys)
    events = EventAccumulator(str(smoke_run.run_dir / "tensorboard" / stage)).Reload()
    own_key = next(key for key in keys if key.startswith(f"{stage}/"))
    assert [event.step for event in events.Scalars(own_key)] == [line["step"] for line in lines]


def test_the_report_needs_no_other_file(smoke_run: SmokeRun) -> None:
    html = (smoke_run.run_dir / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html)
    assert sum(source.startswith("data:image/") for source in sources) >= 4
    assert [source[:80] for source in sources if not source.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\(\s*[\"']?http", html)


def test_both_checkpoints_load_in_plain_transformers(smoke_run: SmokeRun) -> None:
    for name, auto_class in (("reward_model", AutoModelForSequenceClassification), ("policy", AutoModelForCausalLM)):
        folder = smoke_run.run_dir / "checkpoints" / name
        model, loading = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template
        assert tokenizer.pad_token_id is not None
        if name == "reward_model":
            assert model.config.num_labels == 1


def test_rloo_logs_gold_and_proxy_scores_of_the_version_that_sampled(smoke_run: SmokeRun) -> None:
    lines = metric_lines(smoke_run.run_dir, "rloo")
    for line in lines:
        assert {"rloo/gold_score_mean", "rloo/proxy_score_mean", "rloo/kl_mean"} <= set(line)
        assert line["rloo/policy_version"] == line["step"] - 1
        assert line["rloo/sampler_gap_max"] < LOGPROB_TOLERANCE
    assert lines[0]["rloo/kl_mean"] == pytest.approx(0, abs=1e-5)
    assert any(abs(line["rloo/kl_mean"]) > 1e-4 for line in lines[1:]), "no weight update reached the engine"


@pytest.mark.parametrize("scenario", ["train", *SCENARIOS])
def test_the_ids_trained_on_are_the_ids_that_serving_makes_of_the_texts(smoke_run: SmokeRun, scenario: str) -> None:
    chat = ChatFormat.load(smoke_run.run_dir / "checkpoints" / "reward_model")
    texts = {}
    for line in (smoke_run.run_dir / "preferences" / "scenarios" / f"{scenario}.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts[row["prompt_id"]] = row
    tokens = (
        pq.ParquetFile(next((smoke_run.run_dir / "preferences" / "tokens" / f"scenario={scenario}").glob("*.parquet")))
        .read()
        .to_pylist()
    )
    assert tokens
    for row in tokens:
        text = texts[row["group_id"]]
        assert row["prompt_ids"] == chat.prompt_ids(text["prompt"])
        assert row["completion_ids"] == [chat.completion_ids(completion) for completion in text["completions"]]
        assert row["gold_scores"] == text["gold_scores"]


def test_evaluation_scores_are_those_of_plain_transformers(smoke_run: SmokeRun) -> None:
    folder = smoke_run.run_dir / "checkpoints" / "reward_model"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
    )
    scores = {
        (r["scenario"], r["prompt_id"], r["completion_index"]): r["score"]
        for r in pq.read_table(smoke_run.run_dir / "evaluation/scores.parquet").to_pylist()
    }
    for scenario in SCENARIOS:
        row = json.loads(
            (smoke_run.run_dir / "preferences" / "scenarios" / f"{scenario}.jsonl").read_text().splitlines()[0]
        )
        for index, completion in enumerate(row["completions"]):
            rendered = tokenizer.apply_chat_template(
                [*row["prompt"], {"role": "assistant", "content": completion}], tokenize=False
            )
            ids = tokenizer(rendered.rstrip("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=ids).logits.item()
            assert scores[scenario, row["prompt_id"], index] == pytest.approx(expected, abs=SCORE_TOLERANCE)


def test_the_same_command_again_skips_every_stage_and_prints_the_same_table(
    smoke_run: SmokeRun, launcher: Launcher
) -> None:
    metrics = (smoke_run.run_dir / "metrics.jsonl").read_bytes()
    again = launcher.pipeline("full_rlhf.py", "--config", SMOKE_CONFIG, "--run-dir", str(smoke_run.run_dir), WITH_TWIN)
    assert again.wait() == 0, again.output()
    assert again.output().count("already committed, skipped") == 8  # two of them the twin's
    assert final_table(again.output()) == final_table(smoke_run.output)
    assert (smoke_run.run_dir / "metrics.jsonl").read_bytes() == metrics
    assert not list(launcher.ray_dir.iterdir()), "Ray was started although there was nothing to do"


def test_a_changed_config_is_refused_for_the_same_run_directory(smoke_run: SmokeRun, launcher: Launcher) -> None:
    changed = launcher.pipeline(
        "full_rlhf.py",
        "--config",
        SMOKE_CONFIG,
        "--run-dir",
        str(smoke_run.run_dir),
        "--set",
        "reward_model.bsr_coefficient=0.5",
    )
    assert changed.wait() == 2
    assert "reward_model.bsr_coefficient: 0.001 there, 0.5 now" in changed.output()
    assert "Traceback" not in changed.output()
    assert not list(launcher.ray_dir.iterdir())
