"""Indexes in this process: BM25 and dense vectors."""
