"""Trees of tokens laid out in rows for the policy, and rows as bytes that travel (wire.py). Begin with tree.py. Imports types only."""
