"""The training loop. Every rank runs main.py, whose `run` is the table of contents of the project. Begin there.

services.py  what a run opens before its first step and uses in every one
step.py      the stages of a step: log-probs, gains, advantages, minibatches
queue.py     rollouts for one step after another, ahead of training where allowed
supervised.py  demonstrations, their held-out loss, early stop
evaluate.py  scores on held-out questions

May import every room but cli, launch, plan and doctor.
"""
