"""A real Ray whose raylet is killed is named at once, and nothing of it stays."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from igpo_megatron.config.load import build
from igpo_megatron.engines.ray_cluster import RayCluster

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"


def test_a_killed_raylet_is_named_and_its_agents_end_with_the_cluster() -> None:
    cluster = RayCluster(build({"model": {"path": str(POLICY)}, "run": {"device": "cpu"}}), cuda=False)
    try:
        (raylet,) = [child for child in psutil.Process().children() if child.name() == "raylet"]
        deadline = time.monotonic() + 60
        while not (agents := raylet.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert cluster.ended() is None
        cluster.remember()
        raylet.kill()
        deadline = time.monotonic() + 10
        while cluster.ended() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert cluster.ended() == "Ray ended on this machine: its raylet died"
    finally:
        cluster.close()
    _, alive = psutil.wait_procs(agents, timeout=10)
    assert not alive
