"""Indexes in this process: BM25, dense vectors, and both together."""
