"""How processes wait, fail, end, and leave nothing behind.

waits.py      every wait has a name and a deadline
endings.py    how a process ends: an exit code, and one sentence on the console
failures.py   tracebacks kept in the run's folder; blotting.py removes secrets from them
leftovers.py  removes what killed processes left
library_log.py, offline.py  libraries log to a file and contact no server

Imports types only.
"""
