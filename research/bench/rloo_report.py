"""Print the tables of the RLOO bench."""

import time
from statistics import median

from research.bench.rloo_turns import Contender
from research.bench.scoring_figures import ratio_of_rounds

PHASES = {
    "generate": "generate",
    "measure": "measure",
    "wait_for_scores": "wait for scores",
    "update": "update",
    "weight_sync": "weight sync",
}
started_s = time.perf_counter()


def print_table(title: str, contenders: list[Contender]) -> None:
    """Print the table of all contenders. Ratios are medians over the rounds, and compare with the first contender."""
    print(
        f"\n| {title} | s a step, median | ratio of steps/s | tokens a completion | cores in use "
        "| idle trainers meanwhile, cores | s a step of each round |"
    )
    print("| --- " * 7 + "|")
    for contender in contenders:
        rounds = " ".join(f"{done.seconds_per_step:.2f}" for done in contender.rounds)
        ratio = ratio_of_rounds(contender.steps_per_s, contenders[0].steps_per_s)
        cores = f"{median(contender.cores):.2f} | {median(contender.others_cores):.2f}"
        print(
            f"| {contender.label} | {contender.step_s:.3f} | {ratio:.2f} | {contender.completion_tokens:.1f} "
            f"| {cores} | {rounds} |"
        )
    print(flush=True)


def print_our_table(title: str, contenders: list[Contender]) -> None:
    """Print where the seconds of a step go, as medians over all steps. Phases that overlap make `rest` negative."""
    phases = " | ".join(PHASES.values())
    print(f"\n| {title} | s a step, median | ratio of steps/s | {phases} | rest | tokens a completion |")
    print("| --- " * (5 + len(PHASES)) + "|")
    for contender in contenders:
        seconds = [contender.phase_s(phase) for phase in PHASES]
        ratio = ratio_of_rounds(contender.steps_per_s, contenders[0].steps_per_s)
        cells = " | ".join(f"{value:.3f}" for value in seconds)
        print(
            f"| {contender.label} | {contender.step_s:.3f} | {ratio:.2f} | {cells} "
            f"| {contender.step_s - sum(seconds):.3f} | {contender.completion_tokens:.1f} |"
        )
    print(flush=True)


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - started_s:4.0f} s] {message}", flush=True)
