"""Typed configuration: the schema, loading from YAML and overrides, and the checks that need files or a world size."""
