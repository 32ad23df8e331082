"""What a run writes, and how people look at it.

run_folder.py    where everything lies. Begin here.
tracker.py       metrics to console, JSON lines and wandb
rollout_dump.py  rollouts as parquet, enough to replay a step
report/          one HTML page per run

Imports data and supervision.
"""
