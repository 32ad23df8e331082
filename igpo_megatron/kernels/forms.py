"""Which form of the Triton forward runs, looked up in the committed table head_forms.json.

    {"NVIDIA H100 80GB HBM3": {"source": "measured: ...", "rules": [{"max_rows": 256, "form": "fused"}, ...]}, "default": ...}

What the forms are is in triton_stream and triton_head. The first rule whose bounds hold decides; a bound that is left out always holds.
`tools/bench/head_kernel.py --write-table` writes a device's entry from measured medians. Never a race at run time: that would change the
order of summation between runs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, get_args

Form = Literal["fused", "tma", "chunks", "specialised"]
FORMS: tuple[Form, ...] = get_args(Form)
"""The riskiest last: whoever tries all of them in this order has the results of the others by then."""

TABLE = Path(__file__).with_name("head_forms.json")


def choose(device_name: str, rows: int, hidden: int, vocab: int, table: dict[str, Any] | None = None) -> str:
    """Form for N `rows`, H `hidden`, v `vocab` rows of weight on this rank; a device that is not listed uses `default`."""
    table = table or load()
    entry = table.get(device_name) or table["default"]
    sizes = {"max_rows": rows, "max_hidden": hidden, "max_vocab": vocab}
    for rule in entry["rules"]:
        if all(size <= rule[bound] for bound, size in sizes.items() if bound in rule):
            return rule["form"]
    raise ValueError(f"head_forms.json, {device_name}: no rule covers N={rows}, H={hidden}, v={vocab}; the last rule must have no bounds")


@functools.cache
def load() -> dict[str, Any]:
    """The committed table."""
    return json.loads(TABLE.read_text(encoding="utf-8"))
