"""Log-probs of given tokens from hidden states, without the logits: Triton on CUDA, chunks of torch elsewhere.

linear_logprob.py  the autograd function, and which form it takes. Begin here.
token_loss.py      the same with the loss's gradient formed in the forward pass

Imports types only. This room alone knows Triton.
"""
