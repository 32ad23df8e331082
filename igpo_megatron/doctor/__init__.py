"""Checks of machine, model, tools and probes: the code of `igpo doctor` and `igpo convert verify`.

machine.py   packages, devices, memory
probes.py    engine and policy score probes with the same result
tools.py     every tool answers
chat.py      how the model's chat template is used
verify.py    converted weights give the same log-probs
commands.py  the command line

May import every room below cli.
"""
