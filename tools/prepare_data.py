"""`igpo data` as a script, with the sets of facts: python tools/prepare_data.py questions|corpus|check|world-facts|element-facts --help"""

import demo_data
from igpo_megatron.data.commands import app, prepare
from igpo_megatron.supervision.endings import one_sentence

if __name__ == "__main__":
    app.command("questions")(prepare)  # the name that `igpo data prepare` had here
    app.command("world-facts")(demo_data.main)
    app.command("element-facts")(demo_data.elements)
    with one_sentence():
        app()
