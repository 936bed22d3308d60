"""Evaluate a reward model on a suite: score every case, then work out the figures.

A checkpoint and a served endpoint take the same path, since both are a Scorer.

rows ─parse─► cases ─Scorer, some cases at a time─► scores.jsonl ─strata, bootstrap─► means ─combine─► result.json
                       └─ refused (too long, not finite): stop, or leave the case out and count it
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
from rm_robust.evaluation.cases import Case, CaseFacts, HashedFile, KnownCase, hashed_files, read_cases, skipped_files
from rm_robust.evaluation.score_log import Outcome, ScoreLog, read_log, require_same
from rm_robust.evaluation.suites import Suite
from rm_robust.runs import files as run_files
from rm_robust.scoring.contract import Scorer, ScoreReply

SEED = 0
CASES_AT_A_TIME = 64
NUM_REFUSED_SHOWN = 10
"""The number of refused cases that the result names."""
LIBRARIES = ("torch", "transformers", "scipy", "numpy")
"""The libraries whose versions the result names."""
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be evaluated, and how."""

    suite_name: str
    suite: Suite
    paths: list[str]
    """Files or folders of the suite's rows."""
    folder: Path
    """The folder of scores.jsonl and result.json."""
    leave_out_refused: bool = False
    """Whether cases without scores are left out and counted, instead of ending the evaluation."""
    against: Path | None = None
    """The folder of a finished evaluation of the same data, whose figures are subtracted."""
    scored_with: Mapping[str, Any] = field(default_factory=dict)
    """Settings that decide which cases have scores. A stopped evaluation goes on only under the same settings."""

    def read_cases(self) -> Iterator[Case]:
        """Yield the cases of the plan's files, in order. Raises DataError for a row that cannot be read."""
        return read_cases(self.paths, self.suite.parse, self.suite.columns)


@dataclass(frozen=True)
class Data:
    """The cases of an evaluation, without their texts: `evaluate` reads the texts again from the files."""

    cases: list[KnownCase]
    files: list[HashedFile]
    identity: dict[str, Any]
    """What tells these data from others: the suite, the hashes of the files, and the texts."""


def read_data(plan: EvaluationPlan) -> Data:
    """Read the plan's files.

    Raises DataError for a row that cannot be read, for files without rows, and when the evaluation in `against` is of
    other data or not finished.
    """
    cases = [case.without_texts for case in plan.read_cases()]
    if not cases:
        raise DataError(f"There are no rows in {', '.join(plan.paths)}.")
    files = hashed_files(plan.paths)
    subsets = sorted({case.subset for case in cases})
    # The hashes of the files are not enough: a suite may add texts of its own.
    texts = hashlib.blake2b(b"".join(case.fingerprint for case in cases), digest_size=16).hexdigest()
    identity = {
        "suite": plan.suite_name,
        "files": [file.sha256 for file in files],
        "num_cases": len(cases),
        "subsets": subsets,
        "texts": texts,
    }
    data = Data(cases, files, identity)
    if plan.against is not None:
        _outcomes_of_other(plan.against, data)
    return data


def figure_names(suite: Suite, cases: Sequence[CaseFacts]) -> list[str]:
    """Return the names of the figures that a result of these cases can have."""
    strata = suite.strata(cases, [[0.0] * len(case.gold_scores) for case in cases])
    return list(resampled_figures(strata, suite.combine, seed=SEED, num_resamples=0))


def evaluate(
    plan: EvaluationPlan, data: Data, scorer: Scorer, *, cases_at_a_time: int = CASES_AT_A_TIME
) -> dict[str, Any]:
    """Score every case that an earlier call did not reach, write the plan's result.json and return it.

    Raises DataError for a folder of another evaluation. Raises ScoringError when scoring fails, when a case has no
    scores (unless the plan leaves such cases out), and when the checkpoint changes meanwhile.
    """
    cases = data.cases
    # The checkpoint is asked for before anything is written.
    checkpoint = _checkpoint_of(scorer, list(islice(plan.read_cases(), CASES_AT_A_TIME)), plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    setup = {
        "checkpoint": checkpoint,
        "leave_out_refused": plan.leave_out_refused,
        "scored_with": dict(plan.scored_with),
    }
    log = ScoreLog(plan.folder / SCORES, data.identity | setup)
    with tqdm(
        desc=f"evaluate {plan.suite_name}", unit=" prompts", total=len(cases), initial=len(log.outcomes), mininterval=2
    ) as bar:
        waiting = islice(plan.read_cases(), len(log.outcomes), None)
        while part := list(islice(waiting, cases_at_a_time)):
            _require_unchanged(part, cases[len(log.outcomes) : len(log.outcomes) + len(part)])
            outcomes = score_part(scorer, part, checkpoint=checkpoint)
            refused = next((index for index, outcome in enumerate(outcomes) if isinstance(outcome, str)), None)
            if refused is not None and not plan.leave_out_refused:
                log.append(outcomes[:refused])
                raise _no_scores(part[refused], str(outcomes[refused]))
            log.append(outcomes)
            bar.update(len(part))
    _require_unchanged([], cases[len(log.outcomes) :])
    _require_scores_of(cases, log.outcomes, plan.folder / SCORES)
    result = _result(plan, data, log.outcomes, checkpoint)
    run_files.write_json(plan.folder / "result.json", result)
    return result


def score_part(scorer: Scorer, cases: Sequence[Case], *, checkpoint: str) -> list[Outcome]:
    """Return the scores of every case, or the reason why it has none.

    A refused request is halved and asked again, until the cases that cause the refusal are alone. Raises ScoringError
    for any other failure, and when another checkpoint answers.
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
            f"The scorer has changed from {checkpoint} to {reply.checkpoint}: "
            "scores of two checkpoints cannot be compared. Evaluate again."
        )
    return list(reply.scores)


def figures_of(suite: Suite, cases: Sequence[CaseFacts], scores: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """Return the suite's figures of these scores, with their intervals.

    The bounds of an interval are NaN for the figures in `suite.without_interval`.
    """
    figures = estimates(suite.strata(cases, scores), suite.combine, seed=SEED)
    without_interval = {
        name: Estimate(figure.value, math.nan, math.nan)
        for name, figure in figures.items()
        if _last_part(name) in suite.without_interval
    }
    return figures | without_interval


def _ask(scorer: Scorer, cases: Sequence[Case]) -> ScoreReply | str:
    """Return the scorer's reply, or the reason why it refuses these texts."""
    try:
        return scorer.score([case.score_input for case in cases])
    except RefusedInputError as error:
        return str(error)


def _checkpoint_of(scorer: Scorer, cases: Sequence[Case], plan: EvaluationPlan) -> str:
    """Return the checkpoint that answers for the first case that has scores."""
    reason = ""
    for case in cases:
        reply = _ask(scorer, [case])
        if not isinstance(reply, str):
            return reply.checkpoint
        if not plan.leave_out_refused:
            raise _no_scores(case, reply)
        reason = reply
    raise ScoringError(f"None of the first {len(cases)} cases has scores. The last reason: {reason}")


def _require_unchanged(part: Sequence[Case], known: Sequence[KnownCase]) -> None:
    """Raise DataError when a case is not the one that `read_data` read in its place."""
    for case, expected in zip_longest(part, known):
        if case is None or case.without_texts != expected:
            raise DataError(
                f"Case {(case or expected).place} is not what it was a moment ago: "
                "a file changed while it was evaluated. Evaluate again."
            )


def _no_scores(case: Case, reason: str) -> ScoringError:
    return ScoringError(
        f"Case {case.place} has no scores: {reason} With --leave-out-refused such cases are left out and counted."
    )


def _outcomes_of_other(folder: Path, data: Data) -> tuple[str, list[Outcome]]:
    """Return the checkpoint and the outcomes of a finished evaluation of the same data."""
    path = folder / SCORES
    logged_identity, outcomes = read_log(path)
    require_same(path, logged_identity, data.identity)
    if len(outcomes) < len(data.cases):
        raise DataError(
            f"{path} has the scores of {len(outcomes)} of {len(data.cases)} cases: finish that evaluation first."
        )
    _require_scores_of(data.cases, outcomes, path)
    return str(logged_identity["checkpoint"]), outcomes


def _require_scores_of(cases: Sequence[CaseFacts], outcomes: Sequence[Outcome], path: Path) -> None:
    """Raise DataError when a log does not have one score for every completion."""
    if len(cases) != len(outcomes) or any(
        len(outcome) != len(case.gold_scores)
        for case, outcome in zip(cases, outcomes, strict=True)
        if not isinstance(outcome, str)
    ):
        raise DataError(f"{path} does not have a score for every completion. Delete it and evaluate again.")


def _compared(plan: EvaluationPlan, data: Data, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the comparison with the evaluation in `against`: its checkpoint, and every figure minus its figure.

    It is made on the cases that have scores in both evaluations.
    """
    assert plan.against is not None
    checkpoint, other_outcomes = _outcomes_of_other(plan.against, data)
    scored_by_both = [
        (case, scores, other_scores)
        for case, scores, other_scores in zip(data.cases, outcomes, other_outcomes, strict=True)
        if not isinstance(scores, str) and not isinstance(other_scores, str)
    ]
    figures = {}
    if scored_by_both:
        cases = [case for case, _, _ in scored_by_both]
        strata = plan.suite.strata(cases, [scores for _, scores, _ in scored_by_both])
        other_strata = plan.suite.strata(cases, [other_scores for _, _, other_scores in scored_by_both])
        figures = differences(strata, other_strata, plan.suite.combine, seed=SEED)
    kept = {
        name: _finite(asdict(figure))
        for name, figure in figures.items()
        if _last_part(name) not in plan.suite.without_interval
    }
    return {"checkpoint": checkpoint, "num_cases": len(scored_by_both), "differences": kept}


def _result(plan: EvaluationPlan, data: Data, outcomes: Sequence[Outcome], checkpoint: str) -> dict[str, Any]:
    cases, scores, refused = [], [], []
    for case, outcome in zip(data.cases, outcomes, strict=True):
        if isinstance(outcome, str):
            refused.append({"case": case.place, "reason": outcome})
        else:
            cases.append(case)
            scores.append(outcome)
    notes = plan.suite.notes(cases)
    if refused:
        notes.append(f"{len(refused)} of {len(data.cases)} cases have no scores and are left out")
    if skipped := skipped_files(plan.paths):
        notes.append(f"{len(skipped)} files in the folders are not read, such as {skipped[0]}")
    num_tied = sum(len(set(case_scores)) == 1 for case_scores in scores)
    if num_tied:
        notes.append(
            f"the scores of {num_tied} of {len(scores)} prompts are all equal: "
            "the model does not tell their completions apart"
        )
    result: dict[str, Any] = {
        "suite": plan.suite_name,
        "checkpoint": checkpoint,
        "files": [asdict(file) for file in data.files],
        "num_cases": len(data.cases),
        "num_refused": len(refused),
        "refused": refused[:NUM_REFUSED_SHOWN],
        "notes": notes,
        "interval": f"{CONFIDENCE:.0%} percentile bootstrap over prompts, {NUM_RESAMPLES} resamples, seed {SEED}",
        "figures": {name: _finite(asdict(figure)) for name, figure in figures_of(plan.suite, cases, scores).items()},
        "versions": {name: version(name) for name in LIBRARIES},
    }
    result |= plan.suite.details(cases, scores)
    return result | ({} if plan.against is None else {"against": _compared(plan, data, outcomes)})


def _last_part(figure: str) -> str:
    return figure.rpartition(".")[2]


def _finite(figure: dict[str, float]) -> dict[str, float | None]:
    """Return the figure with None for NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in figure.items()}
