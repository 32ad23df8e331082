"""How to lay a model out on N devices: what fits, and how long a step takes. Begin with command.py, then search.py;
commands.py has the options.

memory.py, train_time.py, rollout_time.py, asynchronous.py  the models of cost
machines.py, calibrate.py  what a device can do, from data sheets or measured

Imports config, and policy/meta.py to count parameters.
"""
