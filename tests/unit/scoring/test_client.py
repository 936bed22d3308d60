"""The scoring client works against a real HTTP server that fails in every way we know of."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rm_robust.errors import ConfigError, RefusedInputError, ScorerUnavailableError, ScoringError
from rm_robust.scoring.client import (
    KEY_VARIABLE,
    MAX_RETRIES,
    AsyncRewardClient,
    Failure,
    Retries,
    RewardClient,
    backoff_s,
)
from rm_robust.scoring.contract import ScoreInput, TokenCounts, split_inputs

CHECKPOINT_A, CHECKPOINT_B = "sha256:aaaa", "sha256:bbbb"


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Behaviour = Callable[[int, list[dict[str, Any]]], Answer]
"""A function of the number of the request, from 0, and its inputs that returns the server's answer."""


def right_scores(inputs: list[dict[str, Any]]) -> list[list[float]]:
    """Return the scores: a completion's score is its number, "7.5" -> 7.5."""
    return [[float(completion) for completion in item["completions"]] for item in inputs]


def scored(scores: list[list[float]], *, checkpoint: str = CHECKPOINT_A) -> Answer:
    return Answer(
        body=json.dumps({"model": "m", "checkpoint": checkpoint, "results": [{"scores": s} for s in scores]}).encode()
    )


def refused(status: int, message: str, **headers: str) -> Answer:
    return Answer(status, json.dumps({"error": {"type": "t", "message": message}}).encode(), headers)


@dataclass
class Server:
    url: str
    num_requests: int = 0
    authorization: str | None = None
    """The Authorization header of the last request."""
    num_in_flight: int = 0
    most_in_flight: int = 0
    connections: set[tuple[str, int]] = field(default_factory=set)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Server]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/prefix/v1/score"
            server.authorization = self.headers["authorization"]
            inputs = json.loads(self.rfile.read(int(self.headers["content-length"])))["inputs"]
            with lock:
                number = server.num_requests
                server.num_requests += 1
                server.num_in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.num_in_flight)
                server.connections.add(self.client_address)
            answer = behaviour(number, inputs)
            with lock:
                server.num_in_flight -= 1
            if answer.status == 0:  # drop the connection without a reply
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        server = Server(f"http://127.0.0.1:{httpd.server_port}/prefix/")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            httpd.shutdown()
            thread.join()


def numbered_inputs(num_inputs: int, *, num_completions: int = 1) -> list[ScoreInput]:
    return [
        ScoreInput(prompt=f"p{i}", completions=[f"{i}.{k}" for k in range(num_completions)]) for i in range(num_inputs)
    ]


def right_reply(inputs: list[ScoreInput]) -> list[list[float]]:
    return right_scores([item.model_dump() for item in inputs])


@pytest.fixture(autouse=True)
def no_real_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_robust.scoring.client.FIRST_BACKOFF_S", 0.001)


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_importing_the_client_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, rm_robust.scoring; print(sorted({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        == "[]"
    )


def test_scores_come_back_raw_and_in_order_with_the_model_and_checkpoint() -> None:
    inputs = [
        ScoreInput(prompt=[{"role": "user", "content": "hi"}], completions=["-31.25", "1e-7"]),
        ScoreInput(prompt="hi", completions=["4"]),
    ]
    with serving(lambda _, inputs: scored(right_scores(inputs))) as server, RewardClient(server.url) as client:
        reply = client.score(inputs)
    assert reply.scores == [[-31.25, 1e-7], [4.0]]
    assert (reply.model, reply.checkpoint) == ("m", CHECKPOINT_A)


def test_long_lists_are_chunked_with_bounded_concurrency_and_keep_their_order() -> None:
    def later_chunks_answer_first(number: int, inputs: list[dict[str, Any]]) -> Answer:
        assert sum(len(item["completions"]) for item in inputs) <= 4
        time.sleep(0.02 if number % 3 == 0 else 0)
        return scored(right_scores(inputs))

    inputs = numbered_inputs(41, num_completions=2)
    with serving(later_chunks_answer_first) as server:
        with RewardClient(server.url, max_completions_per_request=4, max_concurrent_requests=3) as client:
            assert client.score(inputs).scores == right_reply(inputs)
        assert server.num_requests == 21
        assert 1 < server.most_in_flight <= 3
        assert len(server.connections) <= 3, "connections are reused"


@pytest.mark.parametrize(
    "failure", [refused(429, "full", Retry_After="0"), refused(503, "no replica"), Answer(502, b"<html>"), Answer(0)]
)
def test_an_overloaded_failing_or_dropped_request_is_tried_again(failure: Answer) -> None:
    with serving(lambda number, inputs: failure if number < 2 else scored(right_scores(inputs))) as server:
        with RewardClient(server.url, max_retries=2) as client:
            assert client.score(numbered_inputs(3)).scores == [[0.0], [1.0], [2.0]]
        assert server.num_requests == 3


def test_the_servers_retry_after_is_waited_for() -> None:
    def full_at_first(number: int, inputs: list[dict[str, Any]]) -> Answer:
        return refused(429, "full", Retry_After="1") if number == 0 else scored(right_scores(inputs))

    with serving(full_at_first) as server, RewardClient(server.url) as client:
        started_s = time.monotonic()
        client.score(numbered_inputs(1))
    assert time.monotonic() - started_s >= 1.0


def test_backoff_doubles_with_jitter_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_robust.scoring.client.FIRST_BACKOFF_S", 0.1)
    for attempt, longest_s in [(0, 0.1), (3, 0.8), (50, 10.0)]:
        delays = [backoff_s(attempt, retry_after_s=0) for _ in range(200)]
        assert longest_s / 2 <= min(delays) < max(delays) <= longest_s
        assert max(delays) - min(delays) > longest_s / 4


def waits_until_the_end(failures: Callable[[int], Failure]) -> tuple[list[float], ScoringError]:
    """Return the waits before each new attempt and the error after the last one; failures(n) ends attempt n."""
    retries, waits = Retries(MAX_RETRIES), list[float]()
    try:
        while True:
            waits.append(retries.next_wait_s(failures(len(waits))))
    except ScoringError as error:
        return waits, error


@pytest.mark.parametrize(("jitter", "total_s"), [(0.5, 61.35), (1.0, 122.7)])
def test_a_service_may_be_full_or_away_for_a_minute(
    jitter: float, total_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1 s doubled up to 6.4 s gives 12.7 s, and 11 times 10 s gives 110 s. Jitter takes away half at most."""
    monkeypatch.setattr("rm_robust.scoring.client.FIRST_BACKOFF_S", 0.1)
    monkeypatch.setattr("random.uniform", lambda *_: jitter)
    for status in (429, 502, 503):
        waits, error = waits_until_the_end(lambda _, status=status: Failure(status, "full"))
        assert sum(waits) == pytest.approx(total_s)
        assert type(error) is ScorerUnavailableError
        assert str(error) == "19 attempts, the last one: full"
    waits, _ = waits_until_the_end(lambda _: Failure(429, "full", retry_after_s=3600))
    assert sum(waits) == pytest.approx(total_s + 18 * 10), "what the server asks for is bounded"


@pytest.mark.parametrize(("status", "error_class"), [(500, ScoringError), (504, ScorerUnavailableError)])
def test_a_failure_that_costs_the_server_an_attempt_is_tried_again_eight_times_however_often_it_was_full(
    status: int, error_class: type
) -> None:
    waits, error = waits_until_the_end(lambda _: Failure(status, "failed"))
    assert len(waits) == 8
    assert type(error) is error_class
    waits, _ = waits_until_the_end(lambda n: Failure(503 if n < 5 else status, "failed"))
    assert len(waits) == 5 + 8


def test_a_completion_that_has_no_score_is_not_asked_about_again() -> None:
    with (
        serving(lambda *_: refused(500, "inputs[0]: not finite", X_RM_Robust_Error="scoring_failed")) as server,
        RewardClient(server.url) as client,
    ):
        with pytest.raises(ScoringError, match="HTTP 500: inputs.0.: not finite") as caught:
            client.score(numbered_inputs(2))
        assert type(caught.value) is RefusedInputError
        assert server.num_requests == 1


def test_a_server_that_fails_for_ever_gives_an_error_after_the_last_retry() -> None:
    with serving(lambda *_: refused(500, "out of memory")) as server, RewardClient(server.url, max_retries=3) as client:
        with pytest.raises(
            ScoringError, match=r"inputs 0 to 1 of 2 .* 4 attempts, the last one: HTTP 500: out of memory"
        ):
            client.score(numbered_inputs(2))
        assert server.num_requests == 4


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 302])
def test_a_refusal_is_not_tried_again_and_its_reason_is_passed_on(status: int) -> None:
    with serving(lambda *_: refused(status, "inputs[0] is too long")) as server, RewardClient(server.url) as client:
        with pytest.raises(ScoringError, match=rf"HTTP {status}: inputs\[0\] is too long"):
            client.score(numbered_inputs(2))
        assert server.num_requests == 1


def test_who_sends_no_key_to_a_guarded_service_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with serving(lambda *_: refused(401, "A key is needed.")) as server:
        with RewardClient(server.url) as client, pytest.raises(ScoringError) as without:
            client.score(numbered_inputs(1))
        with RewardClient(server.url, api_key="wrong") as client, pytest.raises(ScoringError) as with_one:
            client.score(numbered_inputs(1))
    assert "HTTP 401: A key is needed. Set RM_ROBUST_API_KEY to a key of the service" in str(without.value)
    assert "Set RM_ROBUST_API_KEY" not in str(with_one.value)


def test_a_failure_names_the_chunk_that_failed_and_stops_the_others() -> None:
    def third_chunk_is_refused(_: int, inputs: list[dict[str, Any]]) -> Answer:
        return refused(422, "inputs[1] is odd") if inputs[0]["prompt"] == "p4" else scored(right_scores(inputs))

    named = r"inputs 4 to 5 of 100 .*inputs\[1\] is odd \(an index in this message counts from input 4\)"
    with (
        serving(third_chunk_is_refused) as server,
        RewardClient(server.url, max_completions_per_request=2, max_concurrent_requests=1) as client,
    ):
        with pytest.raises(ScoringError, match=named):
            client.score(numbered_inputs(100))
        assert server.num_requests == 3


WRONG_BODIES = {
    "a result is missing": (lambda right: {"results": right[:-1]}, "2 results for 3 inputs"),
    "a result is added": (lambda right: {"results": [*right, right[0]]}, "4 results for 3 inputs"),
    "results are reordered": (lambda right: {"results": right[::-1]}, r"results\[0\] has 3 scores for 1 completions"),
    "a score is missing": (
        lambda right: {"results": [*right[:2], {"scores": right[2]["scores"][:2]}]},
        r"results\[2\] has 2 scores for 3",
    ),
    "a score is NaN": (
        lambda right: {"results": [{"scores": [float("nan")]}, *right[1:]]},
        r"results.0.scores.0: .*finite",
    ),
    "a score is infinite": (
        lambda right: {"results": [{"scores": [float("-inf")]}, *right[1:]]},
        r"results.0.scores.0: .*finite",
    ),
    "a score is null": (lambda right: {"results": [{"scores": [None]}, *right[1:]]}, r"results.0.scores.0: .*number"),
    "a score is text": (lambda right: {"results": [{"scores": ["1.0"]}, *right[1:]]}, r"results.0.scores.0: .*number"),
    "the checkpoint is missing": (lambda right: {"results": right, "checkpoint": None}, r"checkpoint: .*string"),
}


@pytest.mark.parametrize("wrong", WRONG_BODIES.values(), ids=WRONG_BODIES.keys())
def test_a_reply_that_is_not_one_finite_score_per_completion_in_order_is_an_error(
    wrong: tuple[Callable[..., dict[str, Any]], str],
) -> None:
    spoil, message = wrong

    def answer(_: int, inputs: list[dict[str, Any]]) -> Answer:
        right = [{"scores": scores} for scores in right_scores(inputs)]
        return Answer(body=json.dumps({"model": "m", "checkpoint": CHECKPOINT_A, **spoil(right)}).encode())

    inputs = [
        ScoreInput(prompt="p", completions=[str(k) for k in range(num_completions)]) for num_completions in (1, 2, 3)
    ]
    with serving(answer) as server, RewardClient(server.url) as client:
        with pytest.raises(ScoringError, match=message):
            client.score(inputs)
        assert server.num_requests == 1


def test_a_body_that_is_not_json_is_an_error() -> None:
    page = Answer(body=b"<html>hello</html>")
    with (
        serving(lambda *_: page) as server,
        RewardClient(server.url) as client,
        pytest.raises(ScoringError, match="at its start: Invalid JSON"),
    ):
        client.score(numbered_inputs(1))


def test_a_checkpoint_that_changes_within_a_call_is_an_error() -> None:
    def swaps(_: int, inputs: list[dict[str, Any]]) -> Answer:
        return scored(right_scores(inputs), checkpoint=CHECKPOINT_B if inputs[0]["prompt"] == "p3" else CHECKPOINT_A)

    with serving(swaps) as server, RewardClient(server.url, max_completions_per_request=1) as client:
        assert client.score(numbered_inputs(3)).checkpoint == CHECKPOINT_A
        with pytest.raises(
            ScoringError, match=f"Inputs 3 to 3 were scored by m {CHECKPOINT_B}, not by m {CHECKPOINT_A}"
        ):
            client.score(numbered_inputs(5))


def test_a_checkpoint_other_than_the_expected_one_is_an_error() -> None:
    with serving(lambda _, inputs: scored(right_scores(inputs))) as server:
        with RewardClient(server.url, expected_checkpoint=CHECKPOINT_A) as client:
            assert client.score(numbered_inputs(1)).scores == [[0.0]]
        with (
            RewardClient(server.url, expected_checkpoint=CHECKPOINT_B) as client,
            pytest.raises(ScoringError, match=f"not by m {CHECKPOINT_B}"),
        ):
            client.score(numbered_inputs(1))


def test_a_server_that_hangs_is_an_error_within_the_timeout() -> None:
    release = threading.Event()

    def hang(_: int, inputs: list[dict[str, Any]]) -> Answer:
        release.wait(30)
        return scored(right_scores(inputs))

    with serving(hang) as server, RewardClient(server.url, timeout_s=0.2) as client:
        started_s = time.monotonic()
        with pytest.raises(ScorerUnavailableError, match=r"ReadTimeout .*0.2 s"):
            client.score(numbered_inputs(1))
        assert time.monotonic() - started_s < 10
        release.set()
        assert server.num_requests == 1


def test_nobody_listening_is_an_error_that_says_so() -> None:
    with serving(lambda _, inputs: scored(right_scores(inputs))) as server:
        url = server.url
    with (
        RewardClient(url, max_retries=1) as client,
        pytest.raises(ScorerUnavailableError, match=r"2 attempts, the last one: ConnectError"),
    ):
        client.score(numbered_inputs(1))


def test_nothing_to_score_and_a_url_that_is_not_http_are_errors() -> None:
    with RewardClient("http://127.0.0.1:9") as client, pytest.raises(ScoringError, match="nothing to score"):
        client.score([])
    with pytest.raises(ConfigError, match="got '127.0.0.1:8000'"):
        RewardClient("127.0.0.1:8000")


def test_the_async_client_scores_several_lists_at_once() -> None:
    async def score_three(url: str) -> list[list[list[float]]]:
        async with AsyncRewardClient(url, max_completions_per_request=2) as client:
            return [
                reply.scores for reply in await asyncio.gather(*(client.score(numbered_inputs(n)) for n in (1, 5, 9)))
            ]

    with serving(lambda _, inputs: scored(right_scores(inputs))) as server:
        assert asyncio.run(score_three(server.url)) == [right_reply(numbered_inputs(n)) for n in (1, 5, 9)]


def test_threads_may_share_one_sync_client() -> None:
    with (
        serving(lambda _, inputs: scored(right_scores(inputs))) as server,
        RewardClient(server.url, max_completions_per_request=2) as client,
    ):
        scores: dict[int, list[list[float]]] = {}
        threads = [
            threading.Thread(target=lambda n=n: scores.update({n: client.score(numbered_inputs(n)).scores}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert scores == {n: right_reply(numbered_inputs(n)) for n in range(1, 9)}


def test_a_client_that_was_never_closed_does_not_keep_the_program_alive() -> None:
    code = "from rm_robust.scoring import RewardClient; client = RewardClient('http://127.0.0.1:9')"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("counts", "spans"),
    [([1, 1, 1], [(0, 2), (2, 3)]), ([3, 1, 1], [(0, 1), (1, 3)]), ([2], [(0, 1)]), ([9], [(0, 1)])],
)
def test_inputs_are_split_between_and_never_within(counts: list[int], spans: list[tuple[int, int]]) -> None:
    inputs = [ScoreInput(prompt="p", completions=["x"] * count) for count in counts]
    assert split_inputs(inputs, 2) == [range(start, end) for start, end in spans]


def test_what_a_newer_server_adds_is_kept_for_every_chunk_and_an_older_server_may_lack_it() -> None:
    def newer(_: int, inputs: list[dict[str, Any]]) -> Answer:
        results = [
            {"scores": [1.0], "token_counts": {"prompt": len(item["prompt"]), "completions": [2]}} for item in inputs
        ]
        return Answer(
            body=json.dumps(
                {"model": "m", "checkpoint": CHECKPOINT_A, "template": "sha256:t", "results": results}
            ).encode()
        )

    inputs = [ScoreInput(prompt="p" * length, completions=["1"]) for length in (1, 2, 3)]
    with serving(newer) as server, RewardClient(server.url, max_completions_per_request=1) as client:
        reply = client.score(inputs)
    assert reply.template == "sha256:t"
    assert [result.token_counts for result in reply.results] == [
        TokenCounts(prompt=length, completions=[2]) for length in (1, 2, 3)
    ]
    with serving(lambda _, inputs: scored(right_scores(inputs))) as server, RewardClient(server.url) as client:
        older = client.score(inputs)
    assert (older.template, older.results[0].token_counts) == (None, None)


def test_the_key_is_sent_as_a_bearer_token_and_the_argument_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    with serving(lambda _, inputs: scored(right_scores(inputs))) as server:
        for variable, argument in ((None, None), ("rmk_environment", None), ("rmk_environment", "rmk_argument")):
            if variable is not None:
                monkeypatch.setenv(KEY_VARIABLE, variable)
            with RewardClient(server.url, api_key=argument) as client:
                client.score(numbered_inputs(1))
            sent.append(server.authorization)
    assert sent == [None, "Bearer rmk_environment", "Bearer rmk_argument"]


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "clé"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match=f"it has {len(key)} characters") as caught:
        AsyncRewardClient("http://127.0.0.1:9", api_key=key)
    assert not key or key not in str(caught.value)


def test_calibrated_scores_are_asked_for_and_say_what_they_were_made_with() -> None:
    calibration = {"mean": 1.0, "std": 2.0}

    def calibrated(_: int, inputs: list[dict[str, Any]]) -> Answer:
        return Answer(
            body=json.dumps({**json.loads(scored(right_scores(inputs)).body), "calibration": calibration}).encode()
        )

    with (
        serving(calibrated) as server,
        RewardClient(server.url, calibrated=True, max_completions_per_request=1) as client,
    ):
        reply = client.score(numbered_inputs(3))
    assert reply.calibration is not None
    assert reply.calibration.model_dump() == calibration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrated": True}, "the scores are raw, but calibrated ones were asked for"),
        ({"model": "other"}, "from the model 'm', but 'other' was asked for"),
    ],
)
def test_a_server_that_does_not_know_what_is_asked_for_is_an_error(options: Any, message: str) -> None:
    with (
        serving(lambda _, inputs: scored(right_scores(inputs))) as server,
        RewardClient(server.url, **options) as client,
        pytest.raises(ScoringError, match=message),
    ):
        client.score(numbered_inputs(1))
