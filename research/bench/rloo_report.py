"""The tables of the RLOO bench."""

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
    """Ratios of steps/s to the first, medians of the rounds' own."""
    print(
        f"\n| {title} | s a step, median | ratio of steps/s | tokens a completion | cores in use | idle trainers meanwhile, cores | s a step of each round |"
    )
    print("| --- " * 7 + "|")
    for own in contenders:
        rounds = " ".join(f"{done.seconds_per_step:.2f}" for done in own.rounds)
        print(f"| {own.label} | {own.step_s:.3f} | {ratio_of_rounds(own.steps_per_s, contenders[0].steps_per_s):.2f} | {own.completion_tokens:.1f} | "
              f"{median(own.cores):.2f} | {median(own.others_cores):.2f} | {rounds} |")  # fmt: skip
    print(flush=True)


def print_our_table(title: str, contenders: list[Contender]) -> None:
    """Where the seconds of a step go: medians over all steps. What overlaps makes `rest` negative."""
    print(
        f"\n| {title} | s a step, median | ratio of steps/s | {' | '.join(PHASES.values())} | rest | tokens a completion |"
    )
    print("| --- " * (5 + len(PHASES)) + "|")
    for own in contenders:
        seconds = [own.phase_s(phase) for phase in PHASES]
        ratio = ratio_of_rounds(own.steps_per_s, contenders[0].steps_per_s)
        print(f"| {own.label} | {own.step_s:.3f} | {ratio:.2f} | {' | '.join(f'{value:.3f}' for value in seconds)} | {own.step_s - sum(seconds):.3f} | "
              f"{own.completion_tokens:.1f} |")  # fmt: skip
    print(flush=True)


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - started_s:4.0f} s] {message}", flush=True)
