"""A real Ray whose raylet is killed is named at once, and nothing of it stays."""

from __future__ import annotations

import time

from demo_runs import POLICY

from igpo_megatron.config.load import build
from igpo_megatron.engines.ray_cluster import RayCluster
from igpo_megatron.supervision.leftovers import is_alive


def test_a_killed_raylet_is_named_and_its_agents_end_with_the_cluster() -> None:
    cluster = RayCluster(build({"model": {"path": str(POLICY)}, "run": {"device": "cpu"}}), cuda=False)
    try:
        raylet = cluster._servers["raylet"]
        deadline = time.monotonic() + 60
        while not (agents := raylet.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert cluster.ended() is None
        cluster.remember()
        raylet.kill()
        deadline = time.monotonic() + 60
        while cluster.ended() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert cluster.ended() == "Ray ended on this machine: its raylet died"
    finally:
        cluster.close()
    assert not any(map(is_alive, agents))
