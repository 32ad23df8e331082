"""Messages between the nodes and node 0: JSON with a schema, bounded and cleaned. Anything else is refused and never acted on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from igpo_megatron.launch.preflight import Facts, Strict
from igpo_megatron.untrusted import BadJson, clean_text, json_loads_untrusted

MAX_MESSAGE = 2**19
"""Bytes of a sealed message; its longest part, a resolved configuration, has about 5,000."""

MAX_SENTENCE = 8_000
"""Characters; the longest sentences quote the end of a log."""

MAX_FLAGS = 16

Kind = Literal["done", "interrupted", "ray", "signal", "error", "peer"]
"""`peer`: a rank lost its connection to another one, which is never the cause."""

Message = TypeVar("Message")


class BadMessage(ValueError):
    """Not JSON, or not as the schema requires; the message says briefly what is wrong."""


def clean_sentence(text: str) -> str:
    """`text` made safe for a terminal: no control characters but line ends, and at most MAX_SENTENCE characters."""
    if len(text) > MAX_SENTENCE:
        text = text[: MAX_SENTENCE - 2] + " …"
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in clean_text(text))


Sentence = Annotated[str, AfterValidator(clean_sentence)]
Flag = Annotated[str, Field(pattern=r"^[a-z_]{1,20}$")]
Flags = Annotated[list[Flag], Field(max_length=MAX_FLAGS)]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Proof = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Code = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, slots=True)
class Report(Strict):
    """How a node's part ended."""

    rank: int
    kind: Kind
    sentence: Sentence
    code: Code
    time: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Verdict(Strict):
    """How the job ended; the same for every node."""

    code: Code
    sentence: Sentence


@dataclass(frozen=True, slots=True)
class Said(Strict):
    """A node's complete state in every message: one that is lost or arrives twice changes nothing."""

    launcher: Nonce
    """Identifies the launcher: a second one on the same node has another."""

    facts: Facts | None = None
    """Before the start only."""

    report: Report | None = None
    flags: Flags = field(default_factory=list)
    """What is ready."""

    left: bool = False
    """The node has stopped."""


@dataclass(frozen=True, slots=True)
class Answer(Strict):
    """Node 0's answer to a node."""

    refused: Sentence = ""
    """Why this launcher has no place in the job."""

    stop: Sentence = ""
    """Why the job cannot start."""

    nodes: list[Facts] | None = None
    """The nodes of the job, once it starts, without the facts that other nodes do not need."""

    flags: Flags = field(default_factory=list)
    """What some node has reported as ready."""

    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Hello(Strict):
    """A node's first message, the only one accepted before it has proved the secret."""

    nonce: Nonce


@dataclass(frozen=True, slots=True)
class Greeting(Strict):
    """Node 0's answer: its own challenge, and proof that it knows the secret."""

    challenge: Nonce
    proof: Proof


@dataclass(frozen=True, slots=True)
class Sealed(Strict):
    """A message under a seal (seal.py); `number` grows from one message of a session to the next."""

    nonce: Nonce
    challenge: Nonce
    number: Annotated[int, Field(ge=0, lt=2**53)]
    body: str
    seal: Proof


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Facts, Report, Said, Answer, Hello, Greeting, Sealed)}


def write(message: Any) -> str:
    """One of the above as JSON."""
    return _ADAPTERS[type(message)].dump_json(message).decode()


def read(kind: type[Message], text: str | bytes) -> Message:
    """The message that a peer wrote. Raises BadMessage."""
    try:
        value: Message = _ADAPTERS[kind].validate_python(json_loads_untrusted(text))
        return value
    except BadJson as error:
        raise BadMessage(f"not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:100]
        raise BadMessage(clean_sentence(f"{place}: {first['msg']}")) from None
