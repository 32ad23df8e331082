"""Turn YAML and the command line into one checked `Config`.

schema.py  all sections together; each is defined, with its own checks, in its room. Begin here.
load.py    reads and explains settings, and describes mistakes
checks.py  runs the checks of every section, and those across sections
host.py    what `auto` means on this machine

Imports the settings.py of every room, and advantages and losses, which have their settings beside them; no other code of theirs.
"""
