"""Both ends of a connection prove that they know the job's secret, which never crosses the network; every message after that is sealed.

node                                              node 0
   ─── nonce ──────────────────────────────────────►
   ◄── challenge, HMAC(key; "head", nonce, challenge)       only who knows the secret can answer so
   ─── number, body, HMAC(session; "node", number, body) ─► session = HMAC(key; "session", nonce, challenge)
   ◄── body, HMAC(session; "head", number, body) ──

Numbers grow, nonce and challenge are random: nothing that was recorded can be said again, and nobody on the way can change a word.
Bodies can be read on the way: they hold no secret. HMAC is SHA-256 of RFC 2104.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def derive_key(secret: str) -> bytes:
    """[32] Takes 50 ms on purpose: so long is every guess of whoever recorded a proof and tries short secrets (RFC 7914)."""
    return hashlib.scrypt(secret.encode(), salt=b"igpo launch", n=2**14, r=8, p=1, dklen=32)


def new_nonce() -> str:
    """256 random bits, in hexadecimal."""
    return secrets.token_hex(32)


def mac(key: bytes, *parts: str) -> str:
    """HMAC of `parts`, in hexadecimal; no two lists of parts look alike to it."""
    return hmac.new(key, "".join(f"{len(part)}:{part}" for part in parts).encode(), hashlib.sha256).hexdigest()


def is_mac(claimed: str, key: bytes, *parts: str) -> bool:
    """`claimed` is the HMAC of `parts`; takes as long whatever is wrong."""
    return hmac.compare_digest(claimed.encode(), mac(key, *parts).encode())


def session_key(key: bytes, nonce: str, challenge: str) -> bytes:
    """Seals of one session."""
    return bytes.fromhex(mac(key, "session", nonce, challenge))


class Challenges:
    """Node 0's challenges. It keeps none: whoever only asks for them costs no memory."""

    def __init__(self) -> None:
        self._own = secrets.token_bytes(32)

    def make(self, nonce: str) -> str:
        """A challenge for whoever sent `nonce`."""
        random = secrets.token_hex(16)
        return random + mac(self._own, random, nonce)[:32]

    def made(self, challenge: str, nonce: str) -> bool:
        """This is one of ours, and for this nonce."""
        return hmac.compare_digest(challenge[32:], mac(self._own, challenge[:32], nonce)[:32])
