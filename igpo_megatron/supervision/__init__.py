"""How processes wait, fail, end, and leave nothing behind.

waits.py      every wait has a name and a deadline
endings.py    how a process ends: exit codes, and one sentence for people
failures.py   tracebacks kept in the run's folder; blotting.py keeps secrets out of them
leftovers.py  removes what killed processes left
library_log.py, offline.py  libraries talk to a file, and to nobody outside

Imports types only.
"""
