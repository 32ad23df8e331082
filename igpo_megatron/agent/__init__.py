"""The agent loop: one question becomes one tree of turns.

trajectory.py  one path: think, call a tool, read, think again, answer. Begin here.
rollouter.py   many questions at once, with deadlines and a limit on failures
trees/         which paths fork, and where
prober.py      probes of the ground truth, scored by engines during the rollout
demonstrat*.py a scripted agent, which demonstrates searching

Imports chat, tools and the interfaces of engines; knows neither torch nor Ray.
"""
