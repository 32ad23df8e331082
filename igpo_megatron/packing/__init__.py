"""Trees of tokens laid out in rows for the policy, and rows as bytes to send (wire.py). Begin with tree.py. Imports types only."""
