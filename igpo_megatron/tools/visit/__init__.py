"""Reads a web page: fetch.py loads it, extract.py gets its text, reader.py chooses what fits. Begin with reader.py."""
