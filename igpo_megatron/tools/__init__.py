"""Tools that a policy can call. Begin with base.py, which defines a tool; registry.py has a row for each.

search_tool.py  searches
visit/          reads web pages
python/         runs the policy's code in a sandbox
stored_tool.py, tally.py  record calls for replay, and count how they end

Imports search.
"""
