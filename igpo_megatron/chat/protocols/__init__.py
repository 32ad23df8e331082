"""How a policy writes tool calls and answers: formats of data and pure functions, listed in registry.py. Begin with base.py."""
