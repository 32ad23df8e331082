"""Reads a web page: fetch.py loads it, extract.py takes its text, reader.py chooses what fits."""
