"""The report is one self-contained file that shows what the run directory holds, and says what it does not hold."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_robust.errors import DataError
from rm_robust.report.page import write_report
from rm_robust.report.record import gold_gain, read_run

SCRIPT = "<script>alert('x')</script> & done"
EVALUATION = {
    "in_domain": {
        "metric": "accuracy",
        "value": 0.8412,
        "num_prompts": 3000,
        "num_undefined": 0,
        "num_constant_scores": 2,
    },
    "prompt_disjoint": {
        "metric": "kendall_tau_b",
        "value": 0.6157,
        "num_prompts": 400,
        "num_undefined": 7,
        "num_constant_scores": 1,
    },
    "response_disjoint": {
        "metric": "kendall_tau_b",
        "value": 0.5115,
        "num_prompts": 2993,
        "num_undefined": 11,
        "num_constant_scores": 3,
    },
    "mutual_disjoint": {
        "metric": "kendall_tau_b",
        "value": -0.0506,
        "num_prompts": 399,
        "num_undefined": 5,
        "num_constant_scores": 4,
    },
}
RESPONSE_MODELS = {
    "training": {"terse-expert": 0.82, "plain": 0.55, "listy": 0.41, "flatterer": 0.15, "babbler": -0.2},
    "unseen": {"quiet-$master": 0.93, "polite-novice": -0.1},
}


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def add_sft(run_dir: Path) -> None:
    rng = np.random.default_rng(1)
    rows: list[dict[str, object]] = []
    for step in range(1, 188):
        row = {
            "stage": "sft",
            "step": step,
            "time": step,
            "sft/loss": 0.9 + 5 * math.exp(-step / 25) + 0.06 * rng.normal(),
        }
        rows.append(row | ({"sft/eval_loss": 1.0 + 5 * math.exp(-step / 25)} if step % 25 == 0 else {}))
    write_lines(run_dir / "metrics.jsonl", rows)


def add_reward_model(run_dir: Path) -> None:
    rng = np.random.default_rng(2)
    rows: list[dict[str, object]] = []
    for step in range(1, 142):
        progress = 1 - math.exp(-step / 40)
        row: dict[str, object] = {
            "stage": "reward_model",
            "step": step,
            "time": step,
            "reward_model/loss": 0.69 - 0.35 * progress + 0.03 * rng.normal(),
            "reward_model/accuracy": min(1.0, 0.5 + 0.36 * progress + 0.04 * rng.normal()),
            "reward_model/margin_mean": 1.6 * progress,
            "reward_model/batch_mean_score": 0.4 * math.exp(-step / 10) + 0.05 * rng.normal(),
            "reward_model/score_std": 0.2 + progress,
            "reward_model/penalty": 0.01 * math.exp(-step / 10),
            "reward_model/hidden_norm_mean": 30 + 8 * progress,
            "reward_model/hidden_norm_std": 1 + 2 * progress,
            "reward_model/gradient_norm": 2 - progress + 0.2 * rng.random(),
        }
        rows.append(row | ({"reward_model/in_domain_accuracy": 0.5 + 0.32 * progress} if step % 25 == 0 else {}))
    write_lines(run_dir / "metrics.jsonl", rows)


def add_rloo(run_dir: Path, *, num_steps: int = 60) -> None:
    rng = np.random.default_rng(3)
    rows: list[dict[str, object]] = []
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        rows.append({
            "stage": "rloo", "step": step, "time": step,
            "rloo/proxy_score_mean": -0.2 + 1.9 * progress + 0.1 * rng.normal(),
            "rloo/gold_score_mean": 0.45 + 0.6 * progress - 0.3 * progress**3 + 0.05 * rng.normal(),
            "rloo/gold_score_std": 0.5,
            "rloo/kl_mean": 6 * progress**1.3 + 0.1 * rng.random(),
            "rloo/entropy_mean": 1.2 - 0.6 * progress + 0.03 * rng.normal(),
            "rloo/completion_tokens_mean": 22 + 9 * progress + rng.normal(),
            "rloo/truncated_fraction": 0.05 * (1 - progress),
            "rloo/reward_mean": -0.2 + 1.6 * progress + 0.1 * rng.normal(),
            "time/generate_s": 1.1 + 0.1 * rng.random(), "time/measure_s": 0.35, "time/wait_for_scores_s": 0.25,
            "time/update_s": 0.9, "time/weight_sync_s": 0.12, "time/step_s": 2.9,
        })  # fmt: skip
        if step >= 20:
            rows[-1] |= {
                "rloo/monitor/proxy_rise": 0.3,
                "rloo/monitor/proxy_rise_se": 0.05,
                "rloo/monitor/gold_rise": 0.2,
                "rloo/overoptimised": 0.0,
            }
        if step % 20 == 0:
            names = (
                "gold_mean",
                "sft_gold_mean",
                "win_rate",
                "win_rate_se",
                "length_controlled_win_rate",
                "completion_tokens_mean",
                "kl_mean",
            )
            rows[-1] |= {f"rloo/eval/{name}": progress for name in (*names, "sft_completion_tokens_mean")}
    write_lines(run_dir / "metrics.jsonl", rows)
    samples = [
        {
            "step": step, "prompt": "Order: pear apple fig", "completion": completion,
            "proxy_score": 0.5, "gold_score": 0.25, "num_tokens": 9,
        }
        for step in (1, num_steps) for completion in ("apple fig pear", SCRIPT, "  two\n  lines")
    ]  # fmt: skip
    write_lines(run_dir / "rloo" / "samples.jsonl", samples)


def add_evaluation(run_dir: Path) -> None:
    write_json(run_dir / "evaluation.json", EVALUATION)
    rng = np.random.default_rng(4)
    tables = []
    for index, scenario in enumerate(EVALUATION):
        num_rows, is_unseen = 1600, index >= 2
        tables.append(pa.table({
            "scenario": [scenario] * num_rows, "prompt_id": [f"p{i // 4}" for i in range(num_rows)],
            "completion_index": [i % 4 for i in range(num_rows)], "gold_score": rng.normal(size=num_rows),
            "score": rng.normal(0.1 * index, 1 + 0.15 * index, num_rows),
            "hidden_norm_before_final_norm": rng.normal(40, 1.5, num_rows)
            + (rng.gamma(2, 1.5, num_rows) if is_unseen else 0),
            "hidden_norm_after_final_norm": rng.normal(12.6, 0.02 + 0.02 * is_unseen, num_rows),
        }))  # fmt: skip
    (run_dir / "evaluation").mkdir()
    pq.write_table(pa.concat_tables(tables), run_dir / "evaluation" / "scores.parquet")


def add_sources(run_dir: Path) -> None:
    """Add the counts of FIELD.md's run, which lost 93 % of its rows, and of a source that lost little."""
    source: dict[str, object] = {
        "scenario": "train", "paths": ["mine.jsonl"], "weight": 1.0, "num_read": 2600, "num_kept": 188,
        "num_truncated": 7, "num_merged": 3, "num_dropped": {"prompt too long": 2400, "malformed": 12},
        "num_skipped_files": {"another format": 3}, "skipped_files": ["a.csv: another format"],
        "lost_fraction": 2412 / 2600,
    }  # fmt: skip
    small = {**source, "scenario": "in_domain", "num_dropped": {"tied scores": 5}, "lost_fraction": 0.0}
    write_json(run_dir / "preferences" / "tokens" / "report.json", {"sources": [source, small]})


def add_stages(run_dir: Path) -> None:
    seconds = {"world": 6.1, "sft": 81.0, "preferences": 22.4, "reward_model": 74.0, "evaluation": 31.5, "rloo": 171.2}
    for index, (stage, stage_seconds) in enumerate(seconds.items()):
        write_json(
            run_dir / "stages" / f"{stage}.json",
            {"stage": stage, "seconds": stage_seconds, "finished_at": 1000.0 + index, "rows": 3},
        )


def add_twin(run_dir: Path) -> None:
    """Add a twin: a run in a folder of the run, whose reward model is a little worse."""
    twin_dir = run_dir / "bt_twin"
    twin_dir.mkdir()
    add_reward_model(twin_dir)
    add_evaluation(twin_dir)
    write_json(
        twin_dir / "evaluation.json",
        {name: row | {"value": float(row["value"]) - 0.1} for name, row in EVALUATION.items()},
    )
    for stage, seconds in {"preferences": 22.4, "reward_model": 70.5, "evaluation": 30.0}.items():
        write_json(
            twin_dir / "stages" / f"{stage}.json", {"stage": stage, "seconds": seconds, "finished_at": 2000.0 + seconds}
        )


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "tiny_cpu"
    run_dir.mkdir()
    config = {
        "name": "tiny_cpu",
        "seed": 7,
        "reward_model": {"objective": "bsr"},
        "data": {"train": ["https://example.org/<pairs>"]},
    }
    write_json(run_dir / "config.resolved.json", config)
    add_sft(run_dir)
    add_reward_model(run_dir)
    add_rloo(run_dir)
    add_evaluation(run_dir)
    add_stages(run_dir)
    add_twin(run_dir)
    add_sources(run_dir)
    write_json(run_dir / "world" / "response_models.json", RESPONSE_MODELS)
    write_report(run_dir)
    return run_dir


class Page(HTMLParser):
    """The tags, attributes, table rows and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
            self.is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = self.is_in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_in_cell:
            self.rows[-1][-1] += data


def page_of(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text())


def test_the_report_is_one_file_without_any_link_or_script(full_run: Path) -> None:
    page = page_of(full_run)
    assert {"script", "link", "a", "iframe"}.isdisjoint(page.tags)
    assert {name for name, _ in page.attributes}.isdisjoint({"href", "onload", "onclick", "srcset"})
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = (full_run / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert ("name", "viewport") in page.attributes


def test_every_figure_of_a_full_run_is_drawn_and_nothing_is_said_to_be_missing(full_run: Path) -> None:
    page = page_of(full_run)
    titles = [value for name, value in page.attributes if name == "alt"]
    assert titles == [
        "Against RLOO step", "Against KL divergence", "The four scenarios", "Scores", "Hidden norms",
        "Dispersion of hidden norms", "Reward-model training: curves",
        "Supervised fine-tuning: curves", "RLOO policy: curves", "Stages of the run", "One RLOO step",
    ]  # fmt: skip
    assert ("class", "absent") not in page.attributes
    images = [base64.b64decode(value.split(",")[1]) for name, value in page.attributes if name == "src"]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert sum(map(len, images)) < 1_500_000


def test_the_scenario_table_shows_the_values_of_evaluation_json(full_run: Path) -> None:
    rows = page_of(full_run).rows
    assert ["In-domain", "pairwise accuracy", "0.8412", "0.7412", "3000", "0", "2"] in rows
    assert ["Mutual-disjoint", "Kendall's tau-b", "-0.0506", "-0.1506", "399", "5", "4"] in rows


def test_a_run_without_a_twin_has_no_column_for_one(tmp_path: Path) -> None:
    add_evaluation(tmp_path)
    write_report(tmp_path)
    assert ["In-domain", "pairwise accuracy", "0.8412", "3000", "0", "2"] in page_of(tmp_path).rows


def test_a_twins_own_stages_are_counted_and_those_that_it_shares_are_not(full_run: Path) -> None:
    seconds = read_run(full_run).all_stage_seconds
    assert list(seconds) == [
        "world",
        "sft",
        "preferences",
        "reward_model",
        "evaluation",
        "reward_model, BT twin",
        "evaluation, BT twin",
        "rloo",
    ]
    assert sum(seconds.values()) == pytest.approx(6.1 + 81.0 + 22.4 + 74.0 + 31.5 + 70.5 + 30.0 + 171.2)


def test_a_source_with_only_pairs_is_said_to_have_only_accuracy(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation.json", dict.fromkeys(EVALUATION, EVALUATION["in_domain"]))
    write_report(tmp_path)
    assert "This source has only pairs" in page_of(tmp_path).text


def test_a_completion_with_markup_is_shown_as_text(full_run: Path) -> None:
    page = page_of(full_run)
    assert any(SCRIPT in row for row in page.rows)
    assert any("  two\n  lines" in row for row in page.rows)
    assert "<script" not in (full_run / "report.html").read_text()


def test_a_completion_with_unicode_line_separators_is_one_sample(tmp_path: Path) -> None:
    sample = {
        "step": 1,
        "prompt": "p",
        "completion": "a\u2028b\x85c",
        "proxy_score": 0.5,
        "gold_score": 0.25,
        "num_tokens": 9,
    }
    path = tmp_path / "rloo" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text((json.dumps(sample, ensure_ascii=False) + "\n") * 2)
    assert [read.completion for read in read_run(tmp_path).samples] == ["a\u2028b\x85c"] * 2


def test_the_summary_gives_the_tenths_and_the_gain_worked_out_by_hand(tmp_path: Path) -> None:
    """There are 20 steps, so a tenth has two: gold 1, 3 (std 1 each) ... 5, 7.

    The pooled variance is 1 + var(1, 3) = 2, and the gain is (6 - 2) / sqrt(2).
    """
    gold = [1.0, 3.0, *[0.0] * 16, 5.0, 7.0]
    rows: list[dict[str, object]] = [
        {
            "stage": "rloo",
            "step": i + 1,
            "rloo/gold_score_mean": value,
            "rloo/gold_score_std": 1.0,
            "rloo/proxy_score_mean": i,
        }
        for i, value in enumerate(gold)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_json(tmp_path / "config.resolved.json", {"name": "by_hand", "seed": 11, "reward_model": {"objective": "bt"}})
    write_report(tmp_path)
    text = page_of(tmp_path).text
    for expected in (
        "by_hand",
        "bt",
        "seed 11",
        "2.000 → 6.000",
        "0.500 → 18.500",
        f"{4 / math.sqrt(2):+.2f} SD",
        "rose with it",
    ):
        assert expected in text
    gain = gold_gain(read_run(tmp_path).metrics["rloo"])
    assert gain == pytest.approx(4 / math.sqrt(2))


def test_the_gain_divides_by_the_deviation_of_all_completions_of_the_first_tenth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores_SN = rng.normal(size=(40, 64)) + np.linspace(0, 2, 40)[:, None]
    rows: list[dict[str, object]] = [
        {"stage": "rloo", "step": i + 1, "rloo/gold_score_mean": row.mean(), "rloo/gold_score_std": row.std()}
        for i, row in enumerate(scores_SN)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    expected = (scores_SN[-4:].mean() - scores_SN[:4].mean()) / scores_SN[:4].std()
    assert gold_gain(read_run(tmp_path).metrics["rloo"]) == pytest.approx(expected)


def test_a_proxy_that_rises_while_gold_falls_is_called_over_optimisation(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"stage": "rloo", "step": i, "rloo/gold_score_mean": -i, "rloo/gold_score_std": 1.0, "rloo/proxy_score_mean": i}
        for i in range(1, 41)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_report(tmp_path)
    assert "over-optimised the reward model" in page_of(tmp_path).text


def test_a_run_with_only_sft_shows_its_curve_and_names_every_part_that_is_missing(tmp_path: Path) -> None:
    add_sft(tmp_path)
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert [value for name, value in page.attributes if name == "alt"] == ["Supervised fine-tuning: curves"]
    for sentence in (
        "RLOO has not run", "Reward-model training has not run",
        "The reward model has not been evaluated", "evaluation/scores.parquet has not",
        "rloo/samples.jsonl has not", "no config.resolved.json", "no stage has been committed",
    ):  # fmt: skip
        assert sentence in page.text
    assert "SFT has not run" not in page.text


def test_an_empty_run_directory_gives_a_report_without_pictures(tmp_path: Path) -> None:
    assert write_report(tmp_path) == tmp_path / "report.html"
    page = page_of(tmp_path)
    assert "img" not in page.tags
    assert "SFT has not run" in page.text


@pytest.mark.parametrize(
    "key",
    [
        "rloo/proxy_score_mean",
        "rloo/gold_score_mean",
        "rloo/kl_mean",
        "rloo/entropy_mean",
        "time/step_s",
        "time/generate_s",
    ],
)
def test_any_single_rloo_metric_and_any_single_step_is_enough(tmp_path: Path, key: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "rloo", "step": 1, key: 0.5}])
    write_report(tmp_path)
    assert "Not logged in this run" in page_of(tmp_path).text


def test_metrics_that_were_not_logged_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": step, "sft/loss": 1.0} for step in (1, 2)])
    write_report(tmp_path)
    assert "Not logged in this run: sft/eval_loss" in page_of(tmp_path).text


def test_constant_and_missing_norms_are_drawn_or_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    table = pa.table({
        "scenario": ["in_domain"] * 4, "score": [0.0, 1.0, None, 2.0], "hidden_norm_before_final_norm": [11.3137] * 4,
        "hidden_norm_after_final_norm": pa.array([None] * 4, type=pa.float64()),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "evaluation" / "scores.parquet")
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert "1 completions without a score are not drawn" in page.text
    assert "Hidden norms" in [value for name, value in page.attributes if name == "alt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", '{"in_domain": {"metric": "accuracy"}}'),
        ("evaluation.json", "[1]"),
        ("config.resolved.json", "{"),
        ("world/response_models.json", '{"training": {}}'),
        ("stages/sft.json", '{"stage": "sft"}'),
        ("evaluation/scores.parquet", "no parquet"),
        ("rloo/samples.jsonl", '{"step": 1}\n{"step": 2}\n'),
    ],
)
def test_a_file_that_cannot_be_understood_is_an_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path)


def test_a_run_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        write_report(tmp_path / "absent")


def test_lost_rows_are_counted_and_large_losses_are_warned_of(full_run: Path, tmp_path: Path) -> None:
    page = page_of(full_run)
    text = " ".join(page.text.split())
    assert "93 % of the rows of train (mine.jsonl) are lost: 188 kept of 2600 read." in text
    assert "rows of in_domain" not in text
    assert [row for row in page.rows if row[:2] == ["train", "mine.jsonl"]] == [
        [
            *("train", "mine.jsonl", "2400 prompt too long, 12 malformed, 3 files not read: another format"),
            *("2600", "188", "7", "92.8%"),
        ]
    ]
    write_report(tmp_path)
    assert "No counts of rows" in page_of(tmp_path).text
    old = {"sources": [{"scenario": "train", "num_read": 3}]}
    write_json(tmp_path / "preferences" / "tokens" / "report.json", old)
    write_report(tmp_path)
    assert "No counts of rows" in page_of(tmp_path).text
