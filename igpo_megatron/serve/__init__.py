"""Servers for runs on other machines, both with Search-R1's protocol: `igpo serve retriever` and `igpo serve search`.

retriever.py  a corpus and its index. Begin here.
search.py     a paid API behind a cache, with the budgets of budgets.py
http.py       code that both share

Imports search and its imports; no torch.
"""
