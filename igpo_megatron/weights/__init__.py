"""Transfer of new weights from the policy to the engines, and the checks that they arrived.

send.py       cuts weights into buckets, follows each to every engine, checks the canary. Begin here.
store.py      the shared file of buckets, with fingerprints
transports.py, cuda_transports.py  how buckets travel
transfer.py   the receiving end, inside vLLM's workers

Imports supervision only; policy/weight_sync.py is the sending rank's side.
"""
