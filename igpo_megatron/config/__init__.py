"""From YAML and command line to one checked `Config`.

schema.py  all sections together; each lives in the settings.py of its room, with what can be wrong in it. Begin here.
load.py    reads, explains, and names what is wrong
checks.py  asks every section, and what is between them

Imports the settings.py of every room, and no other code of theirs.
"""
