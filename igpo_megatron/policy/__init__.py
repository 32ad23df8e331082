"""The policy on Megatron-Core. This room alone knows Megatron.

policy.py    the policy: log-probs, training steps, reference weights. Begin here.
model.py     from a Hugging Face config to a GPTModel, whose mask is attention.py
schedule.py  passes over micro-batches, run by Megatron's pipeline schedules
parallel.py  process groups; rows.py gives every rank its rows
checkpoint*.py, weight_sync.py  weights to disk, and to the engines

Imports packing, kernels, supervision, checkpoint_conversion, and from algorithms the input of a loss.
"""
