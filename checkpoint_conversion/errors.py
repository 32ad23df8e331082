"""What a conversion raises; apart, so that who only catches it loads no torch."""


class ConversionError(ValueError):
    """A folder, a name or a tensor that cannot be converted; the message says what was found, expected, and what to change."""
