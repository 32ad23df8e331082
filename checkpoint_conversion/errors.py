"""The error of all conversions, in a file of its own, so that catching it does not import torch."""


class ConversionError(ValueError):
    """A folder, a name or a tensor that cannot be converted; the message says what was found, expected, and what to change."""
