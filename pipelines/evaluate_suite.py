"""Measure how well a reward model ranks on a benchmark or on one's own files: `rm-robust evaluate --suite …`."""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rm_robust.cluster.log_lines import start_logging
from rm_robust.cluster.session import connect_to_ray
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.errors import ConfigError, RmRobustError
from rm_robust.evaluation.evaluate import CASES_AT_A_TIME, EvaluationPlan, evaluate, figure_names, read_data
from rm_robust.evaluation.page import write_page
from rm_robust.evaluation.suites import SUITES, Suite, preferences_by
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import require_lasting
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import Scorer

_REQUIREMENT = re.compile(r"\s*(?P<figure>.+?)\s*(?P<relation>>=|<=)\s*(?P<bound>[-+0-9.eE]+)\s*")


def evaluate_suite(options: argparse.Namespace) -> int:
    """Evaluate on a suite, and return the exit status.

    0: done; 1: a requirement is not met; 2: an error that a user can correct; 130: stopped with Ctrl-C.
    """
    start_logging()
    quieten_libraries()
    try:
        require_lasting(options.out, f"--out {options.out}")
        requirements = [parse_requirement(text) for text in options.require]
        options.model = options.model and run_files.locate(options.model)
        scored_with = {"max_length_tokens": options.max_length_tokens} if options.url is None else {}
        plan = EvaluationPlan(
            options.suite,
            _suite(options),
            options.data,
            options.out,
            options.leave_out_refused,
            options.against,
            scored_with,
        )
        data = read_data(plan)
        require_known([figure for figure, _, _ in requirements], figure_names(plan.suite, data.cases))
        with _scorer(options) as scorer:
            result = evaluate(plan, data, scorer, cases_at_a_time=CASES_AT_A_TIME * max(1, options.workers))
        page = write_page(result, options.out)
        print("\n".join(table(result)))
        failed = unmet(requirements, result)
    except (RmRobustError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{options.out / 'result.json'}, {page}")
    for line in failed:
        print(f"not met: {line}", file=sys.stderr)
    return 1 if failed else 0


def parse_requirement(text: str) -> tuple[str, str, float]:
    """Parse `figure>=number` or `figure<=number`. Raises ConfigError for anything else."""
    match = _REQUIREMENT.fullmatch(text)
    with contextlib.suppress(ValueError):  # float() refuses the text
        if match:
            return match["figure"], match["relation"], float(match["bound"])
    raise ConfigError(
        f'--require {text!r} is no requirement. Write "FIGURE>=NUMBER" or "FIGURE<=NUMBER", for example '
        '"mutual_disjoint.kendall_tau>=0.55".'
    )


def require_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a figure that no result has."""
    for name in names:
        if name not in known:
            raise ConfigError(f"--require names {name!r}, which is none of the figures: {', '.join(known)}.")


def unmet(requirements: Sequence[tuple[str, str, float]], result: dict[str, Any]) -> list[str]:
    """Return a line for each requirement that does not hold. A figure without a value meets none.

    Raises ConfigError for a figure that the result does not have.
    """
    require_known([figure for figure, _, _ in requirements], list(result["figures"]))
    lines = []
    for figure, relation, bound in requirements:
        value = result["figures"][figure]["value"]
        if value is None or not (value >= bound if relation == ">=" else value <= bound):
            lines.append(f"{figure} {relation} {bound:g}: it is {'undefined' if value is None else f'{value:.4f}'}")
    return lines


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines that a terminal shows: every figure with its interval, and the differences from --against."""
    width = max(map(len, result["figures"]))
    num_scored = result["num_cases"] - result["num_refused"]
    checkpoint = result["checkpoint"][:19]
    head = f"{result['suite']}: {num_scored} of {result['num_cases']} cases, checkpoint {checkpoint}"
    rows = [f"{name:{width}}  {_with_interval(figure)}" for name, figure in result["figures"].items()]
    if "against" in result:
        against = result["against"]
        rows += ["", f"minus checkpoint {against['checkpoint'][:19]}, on {against['num_cases']} cases:"]
        rows += [
            f"{name:{width}}  {_with_interval(difference)}   p = {difference['p_value']:.3f}"
            for name, difference in against["differences"].items()
        ]
    return [head, *rows, f"intervals: {result['interval']}", *(f"note: {note}" for note in result["notes"])]


def _with_interval(figure: dict[str, Any]) -> str:
    return f"{_shown(figure['value'])}   {_shown(figure['low'])} to {_shown(figure['high'])}"


def _shown(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"


def _suite(options: argparse.Namespace) -> Suite:
    if options.by is None:
        return SUITES[options.suite]
    if options.suite != "preferences":
        raise ConfigError(f"--by names the column of subsets in the suite preferences; {options.suite} takes none.")
    return preferences_by(options.by)


@contextlib.contextmanager
def _scorer(options: argparse.Namespace) -> Iterator[Scorer]:
    if options.url is not None:
        with RewardClient(options.url, model=options.served_model) as client:
            yield client
        return
    settings = {
        "device": options.device,
        "max_length_tokens": options.max_length_tokens,
        "max_tokens_per_batch": options.max_tokens_per_batch,
    }
    if options.workers < 0:
        raise ConfigError(f"--workers {options.workers} is no number of workers; 0 evaluates in this process.")
    if options.workers:
        from rm_robust.scoring.checkpoint_scorer import ShardedScorer

        connect_to_ray()
        yield ShardedScorer(options.model, num_workers=options.workers, num_cpus=options.cpus_per_worker, **settings)
        return
    from rm_robust.scoring.checkpoint_scorer import ON_A_GPU, CheckpointScorer, require_device

    require_device(
        options.device, f"--device {options.device}", fix=f"{ON_A_GPU}, or let a cluster's nodes score (--workers)."
    )
    yield CheckpointScorer(options.model, **settings)
