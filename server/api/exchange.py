"""Between the engine and those who ask it: which API process a request came from, and what each is to be told."""

import logging
import queue
import time
from dataclasses import dataclass, field
from typing import Any

from adapters.status import AdapterStatus
from server.api.messages import OBSERVER, Abort, EngineInfo, Forget, Frame, Ping, Submit
from server.engine.types import AdapterChange, ErrorKind, FinishReason, Request, SequenceOutput, StepStats

logger = logging.getLogger(__name__)
STATS_SECONDS = 0.05  # how long figures may wait for a frame when no request has anything to say


@dataclass
class _Untold:
    """What one API process has not been told."""

    met: bool = False  # whether it has ever asked for a sign of life
    ponged: bool = False
    outputs: list[SequenceOutput] = field(default_factory=lambda: list[SequenceOutput]())
    stats: list[StepStats] = field(default_factory=lambda: list[StepStats]())
    changes: list[AdapterChange] = field(default_factory=lambda: list[AdapterChange]())
    last_sent: float = field(default_factory=time.monotonic)

    def due(self, idle: bool) -> bool:
        """Whether it can't wait."""
        late = idle or time.monotonic() - self.last_sent > STATS_SECONDS
        return self.met and bool(self.outputs or self.ponged or ((self.stats or self.changes) and late))

    def frame(self, info: EngineInfo) -> Frame:
        """All of it."""
        pong = info if self.ponged else None
        frame = Frame(info.epoch, pong, tuple(self.outputs), tuple(self.stats), tuple(self.changes))
        self.ponged, self.outputs, self.stats, self.changes = False, [], [], []
        self.last_sent = time.monotonic()
        return frame


class Exchange:
    """Takes the messages of every API process from `inbox`, steps the engine, makes their frames."""

    def __init__(self, engine: Any, info: EngineInfo, processes: int) -> None:
        """`processes`: how many API processes there are."""
        self.inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()  # a process's number and its message
        self._engine, self._info = engine, info
        self._untold = [_Untold() for _ in range(processes)]
        self._asked_by: dict[str, int] = {}  # request id -> process, of those that have not ended
        self._standing: dict[str, AdapterChange] = {}  # digest -> its last change, unless it is absent
        self._told = False  # whether there is news for the engine that isn't work

    def turn(self) -> list[tuple[int, Frame]]:
        """Take what has come, waiting for it if there is nothing to do; a step; a frame for each who must have one."""
        self._receive()
        engine = self._engine
        # A step after an abort tells that nothing runs any more, one after a load that it has ended.
        if engine.has_work or engine.loading or self._told:
            self._told = False
            step = engine.step()
            for output in step.outputs:
                self._answer(output)
            self._note(step.stats)
            if not step.stats.batch_size:
                time.sleep(0.001)  # only loads are under way
        idle = not engine.has_work and not engine.loading
        return [(i, untold.frame(self._info)) for i, untold in enumerate(self._untold) if untold.due(idle)]

    def _receive(self) -> None:
        """Take every message that has come; with nothing to do, wait for one."""
        engine, refused = self._engine, False
        while True:
            busy = engine.has_work or engine.loading or self._told or refused or any(u.ponged for u in self._untold)
            try:
                process, message = self.inbox.get_nowait() if busy else self.inbox.get()
            except queue.Empty:
                return
            match message:
                case Ping():
                    self._meet(self._untold[process])
                case Submit(epoch, requests) if epoch == self._info.epoch:
                    for request in requests:
                        refused |= not self._add(request, process)
                case Abort(epoch, request_id) if epoch == self._info.epoch:
                    self._asked_by.pop(request_id, None)
                    engine.abort(request_id)
                    self._told = True
                case Forget(epoch, digest) if epoch == self._info.epoch:
                    engine.forget(digest)
                    self._told = True
                case _:
                    logger.debug("dropped a message for an earlier worker: %r", message)

    def _add(self, request: Request, process: int) -> bool:
        self._asked_by[request.request_id] = process
        try:
            self._engine.add_request(request)
        except ValueError as error:
            why, kind, reason = str(error), ErrorKind.GENERATION, FinishReason.ERROR
            self._answer(SequenceOutput(request.request_id, (), (), reason, error=why, error_kind=kind))
            return False
        return True

    def _answer(self, output: SequenceOutput) -> None:
        process = self._asked_by.get(output.request_id)
        if process is None:
            return  # aborted meanwhile
        if output.finish_reason is not None:
            del self._asked_by[output.request_id]
        self._untold[process].outputs.append(output)

    def _meet(self, untold: _Untold) -> None:
        untold.ponged = True
        if not untold.met:
            untold.met, untold.changes = True, list(self._standing.values())

    def _note(self, stats: StepStats) -> None:
        self._untold[OBSERVER].stats.append(stats)
        for change in stats.residency:
            digest, status, _ = change
            if status == AdapterStatus.ABSENT.value:
                self._standing.pop(digest, None)
            else:
                self._standing[digest] = change
        for untold in self._untold:
            if untold.met:  # others get all that stands, with their first pong
                untold.changes += stats.residency
