"""Count the paid searches of each run, in SQLite, so that a restart of the server loses no counts.

cache miss of a run --charge--> ledger: enough left? ──> the provider
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from igpo_megatron.search.results import SearchClient, SearchResult, SearchStopped

SCHEMA = "CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, queries INTEGER NOT NULL) WITHOUT ROWID"


class BudgetSpent(SearchStopped):
    """The run has too few searches left for its request."""


class Ledger:
    """Run -> paid queries so far. Several servers may share the file."""

    def __init__(self, path: Path):
        """Open or make the table; the file may hold other tables."""
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
        """Run -> paid queries, for every run that has used any."""
        return dict(self._database.execute("SELECT run, queries FROM spent ORDER BY run"))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class Metered:
    """SearchClient that charges a run before it calls another client, which it does not own.

    A query counts once, however many attempts it takes and however it ends: whether a provider charges for failures is unknown here.
    """

    def __init__(self, inner: SearchClient, ledger: Ledger, run: str, budget: int):
        self.inner, self.ledger, self.run, self.budget = inner, ledger, run, budget

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """The other client's results. Raises BudgetSpent before any query is sent."""
        self.ledger.charge(self.run, sum(bool(query.strip()) for query in queries), self.budget)
        return await self.inner.search(queries)

    async def close(self) -> None:
        """The other client stays open."""
