"""What a run leaves behind for people: metrics, console, rollout files."""
