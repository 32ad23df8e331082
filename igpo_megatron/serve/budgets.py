"""How many paid searches each run has used, kept in SQLite so that a restart of the server forgets none.

cache miss of a run --charge--> ledger: enough left? ──> the provider
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from igpo_megatron.search.results import SearchClient, SearchResult, SearchStopped

SCHEMA = "CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, queries INTEGER NOT NULL) WITHOUT ROWID"


class BudgetSpent(SearchStopped):
    """The run has not enough searches left for what it asks."""


class Ledger:
    """Run -> paid queries so far. Several servers may share the file."""

    def __init__(self, path: Path):
        """Open or make the table; the file may hold other things."""
        self._database = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._database.execute(SCHEMA)

    def charge(self, run: str, queries: int, budget: int) -> None:
        """Add `queries` to what the run has used. Raises BudgetSpent, and adds nothing, where that would be more than `budget`."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            spent = self.spent(run)
            if spent + queries > budget:
                raise BudgetSpent(
                    f"run {run} has used {spent} of its {budget} paid searches and asks for {queries} more; "
                    "cached answers stay free; start the server with a higher --budget, or take another run id"
                )
            self._database.execute("REPLACE INTO spent VALUES (?, ?)", (run, spent + queries))

    def spent(self, run: str) -> int:
        """Paid queries of a run so far."""
        row = self._database.execute("SELECT queries FROM spent WHERE run = ?", (run,)).fetchone()
        return row[0] if row else 0

    def all(self) -> dict[str, int]:
        """Every run that has used something."""
        return dict(self._database.execute("SELECT run, queries FROM spent ORDER BY run"))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class Metered:
    """SearchClient that charges a run before it asks another one, which it does not own.

    A query counts once, however many attempts it takes and however it ends: what a provider charges for a failure is not known here.
    """

    def __init__(self, inner: SearchClient, ledger: Ledger, run: str, budget: int):
        self.inner, self.ledger, self.run, self.budget = inner, ledger, run, budget

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """The other client's results. Raises BudgetSpent before anything is asked."""
        self.ledger.charge(self.run, sum(bool(query.strip()) for query in queries), self.budget)
        return await self.inner.search(queries)

    async def close(self) -> None:
        """The other client stays open."""
