"""Replace secrets in text that is shown or stored by `***`, in every form in which they are sent."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from urllib.parse import quote, quote_plus

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are never shown."""

_SHORTEST, _SHORTEST_UNASKED = 4, 8
"""Characters. Shorter values are not secrets and occur in any text; the second limit is for values known as secrets by their name only."""


def blot_value(text: str, value: str) -> str:
    """`text` without the secret `value`."""
    if len(value) < _SHORTEST:
        return text
    for form in {value, quote(value), quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]}:
        text = text.replace(form, "***")
    return text


def blot_environment(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of environment variables that are named like secrets."""
    secrets = [value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= _SHORTEST_UNASKED]
    for value in sorted(secrets, key=len, reverse=True):  # one may be a prefix of another
        text = blot_value(text, value.encode("utf-8", "replace").decode())
    return text
