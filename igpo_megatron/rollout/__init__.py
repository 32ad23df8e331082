"""Multi-turn trajectories: chat format, agent loop, engines and the rollouter that runs many at once."""
