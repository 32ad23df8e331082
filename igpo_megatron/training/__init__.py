"""The training loop. Every rank runs main.py, whose `train` is the table of contents of the project. Begin there.

step.py      what a step learns from its groups: log-probs, gains, advantages, loss
queue.py     rollouts for one step after another, ahead of training where allowed
evaluate.py  scores on held-out questions

May import every room but cli, launch, plan and doctor.
"""
