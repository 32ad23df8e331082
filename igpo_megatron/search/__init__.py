"""Search: a back-end behind a limiter, a cache or a record.

results.py    what a search gives back, and the interface of all that can search. Begin here.
registry.py   every back-end, a row each; client.py goes from settings to a client
providers/    web APIs and retriever servers, over http.py
local/        BM25 and dense indexes in this process
cache.py      answers kept, recorded and replayed

Imports data and supervision; no torch.
"""
