"""Back-ends that are asked over HTTP: web APIs and retriever servers. A new one begins with base.py."""
