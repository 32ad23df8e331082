"""Engines continue token sequences and score probes. This room and weights/ alone know vLLM and Ray.

api.py           what a run asks of engines; imports nothing heavy. Begin here.
factory.py       chooses between the two that there are
pool.py          vLLM engines, placed by Ray: fleet.py keeps them alive, actor.py is one of them
torch_engine/    transformers in the main rank's process

Imports chat, weights and supervision.
"""
