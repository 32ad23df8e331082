"""Conversations as tokens: rendered once, then only appended to.

format.py     ChatFormat, all that a rollout asks of a conversation. Begin here.
template.py   what a model's chat template writes around messages
protocols/    how a policy spells tool calls and answers

Imports tools, for what the policy is told of them.
"""
