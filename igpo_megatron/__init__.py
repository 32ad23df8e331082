"""igpo_megatron: train search agents with information-gain rewards on Megatron-Core, vLLM and Ray."""

__version__ = "0.1.0"
