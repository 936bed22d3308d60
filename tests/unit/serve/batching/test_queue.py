"""Test the queue between requests and replicas, with replicas that the test itself plays.

The tests say which items leave together, and that no request is lost and no reply mixes two checkpoints.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from rm_robust.scoring.contract import ScoreInput, ScoreRequest
from serve.batching import queue as batch_queue
from serve.batching.queue import BatchQueue
from serve.metrics import ModelMetrics, ServiceMetrics
from serve.settings import ModelSettings, ServiceLimits
from serve.work import (
    Batch,
    BatchScores,
    OtherGeneration,
    Outcome,
    Prepared,
    Refusal,
    Scored,
    ScoringRequest,
    ServedModel,
    WorkItem,
    parts_of,
)

Answer = Callable[[Batch], Awaitable[object]]


def served(generation: int) -> ServedModel:
    return ServedModel("m", f"sha256:{generation}", None, None, generation=generation)


class Words:
    """A Preparer that counts a word as a token, and refuses the prompt `wrong`.

    From generation 2 on, it writes prompts in capitals.
    """

    def __init__(self, model: ServedModel) -> None:
        self.generation = model.generation

    def prepare(self, request: ScoringRequest) -> Prepared | Refusal:
        items = []
        for index, part in enumerate(parts_of(request)):
            item = part.content
            assert isinstance(item, ScoreInput)
            assert isinstance(item.prompt, str)
            if item.prompt == "wrong":
                return Refusal(422, "invalid_request", "wrong")
            content = (
                ScoreInput(prompt=item.prompt.upper(), completions=item.completions) if self.generation > 1 else item
            )
            num_words = sum(len(completion.split()) for completion in item.completions)
            items.append(WorkItem(index, content, hash(item.prompt), len(item.prompt.split()), num_words))
        return Prepared(items, [None] * len(items))


def right_scores(content: object) -> list[float]:
    assert isinstance(content, ScoreInput)
    return [float(len(str(content.prompt)) * 1000 + len(completion)) for completion in content.completions]


class Replica:
    """Keeps every batch, and answers it while `gate` is open."""

    def __init__(self, name: str = "r", generation: int = 1) -> None:
        self.name, self.generation = name, generation
        self.batches: list[Batch] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, batch: Batch) -> object:
        self.batches.append(batch)
        await self.gate.wait()
        await asyncio.sleep(0)
        if batch.generation != self.generation:
            return OtherGeneration(served(self.generation))
        return BatchScores(self.name, [right_scores(content) for content in batch.contents])

    @property
    def sizes(self) -> list[int]:
        return [len(batch.contents) for batch in self.batches]


class Call:
    """Works as a DeploymentResponse: it runs from the start, and can be awaited and cancelled."""

    def __init__(self, answer: Awaitable[object]) -> None:
        self._task = asyncio.ensure_future(answer)

    def __await__(self) -> Generator[Any, None, object]:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


async def queue_on(
    answer: Answer,
    *,
    limits: ServiceLimits | None = None,
    load_preparer: Callable[[ServedModel], Words] = Words,
    **model: Any,
) -> BatchQueue:
    settings = ModelSettings(**({"model_name": "m", "embedded_judge": True, "max_batch_tokens": 10} | model))
    metrics = ModelMetrics(ServiceMetrics(), "m")
    queue = BatchQueue(
        settings,
        limits or ServiceLimits(),
        metrics,
        call=lambda batch: Call(answer(batch)),
        load_preparer=load_preparer,
    )
    await queue.adopt(served(1))
    return queue


def request(*inputs: tuple[str, int]) -> ScoreRequest:
    """Return a request with these prompts; each has one completion of so many words."""
    return ScoreRequest(
        inputs=[ScoreInput(prompt=prompt, completions=[" ".join(["w"] * num_words)]) for prompt, num_words in inputs]
    )


def expected(asked: ScoreRequest) -> list[list[float]]:
    return [right_scores(item) for item in asked.inputs]


def scores_of(outcome: Outcome) -> list[list[float]]:
    assert isinstance(outcome, Scored), outcome
    return [result.scores for result in outcome.results]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_waits_leaves_in_batches_that_the_tokens_fill() -> None:
    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica)
        first = asyncio.create_task(queue.score(request(("p", 1))))
        await turns()
        asked = [request((f"p{index}", 2)) for index in range(7)]  # three tokens each
        tasks = [asyncio.create_task(queue.score(one)) for one in asked]
        await turns()
        assert replica.sizes == [1, 3]  # the idle replica takes what there is, and one full batch waits for it
        replica.gate.set()
        assert [scores_of(outcome) for outcome in await asyncio.gather(*tasks)] == [expected(one) for one in asked]
        assert replica.sizes == [1, 3, 3, 1]
        await first

    run(test)


def test_an_equal_prompt_is_counted_once_in_a_batch() -> None:
    async def test() -> None:
        for share_prompts, sizes in ((True, [5, 1]), (False, [3, 3])):
            replica = Replica()
            queue = await queue_on(replica, share_prompts=share_prompts)
            asked = (
                request(*[("p q", 1)] * 4 + [("p q", 4), ("p q", 3)]) if share_prompts else request(*[("p q", 1)] * 6)
            )
            assert scores_of(await queue.score(asked)) == expected(asked)
            assert replica.sizes == sizes

    run(test)


def test_an_item_larger_than_a_batch_has_one_of_its_own() -> None:
    async def test() -> None:
        replica = Replica()
        queue = await queue_on(replica)
        asked = request(("a", 1), ("b", 50), ("c", 1))
        assert scores_of(await queue.score(asked)) == expected(asked)
        assert replica.sizes == [1, 1, 1]

    run(test)


def test_a_small_request_does_not_wait_for_all_of_a_large_one() -> None:
    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica)
        large = asyncio.create_task(queue.score(request(*[(f"p{index}", 1) for index in range(100)])))
        await turns()
        small = asyncio.create_task(queue.score(request(("s", 1))))
        await turns()
        replica.gate.set()
        await small
        assert len(replica.batches) <= 5
        assert not large.done()
        assert len(scores_of(await large)) == 100

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_asked_together_every_request_gets_its_own_scores(seed: int) -> None:
    async def test() -> None:
        rng = Random(seed)
        queue = await queue_on(Replica(), max_batch_tokens=rng.randint(1, 30), num_replicas=rng.randint(1, 3))
        asked = [
            request(*[(f"p{rng.randint(0, 5)}", rng.randint(0, 9)) for _ in range(rng.randint(1, 12))])
            for _ in range(30)
        ]
        outcomes = await asyncio.gather(*(queue.score(one) for one in asked))
        assert [scores_of(outcome) for outcome in outcomes] == [expected(one) for one in asked]

    run(test)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica, limits=ServiceLimits(max_queued_requests=2))
        first, second = (asyncio.create_task(queue.score(request((prompt, 8)))) for prompt in "ab")
        await turns()
        assert queue.is_full
        third = await queue.score(request(("c", 8)))
        assert isinstance(third, Refusal)
        second.cancel()
        await turns()
        assert not queue.is_full
        fourth = asyncio.create_task(queue.score(request(("d", 8))))
        await turns()
        replica.gate.set()
        await asyncio.gather(first, fourth)
        prompts = [
            content.prompt for batch in replica.batches for content in batch.contents if isinstance(content, ScoreInput)
        ]
        assert prompts == ["a", "d"]

    run(test)


def test_full_queues_are_429_and_a_request_that_never_fits_is_413() -> None:
    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica, limits=ServiceLimits(max_queued_tokens=20))
        first = asyncio.create_task(queue.score(request(("a", 11))))
        await turns()
        for words, status in ((8, 429), (20, 413), (19, 429)):
            refusal = await queue.score(request(("b", words)))
            assert isinstance(refusal, Refusal)
            assert refusal.status == status, words
        replica.gate.set()
        await first
        asked = request(("b", 19))
        assert scores_of(await queue.score(asked)) == expected(asked)

    run(test)


def test_a_request_without_scores_in_time_is_504_and_leaves_the_queue() -> None:
    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica, limits=ServiceLimits(request_timeout_s=0.05, max_queued_requests=1))
        outcome = await queue.score(request(("a", 1)))
        assert isinstance(outcome, Refusal)
        assert (outcome.status, outcome.type) == (504, "timeout")
        assert not queue.is_full

    run(test)


def test_a_refused_request_is_not_counted_as_waiting() -> None:
    async def test() -> None:
        queue = await queue_on(Replica(), limits=ServiceLimits(max_queued_requests=1))
        for _ in range(3):
            outcome = await queue.score(request(("wrong", 1)))
            assert isinstance(outcome, Refusal)
            assert outcome.status == 422

    run(test)


def test_the_batch_of_a_replica_that_dies_is_scored_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_queue, "AGAIN_AFTER_S", 0.01)

    async def test() -> None:
        replica, deaths = Replica(), 3

        async def dies_at_first(batch: Batch) -> object:
            nonlocal deaths
            deaths -= 1
            if deaths >= 0:
                raise RayActorError
            return await replica(batch)

        queue = await queue_on(dies_at_first)
        asked = [request((f"p{index}", 3)) for index in range(9)]
        outcomes = await asyncio.gather(*(queue.score(one) for one in asked))
        assert [scores_of(outcome) for outcome in outcomes] == [expected(one) for one in asked]

    run(test)


def test_the_batch_of_a_replica_that_hangs_is_scored_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_queue, "AGAIN_AFTER_S", 0.01)

    async def test() -> None:
        replica, hung = Replica(), 2

        async def hangs_at_first(batch: Batch) -> object:
            nonlocal hung
            hung -= 1
            if hung >= 0:
                await asyncio.Event().wait()
            return await replica(batch)

        queue = await queue_on(hangs_at_first, limits=ServiceLimits(batch_timeout_s=0.05))
        asked = request(("p", 3))
        assert scores_of(await queue.score(asked)) == expected(asked)

    run(test)


def test_a_replica_that_fails_is_a_500_for_its_batch_alone() -> None:
    async def test() -> None:
        replica = Replica()

        async def fails_on_b(batch: Batch) -> object:
            if any(isinstance(content, ScoreInput) and content.prompt == "b" for content in batch.contents):
                raise RayTaskError("score", "traceback", ValueError("no"))
            return await replica(batch)

        queue = await queue_on(fails_on_b)
        assert scores_of(await queue.score(request(("a", 1)))) == [[1001.0]]
        outcome = await queue.score(request(("b", 1)))
        assert isinstance(outcome, Refusal)
        assert (outcome.status, outcome.type) == (500, "internal_error")
        assert scores_of(await queue.score(request(("a", 1)))) == [[1001.0]]

    run(test)


def test_an_item_without_a_score_refuses_its_own_request_by_its_field() -> None:
    async def test() -> None:
        async def no_score_for_b(batch: Batch) -> object:
            return BatchScores(
                "r",
                [
                    "not finite" if isinstance(c, ScoreInput) and c.prompt == "b" else right_scores(c)
                    for c in batch.contents
                ],
            )

        queue = await queue_on(no_score_for_b)
        good, bad = await asyncio.gather(
            queue.score(request(("a", 1))), queue.score(request(("a", 1), ("b", 1), ("c", 1)))
        )
        assert scores_of(good) == [[1001.0]]
        assert isinstance(bad, Refusal)
        assert (bad.status, bad.message) == (500, "inputs[1].prompt: not finite")

    run(test)


def test_a_swap_in_the_middle_of_a_request_scores_all_of_it_with_the_new_checkpoint() -> None:
    async def test() -> None:
        replica = Replica()
        batches_before_the_swap = 3

        async def swaps(batch: Batch) -> object:
            if len(replica.batches) == batches_before_the_swap:
                replica.generation = 2
            return await replica(batch)

        queue = await queue_on(swaps)
        asked = request(*[(f"p{index}", 3) for index in range(20)])
        outcome = await queue.score(asked)
        assert len([batch for batch in replica.batches if batch.generation == 1]) > 2
        assert isinstance(outcome, Scored)
        assert outcome.served == served(2)
        assert {
            str(c.prompt)[0]
            for batch in replica.batches
            if batch.generation == 2
            for c in batch.contents
            if isinstance(c, ScoreInput)
        } == {"P"}
        assert scores_of(outcome) == expected(asked)  # text in capitals is as long

    run(test)


def test_a_replica_that_is_behind_is_asked_again_until_it_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_queue, "AGAIN_AFTER_S", 0.01)

    async def test() -> None:
        new, old = Replica("new", generation=2), Replica("old", generation=1)
        number = 0

        async def one_after_the_other(batch: Batch) -> object:
            nonlocal number
            number += 1
            if number > 12:
                old.generation = 2
            return await (old if number % 2 else new)(batch)

        queue = await queue_on(one_after_the_other)
        for index in range(8):
            outcome = await queue.score(request((f"p{index}", 3)))
            assert isinstance(outcome, Scored)
            assert (outcome.served.generation == 2) or not new.batches
        assert queue.served == served(2)

    run(test)


def test_a_request_that_is_prepared_while_the_checkpoint_changes_is_prepared_for_the_new_one() -> None:
    async def test() -> None:
        replica = Replica(generation=2)
        queue = await queue_on(replica)
        long = request(("p", 10_000))  # prepared in a thread
        task = asyncio.create_task(queue.score(long))
        await queue.adopt(served(2))
        outcome = await task
        assert isinstance(outcome, Scored)
        assert outcome.served == served(2)
        assert {batch.generation for batch in replica.batches} == {2}

    run(test)


def test_a_request_that_is_given_up_during_a_swap_no_longer_counts() -> None:
    tasks: list[asyncio.Task[Outcome]] = []

    class LosesACaller(Words):
        """In generation 2, every completion is longer.

        While the first request is prepared for generation 2, the caller of the second request goes away.
        """

        def prepare(self, request: ScoringRequest) -> Prepared | Refusal:
            prepared = super().prepare(request)
            if self.generation == 1 or isinstance(prepared, Refusal):
                return prepared
            tasks[1].cancel()
            return Prepared([replace(item, num_completion_tokens=10) for item in prepared.items], prepared.counts)

    async def test() -> None:
        replica = Replica()
        replica.gate.clear()
        queue = await queue_on(replica, limits=ServiceLimits(max_queued_tokens=22), load_preparer=LosesACaller)
        tasks.extend(asyncio.create_task(queue.score(request((prompt, 1)))) for prompt in "ab")
        await turns()
        await queue.adopt(served(2))
        assert tasks[1].cancelled()
        replica.generation = 2
        replica.gate.set()
        await tasks[0]
        assert isinstance(await queue.score(request(("c", 1), ("d", 1))), Scored)  # all the room there is

    run(test)


def test_a_request_whose_batches_are_lost_again_and_again_is_given_up_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_queue, "AGAIN_AFTER_S", 0.001)

    async def test() -> None:
        replica = Replica()
        num_deaths = 0

        async def dies_of_poison(batch: Batch) -> object:
            nonlocal num_deaths
            if any(isinstance(content, ScoreInput) and content.prompt == "poison" for content in batch.contents):
                num_deaths += 1
                raise RayActorError
            return await replica(batch)

        queue = await queue_on(dies_of_poison)
        outcome = await queue.score(request(("poison", 1)))
        assert isinstance(outcome, Refusal)
        assert (outcome.status, outcome.type) == (503, "unavailable")
        assert num_deaths == batch_queue.MAX_LOSSES + 1
        assert scores_of(await queue.score(request(("a", 1)))) == [[1001.0]]

    run(test)


def test_a_directory_that_was_written_anew_is_another_checkpoint_though_its_generation_is_the_same() -> None:
    async def test() -> None:
        replica = Replica()
        anew = ServedModel("m", "sha256:anew", None, None, generation=1)

        async def started_later(batch: Batch) -> object:
            return await replica(batch) if batch.checkpoint == anew.checkpoint else OtherGeneration(anew)

        queue = await queue_on(started_later)
        outcome = await queue.score(request(("a", 1)))
        assert isinstance(outcome, Scored)
        assert outcome.served == anew
        assert {batch.checkpoint for batch in replica.batches} == {anew.checkpoint}

    run(test)
