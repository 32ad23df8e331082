"""The door of node 0: who has not proved the secret learns and changes nothing, and who has can say only what fits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launch import LONG_S, clock_of_boards, eventually, meet, pair

from igpo_megatron.launch import doorway
from igpo_megatron.launch.board import Board, PreflightFailed
from igpo_megatron.launch.doorway import Doorway, Line, Unanswered, WrongSecret
from igpo_megatron.launch.head import Head
from igpo_megatron.launch.job import open_store
from igpo_megatron.launch.messages import (
    MAX_MESSAGE,
    MAX_SENTENCE,
    Answer,
    BadMessage,
    Greeting,
    Hello,
    Report,
    Said,
    Sealed,
    Verdict,
    read,
    write,
)
from igpo_megatron.launch.node import Node
from igpo_megatron.launch.preflight import Facts
from igpo_megatron.launch.seal import Challenges, derive_key, mac, new_nonce, session_key

SECRET = "correct horse battery staple"
KEY = derive_key(SECRET)
FACTS = Facts(0, 2, "both", 1, "a", "127.0.0.1")
HEAD = Node(0, 2, "both", 1, "a", "127.0.0.1", "127.0.0.1", 29400)


def said(rank: int = 0, **changes: object) -> Said:
    """What the launcher of a node says; the same launcher for the same rank."""
    return Said(f"{rank:064x}", **{"facts": replace(FACTS, rank=rank), **changes})  # type: ignore[arg-type]


def started() -> Head:
    """Node 0 of a job whose two nodes have met."""
    head = Head(HEAD, lost_after_s=20)
    for rank in (0, 1):
        head.hear(said(rank), 0.0)
    head.conclude(head.facts, [], 60, overdue=False, strangers=())
    return head


# ---- what node 0 makes of a message


def test_the_first_report_of_a_node_counts_and_only_for_itself() -> None:
    head = started()
    first = Report(0, "error", "the first", 1, 1.0)
    head.hear(said(1, report=first), 1.0)
    head.hear(said(1, report=replace(first, sentence="the second")), 1.0)
    head.look(1.0)
    head.hear(said(0), 4.0)
    head.hear(said(1), 4.0)
    head.look(4.0)
    assert head.hear(said(0), 4.0).verdict == Verdict(1, "the first")
    assert head._seats[said(1).launcher].report == replace(first, rank=1), "node 1 cannot report for node 0"
    head.hear(said(0, report=replace(first, kind="ray", sentence="a later cause")), 4.0)
    head.look(8.0)
    assert head.hear(said(0), 8.0).verdict == Verdict(1, "the first")


def test_a_stranger_to_the_job_has_no_place_in_it_and_takes_none_away() -> None:
    head = started()
    assert "already has its 2 nodes" in head.hear(said(5, facts=replace(FACTS, rank=1)), 1.0).refused
    assert "does not know this launcher" in head.hear(said(6, facts=None), 1.0).refused
    assert [one.rank for one in head.hear(said(1), 1.0).nodes or []] == [0, 1]
    head = Head(HEAD, lost_after_s=20)
    assert "is not one of its own 2 nodes" in head.hear(said(2), 0.0).refused and head.facts == []
    for number in range(1000):
        head.hear(said(number, facts=FACTS), 0.0)
    assert len(head.facts) == 2 * 2 + 8
    head.forget_silent(21.0)
    assert head.facts == []


def test_flags_and_sentences_are_bounded() -> None:
    head = started()
    for number in range(40):
        head.hear(said(1, flags=[f"flag_{'abcdefghij'[number % 10]}{'abcd'[number // 10]}"]), 1.0)
    assert len(head.hear(said(1), 1.0).flags) == 16
    long = read(Report, json.dumps({"rank": 1, "kind": "error", "sentence": "x\u001b[31m" * 10**4, "code": 1, "time": 1}))
    assert len(long.sentence) == MAX_SENTENCE and "\u001b" not in long.sentence
    assert read(Answer, write(Answer(refused="first\nsecond\0"))).refused == "first\nsecond"


GOOD = json.loads(write(said()))


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": "not json"},
        {"facts": {**GOOD["facts"], "rank": -1}},
        {"facts": {**GOOD["facts"], "rank": 1e300}},
        {"facts": {**GOOD["facts"], "nodes": 10**7}},
        {"facts": {**GOOD["facts"], "host": "a\u001b[2J"}},
        {"facts": {**GOOD["facts"], "host": "a" * 300}},
        {"facts": {**GOOD["facts"], "busy": [70000]}},
        {"facts": {**GOOD["facts"], "packages": {str(number): "1" for number in range(200)}}},
        {"facts": {**GOOD["facts"], "surprise": 1}},
        {"report": {"rank": 0, "kind": "murder", "sentence": "", "code": 1, "time": 0}},
        {"report": {"rank": 0, "kind": "done", "sentence": "", "code": 1000, "time": 0}},
        {"flags": ["ray"] * 100},
        {"flags": ["../ray"]},
        {"launcher": "me"},
        {"left": [[[]]]},
    ],
)
def test_a_message_that_does_not_fit_is_refused_and_says_where(changes: dict[str, object]) -> None:
    (key,) = changes
    with pytest.raises(BadMessage, match=f"^{key}"):
        read(Said, json.dumps({**GOOD, **changes}))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of every request here are in one process, which may stand still for longer than a real one's answer may take."""
    monkeypatch.setattr(doorway, "REQUEST_S", 60.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a" * 64, "ray", "done"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(GOOD) + list(GOOD["facts"])) | st.text(), inner),
    max_leaves=12,
)


@given(st.binary() | st.text() | JSON.map(json.dumps) | JSON.map(lambda value: json.dumps({**GOOD, "facts": value})))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_no_untrusted_message_raises_anything_but_one_error(text: str | bytes) -> None:
    for kind in (Said, Answer, Sealed, Hello, Greeting):
        try:
            read(kind, text)
        except BadMessage as problem:
            assert len(str(problem)) < 500


# ---- the server and its clients


async def through_the_door(use: Callable[[str, Doorway], Awaitable[None]], head: Head | None = None) -> None:
    """Serve a job's node 0 on a free port and call `use` with its address."""
    head = head or started()
    listener = socket.create_server(("127.0.0.1", 0))
    door = Doorway(KEY, 2, lambda message: head.hear(message, time.monotonic()))
    async with door.open(listener):
        await use(f"127.0.0.1:{listener.getsockname()[1]}", door)


def line(place: str, secret: str = SECRET) -> contextlib.AbstractAsyncContextManager[Line]:
    host, port = place.split(":")
    return doorway.line(derive_key(secret), host, int(port), 2)


def test_what_is_said_can_be_read_on_the_way_but_neither_repeated_nor_changed_and_holds_no_secret() -> None:
    async def use(place: str, door: Doorway) -> None:
        host, port = place.split(":")
        heard = bytearray()
        requests: list[bytes] = []

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: list[bytes] | None) -> None:
            while part := await reader.read(2**16):
                heard.extend(part)
                if keep is not None:
                    keep.append(part)
                writer.write(part)
            writer.close()

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pass_on(reader, inner_writer, requests), pass_on(inner_reader, writer, None))

        relay = await asyncio.start_server(between, "127.0.0.1", 0)
        async with line("127.0.0.1:" + str(relay.sockets[0].getsockname()[1])) as client:
            assert (await client.ask(said(1))).nodes
        relay.close()
        assert SECRET.encode() not in heard and KEY.hex().encode() not in heard and b"proof" in heard
        recorded = read(Sealed, b"".join(requests).split(b"\r\n\r\n")[-1])
        async with aiohttp.ClientSession() as http:
            for message, status in (
                (recorded, 403),  # said before
                (replace(recorded, number=recorded.number + 1), 403),
                (replace(recorded, number=recorded.number + 1, body=recorded.body.replace('"left":false', '"left":true')), 403),
                (replace(recorded, challenge="0" * 64), 403),
            ):
                response = await http.post(f"http://{place}/say", data=write(message))
                assert response.status == status, await response.text()

    asyncio.run(through_the_door(use))


def test_an_answer_that_was_changed_on_the_way_is_not_believed() -> None:
    """A server that knows the secret for the greeting only stands in for someone who changes what follows."""
    challenges = Challenges()

    async def hello(request: aiohttp.web.Request) -> aiohttp.web.Response:
        nonce = read(Hello, await request.read()).nonce
        challenge = challenges.make(nonce)
        return aiohttp.web.Response(text=write(Greeting(challenge, mac(KEY, "proof of node 0", nonce, challenge))))

    async def say(request: aiohttp.web.Request) -> aiohttp.web.Response:
        heard = read(Sealed, await request.read())
        body = write(Answer(verdict=Verdict(0, "injected")))
        seal = mac(session_key(KEY, heard.nonce, heard.challenge), "node", str(heard.number), body)  # a node's seal is not node 0's
        return aiohttp.web.Response(text=write(replace(heard, body=body, seal=seal)))

    async def ask() -> None:
        app = aiohttp.web.Application()
        app.add_routes([aiohttp.web.post("/hello", hello), aiohttp.web.post("/say", say)])
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await aiohttp.web.SockSite(runner, listener).start()
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        async with line(place) as client:
            with pytest.raises(Unanswered, match="no seal of node 0"):
                await client.ask(said(1))
        async with line(place, "another secret") as client:
            with pytest.raises(WrongSecret):
                await client.ask(said(1))
        await runner.cleanup()

    asyncio.run(ask())


async def until_closed(one: socket.socket) -> None:
    """Read to its end, past a refusal for who said something wrong."""
    one.setblocking(False)
    with one, contextlib.suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(one, 2**16):
            pass


def test_strangers_get_a_refusal_and_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorway, "STRANGER_S", 600.0)

    async def use(place: str, door: Doorway) -> None:
        host, port = place.split(":")
        idle = [socket.create_connection((host, int(port)), 2) for _ in range(200)]
        for number, one in enumerate(idle):
            one.sendall((b"", b"\1", b"POST /say HTTP/1.1\r\n", b"POST /say HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")[number % 4])
        for noise in (b"\0" * 10**5, b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 1000, b"POST /say HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            with socket.create_connection((host, int(port)), 2) as one:
                one.sendall(noise)
        async with aiohttp.ClientSession() as http, line(place) as client:
            forged = Sealed(new_nonce(), new_nonce(), 1, write(said(1)), new_nonce())
            for path, body, status in (
                ("say", b"x" * (MAX_MESSAGE + 1), 413),
                ("say", b"[" * 10**5, 400),
                ("hello", b'{"nonce": ' + b"9" * 5000 + b"}", 400),
                ("say", write(forged).encode(), 403),
                ("stop", b"{}", 404),
            ):
                response = await http.post(f"http://{place}/{path}", data=body)
                text = await response.text()
                assert response.status == status and "Traceback" not in text and SECRET not in text
            assert (await client.ask(said(1))).nodes
            monkeypatch.setattr(doorway, "STRANGER_S", 0.5)
            await asyncio.wait_for(asyncio.gather(*map(until_closed, idle)), 60)
            assert (await client.ask(said(1))).nodes, "who has proved the secret keeps the connection"

    asyncio.run(through_the_door(use))


def test_a_node_that_says_what_does_not_fit_is_told_so_and_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(place: str, door: Doorway) -> None:
        async with line(place) as client:
            monkeypatch.setattr(doorway, "write", lambda message: "{}" if isinstance(message, Said) else write(message))
            assert "cannot read what this node says" in (await client.ask(said(1))).refused
            monkeypatch.setattr(doorway, "write", write)
            assert (await client.ask(said(1))).refused == ""

    asyncio.run(through_the_door(use))


# ---- whole boards


def test_a_node_with_another_secret_is_told_so_and_node_0_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    later, (nodes, facts) = clock_of_boards(monkeypatch), pair()
    with ThreadPoolExecutor(1) as node_0:
        waiting = node_0.submit(meet, nodes[:1], facts[:1], secrets=["one"])
        (second,) = meet(nodes[1:], facts[1:], secrets=["another"])
        later(LONG_S / 2)
        (first,) = waiting.result()
    assert "node 1 (host, 127.0.0.1) has another RAY_AUTH_TOKEN than the `igpo launch` at 127.0.0.1:" in str(second)
    assert str(first).endswith("127.0.0.1 asked and did not show that it has the same RAY_AUTH_TOKEN")
    with pytest.raises(PreflightFailed, match="has no secret to show the other nodes: set RAY_AUTH_TOKEN"):
        Board(nodes[0], None, lost_after_s=2)


def test_torchs_store_is_on_a_port_of_its_own_and_on_the_jobs_address_only() -> None:
    nodes, _ = pair()
    node = replace(nodes[0], address="127.0.0.1", head="127.0.0.1")
    store = open_store(node)
    assert node.rendezvous_port not in (node.port, node.ray_port)
    socket.create_connection(("127.0.0.1", node.rendezvous_port), 1).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", node.rendezvous_port), 1)
    del store

    def is_closed() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", node.rendezvous_port)) != 0

    assert eventually(is_closed)
