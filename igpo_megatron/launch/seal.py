"""Both ends of a connection prove that they know the job's secret, which never crosses the network; every message after that is sealed.

node                                              node 0
   ─── nonce ──────────────────────────────────────►
   ◄── challenge, HMAC(key; "head", nonce, challenge)       only a holder of the secret can compute it
   ─── number, body, HMAC(session; "node", number, body) ─► session = HMAC(key; "session", nonce, challenge)
   ◄── body, HMAC(session; "head", number, body) ──

Numbers grow, nonce and challenge are random: recorded messages cannot be replayed, and nobody in between can change one.
Bodies are not encrypted: they hold no secret. HMAC is SHA-256 of RFC 2104.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def derive_key(secret: str) -> bytes:
    """[32] Takes 50 ms on purpose: every guess of a short secret from a recorded proof takes as long (RFC 7914)."""
    return hashlib.scrypt(secret.encode(), salt=b"igpo launch", n=2**14, r=8, p=1, dklen=32)


def new_nonce() -> str:
    """256 random bits, in hexadecimal."""
    return secrets.token_hex(32)


def mac(key: bytes, *parts: str) -> str:
    """HMAC of `parts`, in hexadecimal; different lists of parts never give the same input."""
    return hmac.new(key, "".join(f"{len(part)}:{part}" for part in parts).encode(), hashlib.sha256).hexdigest()


def is_mac(claimed: str, key: bytes, *parts: str) -> bool:
    """`claimed` is the HMAC of `parts`; takes the same time whatever differs."""
    return hmac.compare_digest(claimed.encode(), mac(key, *parts).encode())


def session_key(key: bytes, nonce: str, challenge: str) -> bytes:
    """Key for the seals of one session."""
    return bytes.fromhex(mac(key, "session", nonce, challenge))


class Challenges:
    """Node 0's challenges. None are stored, so requests for them cost no memory."""

    def __init__(self) -> None:
        self._own = secrets.token_bytes(32)

    def make(self, nonce: str) -> str:
        """A challenge for whoever sent `nonce`."""
        random = secrets.token_hex(16)
        return random + mac(self._own, random, nonce)[:32]

    def made(self, challenge: str, nonce: str) -> bool:
        """Whether we made this challenge for this nonce."""
        return hmac.compare_digest(challenge[32:], mac(self._own, challenge[:32], nonce)[:32])
