"""What goes back and forth between API processes and the worker, message by message."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import pytest

from server.api.exchange import Exchange
from server.api.link import EngineLink, Overloaded
from server.api.messages import Abort, EngineInfo, Forget, Frame, Ping, Submit
from server.api.processes import Places
from server.engine.types import FinishReason, Request, SamplingParams
from tests.engine.toy import Toy

INFO = EngineInfo("epoch", os.getpid(), "cpu", "float32", 0, "torch")


def request(name: str, tokens: int = 5, *, stream: bool = False, prompt: int = 3) -> Request:
    return Request(name, (1,) * prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), stream=stream)


class Worker:
    """An exchange over a toy engine, which `processes` have already asked for a sign of life."""

    def __init__(self, processes: int = 2, **limits: int) -> None:
        self.toy = Toy(**{"max_batch_size": 4} | limits)
        self.exchange = Exchange(self.toy.engine, INFO, processes)
        for process in range(processes):
            self.exchange.inbox.put((process, Ping()))
        self.frames: list[tuple[int, Frame]] = self.exchange.turn()

    def tell(self, process: int, *messages: Any) -> None:
        for message in messages:
            self.exchange.inbox.put((process, message))

    def run(self) -> list[tuple[int, Frame]]:
        """Every frame until there is nothing more to do."""
        frames = self.exchange.turn()
        while self.toy.engine.has_work or self.toy.engine.loading:
            frames += self.exchange.turn()
        return frames


def talking(frames: Sequence[tuple[int, Frame]], process: int) -> list[Frame]:
    """The frames to a process that speak of requests."""
    return [frame for to, frame in frames if to == process and frame.outputs]


def test_a_request_that_does_not_stream_costs_one_message_each_way() -> None:
    worker = Worker()
    worker.tell(1, Submit("epoch", (request("a", 10),)))
    (answer,) = talking(worker.run(), 1)
    assert [(o.request_id, len(o.token_ids), o.finish_reason) for o in answer.outputs] == [
        ("a", 10, FinishReason.LENGTH)
    ]


def test_several_choices_that_end_together_do_so_too() -> None:
    worker = Worker()
    worker.tell(0, Submit("epoch", tuple(request(name, 6) for name in "abc")))
    (answer,) = talking(worker.run(), 0)
    assert [output.request_id for output in answer.outputs] == ["a", "b", "c"]


def test_a_stream_has_one_message_a_step_and_only_its_own_process_gets_it() -> None:
    worker = Worker()
    worker.tell(0, Submit("epoch", (request("a", 4, stream=True), request("b", 4, stream=True))))
    worker.tell(1, Submit("epoch", (request("c", 2),)))
    frames = worker.run()
    assert [[o.request_id for o in frame.outputs] for frame in talking(frames, 0)] == [["a", "b"]] * 4
    assert [[o.request_id for o in frame.outputs] for frame in talking(frames, 1)] == [["c"]]


def test_the_first_process_alone_gets_the_figures_and_each_step_once() -> None:
    worker = Worker()
    worker.tell(1, Submit("epoch", (request("a", 7, stream=True),)))
    frames = worker.run()
    assert sum(stats.num_generated_tokens for to, frame in frames for stats in frame.stats if to == 0) == 7
    assert not [frame.stats for to, frame in frames if to == 1 and frame.stats]


def test_figures_wait_for_a_first_process_that_is_late() -> None:
    worker = Worker(processes=2)
    late = Exchange(worker.toy.engine, INFO, 2)
    late.inbox.put((1, Ping()))
    late.turn()
    late.inbox.put((1, Submit("epoch", (request("a", 3),))))
    frames = late.turn()
    while worker.toy.engine.has_work:
        frames += late.turn()
    assert {to for to, _ in frames} == {1}
    late.inbox.put((0, Ping()))
    ((to, frame),) = late.turn()
    assert (to, frame.pong) == (0, INFO)
    assert sum(stats.num_generated_tokens for stats in frame.stats) == 3


def test_a_process_that_comes_late_learns_where_every_adapter_stands() -> None:
    worker = Worker(processes=2)
    worker.toy.preload("a", "b")
    late = Exchange(worker.toy.engine, INFO, 3)
    for process in (0, 1):
        late.inbox.put((process, Ping()))
    frames = late.turn()
    late.inbox.put((1, Forget("epoch", "b")))
    frames += late.turn()
    for process in (0, 1):
        told = dict(change[:2] for to, frame in frames for change in frame.changes if to == process)
        assert told == {"a": "ready", "b": "absent"}, "whoever sends it, all learn of it"
    late.inbox.put((2, Ping()))
    ((to, frame),) = late.turn()
    assert to == 2
    assert dict(change[:2] for change in frame.changes) == {"a": "ready"}


def test_an_abort_ends_its_own_request_alone_and_nothing_is_said_of_it() -> None:
    worker = Worker()
    worker.tell(0, Submit("epoch", (request("a", 9, stream=True),)))
    worker.tell(1, Submit("epoch", (request("b", 3),)))
    worker.exchange.turn()
    worker.tell(0, Abort("epoch", "a"))
    frames = worker.run()
    assert not talking(frames, 0)
    assert [o.finish_reason for o in talking(frames, 1)[0].outputs] == [FinishReason.LENGTH]
    assert worker.exchange._asked_by == {}


def test_what_the_engine_refuses_is_told_to_who_asked() -> None:
    worker = Worker()
    worker.tell(1, Submit("epoch", (request("long", prompt=100),)), Submit("an earlier one", (request("old"),)))
    ((to, frame),) = worker.exchange.turn()
    assert to == 1
    assert [(o.request_id, o.finish_reason) for o in frame.outputs] == [("long", FinishReason.ERROR)]
    assert worker.exchange._asked_by == {}


def test_one_submit_for_several_choices_and_places_are_given_back() -> None:
    async def life() -> None:
        sent: list[Any] = []
        places = Places(5)
        links = [EngineLink(sent.append, None, places, 60.0) for _ in range(2)]
        for link in links:
            link.info = INFO
        worker = Worker()
        answers: list[tuple[str, FinishReason | None]] = []

        async def collect() -> None:
            async for output in links[0].generate(*(request(name, 2) for name in "abc")):
                answers.append((output.request_id, output.finish_reason))

        task = asyncio.ensure_future(collect())
        await asyncio.sleep(0)
        assert [type(message) for message in sent] == [Submit]
        assert places.taken == 3
        with pytest.raises(Overloaded, match="3 requests are in flight, 3 more would be too many"):
            await anext(links[1].generate(*(request(name) for name in "def")))
        assert places.taken == 3, "all or none"
        left = links[1].generate(request("left", stream=True), request("too", stream=True))
        waits = asyncio.ensure_future(anext(left))
        await asyncio.sleep(0)
        assert places.taken == 5
        worker.tell(0, sent[0])
        worker.tell(1, sent[1])
        for to, frame in worker.exchange.turn():
            links[to].on_frame(frame)
        assert (await waits).request_id == "left"
        await left.aclose()
        assert [message for message in sent if isinstance(message, Abort)] == sent[2:]
        assert {message.request_id for message in sent[2:]} == {"left", "too"}
        assert places.taken == 3
        worker.tell(1, *sent[2:])
        for to, frame in worker.run():
            links[to].on_frame(frame)
        await task
        assert answers == [(name, FinishReason.LENGTH) for name in "abc"]
        assert places.taken == 0

    asyncio.run(life())


def test_requests_of_a_lost_worker_give_their_places_back_once() -> None:
    async def life() -> None:
        places = Places(3)
        link = EngineLink(lambda message: None, None, places, 60.0)
        link.info = INFO
        worker = Worker(processes=1)

        async def collect() -> list[tuple[str, FinishReason | None]]:
            outputs = link.generate(request("a", 1), request("b", 9))
            return [(output.request_id, output.finish_reason) async for output in outputs]

        task = asyncio.ensure_future(collect())
        await asyncio.sleep(0)
        worker.tell(0, Submit("epoch", (request("a", 1), request("b", 9))))
        for _, frame in worker.exchange.turn():
            link.on_frame(frame)  # "a" has ended, but nobody has taken that yet
        link._worker_lost("epoch")
        assert await task == [("a", FinishReason.LENGTH), ("b", FinishReason.ERROR)]
        assert places.taken == 0

    asyncio.run(life())
