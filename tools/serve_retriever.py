"""`igpo serve retriever` as a script: python tools/serve_retriever.py --corpus FILE.jsonl --port 8000"""

import typer

from igpo_megatron.serve.retriever import retriever
from igpo_megatron.supervision.endings import one_sentence

if __name__ == "__main__":
    with one_sentence():
        typer.run(retriever)
