"""The policy on Megatron-Core: the only package that knows Megatron."""
