"""One command per node: what a node is, what is wrong between nodes, whose fault an end was. Only node 0's server is started here."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ports import free_port
from typer.testing import CliRunner

from igpo_megatron.cli import app
from igpo_megatron.launch import board, job
from igpo_megatron.launch.agent import ending_of_ranks
from igpo_megatron.launch.board import Board, Judge, PreflightFailed
from igpo_megatron.launch.doorway import Line
from igpo_megatron.launch.head import decide, earliest_cause
from igpo_megatron.launch.job import Options, engine_gpus, launch_arguments, ray_command, run_node
from igpo_megatron.launch.messages import Answer, Report, Said, Verdict, read, write
from igpo_megatron.launch.node import Node, busy_ports, place
from igpo_megatron.launch.preflight import Facts, disagreements, facts_of, missing
from igpo_megatron.launch.processes import Child
from igpo_megatron.supervision.endings import Ending

SECRET = "a secret of the job"
LONG_S = 200.0
"""Seconds that pass on no machine before a test has seen what it waits for."""
FIRST = Facts(0, 2, "both", 1, "a", "10.0.0.1", {"torch": "2.13", "python": "3.11"}, {"optim": {"lr": 0.1}}, "m")
SECOND = replace(FIRST, rank=1, host="b", address="10.0.0.2")


def given(**changes: object) -> Node:
    return place(**{"rank": 0, "nodes": 2, "head": "127.0.0.1:5000", "role": "both", "ranks": None, "world": 4, **changes})  # type: ignore[arg-type]


def test_a_node_takes_its_equal_share_of_the_layout_and_the_heads_next_ports():
    node = given()
    assert (node.rank, node.ranks, node.address, node.port, node.ray_port, node.rendezvous_port) == (0, 2, "127.0.0.1", 5000, 5001, 5002)
    assert given(rank=1, role="rollout").ranks == 0 and given(ranks=3).ranks == 3


def test_a_single_node_is_bound_to_loopback_whatever_head_it_was_given():
    node = given(nodes=1, head="10.1.2.3", rank=None)
    assert (node.address, node.head, node.ranks) == ("127.0.0.1", "127.0.0.1", 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": None}, "--nodes 2 needs --node-rank 0 to 1"),
        ({"rank": 2}, "--node-rank 2 is not one of 0 to 1"),
        ({"head": None}, "needs --head HOST"),
        ({"head": "127.0.0.1:x"}, "expected HOST or HOST:PORT"),
        ({"head": "203.0.113.9"}, "--head 203.0.113.9 is 203.0.113.9, which is no address of this machine"),
        ({"role": "rollout"}, "--role rollout on node 0"),
        ({"role": "serve"}, "--role serve: expected one of train, rollout, both"),
        ({"world": 3}, "the layout has 3 ranks, which 2 nodes cannot share evenly"),
        ({"rank": 1, "address": "203.0.113.9"}, "--address 203.0.113.9 is no address of this machine"),
    ],
)
def test_a_command_line_that_names_no_place_is_answered_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        given(**changes)


def test_a_busy_port_is_seen_and_a_free_one_is_not():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert busy_ports("127.0.0.1", [port]) == [port]
    assert busy_ports("127.0.0.1", [port]) == []


def test_nodes_that_agree_have_no_problem():
    assert disagreements([FIRST, SECOND]) == [] and missing([FIRST, SECOND], 2, 5) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nodes": 3}, "node 0 (a, 10.0.0.1) expects 2 nodes and node 1 (b, 10.0.0.2) expects 3"),
        ({"rank": 0}, "node 0 (a, 10.0.0.1) and node 0 (b, 10.0.0.2) have the same --node-rank"),
        ({"packages": {"torch": "2.12", "python": "3.11"}}, "other versions: torch: '2.13' -> '2.12'"),
        ({"config": {"optim": {"lr": 0.2}}}, "other settings: optim.lr: 0.1 -> 0.2"),
        ({"model": "n"}, "the model folder on node 1 (b, 10.0.0.2) is another"),
        ({"options": {"max_restarts": 1}}, "started with other options: max_restarts: None -> 1"),
    ],
)
def test_what_differs_between_nodes_is_named_with_both_values(changes, sentence):
    (problem,) = disagreements([FIRST, replace(SECOND, **changes)])
    assert sentence in problem


def test_a_busy_port_and_missing_nodes_are_named():
    (problem,) = disagreements([replace(FIRST, busy=[29401]), SECOND])
    assert problem.startswith("port 29401 of node 0 (a, 10.0.0.1) is busy")
    assert missing([SECOND], 3, 60) == "nodes 0, 2 of 3 did not come within 60 s; here: node 1 (b, 10.0.0.2)"


def test_node_0_looks_whether_torchruns_port_is_free():
    from igpo_megatron.config.load import load

    port = free_port(2)
    head = Node(0, 2, "both", 1, "a", "127.0.0.1", "127.0.0.1", port)
    with socket.create_server(("127.0.0.1", head.rendezvous_port)):
        assert facts_of(head, load("examples/quickstart/igpo.yaml", []), {}, with_ray=False).busy == [head.rendezvous_port]


def test_facts_survive_the_wire():
    assert read(Facts, write(FIRST)) == FIRST


def test_a_killed_rank_is_the_cause_though_its_neighbour_reported_first():
    neighbour = Report(0, "error", "rank 0 lost its connection", 1, 10.0)
    killed = Report(1, "signal", "rank 1 was ended by SIGKILL", 137, 10.4)
    assert earliest_cause([neighbour, killed]) == killed and earliest_cause([neighbour]) == neighbour
    assert earliest_cause([killed, Report(0, "ray", "Ray ended", 1, 11.0)]).kind == "ray"


def test_a_verdict_waits_for_later_reports_and_for_every_trainer():
    failed = Report(1, "signal", "rank 1 was ended by SIGKILL", 137, 10.4)
    done = [Report(rank, "done", "", 0, 1.0) for rank in (0, 1)]
    assert decide([failed], {0, 1}, {}, 20, since_first_s=0.5) is None
    assert decide([failed], {0, 1}, {}, 20, since_first_s=2.5) == Verdict(137, failed.sentence)
    assert decide(done[:1], {0, 1}, {"b": 19.0}, 20, 0.0) is None
    assert decide(done, {0, 1}, {}, 20, 0.0) == Verdict(0, "finished")
    # A lost connection waits for its cause: another report, or a node that has fallen silent.
    peer = Report(0, "peer", "rank 0 lost its connection to another rank", 1, 10.0)
    assert decide([peer], {0, 1}, {"node 1 (b)": 15.0}, 20, since_first_s=14.0) is None
    assert decide([peer, failed], {0, 1}, {}, 20, since_first_s=2.5) == Verdict(137, failed.sentence)
    assert "node 1 (b) has not been heard of" in decide([peer], {0, 1}, {"node 1 (b)": 21.0}, 20, since_first_s=20.0).sentence
    assert decide([peer], {0, 1}, {}, 20, since_first_s=22.5) == Verdict(1, peer.sentence)
    lost = decide(done[:1], {0, 1}, {"node 1 (b)": 21.0}, 20, 0.0)
    assert lost == Verdict(1, "node 1 (b) has not been heard of for 21 s: it is down or cut off")


@pytest.mark.parametrize(
    ("role", "overrides", "expected"),
    [
        ("both", ["rollout.engine.gpu_ids=[6,7]"], [6, 7]),
        ("train", ["rollout.engine.gpu_ids=[6,7]"], []),
        ("rollout", [], None),
        ("both", ["placement.mode=colocated"], [0, 1]),
        ("train", ["placement.mode=colocated"], [0, 1]),
    ],
)
def test_ray_sees_the_engines_gpus_which_may_be_those_of_the_ranks(role, overrides, expected):
    from igpo_megatron.config.load import load

    node = Node(1, 2, role, 0 if role == "rollout" else 2, "a", "10.0.0.2", "10.0.0.1", 29400)
    gpus = engine_gpus(node, load("examples/quickstart/igpo.yaml", overrides))
    assert (None if gpus is None else list(gpus)) == expected


def test_ray_and_torchrun_get_the_addresses_of_the_job(tmp_path):
    from igpo_megatron.config.load import load

    config = load("examples/quickstart/igpo.yaml", ["rollout.engine.count=3"])
    head = Node(0, 3, "train", 2, "a", "10.0.0.1", "10.0.0.1", 29400)
    worker = Node(2, 3, "rollout", 0, "c", "10.0.0.3", "10.0.0.1", 29400)
    first, second = " ".join(ray_command(head, config, tmp_path)), " ".join(ray_command(worker, config, tmp_path))
    assert (
        f"--node-ip-address 10.0.0.1 --num-cpus 0 --num-gpus 0 --temp-dir {tmp_path}/ray --head --port 29401" in first
        and "pkill" not in first
    )
    assert f"--node-ip-address 10.0.0.3 --num-cpus 4 --num-gpus 0 --temp-dir {tmp_path}/ray --address 10.0.0.1:29401" in second
    options = Options("c10d", 2, 120, 20)
    agent = launch_arguments(replace(head, rank=1), [0, 1], options)
    assert (agent["min_nodes"], agent["max_restarts"], agent["rdzv_endpoint"]) == (2, 2, "10.0.0.1:29402")
    static = launch_arguments(replace(head, rank=1), [0, 1], replace(options, rendezvous="static", max_restarts=0))
    assert (static["rdzv_endpoint"], static["rdzv_configs"]["rank"]) == ("10.0.0.1:29402", 1)
    with pytest.raises(ValueError, match="expected c10d or static"):
        Options("etcd", 0, 1, 1)
    with pytest.raises(ValueError, match="--max-restarts 2 needs --rendezvous c10d"):
        Options("static", 2, 1, 1)


def failure(code: int, second: int, left: Ending | None = None):
    data = {"message": "<NONE>"} if left is None else {"message": left.sentence, "ending": asdict(left)}
    return SimpleNamespace(exitcode=code, timestamp=second, error_file_data=data)


def test_the_rank_that_was_killed_or_said_why_is_the_culprit_not_those_that_torchrun_ended():
    ended, why = failure(-15, 1), Ending("error", 1, "engine 0 did not start", 3.4)
    lost = failure(1, 2, Ending("peer", 1, "rank 1 lost its connection to another rank", 2.9))
    asked = failure(143, 1, Ending("interrupted", 143, "rank 0 was interrupted by SIGTERM", 3.1))
    assert ending_of_ranks({0: ended, 1: lost, 2: failure(-9, 3)}).sentence == "rank 2 was ended by SIGKILL"
    assert ending_of_ranks({0: lost, 1: failure(1, 3, why), 2: asked}) == why
    assert ending_of_ranks({0: failure(-15, 1), 1: failure(1, 3, replace(why, time=3.5)), 2: failure(1, 3, why)}) == why
    assert ending_of_ranks({0: ended, 1: lost}).sentence == "rank 1 lost its connection to another rank"
    assert ending_of_ranks({0: asked, 1: lost}).kind == "peer"
    assert ending_of_ranks({0: failure(3, 4), 1: failure(-15, 3)}) == Ending("error", 3, "rank 0 ended with exit code 3", 4)
    assert ending_of_ranks({0: ended}).sentence == "rank 0 was ended by SIGTERM"


def test_a_rank_that_torchrun_kills_because_it_closes_too_slowly_is_not_the_cause():
    why = Ending("error", 1, "rank 1 failed: ValueError", 100.0)
    assert ending_of_ranks({0: failure(-9, 131), 1: failure(1, 100, why)}) == why
    assert ending_of_ranks({0: failure(-9, 100), 1: failure(1, 100, why)}).sentence == "rank 0 was ended by SIGKILL"


# ---- the meeting, for real: threads stand in for nodes


def meet(
    nodes: list[Node],
    facts: list[Facts],
    deadline_s: float = LONG_S,
    lost_after_s: float = LONG_S,
    secrets: Sequence[str] = (SECRET,) * 3,
    judge: Judge = disagreements,
) -> list[Board | str]:
    """Each node's board once all have met, or the sentence it would print."""
    answers: list[Board | str] = ["no answer"] * len(nodes)

    def one(number: int) -> None:
        try:
            board = Board(nodes[number], secrets[number], lost_after_s=lost_after_s)
            board.meet(facts[number], deadline_s, judge)
            answers[number] = board
        except PreflightFailed as problem:
            answers[number] = str(problem)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline_s + 60)
    return answers


def pair(count: int = 2) -> tuple[list[Node], list[Facts]]:
    port = free_port(2)  # Ray's and torch's come after it
    nodes = [Node(rank, count, "both", 1, "host", "127.0.0.1", "127.0.0.1", port) for rank in range(count)]
    return nodes, [Facts(rank, count, "both", 1, "host", "127.0.0.1", config={"lr": 1}) for rank in range(count)]


def eventually(happened: Callable[[], object]) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if happened():
            return True
        time.sleep(0.05)
    return False


def test_every_node_prints_the_same_sentence_where_settings_differ():
    nodes, facts = pair()
    facts[1] = replace(facts[1], config={"lr": 2})
    first, second = meet(nodes, facts)
    assert isinstance(first, str) and first == second and "lr: 1 -> 2" in first


def test_node_0_answers_until_a_slow_node_has_heard_why_the_job_cannot_start(monkeypatch):
    ask = Line.ask

    async def slowly(line: Line, said: Said) -> Answer:
        answer = await ask(line, said)
        await asyncio.sleep(1.5)
        return answer

    monkeypatch.setattr(Line, "ask", slowly)
    nodes, facts = pair()
    first, second = meet(nodes, [facts[0], replace(facts[1], config={"lr": 2})])
    assert first == second and "lr: 1 -> 2" in str(first)


def clock_of_boards(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets it forward by seconds; node 0 gives up LONG_S / 2 before the deadline, so the others have as long to hear it."""
    skipped: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(skipped), time=time.time, sleep=time.sleep)
    monkeypatch.setattr(board, "time", clock)
    monkeypatch.setattr(board, "_HEAD_SPARES_S", LONG_S / 2)
    return skipped.append


def test_a_peer_that_does_not_come_is_missed_by_every_node_within_the_deadline(monkeypatch):
    later = clock_of_boards(monkeypatch)

    def judge(found: list[Facts]) -> list[str]:
        if len(found) == 2:
            later(LONG_S / 2)
        return disagreements(found)

    nodes, facts = pair(3)
    first, second = meet(nodes[:2], facts[:2], judge=judge)
    assert first == second and str(first).startswith("node 2 of 3 did not come within 200 s")


def test_a_node_that_nobody_answers_says_so_at_the_deadline():
    nodes, facts = pair(3)
    began = time.monotonic()
    (alone,) = meet(nodes[1:2], facts[1:2], deadline_s=2)
    assert "no `igpo launch` of node 0 answered" in str(alone) and time.monotonic() - began < 60


def test_a_port_taken_by_somebody_else_is_told_by_every_node():
    nodes, facts = pair()
    with socket.create_server(("127.0.0.1", nodes[0].port)):
        first, second = meet(nodes, facts, deadline_s=4)
    assert f"port {nodes[0].port} of node 0 (host, 127.0.0.1) is busy" in str(first)
    assert "if something else listens on that port" in str(second)


def test_a_failure_on_one_node_becomes_the_verdict_on_all_and_a_silent_node_is_missed():
    nodes, facts = pair()
    first, second = meet(nodes, facts)
    assert isinstance(first, Board) and isinstance(second, Board)
    second.post("ray")
    assert eventually(lambda: first.has("ray"))
    assert first.verdict is None and second.verdict is None
    second.report("signal", "rank 1 was ended by SIGKILL", 137)
    assert eventually(lambda: first.verdict and second.verdict)
    assert first.verdict == second.verdict == Verdict(137, "rank 1 was ended by SIGKILL")
    second.leave()
    first.leave()
    assert first._ended.is_set(), "it has heard that node 1 has left, and does not wait for more"


def test_a_node_whose_heartbeat_stops_ends_the_job_on_the_others():
    nodes, facts = pair()
    first, second = meet(nodes, facts)
    assert isinstance(first, Board) and isinstance(second, Board) and first._head
    second._ended.set()  # its thread stops: what a cut link looks like from node 0
    first._head._lost_after_s = second._lost_after_s = 2.0  # from here on: before, a slow machine would have lost it too early
    assert eventually(lambda: first.verdict)
    assert first.verdict is not None and first.verdict.sentence.startswith("node 1 (host, 127.0.0.1) has not been heard of for")
    assert eventually(lambda: second.verdict)
    assert second.verdict is not None and "node 0 (host, 127.0.0.1) has not answered node 1" in second.verdict.sentence
    first.leave()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NNODES": "2"}, "--nodes 2 needs --node-rank 0 to 1"),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "1"}, "--nodes 2 needs --head"),
        ({"SLURM_NNODES": "3", "SLURM_NODEID": "3", "MASTER_ADDR": "127.0.0.1"}, "--node-rank 3 is not one of 0 to 2"),
        ({"NNODES": "2", "NODE_RANK": "0", "IGPO_HEAD": "127.0.0.1", "NODE_ROLE": "rollout"}, "--role rollout on node 0"),
    ],
)
def test_the_command_reads_its_place_from_the_launchers_environment(environment, sentence, tmp_path, monkeypatch):
    for name in ("NNODES", "NODE_RANK", "NODE_ROLE", "IGPO_HEAD", "MASTER_ADDR", "SLURM_NNODES", "SLURM_NODEID", "RANKS", "NODE_IP"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["launch", "examples/quickstart/igpo.yaml", f"run.folder={tmp_path}"], env=environment)
    assert result.exit_code == 2 and f"error: {sentence}" in result.output


def test_a_server_that_dies_below_a_child_that_goes_on_is_named(tmp_path: Path) -> None:
    """`ray start` waits for a raylet that was killed as it came up."""
    (tmp_path / "raylet").symlink_to(shutil.which("sleep") or "")
    child = Child(["sh", "-c", '"$0" 600 & sleep 600', str(tmp_path / "raylet")], {})
    try:
        deadline = time.monotonic() + 60
        while not (servers := [one for one in psutil.Process(child._process.pid).children() if one.name() == "raylet"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert child.poll() is None and child.ended(("raylet",)) is None
        servers[0].kill()
        while child.ended(("raylet",)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert child.poll() is None and child.ended(("raylet",)) == "raylet" and child.ended(("gcs_server",)) is None
    finally:
        child.stop(5)


def test_a_file_of_questions_with_wrong_columns_stops_every_node_before_anything_starts(tmp_path, monkeypatch, capsys):
    from igpo_megatron.config.load import load

    class Meeting:
        def __init__(self, *_: object, **__: object) -> None: ...

        def meet(self, own: Facts, deadline_s: float, judge: Judge) -> list[Facts]:
            raise PreflightFailed("; ".join(judge([own, replace(own, rank=1)])))

    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"question": ["Which city?"]}), bad)
    config = load("examples/quickstart/igpo.yaml", [f"data.train=[{bad}]", "data.eval=[]"])
    monkeypatch.setattr(job, "Board", Meeting)
    monkeypatch.setattr(job, "check", lambda *_, **__: [])
    assert run_node(Node(0, 2, "both", 1, "a", "127.0.0.1", "127.0.0.1", free_port()), config, [], Options("c10d", 0, 5, 5)) == 2
    assert f"error: {bad}: cannot be used as questions:\n  - column data_source: column is missing" in capsys.readouterr().err
