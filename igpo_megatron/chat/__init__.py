"""Conversations as tokens: rendered once, then only appended to.

format.py     ChatFormat: prompts, results, probes and parsing for a rollout. Begin here.
template.py   what a model's chat template writes around messages
protocols/    how a policy writes tool calls and answers

Imports tools, for their descriptions.
"""
