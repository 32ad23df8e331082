"""What a run optimises: plain functions on plain lists; tensors in the losses only.

outcomes.py    how well an answer matches
rewards.py     the reward of a trajectory, from the outcome of its answer
info_gain.py   what each turn added to the probability of the ground truth
advantages/    one number per turn, from outcomes and gains; begin with registry.py
losses/        from advantages and log-probs of tokens to the loss; begin with registry.py
hooks.py       checks functions of your own that replace ours

Imports the protocols of chat; outcomes, advantages and losses import nothing, as the configuration is made of them.
"""
