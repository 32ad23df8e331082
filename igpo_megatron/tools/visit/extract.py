"""The text of a page: HTML by trafilatura, PDF by pypdf, plain text as it is; in worker processes, because pages are hostile.

    Extractor ──{"kind", "bytes"} + body──> worker (`python page_text.py`): limits on memory, killed at its deadline
              <──{"title", "text"} or {"error"}──      not trusted: a hostile page may have taken over the worker

A killed worker is replaced; the event loop never waits for a parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from igpo_megatron.tools.visit.page_text import MAX_ANSWER, ExtractionFailed, PageText
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

WORKER = Path(__file__).with_name("page_text.py")

KINDS = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/x-pdf": "pdf",
    "text/plain": "text",
    "text/markdown": "text",
    "text/csv": "text",
    "application/json": "text",
}
"""Media type -> how it is read."""


def kind_of(content_type: str, body: bytes) -> str | None:
    """html, pdf or text; None for other types. Content that looks like PDF or HTML is taken for it, since servers mislabel."""
    if body.startswith(b"%PDF-"):
        return "pdf"
    if content_type in KINDS:
        return KINDS[content_type]
    beginning = body[:1024].lstrip().lower()
    return "html" if beginning.startswith((b"<!doctype html", b"<html")) else None


class Extractor:
    """A few worker processes, started when first needed. Used from one event loop."""

    def __init__(self, workers: int, timeout_s: float):
        self._timeout_s = timeout_s
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(workers):
            self._idle.put_nowait(None)

    async def extract(self, kind: str, body: bytes, charset: str | None) -> PageText:
        """Text of a page. Raises ExtractionFailed, also if the worker took too long or was killed by the page."""
        worker = await self._idle.get()
        try:
            if worker is None or worker.returncode is not None:
                worker = await _start_worker()
            async with asyncio.timeout(self._timeout_s):
                answer = await _ask(worker, kind, body, charset)
        except (OSError, asyncio.IncompleteReadError, BadJson) as error:
            await _stop(worker)
            worker = None
            late = f"its text could not be extracted within {self._timeout_s:g} s"
            raise ExtractionFailed(late if isinstance(error, TimeoutError) else "it took too much memory or broke the parser") from None
        except asyncio.CancelledError:
            # Its late answer would be taken for the next page's.
            if worker is not None and worker.returncode is None:
                worker.kill()
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if "error" in answer:
            raise ExtractionFailed(answer["error"])
        return PageText(answer["title"], answer["text"])

    async def close(self) -> None:
        """End the idle workers; call it when nothing is being extracted."""
        while not self._idle.empty():
            await _stop(self._idle.get_nowait())


async def _start_worker() -> asyncio.subprocess.Process:
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    # By path and isolated, without this process's environment: an exploited parser finds no keys there.
    command = (sys.executable, "-I", "-B", str(WORKER))
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=none, env={"LANG": "C.UTF-8"})


async def _ask(worker: asyncio.subprocess.Process, kind: str, body: bytes, charset: str | None) -> dict[str, str]:
    """{"title", "text"} or {"error"}. Raises BadJson for an answer that our worker would not give."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps({"kind": kind, "charset": charset, "bytes": len(body)}).encode() + b"\n" + body)
    await worker.stdin.drain()
    size = int.from_bytes(await worker.stdout.readexactly(8), "big")
    if size > MAX_ANSWER:
        raise BadJson(f"an answer of {size} bytes")
    answer = json_loads_untrusted(await worker.stdout.readexactly(size))
    if not isinstance(answer, dict) or set(answer) not in ({"error"}, {"title", "text"}) or {*map(type, answer.values())} != {str}:
        raise BadJson("not an answer of a worker")
    return answer


async def _stop(worker: asyncio.subprocess.Process | None) -> None:
    if worker is not None and worker.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()
