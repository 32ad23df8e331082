"""One node's side of the meeting on node 0: facts before the start, then heartbeats and a report, and one verdict at the end.

A thread does all communication, so a broken link blocks that thread and never the node. Every node uses its own clock; clocks of two
machines are compared only to order reports of one kind.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

from igpo_megatron.launch.doorway import Doorway, Unanswered, WrongSecret, line
from igpo_megatron.launch.head import Head
from igpo_megatron.launch.messages import Answer, Kind, Report, Said, Verdict, clean_sentence
from igpo_megatron.launch.node import Node
from igpo_megatron.launch.preflight import Facts, busy_port
from igpo_megatron.launch.seal import derive_key, new_nonce
from igpo_megatron.types import UserError

Ask = Callable[[Said], Awaitable[Answer]]
Judge = Callable[[list[Facts]], list[str]]
"""Facts of all nodes -> their disagreements, one sentence each."""

_POLL_S = 0.2
_POLLS_TO_TELL = 20
_LEAVE_S = 20.0
_HEAD_SPARES_S = 5.0  # node 0 decides this early, so that the others hear it before their deadline


class PreflightFailed(UserError):
    """The job cannot start; the message is the sentence that every node prints."""


class Board:
    """One node's side of the meeting. Raises PreflightFailed if it has no shared secret."""

    def __init__(self, node: Node, secret: str | None, *, lost_after_s: float) -> None:
        if not secret:
            raise PreflightFailed(f"{node.name} has no secret to show the other nodes: set RAY_AUTH_TOKEN to the same secret on every node")
        self.node, self._lost_after_s = node, lost_after_s
        self._key = derive_key(secret)
        self._launcher = new_nonce()
        self._head: Head | None = None
        self._doorway: Doorway | None = None
        self._facts: list[Facts] = []
        self._report: Report | None = None
        self._ready: set[str] = set()
        self._left = False
        self._posted: set[str] = set()
        self._verdict: Verdict | None = None
        self._heard = time.monotonic()
        self._ended = threading.Event()

    def meet(self, own: Facts, deadline_s: float, judge: Judge) -> list[Facts]:
        """Wait for every node, at most `deadline_s`; the facts of all, or PreflightFailed with the same sentence on every node."""
        met: Future[list[Facts]] = Future()
        threading.Thread(target=lambda: asyncio.run(self._live(own, deadline_s, judge, met)), daemon=True).start()
        try:
            return met.result(deadline_s + _HEAD_SPARES_S)  # the thread itself gives up at the deadline
        except TimeoutError:
            raise PreflightFailed(self._no_answer(deadline_s)) from None

    @property
    def verdict(self) -> Verdict | None:
        """How the job ended; None while it runs. A node that gets no answer from node 0 any more decides for itself."""
        silent = time.monotonic() - self._heard
        if self._verdict is None and not self.node.is_head and silent > self._lost_after_s:
            head = next(one.name for one in self._facts if one.rank == 0)
            self._verdict = Verdict(1, f"{head} has not answered {self.node.name} for {silent:.0f} s: one of them is down or cut off")
        return self._verdict

    def report(self, kind: Kind, sentence: str, code: int) -> None:
        """Report how this node's part ended; only the first call counts."""
        if self._report is None:
            self._report = Report(self.node.rank, kind, clean_sentence(sentence), min(max(code, 0), 255), time.time())

    def post(self, flag: str) -> None:
        """Tell every node that something is ready."""
        self._ready.add(flag)

    def has(self, flag: str) -> bool:
        """Whether some node has posted it; known after a few polls."""
        return flag in self._posted

    def leave(self) -> None:
        """Report that this node has stopped; node 0 waits until all others have stopped or are lost."""
        self._left = True
        until = time.monotonic() + (_LEAVE_S if self.node.is_head else 2.0)
        while time.monotonic() < until and not self._ended.is_set():
            time.sleep(_POLL_S)

    # ---- the thread

    async def _live(self, own: Facts, deadline_s: float, judge: Judge, met: Future[list[Facts]]) -> None:
        """Meet, then exchange messages until the node has left."""
        try:
            async with self._way() as ask:
                self._facts = await self._meet(ask, own, deadline_s, judge)
                self._heard = time.monotonic()
                met.set_result(self._facts)
                await self._talk(ask)
        except Exception as error:
            if not met.done():
                met.set_exception(error)
                return
            self._verdict = self._verdict or Verdict(1, f"the launcher of {self.node.name} failed: {type(error).__name__}")
            raise

    @asynccontextmanager
    async def _way(self) -> AsyncIterator[Ask]:
        """A way to ask node 0, which may be this node. Raises PreflightFailed if its port is taken."""
        if not self.node.is_head:
            async with line(self._key, self.node.head, self.node.port, self.node.nodes) as way:
                yield way.ask
            return
        head = self._head = Head(self.node, lost_after_s=self._lost_after_s)
        self._doorway = Doorway(self._key, self.node.nodes, lambda said: head.hear(said, time.monotonic()))
        try:
            listener = socket.create_server((self.node.address, self.node.port), backlog=1024)
        except OSError:
            raise PreflightFailed(busy_port(self.node.port, self.node.name)) from None

        async def ask(said: Said) -> Answer:
            return head.hear(said, time.monotonic())

        async with self._doorway.open(listener):
            yield ask

    async def _meet(self, ask: Ask, own: Facts, deadline_s: float, judge: Judge) -> list[Facts]:
        until = time.monotonic() + deadline_s
        judged: list[Facts] = []
        problems: list[str] = []
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    answer = await ask(Said(self._launcher, facts=own))
            except WrongSecret:
                raise PreflightFailed(
                    f"{self.node.name} has another RAY_AUTH_TOKEN than the `igpo launch` at {self.node.head}:{self.node.port}: "
                    "set it to the same secret on every node"
                ) from None
            except (Unanswered, TimeoutError):
                await asyncio.sleep(_POLL_S)
                continue
            if answer.nodes:
                return answer.nodes
            if answer.stop and self._head:
                await self._tell_all(self._head)
            if answer.stop or answer.refused:
                raise PreflightFailed(answer.stop or answer.refused)
            if self._head and self._doorway:
                self._head.forget_silent(time.monotonic())
                facts = self._head.facts
                if facts != judged:
                    judged, problems = facts, await asyncio.to_thread(judge, facts)
                overdue = time.monotonic() > until - min(_HEAD_SPARES_S, deadline_s / 2)
                self._head.conclude(facts, problems, deadline_s, overdue=overdue, strangers=self._doorway.strangers)
            await asyncio.sleep(_POLL_S)
        raise PreflightFailed(self._no_answer(deadline_s))

    async def _tell_all(self, head: Head) -> None:
        """Let the others hear why the job cannot start before this process, and with it the server, ends.

        The wait is counted in polls, not in seconds: none passes while a machine stands still. It ends even if a node was killed.
        """
        for _ in range(_POLLS_TO_TELL):
            if head.all_are_told:
                break
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_POLL_S)  # the last answer is on its way

    async def _talk(self, ask: Ask) -> None:
        """Heartbeats; on node 0 also the decision."""
        while not self._ended.is_set():
            said = Said(self._launcher, report=self._report, flags=sorted(self._ready), left=self._left)
            try:
                answer = await ask(said)
            except (Unanswered, WrongSecret):  # node 0 or the link failed: `verdict` reports it once that has lasted
                pass
            else:
                self._heard = time.monotonic()
                self._posted |= set(answer.flags)
                refused = Verdict(1, answer.refused) if answer.refused else None
                self._verdict = self._verdict or answer.verdict or refused
                if said.left and not self.node.is_head:
                    self._ended.set()
            if self._head and self._head.look(time.monotonic()):
                self._ended.set()
            await asyncio.sleep(_POLL_S)

    def _no_answer(self, deadline_s: float) -> str:
        return (
            f"no `igpo launch` of node 0 answered at {self.node.head}:{self.node.port} within {deadline_s:g} s: start it there, open the "
            "firewall between the nodes, or, if something else listens on that port, give every node another --head port"
        )
