"""A suite's figures for whatever scores: one path for a checkpoint and for a served endpoint.

rows ─parse─► cases, some at a time ─Scorer─► scores.jsonl (as they come) ─strata─► means ─combine, bootstrap over prompts─► result.json
                         └─ refused (too long, not finite): the evaluation stops, or leaves the case out and says so
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rm_robust.errors import DataError, RefusedInputError, ScoringError
from rm_robust.evaluation.bootstrap import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Estimate,
    differences,
    estimates,
    resampled_figures,
)
from rm_robust.evaluation.cases import Case, CaseFacts, HashedFile, KnownCase, hashed_files, read_cases
from rm_robust.evaluation.score_log import Outcome, ScoreLog, read_log, require_same
from rm_robust.evaluation.suites import Suite
from rm_robust.runs.storage.commits import write_json_atomic
from rm_robust.scoring.contract import Scorer, ScoreReply

SEED = 0
CASES_AT_A_TIME = 64
NUM_REFUSED_SHOWN = 10
LIBRARIES = ("torch", "transformers", "scipy", "numpy")
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate."""

    suite_name: str
    suite: Suite
    paths: list[str]
    folder: Path
    leave_out_refused: bool = False
    """Cases without scores are left out and counted, instead of ending the evaluation."""
    against: Path | None = None
    """Another evaluation's folder, of the same data and finished: its figures are subtracted."""
    scored_with: Mapping[str, Any] = field(default_factory=dict)
    """What decides which cases have scores; an evaluation goes on under the same alone."""


@dataclass(frozen=True)
class Data:
    """The cases of an evaluation without their texts, which are read again to be scored, and what tells them from others."""

    cases: list[KnownCase]
    files: list[HashedFile]
    identity: dict[str, Any]


def read_data(what: Evaluation) -> Data:
    """Raises DataError for a row that cannot be read, and when `against` is not of the same data, or not finished."""
    cases = [case.without_texts for case in read_cases(what.paths, what.suite.parse)]
    if not cases:
        raise DataError(f"There are no rows in {', '.join(what.paths)}.")
    files = hashed_files(what.paths)
    subsets = sorted({case.subset for case in cases})
    texts = hashlib.blake2b(
        b"".join(case.fingerprint for case in cases), digest_size=16
    ).hexdigest()  # a suite may add some of its own
    identity = {
        "suite": what.suite_name,
        "files": [file.sha256 for file in files],
        "num_cases": len(cases),
        "subsets": subsets,
        "texts": texts,
    }
    data = Data(cases, files, identity)
    if what.against is not None:
        _outcomes_of_other(what.against, data)
    return data


def figure_names(suite: Suite, cases: Sequence[CaseFacts]) -> list[str]:
    """What a result of these cases can have."""
    strata = suite.strata(cases, [[0.0] * len(case.gold_scores) for case in cases])
    return list(resampled_figures(strata, suite.combine, seed=SEED, num_resamples=0))


def evaluate(what: Evaluation, data: Data, scorer: Scorer, *, cases_at_a_time: int = CASES_AT_A_TIME) -> dict[str, Any]:
    """Score every case, or those that an earlier call did not reach, and write `folder`/result.json, which is also returned.

    Raises DataError for a folder of another evaluation; ScoringError when scoring fails, when a case has no scores (see Evaluation), and when the
    checkpoint changes on the way.
    """
    cases = data.cases
    checkpoint = _checkpoint_of(
        scorer, list(islice(read_cases(what.paths, what.suite.parse), CASES_AT_A_TIME)), what
    )  # before anything is written
    what.folder.mkdir(parents=True, exist_ok=True)
    own = {"checkpoint": checkpoint, "leave_out_refused": what.leave_out_refused, "scored_with": dict(what.scored_with)}
    log = ScoreLog(what.folder / SCORES, data.identity | own)
    with tqdm(
        desc=f"evaluate {what.suite_name}", unit=" prompts", total=len(cases), initial=len(log.outcomes), mininterval=2
    ) as bar:
        waiting = islice(read_cases(what.paths, what.suite.parse), len(log.outcomes), None)
        while part := list(islice(waiting, cases_at_a_time)):
            _require_unchanged(part, cases[len(log.outcomes) : len(log.outcomes) + len(part)])
            outcomes = score_part(scorer, part, checkpoint=checkpoint)
            refused = next((index for index, outcome in enumerate(outcomes) if isinstance(outcome, str)), None)
            if refused is not None and not what.leave_out_refused:
                log.append(outcomes[:refused])
                raise _no_scores(part[refused], str(outcomes[refused]))
            log.append(outcomes)
            bar.update(len(part))
    _require_unchanged([], cases[len(log.outcomes) :])
    _require_scores_of(cases, log.outcomes, what.folder / SCORES)
    result = _result(what, data, log.outcomes, checkpoint)
    write_json_atomic(what.folder / "result.json", result)
    return result


def score_part(scorer: Scorer, cases: Sequence[Case], *, checkpoint: str) -> list[Outcome]:
    """Of every case its scores, or why it has none: a refused request is asked in halves until the cases that it is refused for are alone.

    Raises ScoringError for any other failure, and when another checkpoint answers.
    """
    reply = _ask(scorer, cases)
    if isinstance(reply, str):
        if len(cases) == 1:
            return [reply]
        half = len(cases) // 2
        return score_part(scorer, cases[:half], checkpoint=checkpoint) + score_part(
            scorer, cases[half:], checkpoint=checkpoint
        )
    if reply.checkpoint != checkpoint:
        raise ScoringError(
            f"The scorer has changed from {checkpoint} to {reply.checkpoint}: scores of two checkpoints cannot be compared. Evaluate again."
        )
    return list(reply.scores)


def figures_of(suite: Suite, cases: Sequence[CaseFacts], scores: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """A suite's figures with their intervals, of known scores."""
    found = estimates(suite.strata(cases, scores), suite.combine, seed=SEED)
    without = {
        name: Estimate(own.value, math.nan, math.nan)
        for name, own in found.items()
        if _last_part(name) in suite.without_interval
    }
    return found | without


def _ask(scorer: Scorer, cases: Sequence[Case]) -> ScoreReply | str:
    """Its reply, or why it refuses these texts."""
    try:
        return scorer.score([case.score_input for case in cases])
    except RefusedInputError as error:
        return str(error)


def _checkpoint_of(scorer: Scorer, cases: Sequence[Case], what: Evaluation) -> str:
    """Of the first case that has scores."""
    reason = ""
    for case in cases:
        reply = _ask(scorer, [case])
        if not isinstance(reply, str):
            return reply.checkpoint
        if not what.leave_out_refused:
            raise _no_scores(case, reply)
        reason = reply
    raise ScoringError(f"None of the first {len(cases)} cases has scores. The last reason: {reason}")


def _require_unchanged(part: Sequence[Case], known: Sequence[KnownCase]) -> None:
    """Raises DataError when the files are not those that were read first."""
    for case, expected in zip_longest(part, known):
        if case is None or case.without_texts != expected:
            raise DataError(
                f"Case {(case or expected).place} is not what it was a moment ago: a file changed while it was evaluated. Evaluate again."
            )


def _no_scores(case: Case, reason: str) -> ScoringError:
    return ScoringError(f"Case {case.place} has no scores: {reason} With --leave-out-refused such cases are counted.")


def _outcomes_of_other(folder: Path, data: Data) -> tuple[str, list[Outcome]]:
    """Checkpoint and outcomes of a finished evaluation of the same data."""
    path = folder / SCORES
    found, outcomes = read_log(path)
    require_same(path, found, data.identity)
    if len(outcomes) < len(data.cases):
        raise DataError(
            f"{path} has the scores of {len(outcomes)} of {len(data.cases)} cases: finish that evaluation first."
        )
    _require_scores_of(data.cases, outcomes, path)
    return str(found["checkpoint"]), outcomes


def _require_scores_of(cases: Sequence[CaseFacts], outcomes: Sequence[Outcome], path: Path) -> None:
    """Raises DataError when a log does not have one score a completion."""
    if len(cases) != len(outcomes) or any(
        len(own) != len(case.gold_scores) for case, own in zip(cases, outcomes, strict=True) if not isinstance(own, str)
    ):
        raise DataError(f"{path} does not have a score for every completion. Delete it, and evaluate again.")


def _compared(what: Evaluation, data: Data, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every figure minus that of the evaluation in `against`, on the cases of which both have scores."""
    assert what.against is not None
    checkpoint, other_outcomes = _outcomes_of_other(what.against, data)
    both = [
        (case, own, other)
        for case, own, other in zip(data.cases, outcomes, other_outcomes, strict=True)
        if not isinstance(own, str) and not isinstance(other, str)
    ]
    shared = [case for case, _, _ in both]
    found = {}
    if both:
        strata, others = (
            what.suite.strata(shared, [own for _, own, _ in both]),
            what.suite.strata(shared, [other for _, _, other in both]),
        )
        found = differences(strata, others, what.suite.combine, seed=SEED)
    kept = {
        name: _finite(asdict(own)) for name, own in found.items() if _last_part(name) not in what.suite.without_interval
    }
    return {"checkpoint": checkpoint, "num_cases": len(both), "differences": kept}


def _result(what: Evaluation, data: Data, outcomes: Sequence[Outcome], checkpoint: str) -> dict[str, Any]:
    known = [(case, own) for case, own in zip(data.cases, outcomes, strict=True) if not isinstance(own, str)]
    refused = [
        {"case": case.place, "reason": own}
        for case, own in zip(data.cases, outcomes, strict=True)
        if isinstance(own, str)
    ]
    known_cases, scores = [case for case, _ in known], [own for _, own in known]
    tied = sum(len(set(own)) == 1 for own in scores)
    notes = what.suite.notes(known_cases)
    notes += [f"{len(refused)} of {len(data.cases)} cases have no scores and are left out"] if refused else []
    notes += (
        [
            f"the scores of {tied} of {len(scores)} prompts are all equal: the model does not tell their completions apart"
        ]
        if tied
        else []
    )
    result: dict[str, Any] = {
        "suite": what.suite_name,
        "checkpoint": checkpoint,
        "files": [asdict(file) for file in data.files],
        "num_cases": len(data.cases),
        "num_refused": len(refused),
        "refused": refused[:NUM_REFUSED_SHOWN],
        "notes": notes,
        "interval": f"{CONFIDENCE:.0%} percentile bootstrap over prompts, {NUM_RESAMPLES} resamples, seed {SEED}",
        "figures": {name: _finite(asdict(own)) for name, own in figures_of(what.suite, known_cases, scores).items()},
        "versions": {name: version(name) for name in LIBRARIES},
    }
    result |= what.suite.details(known_cases, scores)
    return result | ({} if what.against is None else {"against": _compared(what, data, outcomes)})


def _last_part(figure: str) -> str:
    return figure.rpartition(".")[2]


def _finite(figure: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {key: None if math.isnan(value) else value for key, value in figure.items()}
