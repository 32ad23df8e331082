"""Search as a tool: queries to a back-end, passages as text."""

from __future__ import annotations

from collections.abc import Sequence

from igpo_megatron.search.results import SearchClient, SearchResult
from igpo_megatron.tools.base import HIT, Observed
from igpo_megatron.tools.tally import why_failed


class SearchTool:
    """Shows the results of a search client. If one query fails, the call fails; it is never shown as an empty result."""

    def __init__(self, client: SearchClient, hit: str = HIT):
        """`hit`: the protocol's format of a passage."""
        self._client, self._hit = client, hit

    async def use(self, arguments: Sequence[str]) -> Observed:
        """The passages of every query. Raises SearchStopped."""
        results = tuple(await self._client.search(arguments))
        failure = next((why_failed(result) for result in results if not result.status.is_answer), None)
        return Observed("" if failure else render_results(results, self._hit), failure, results=results)

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()


def render_results(results: Sequence[SearchResult], hit: str = HIT) -> str:
    """Passages, one per line, each written as `hit`; several queries get a heading each."""
    blocks = []
    for result in results:
        passages = enumerate(result.passages, start=1)
        lines = [hit.format(rank=rank, title=passage.title, text=passage.text) for rank, passage in passages]
        body = "\n".join(lines) or "No results."
        blocks.append(body if len(results) == 1 else f"Results for: {result.query}\n{body}")
    return "\n\n".join(blocks)
