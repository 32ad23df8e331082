"""The tool the policy calls: search clients behind one protocol. Never imports torch."""
