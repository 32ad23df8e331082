"""Checks across rooms, one file per subject; checks.py runs them all."""
