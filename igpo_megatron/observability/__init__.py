"""What a run writes, and the reports made of it.

run_folder.py    layout of a run's folder. Begin here.
tracker.py       a run's progress and metrics, to console.py, metrics_file.py (JSON lines) and wandb_run.py
rollout_dump.py  rollouts as parquet, enough to replay a step
report/          one HTML page per run

Imports data and supervision.
"""
