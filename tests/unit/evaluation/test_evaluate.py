"""The path from files to result.json, with scorers that are plain functions of the texts."""

import functools
import hashlib
import json
import shutil
import socket
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import evaluate_suite as command
from pipelines.command import main
from rm_robust.data.chat import ChatFormat
from rm_robust.errors import ConfigError, DataError, RefusedInputError, ScorerUnavailableError, ScoringError
from rm_robust.evaluation import evaluate as evaluate_module
from rm_robust.evaluation.constant_answers import ANSWERS
from rm_robust.evaluation.evaluate import CASES_AT_A_TIME, EvaluationPlan, figure_names, read_data
from rm_robust.evaluation.suites import SUITES
from rm_robust.models.checkpoint import MANIFEST_NAME, commit_checkpoint
from rm_robust.scoring.checkpoint_scorer import CheckpointScorer
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult
from tests.support.tiny_reward_model import save_tiny_reward_model

NUM_PAIRS = 20
HOST = socket.gethostname()
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


class TextScorer:
    """A scorer that refuses a request with a completion that has no score, as a service does, and counts its inputs."""

    def __init__(self, score_of: Callable[[str], float | None], checkpoint: str = "sha256:one") -> None:
        self.score_of, self.checkpoint, self.num_scored = score_of, checkpoint, 0

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        rows = [[self.score_of(text) for text in item.completions] for item in inputs]
        for index, row in enumerate(rows):
            if None in row:
                raise RefusedInputError(f"Input {index} has no score.")
        self.num_scored += len(inputs)
        return ScoreReply(
            model="m", checkpoint=self.checkpoint, results=[ScoreResult.model_validate({"scores": row}) for row in rows]
        )


def evaluate(plan: EvaluationPlan, scorer: TextScorer, *, cases_at_a_time: int = CASES_AT_A_TIME) -> dict[str, Any]:
    return evaluate_module.evaluate(plan, read_data(plan), scorer, cases_at_a_time=cases_at_a_time)


def length(text: str) -> float:
    return float(len(text))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Prompt {i}.", "chosen": "long answer" if i % 4 else "bad", "rejected": "short"}
        for i in range(NUM_PAIRS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_of(data: Path, *, leave_out: bool = False) -> EvaluationPlan:
    return EvaluationPlan("preferences", SUITES["preferences"], [str(data)], data.parent / "out", leave_out)


def test_the_result_says_what_was_evaluated_with_what(data: Path) -> None:
    result = evaluate(plan_of(data), TextScorer(length))
    assert result["figures"]["all.accuracy"]["value"] == 0.75
    assert (result["checkpoint"], result["num_cases"], result["num_refused"]) == ("sha256:one", NUM_PAIRS, 0)
    assert result["files"] == [
        {
            "path": str(data),
            "num_bytes": data.stat().st_size,
            "sha256": "sha256:" + hashlib.sha256(data.read_bytes()).hexdigest(),
        }
    ]
    assert json.loads((data.parent / "out" / "result.json").read_text()) == result


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_texts_are_read_a_few_at_a_time_and_not_kept(tmp_path: Path, suffix: str) -> None:
    num_rows, text = 500, "word " * 16_000
    rows = [{"prompt": f"Prompt {i}. {text}", "chosen": f"{i} {text}", "rejected": f"{i}"} for i in range(num_rows)]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows
    tracemalloc.start()
    try:
        assert evaluate(plan_of(path), TextScorer(length), cases_at_a_time=8)["num_cases"] == num_rows
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 0.4 * num_rows * 2 * len(text), "more than a part of the texts at once"


def test_a_file_that_changes_between_its_two_readings_is_refused(data: Path) -> None:
    known = read_data(plan_of(data))
    lines = data.read_text().splitlines()
    lines[3] = lines[3].replace("long answer", "long ANSWER")  # as many characters
    data.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match=r"Case pairs\.jsonl:4 is not what it was a moment ago"):
        evaluate_module.evaluate(plan_of(data), known, TextScorer(length))
    data.write_text("".join(f"{line}\n" for line in data.read_text().splitlines()[:3]))
    with pytest.raises(DataError, match=r"Case pairs\.jsonl:4 is not what it was a moment ago"):
        evaluate_module.evaluate(
            EvaluationPlan("preferences", SUITES["preferences"], [str(data)], data.parent / "other"),
            known,
            TextScorer(length),
        )


def test_scores_of_a_suites_former_texts_are_not_mixed_with_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EvaluationPlan("constant_answers", SUITES["constant_answers"], [str(data)], data.parent / "out")
    assert evaluate(plan, TextScorer(length))["figures"]["padding.wins"]["value"] == 1
    monkeypatch.setitem(ANSWERS, "padding", "short")
    with pytest.raises(DataError, match="texts was"):
        evaluate(plan, TextScorer(length))


def test_a_stopped_evaluation_goes_on_where_it_stopped(data: Path) -> None:
    once = evaluate(
        EvaluationPlan("preferences", SUITES["preferences"], [str(data)], data.parent / "once"),
        TextScorer(length),
        cases_at_a_time=6,
    )

    class StopsScorer(TextScorer):
        def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
            if self.num_scored > 10:
                raise KeyboardInterrupt
            return super().score(inputs)

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan_of(data), StopsScorer(length), cases_at_a_time=6)
    log = data.parent / "out" / "scores.jsonl"
    assert not (data.parent / "out" / "result.json").exists()
    log.write_bytes(log.read_bytes() + b'{"case": 12, "sco')  # what a killed process was writing
    rest = TextScorer(length)
    assert evaluate(plan_of(data), rest, cases_at_a_time=6) == once
    assert rest.num_scored == NUM_PAIRS - 12 + 1  # the first case is asked again, for the checkpoint


def test_scores_of_another_checkpoint_are_not_mixed(data: Path) -> None:
    evaluate(plan_of(data), TextScorer(length))
    with pytest.raises(DataError, match="checkpoint was 'sha256:one', is 'sha256:two'"):
        evaluate(plan_of(data), TextScorer(length, checkpoint="sha256:two"))


def test_a_checkpoint_that_changes_on_the_way_ends_the_evaluation(data: Path) -> None:
    class SwappedScorer(TextScorer):
        def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
            reply = super().score(inputs)
            self.checkpoint = "sha256:two"
            return reply

    with pytest.raises(ScoringError, match="has changed from sha256:one to sha256:two"):
        evaluate(plan_of(data), SwappedScorer(length))


def no_score_of_bad(text: str) -> float | None:
    return None if text == "bad" else length(text)


def test_a_case_without_scores_ends_the_evaluation_unless_it_may_be_left_out(data: Path) -> None:
    stopping = EvaluationPlan("preferences", SUITES["preferences"], [str(data)], data.parent / "stopping")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(ScoringError, match="Case pairs.jsonl:4 has no scores"):
        evaluate(stopping, TextScorer(no_score_of_bad))
    # The scores of the cases before it are kept.
    assert len((data.parent / "stopping" / "scores.jsonl").read_text().splitlines()) == 1 + 3
    result = evaluate(plan_of(data, leave_out=True), TextScorer(no_score_of_bad))
    assert result["refused"][0] == {"case": "pairs.jsonl:4", "reason": "Input 0 has no score."}
    with pytest.raises(DataError, match="leave_out_refused was True, is False"):
        evaluate(plan_of(data), TextScorer(length))
    assert (result["num_refused"], result["figures"]["all.accuracy"]["value"]) == (NUM_PAIRS // 4, 1.0)
    assert f"{NUM_PAIRS // 4} of {NUM_PAIRS} cases have no scores and are left out" in result["notes"]


def test_a_scorer_that_makes_no_number_of_anything_has_no_result(data: Path) -> None:
    with pytest.raises(ScoringError, match="None of the first 20 cases has scores"):
        evaluate(plan_of(data, leave_out=True), TextScorer(lambda _: None))


def test_a_checkpoint_that_makes_nan_of_a_word_has_figures_of_the_other_cases_alone(tmp_path: Path) -> None:
    """The embedding of one token is NaN.

    A case with this token ends the evaluation, or is left out, counted and named; it never has a score.
    """
    intact = save_tiny_reward_model(tmp_path / "intact")
    chat = ChatFormat.load(intact)

    def write(folder: Path) -> None:
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        (folder / MANIFEST_NAME).unlink()
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][chat.completion_ids("river")[0]] = torch.nan
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    commit_checkpoint(tmp_path / "nan", write, kind="reward_model", template_sha256=chat.template_sha256, training={})
    rows = [
        {
            "prompt": f"list {'the ' * i}",
            "chosen": "river stone" if i % 4 == 0 else "quiet stone",
            "rejected": "blue and red",
        }
        for i in range(NUM_PAIRS)
    ]
    files = {"all": rows, "others": [row for row in rows if row["chosen"] != "river stone"]}
    for name, file_rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in file_rows))

    def figures(checkpoint: str, data: str, *, leave_out: bool) -> dict[str, Any]:
        scorer = CheckpointScorer(
            tmp_path / checkpoint, device="cpu", max_length_tokens=None, max_tokens_per_batch=8192
        )
        plan = EvaluationPlan(
            "preferences",
            SUITES["preferences"],
            [str(tmp_path / f"{data}.jsonl")],
            tmp_path / f"{checkpoint}_{data}_{leave_out}",
            leave_out,
        )
        return evaluate_module.evaluate(plan, read_data(plan), scorer)

    with pytest.raises(
        ScoringError, match=r"Case all\.jsonl:1 has no scores: Input 0 got the scores \[nan.*not finite"
    ):
        figures("nan", "all", leave_out=False)
    result, expected = figures("nan", "all", leave_out=True), figures("intact", "others", leave_out=False)
    assert result["num_refused"] == NUM_PAIRS / 4
    assert f"{NUM_PAIRS // 4} of {NUM_PAIRS} cases have no scores and are left out" in result["notes"]
    assert all("not finite" in case["reason"] for case in result["refused"])
    assert result["figures"] == {
        name: pytest.approx(figure, abs=1e-4, nan_ok=True) for name, figure in expected["figures"].items()
    }


def test_a_service_that_is_away_is_no_reason_to_leave_cases_out(data: Path) -> None:
    class AwayScorer(TextScorer):
        def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
            if self.num_scored:
                raise ScorerUnavailableError("away")
            return super().score(inputs)

    with pytest.raises(ScorerUnavailableError):
        evaluate(plan_of(data, leave_out=True), AwayScorer(length))


def test_a_service_that_refuses_the_key_is_no_reason_to_leave_cases_out(data: Path) -> None:
    class LockedScorer(TextScorer):
        def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
            raise ScoringError("HTTP 401: no key")

    with pytest.raises(ScoringError, match="HTTP 401"):
        evaluate(plan_of(data, leave_out=True), LockedScorer(length))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[:3] + lines[2:], "out of order"),
        (lambda lines: ["not JSON", *lines[1:]], "is no log of scores"),
        (lambda lines: [*lines[:2], lines[2].replace("[", "[0.5, "), *lines[3:]], "a score for every completion"),
    ],
    ids=["twice", "not JSON", "a score too many"],
)
def test_a_spoilt_log_is_not_used(data: Path, spoil: Callable[[list[str]], list[str]], message: str) -> None:
    evaluate(plan_of(data), TextScorer(length))
    log = data.parent / "out" / "scores.jsonl"
    log.write_text("".join(line + "\n" for line in spoil(log.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        evaluate(plan_of(data), TextScorer(length))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url=http://127.0.0.1:port", "--data=DATA"], "is not a URL"),
        (
            ["--url=http://127.0.0.1:9", "--data=DATA", "--require=accuracy>=0.5"],
            "none of the figures: all.tied_scores, all.accuracy",
        ),
        (["--url=http://127.0.0.1:9", "--data=DATA", "--against=nowhere"], "There is no nowhere"),
        (["--url=http://127.0.0.1:9", "--data=DATA", "--by=goal"], "there is no 'goal', which --by names"),
        (["--url=http://127.0.0.1:9", "--data=DATA/nothing.parquet"], "nothing.parquet"),
        (["--url=http://127.0.0.1:9", "--data=BROKEN"], "broken.parquet cannot be read"),
        (["--url=http://127.0.0.1:9", "--data=SURROGATE"], "Row surrogate.jsonl:1: Completion 0 is not valid Unicode"),
        (["--model=nowhere", "--data=DATA", "--device=gpu"], "--device gpu cannot be used"),
        pytest.param(
            ["--model=nowhere", "--data=DATA", "--device=cuda"],
            f"on {HOST}, does the scoring, and {HOST} has no CUDA. Start",
            marks=WITHOUT_CUDA,
        ),
        (["--model=nowhere", "--data=DATA"], "nowhere"),
    ],
)
def test_mistakes_get_one_message_before_anything_is_scored(
    data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, surrogate = data.parent / "broken.parquet", data.parent / "surrogate.jsonl"
    broken.write_bytes(b"PAR1 and no more")
    surrogate.write_text('{"prompt": "p", "chosen": "\\ud83d", "rejected": "b"}\n')
    names = {"DATA": data, "BROKEN": broken, "SURROGATE": surrogate}
    options = [
        functools.reduce(lambda text, name: text.replace(name, str(names[name])), names, option) for option in options
    ]
    assert main(["evaluate", *options, "--suite=preferences", f"--out={data.parent / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_inside_a_ray_job_a_relative_out_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["evaluate", "--url=http://127.0.0.1:9", f"--data={data}", "--suite=preferences", "--out=out"]) == 2
    assert (
        "--out out is relative, and a Ray job's working directory is an unpacked copy that vanishes with the job"
        in capsys.readouterr().err
    )


def test_the_names_of_figures_are_known_before_any_score(data: Path) -> None:
    assert figure_names(SUITES["preferences"], read_data(plan_of(data)).cases) == list(
        evaluate(plan_of(data), TextScorer(length))["figures"]
    )


def test_a_constant_scorer_is_warned_of(data: Path) -> None:
    assert any(
        "does not tell their completions apart" in note
        for note in evaluate(plan_of(data), TextScorer(lambda _: 0.0))["notes"]
    )


def test_a_row_that_cannot_be_read_is_named(data: Path) -> None:
    data.write_text(data.read_text() + '{"prompt": "p"}\n')
    with pytest.raises(DataError, match=f"Row pairs.jsonl:{NUM_PAIRS + 1}: Columns"):
        evaluate(plan_of(data), TextScorer(length))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all.accuracy>=0.5", ("all.accuracy", ">=", 0.5)),
        ("Chat Hard.accuracy <= 1e-1", ("Chat Hard.accuracy", "<=", 0.1)),
    ],
)
def test_requirements_are_read(text: str, expected: tuple[str, str, float]) -> None:
    assert command.parse_requirement(text) == expected


@pytest.mark.parametrize("text", ["all.accuracy", "all.accuracy>0.5", "a>=high", ">=0.5"])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no requirement"):
        command.parse_requirement(text)


def test_requirements_that_do_not_hold_are_named(data: Path) -> None:
    result = evaluate(plan_of(data), TextScorer(length))
    assert command.unmet([("all.accuracy", ">=", 0.75), ("all.accuracy", "<=", 0.75)], result) == []
    assert command.unmet([("all.accuracy", ">=", 0.8)], result) == ["all.accuracy >= 0.8: it is 0.7500"]
    with pytest.raises(ConfigError, match="none of the figures"):
        command.unmet([("accuracy", ">=", 0.8)], result)


def against(data: Path, other: str) -> EvaluationPlan:
    return EvaluationPlan(
        "preferences", SUITES["preferences"], [str(data)], data.parent / "own", True, data.parent / other
    )


def test_two_models_are_compared_on_the_cases_that_both_have_scores_of(data: Path) -> None:
    evaluate(plan_of(data, leave_out=True), TextScorer(no_score_of_bad, checkpoint="sha256:two"))
    comparison = evaluate(against(data, "out"), TextScorer(lambda text: -length(text)))["against"]
    assert (comparison["checkpoint"], comparison["num_cases"]) == ("sha256:two", NUM_PAIRS * 3 // 4)
    assert comparison["differences"]["all.accuracy"] == {
        "value": -1.0,
        "low": -1.0,
        "high": -1.0,
        "p_value": pytest.approx(2 / 1001),
    }


def test_a_model_does_not_differ_from_itself(data: Path) -> None:
    evaluate(plan_of(data), TextScorer(length))
    differences = evaluate(against(data, "out"), TextScorer(length))["against"]["differences"]
    assert all(
        (difference["value"], difference["low"], difference["high"], difference["p_value"]) == (0, 0, 0, 1)
        for difference in differences.values()
    )


def test_an_evaluation_of_other_data_or_an_unfinished_one_is_not_compared_with(data: Path) -> None:
    evaluate(plan_of(data), TextScorer(length))
    log = data.parent / "out" / "scores.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="has the scores of 19 of 20 cases"):
        evaluate(against(data, "out"), TextScorer(length))
    data.write_text(data.read_text().replace("Prompt", "Question"))
    with pytest.raises(DataError, match="files was"):
        evaluate(
            EvaluationPlan(
                "preferences", SUITES["preferences"], [str(data)], data.parent / "new", True, data.parent / "out"
            ),
            TextScorer(length),
        )
    with pytest.raises(DataError, match="There is no"):
        evaluate(
            EvaluationPlan(
                "preferences", SUITES["preferences"], [str(data)], data.parent / "third", True, data.parent / "nowhere"
            ),
            TextScorer(length),
        )
