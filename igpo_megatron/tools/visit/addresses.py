"""Which addresses are on the public internet, by IANA's registries of special-purpose addresses.

The tables are copied here because those of Python's `ipaddress` are as old as the interpreter.
https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry, as of October 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NOT_PUBLIC: Sequence[Network] = tuple(
    map(
        ip_network,
        (
            # IPv4, all that is not "globally reachable", and multicast.
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
            *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            # IPv6: the parts of 2000::/3 that are not, 6to4 and Teredo among them.
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)

PUBLIC_WITHIN: Sequence[Network] = tuple(
    map(
        ip_network,
        (
            *("192.0.0.9/32", "192.0.0.10/32"),
            *("2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:3::/32", "2001:4:112::/48", "2001:20::/28", "2001:30::/28"),
        ),
    )
)
"""Blocks inside NOT_PUBLIC that are "globally reachable"."""

UNICAST = IPv6Network("2000::/3")
"""The only part of IPv6 from which public addresses are assigned (RFC 4291)."""

NAT64 = IPv6Network("64:ff9b::/96")
"""IPv4 addresses as seen by networks without IPv4 (RFC 6052)."""


def is_public(address: str) -> bool:
    """True for a public address. An IPv6 address that stands for an IPv4 one is judged by the latter. False for other text."""
    try:
        parsed = _judged(ip_address(address.partition("%")[0]))
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed not in UNICAST:
        return False
    return not any(parsed in block for block in NOT_PUBLIC) or any(parsed in block for block in PUBLIC_WITHIN)


def _judged(address: Address) -> Address:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
