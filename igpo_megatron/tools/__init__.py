"""Tools that a policy can call. Begin with base.py, which says what a tool is; registry.py has a row for each.

search_tool.py  searches
visit/       reads web pages
python/      runs the policy's code in a jail
stored_tool.py, tally.py  records calls for replay, and counts how they end

Imports search.
"""
