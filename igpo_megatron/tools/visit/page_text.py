"""The text of a page from its bytes: a worker process that extract.py starts by path, so it imports nothing from this package.

One request at a time on stdin, {"kind", "charset", "bytes"} and the body; on stdout 8 bytes of length and {"title", "text"} or {"error"}.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import re
import resource
import sys
from dataclasses import dataclass

MAX_PDF_PAGES = 200
MAX_MEMORY = 2 * 2**30
"""Address space of a worker, bytes."""

MAX_ANSWER = 64 * 2**20
"""Largest answer of a worker, bytes of JSON."""

MAX_REASON = 300
"""Characters of a parser's message that are shown."""

CHARSETS = frozenset(
    codecs.lookup(name).name
    for name in (
        *("ascii", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le"),
        *(f"iso8859-{part}" for part in range(1, 17) if part != 12),
        *(f"cp{page}" for page in (437, 850, 852, 855, 857, 858, 860, 861, 863, 865, 866, 874, 932, 949, 950, *range(1250, 1259))),
        *("koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "tis-620"),
        *("gb2312", "gbk", "gb18030", "hz", "big5", "big5hkscs", "euc-jp", "shift_jis", "iso2022_jp", "euc-kr", "iso2022_kr", "johab"),
    )
)
"""Python's names of the encodings used by pages. Its other codecs (unicode_escape, idna, zlib, ...) transform bytes, make halves of
surrogate pairs or raise on invalid input."""


@dataclass(frozen=True, slots=True)
class PageText:
    """Title and text of a page."""

    title: str
    """Empty where it has none."""

    text: str
    """Paragraphs, a line each; empty where there is none."""


class ExtractionFailed(Exception):
    """The page could not be read; the message is one sentence about why."""


def extract_html(body: bytes, charset: str | None) -> PageText:
    """Main text without menus and footers; all visible text if no main part is found. Raises ExtractionFailed."""
    # Imported here: it takes half a second and only workers need it.
    import trafilatura

    # A header's charset overrides the page's own declaration (HTML standard); an unknown one is ignored.
    codec = text_encoding(charset)
    html: str | bytes = body if codec is None else body.decode(codec, errors="replace")
    found = trafilatura.bare_extraction(html, include_comments=False, include_tables=True, with_metadata=True)
    title = str(getattr(found, "title", None) or "")
    text = str(getattr(found, "text", None) or "") or trafilatura.html2txt(html)
    if not text.strip() and codec is not None:
        return extract_html(body, None)  # the page's own declaration may be right
    if not text.strip() and (problem := _why_unread(body)):
        raise ExtractionFailed(problem)
    return PageText(title.strip(), text.strip())


def _why_unread(body: bytes) -> str | None:
    """Why no text was found in a page; None if it has none."""
    import lxml.etree
    import trafilatura

    parser = lxml.etree.HTMLParser()
    with contextlib.suppress(lxml.etree.LxmlError):
        lxml.etree.fromstring(body, parser)
    if any(entry.type == lxml.etree.ErrorTypes.ERR_RESOURCE_LIMIT for entry in parser.error_log):
        return "its HTML is nested too deeply or has too much in one place to be read"
    return "no HTML that can be read" if body.strip() and trafilatura.load_html(body) is None else None


def text_encoding(charset: str | None) -> str | None:
    """Python's name of the encoding that a header calls `charset`; None if it is not in CHARSETS."""
    if charset is None or not re.fullmatch(r"[A-Za-z0-9._:-]{1,40}", charset):
        return None
    try:
        name = codecs.lookup(charset).name
    except LookupError:
        return None
    return name if name in CHARSETS else None


def extract_pdf(body: bytes) -> PageText:
    """Text of the first pages. Raises ExtractionFailed for a broken or locked file; other errors of pypdf pass through."""
    import pypdf
    from pypdf.errors import PyPdfError

    complaints = _Complaints()
    logging.getLogger("pypdf").addHandler(complaints)
    try:
        reader = pypdf.PdfReader(io.BytesIO(body))
        pages = list(reader.pages[:MAX_PDF_PAGES])
        text = "\n".join(page.extract_text() for page in pages).strip()
        title = str(reader.metadata.title or "") if reader.metadata else ""
        if not pages:
            raise ExtractionFailed("not a readable PDF (it has no pages)")
        if not text:
            # pypdf silently skips contents that it cannot decode.
            for page in pages:
                if (contents := page.get_contents()) is not None:
                    contents.get_data()
    except (PyPdfError, NotImplementedError) as error:
        raise ExtractionFailed(f"not a readable PDF ({type(error).__name__}: {error})") from None
    finally:
        logging.getLogger("pypdf").removeHandler(complaints)
    if not text and complaints.first:
        raise ExtractionFailed(f"not a readable PDF ({complaints.first})")
    return PageText(title.strip(), text)


class _Complaints(logging.Handler):
    """Keeps a library's first warning."""

    first = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()


def extract(kind: str, body: bytes, charset: str | None) -> PageText:
    """Text of a page of a known kind. Raises ExtractionFailed, and nothing else."""
    try:
        if kind == "html":
            return extract_html(body, charset)
        if kind == "pdf":
            return extract_pdf(body)
        return PageText("", body.decode(text_encoding(charset) or "utf-8", errors="replace").strip())
    except ExtractionFailed as error:
        raise ExtractionFailed(str(error)[:MAX_REASON]) from None
    except Exception as error:  # noqa: BLE001  (three parsers can raise anything on hostile bytes)
        raise ExtractionFailed(f"the {kind} parser failed ({type(error).__name__}: {error})"[:MAX_REASON]) from None


def serve() -> None:
    """Answer requests until stdin ends."""
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
        if len(words) > MAX_ANSWER:
            words = json.dumps({"error": f"its text takes more than {MAX_ANSWER} bytes"}).encode()
        sys.stdout.buffer.write(len(words).to_bytes(8, "big") + words)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
