"""Run tests as a part of checks.py: counts, failures and what the tests recorded (`record_property`), as JSON.

python tools/gpu/suite.py --out FILE [--interpret] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import machine
import pytest

OUTCOMES = ("passed", "failed", "skipped")


class Record:
    """A pytest plugin that rewrites its file after every test: a run that is cut off keeps what it has found."""

    def __init__(self, out: Path) -> None:
        self.out, self.started, self.about = out, time.monotonic(), {"device": machine.device_name(), "versions": machine.versions()}
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.failures: dict[str, str] = {}
        self.skips: dict[str, int] = defaultdict(int)
        self.properties: dict[str, dict[str, Any]] = {}
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown each report; a test counts once, by its call or by what kept it from that."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.failures[report.nodeid] = str(crash.message if crash else report.longrepr)[:500]
            elif report.skipped and isinstance(report.longrepr, tuple):
                self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1
            if report.user_properties:
                self.properties[report.nodeid] = dict(report.user_properties)
            self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported fails as a test does."""
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = str(report.longrepr)[-500:]
            self.write()

    def largest(self) -> dict[str, float]:
        """Name of a property -> its largest number in any test."""
        found: dict[str, float] = {}
        for properties in self.properties.values():
            for name, value in properties.items():
                if isinstance(value, int | float):
                    found[name] = max(found.get(name, value), value)
        return found

    def headline(self) -> str:
        """One line."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items() if count)
        parts = [counts or "no tests", *(f"{test}: {why.splitlines()[0]}" for test, why in list(self.failures.items())[:1])]
        return "; ".join([*parts, *(f"{name} {value:.3g}" for name, value in self.largest().items())])

    def write(self) -> None:
        figures = {
            **self.counts,
            "seconds": round(time.monotonic() - self.started, 1),
            "failures": self.failures,
            "skips": self.skips,
            "largest": self.largest(),
            "properties": self.properties,
        }
        text = json.dumps({"name": self.out.stem, "figures": figures, "floors": {}, **self.about}, indent=1)
        self.out.write_text(text + "\n", encoding="utf-8")


def interpret() -> None:
    """Triton kernels run in its interpreter from here on, with every numpy.

    Triton 3.6 makes numbers of arrays of one element by `int`, which numpy refuses since 2.4; later versions squeeze them first.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    as_triton_does = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        as_triton_does(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def main() -> None:
    """Exit code 0: some tests passed and none failed."""
    parser = argparse.ArgumentParser(description="Tests, with a JSON result.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--interpret", action="store_true", help="Triton kernels in its interpreter, which must be chosen before it is imported"
    )
    given, arguments = parser.parse_known_args()
    if given.interpret:
        interpret()
    record = Record(given.out)
    code = pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", *arguments], plugins=[record])
    record.write()
    if code or not record.counts["passed"]:
        sys.exit(record.headline())
    print(record.headline())


if __name__ == "__main__":
    main()
