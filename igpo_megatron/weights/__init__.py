"""New weights on their way from the policy to the engines, and the proofs that they arrived.

send.py       cuts weights into buckets and follows each to every engine. Begin here.
store.py      the shared file of buckets, with fingerprints
transports.py, cuda_transports.py  the ways by which buckets travel
transfer.py   the receiving end, inside vLLM's workers
canary.py     the last proof: engines and policy agree on the log-probs of fixed tokens

Imports supervision only; policy/weight_sync.py is the sending rank's side.
"""
