"""Start, await and end the servers of the scoring bench. Each is a process of its own on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from research.bench import scoring_requests as requests
from research.bench.preference_pairs import MAX_SEQUENCE_TOKENS
from research.bench.scoring_requests import Candidates
from rm_robust.cluster.environment import free_port
from rm_robust.data.chat import ChatFormat
from rm_robust.scoring.contract import SCORE_PATH
from serve.keys import new_key

OURS, OURS_NO_SHARING = "rm_robust", "rm_robust, no sharing between requests"
OPENRLHF = "OpenRLHF serve_rm"
VLLM, VLLM_CACHING = "vLLM, prefix caching off", "vLLM, prefix caching on"
UP_WITHIN_S = 300.0
STOPPED_WITHIN_S = 30.0
POLL_EVERY_S = 0.25
VLLM_KV_CACHE_BYTES = 2**30
"""The size of vLLM's cache.

64 of the longest conversations need less (8 KiB per token in the large model), so the cache never evicts what is in
use.
"""
VLLM_ENVIRONMENT = {
    # The engine still has a process of its own, and its worker runs inside it, which is faster on CPUs.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",  # without this project's weight transfer
}


@dataclass(frozen=True)
class Server:
    """How a server is started and asked."""

    name: str
    note: str
    """The chosen threads and flags, for the tables."""
    command: list[str]
    port: int
    path: str
    ready_path: str
    body: Callable[[Candidates, ChatFormat], bytes]
    scores: Callable[[Any], list[float]]
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"


@dataclass(frozen=True)
class Running:
    server: Server
    process: psutil.Popen
    log_path: Path

    def end_of_log(self) -> str:
        return self.log_path.read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """End the server. A second call does nothing."""
        stop(self.process)


def openrlhf(checkpoint: Path, *, num_threads: int) -> Server:
    port = free_port("127.0.0.1")
    command = [
        sys.executable,
        "-m",
        "research.bench.openrlhf_server",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
        "--threads",
        str(num_threads),
    ]
    return Server(
        OPENRLHF,
        of_threads(num_threads),
        command,
        port,
        "/get_reward",
        "/openapi.json",
        requests.openrlhf_body,
        requests.openrlhf_scores,
    )


def vllm(checkpoint: Path, *, num_threads: int, has_prefix_caching: bool) -> Server:
    """Return vLLM's OpenAI-compatible server.

    The `vllm` command does not start with the CPU build, because it looks for a package with another name.
    """
    port = free_port("127.0.0.1")
    command = [
        *(
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *(
            "--model",
            str(checkpoint),
            "--served-model-name",
            requests.VLLM_MODEL_NAME,
            "--runner",
            "pooling",
            "--dtype",
            "float32",
            "--enforce-eager",
        ),
        *("--max-model-len", str(MAX_SEQUENCE_TOKENS), "--kv-cache-memory-bytes", str(VLLM_KV_CACHE_BYTES)),
        *("--pooler-config", '{"use_activation": false}', "--disable-uvicorn-access-log"),
        "--enable-prefix-caching" if has_prefix_caching else "--no-enable-prefix-caching",
    ]
    name = VLLM_CACHING if has_prefix_caching else VLLM
    environment = VLLM_ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads)}
    return Server(
        name,
        of_threads(num_threads),
        command,
        port,
        "/classify",
        "/health",
        requests.vllm_body,
        requests.vllm_scores,
        environment=environment,
    )


def rm_robust(checkpoint: Path, *, shares_prompts: bool, folder: Path) -> Server:
    """Return our server with the replicas and threads that `python -m serve` chooses by default."""
    port = free_port("127.0.0.1")
    key, entry = new_key("bench")
    keys_file = folder / f"keys_{port}.toml"
    keys_file.write_text(f'bench = {{ sha256 = "{entry.sha256}" }}\n')
    command = [
        sys.executable,
        "-m",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
        "--keys",
        str(keys_file),
    ]
    command += ["--max-length-tokens", str(requests.LIST_TOKENS)]
    if not shares_prompts:
        command.append("--no-prompt-sharing")
    headers, environment = {"Authorization": f"Bearer {key}"}, {"RAY_TMPDIR": str(folder)}
    name = OURS if shares_prompts else OURS_NO_SHARING
    return Server(
        name, "", command, port, SCORE_PATH, "/readyz", requests.our_body, requests.our_scores, headers, environment
    )


def of_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


@contextmanager
def running(server: Server, folder: Path) -> Iterator[Running]:
    """Start the server, and end it with everything that it started when the block ends.

    It is ready after `wait_until_ready`.
    """
    log_path = folder / f"{server.port}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", **server.environment}
    with log_path.open("wb") as log:
        process = psutil.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    run = Running(server, process, log_path)
    try:
        yield run
    finally:
        run.end()


def stop(process: psutil.Popen) -> None:
    """Send SIGTERM, as an operator would, and then kill by process id what is left."""
    try:
        descendants = process.children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOPPED_WITHIN_S)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(descendants, timeout=5)
    for descendant in alive:
        descendant.kill()
    psutil.wait_procs(alive, timeout=5)


def wait_until_ready(runs: list[Running]) -> None:
    """Wait until all servers answer.

    Raises RuntimeError, with the end of the log, if a server ends or is not ready in time.
    """
    deadline_s = time.monotonic() + UP_WITHIN_S
    for run in runs:
        while not is_ready(run.server):
            if run.process.poll() is not None or time.monotonic() > deadline_s:
                problem = (
                    "is not ready in time"
                    if run.process.poll() is None
                    else f"ended with status {run.process.returncode}"
                )
                raise RuntimeError(f"{run.server.label} {problem}; the end of its log:\n{run.end_of_log()}")
            time.sleep(POLL_EVERY_S)


def is_ready(server: Server) -> bool:
    try:
        return (
            httpx.get(
                f"http://127.0.0.1:{server.port}{server.ready_path}", timeout=10, trust_env=False, verify=False
            ).status_code
            == 200
        )
    except httpx.TransportError:
        return False
