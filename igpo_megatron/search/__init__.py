"""Search: a back-end behind a limiter, a cache or a record.

results.py    results of a search, and the interface of search clients. Begin here.
registry.py   all back-ends, a row each; client.py makes a client from settings
providers/    web APIs and retriever servers, over http.py
local/        BM25, dense and hybrid indexes in this process
cache.py      answers kept, recorded and replayed

Imports data and supervision; no torch.
"""
