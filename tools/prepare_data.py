"""`igpo data` as a script, with the demo's own set: python tools/prepare_data.py questions|corpus|check|world-facts --help"""

import demo_data
from igpo_megatron.data.commands import app, prepare
from igpo_megatron.supervision.endings import one_sentence

if __name__ == "__main__":
    app.command("questions")(prepare)  # the name that `igpo data prepare` had here
    app.command("world-facts")(demo_data.main)
    with one_sentence():
        app()
