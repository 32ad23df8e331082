"""One HTML page per run. Begin with page.py."""
