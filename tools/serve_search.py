"""`igpo serve search` as a script: python tools/serve_search.py --port 8001 --cache FILE.sqlite --budget 20000 backend=serper"""

import typer

from igpo_megatron.serve.search import search
from igpo_megatron.supervision.endings import one_sentence

if __name__ == "__main__":
    with one_sentence():
        typer.run(search)
