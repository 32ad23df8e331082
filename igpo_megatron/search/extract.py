"""The text of a page: HTML by trafilatura, PDF by pypdf, plain text as it is; in worker processes, because pages are hostile.

    Extractor ──{"kind", "bytes"} + body──> worker (`python extract.py`): limits on memory, killed at its deadline
              <──{"title", "text"} or {"error"}──

A worker that was killed is replaced; the event loop never waits for a parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import resource
import sys
from dataclasses import dataclass
from typing import Any

MAX_PDF_PAGES = 200
MAX_MEMORY = 2 * 2**30
"""Address space of a worker, bytes."""

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


@dataclass(frozen=True, slots=True)
class PageText:
    """What a page says."""

    title: str
    """Empty where it has none."""

    text: str
    """Paragraphs, a line each; empty where there is none."""


class ExtractionFailed(Exception):
    """The page could not be read; the message is one sentence about why."""


def kind_of(content_type: str, body: bytes) -> str | None:
    """html, pdf or text; None for anything that is not read. Servers mislabel: what looks like a PDF or HTML is one."""
    if body.startswith(b"%PDF-"):
        return "pdf"
    if content_type in KINDS:
        return KINDS[content_type]
    beginning = body[:1024].lstrip().lower()
    return "html" if beginning.startswith((b"<!doctype html", b"<html")) else None


def extract_html(body: bytes, charset: str | None) -> PageText:
    """Main text without menus and footers; all visible text where no main part is found."""
    # Imported here: it takes half a second and only workers need it.
    import trafilatura

    # A header's charset overrules what the page says of itself (HTML standard); an unknown one is not believed.
    html: str | bytes = body
    if charset is not None:
        with contextlib.suppress(LookupError):
            html = body.decode(charset, errors="replace")
    found = trafilatura.bare_extraction(html, include_comments=False, include_tables=True, with_metadata=True)
    title = str(getattr(found, "title", None) or "")
    text = str(getattr(found, "text", None) or "") or trafilatura.html2txt(html)
    return PageText(title.strip(), text.strip())


def extract_pdf(body: bytes) -> PageText:
    """Text of the first pages. Raises ExtractionFailed for a broken or locked file."""
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(body))
        pages = [page.extract_text() for _, page in zip(range(MAX_PDF_PAGES), reader.pages, strict=False)]
        title = str(reader.metadata.title or "") if reader.metadata else ""
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ExtractionFailed(f"not a readable PDF ({type(error).__name__}: {error})") from None
    return PageText(title.strip(), "\n".join(pages).strip())


def extract(kind: str, body: bytes, charset: str | None) -> PageText:
    """Text of a page of a known kind. Raises ExtractionFailed."""
    if kind == "html":
        return extract_html(body, charset)
    if kind == "pdf":
        return extract_pdf(body)
    try:
        return PageText("", body.decode(charset or "utf-8", errors="replace").strip())
    except LookupError:
        return PageText("", body.decode(errors="replace").strip())


class Extractor:
    """A few worker processes, started when first needed. Used from one event loop."""

    def __init__(self, workers: int, timeout_s: float):
        self._timeout_s = timeout_s
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(workers):
            self._idle.put_nowait(None)

    async def extract(self, kind: str, body: bytes, charset: str | None) -> PageText:
        """Text of a page. Raises ExtractionFailed, also where the worker took too long or died of the page."""
        worker = await self._idle.get()
        try:
            if worker is None or worker.returncode is not None:
                worker = await _start_worker()
            async with asyncio.timeout(self._timeout_s):
                answer = await _ask(worker, kind, body, charset)
        except TimeoutError:
            await _stop(worker)
            worker = None
            raise ExtractionFailed(f"its text could not be taken out within {self._timeout_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError):
            await _stop(worker)
            worker = None
            raise ExtractionFailed("reading it took too much memory or broke the parser") from None
        except asyncio.CancelledError:
            # Its answer would be taken for that of the next page.
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
    # By path and isolated, with nothing of this process's environment: a parser that is broken into finds no keys there.
    command = (sys.executable, "-I", "-B", __file__)
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=none, env={"LANG": "C.UTF-8"})


async def _ask(worker: asyncio.subprocess.Process, kind: str, body: bytes, charset: str | None) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps({"kind": kind, "charset": charset, "bytes": len(body)}).encode() + b"\n" + body)
    await worker.stdin.drain()
    size = int.from_bytes(await worker.stdout.readexactly(8), "big")
    answer = json.loads(await worker.stdout.readexactly(size))
    assert isinstance(answer, dict), "a worker answers with an object"
    return answer


async def _stop(worker: asyncio.subprocess.Process | None) -> None:
    if worker is not None and worker.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()


def serve() -> None:
    """A worker: answers requests on stdin until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    while header := sys.stdin.buffer.readline():
        request = json.loads(header)
        body = sys.stdin.buffer.read(request["bytes"])
        try:
            page = extract(request["kind"], body, request["charset"])
            answer = {"title": page.title, "text": page.text}
        except ExtractionFailed as error:
            answer = {"error": str(error)}
        words = json.dumps(answer).encode()
        sys.stdout.buffer.write(len(words).to_bytes(8, "big") + words)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
