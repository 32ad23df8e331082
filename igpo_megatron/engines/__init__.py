"""Engines continue token sequences and score probes. Only this room and weights/ use vLLM and Ray.

api.py           the interface of engines; imports nothing heavy. Begin here.
factory.py       chooses between the two back-ends
pool.py          vLLM engines, placed by Ray; fleet.py restarts them, actor.py is one of them
torch_engine/    transformers in the main rank's process

Imports chat, weights and supervision.
"""
