"""Which trajectories fork, and where: base.py grows a tree, entropy.py (ARPO, AEPO) and gain.py decide."""
