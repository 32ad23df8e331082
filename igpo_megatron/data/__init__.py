"""Questions and corpora: reading, ordering and checking them. Needs pyarrow, never torch."""
