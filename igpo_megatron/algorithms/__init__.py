"""What a run optimises: plain functions on plain lists; torch in the losses only.

rewards.py     the outcome of a trajectory
info_gain.py   what each turn added to the probability of the ground truth
advantages/    one number per turn, from outcomes and gains; begin with registry.py
losses/        from advantages and log-probs of tokens to the loss; begin with registry.py
hooks.py       checks functions of your own that replace ours

Imports data, and the protocols of chat.
"""
