"""Fetch one web page for a policy that must not choose which hosts this machine connects to.

url ──> scheme? ──> host ──resolve──> addresses, all public? ──connect to exactly these──> status, headers, body ──redirect?──┐
 ^                                                                                                                            │
 └────────────────────────────────────────── every hop from the start, at most max_redirects ─────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from igpo_megatron.tools.settings import Visit
from igpo_megatron.tools.visit.addresses import is_public

Lookup = Callable[[str], Awaitable[Sequence[str]]]
"""Host name -> addresses as text. Raises socket.gaierror."""

REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of temporary failures: a later try may succeed."""

DECODED = ("", "identity", "gzip", "deflate", "br", "zstd")
"""Content encodings that aiohttp decodes or refuses; with any other it returns the encoded bytes."""


class PageStatus(StrEnum):
    """How a visit ended."""

    OK = "ok"
    """There is text."""

    EMPTY = "empty"
    """The page was read and has no text."""

    REFUSED = "refused"
    """Its address may not be visited: not http(s), or not public."""

    UNREADABLE = "unreadable"
    """There is no readable page: HTTP 4xx, no such host, too large, an unsupported type of file."""

    ERROR = "error"
    """The site could not be reached or failed, or the summariser did."""

    TIMEOUT = "timeout"

    @property
    def is_answer(self) -> bool:
        """True if another try would give the same; the others say nothing about the page and are never cached."""
        return self not in (PageStatus.ERROR, PageStatus.TIMEOUT)


class FetchFailed(Exception):
    """No page; the message is one sentence about why."""

    def __init__(self, status: PageStatus, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page as it was received."""

    content_type: str
    """Media type in lower case without parameters, e.g. `text/html`."""

    charset: str | None
    """As declared in the header, if it is."""

    body: bytes


async def system_lookup(host: str) -> list[str]:
    """The system's resolver: DNS and /etc/hosts; also reads odd spellings of addresses, such as 0x7f.1."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except ValueError as error:  # a label longer than DNS allows, or a zero byte
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedResolver(AbstractResolver):
    """aiohttp's resolver. aiohttp connects to exactly the addresses it returns, so they cannot change after the check."""

    def __init__(self, lookup: Lookup, allow_hosts: Sequence[str]):
        self._lookup, self._allowed = lookup, {host.lower() for host in allow_hosts}

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The host's addresses. Raises FetchFailed if one of them is not public and the host is not allowed by name."""
        addresses = await self._lookup(host)
        if not addresses:
            raise FetchFailed(PageStatus.UNREADABLE, f"{host} has no address")
        self.check(host, addresses)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    def check(self, host: str, addresses: Sequence[str]) -> None:
        """Raises FetchFailed if any address is private, even among public ones, as in DNS rebinding."""
        private = [address for address in addresses if not is_public(address)]
        if private and host.lower().rstrip(".") not in self._allowed:
            shown = host if host in private else f"{host} ({private[0]})"
            raise FetchFailed(PageStatus.REFUSED, f"{shown} is not an address of the public internet")

    async def close(self) -> None:
        """Nothing to release."""


class Fetcher:
    """Downloads pages. Used from one event loop; connections belong to it."""

    def __init__(self, config: Visit, lookup: Lookup):
        self.config = config
        self._headers = {
            "User-Agent": config.user_agent,
            "Accept": "text/html,application/xhtml+xml,application/pdf;q=0.9,text/plain;q=0.8",
        }
        self._resolver = CheckedResolver(lookup, config.allow_hosts)
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str) -> Fetched:
        """The page at `url`, redirects followed, within the limits. Raises FetchFailed."""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise FetchFailed(PageStatus.TIMEOUT, f"no answer within {self.config.timeout_s:g} s") from None
        except aiohttp.ClientConnectorDNSError as error:
            missing = error.os_error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
            status = PageStatus.UNREADABLE if missing else PageStatus.ERROR
            raise FetchFailed(status, f"{error.host}: {error.os_error.strerror}") from None
        except aiohttp.InvalidURL as error:
            raise FetchFailed(PageStatus.REFUSED, f"not a valid address: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise FetchFailed(PageStatus.ERROR, f"{type(error).__name__}: {error}") from None
        except (ValueError, LookupError, ArithmeticError, AssertionError) as error:  # raised by header parsers
            raise FetchFailed(PageStatus.UNREADABLE, f"no proper answer ({type(error).__name__}: {error})") from None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _follow(self, url: str) -> Fetched:
        target = self._checked(url)
        for _ in range(self.config.max_redirects + 1):
            found = await self._hop(target)
            if isinstance(found, Fetched):
                return found
            target = self._checked(found, base=target)
        raise FetchFailed(PageStatus.UNREADABLE, f"more than {self.config.max_redirects} redirects")

    def _checked(self, text: str, base: yarl.URL | None = None) -> yarl.URL:
        """A permitted address. Host names are checked when they are resolved, numeric addresses here."""
        try:
            url = base.join(yarl.URL(text.strip())) if base is not None else yarl.URL(text.strip())
            host = url.host
        except (ValueError, IndexError) as error:  # yarl raises IndexError for some brackets
            raise FetchFailed(PageStatus.REFUSED, f"{text[:200]!r} is not a valid address: {error}") from None
        if url.scheme not in ("http", "https") or not host:
            raise FetchFailed(PageStatus.REFUSED, f"{text[:200]!r}: expected an address that begins with http:// or https://")
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            pass
        else:
            self._resolver.check(host, [host])
        # User names and passwords in the address must not be sent.
        return url.with_user(None).with_fragment(None)

    async def _hop(self, url: yarl.URL) -> Fetched | str:
        """One request: a page, or where it redirects to. Raises FetchFailed."""
        if self._session is None:
            # Created here because a session belongs to its event loop. No proxies (trust_env is off) and no cookies.
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
                connector=aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status in REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            if response.status != 200:
                status = PageStatus.ERROR if response.status in PASSING else PageStatus.UNREADABLE
                raise FetchFailed(status, f"HTTP {response.status} {response.reason or ''}".rstrip())
            packed = response.headers.get("Content-Encoding", "").strip().lower()
            if packed not in DECODED:
                raise FetchFailed(PageStatus.UNREADABLE, f"encoded as {packed[:80]!r}, which is not supported")
            body, most = bytearray(), self.config.max_page_kib * 2**10
            # Decoded bytes are counted, so a page that unpacks to gigabytes is abandoned early.
            async for part in response.content.iter_chunked(65_536):
                body += part
                if len(body) > most:
                    raise FetchFailed(PageStatus.UNREADABLE, f"larger than {most} bytes")
            return Fetched(response.content_type.lower(), response.charset, bytes(body))
