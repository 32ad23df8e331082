"""Trees of tokens laid out in rows for the policy. Begin with tree.py. Imports types only."""
