"""The scaling planner: which layout of a model on N devices fits, how long its step takes, and the file that launches it."""
