"""An engine without vLLM: transformers in the main rank's process. Begin with engine.py."""
