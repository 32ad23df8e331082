"""What this machine, model, tools and probes can do: everything behind `igpo doctor`, and `igpo convert verify`.

machine.py   packages, devices, memory
probes.py    engine and policy score probes alike
tools.py     every tool answers
chat.py      the model's chat template is understood
verify.py    converted weights give the same log-probs
commands.py  the command line

May import every room below cli.
"""
