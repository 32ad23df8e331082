"""From YAML and command line to one checked `Config`.

schema.py  all sections together; each section lives in the settings.py of its room. Begin here.
load.py    reads, explains, and names what is wrong
check/     checks across rooms

Imports the settings.py of every room, and no other code of theirs.
"""
