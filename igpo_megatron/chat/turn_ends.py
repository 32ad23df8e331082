"""The tokens that end a turn: the one that the chat template writes after an assistant's message, and every eos of the model's files.

vLLM always stops at all of them, so all of them are cut from a turn's text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igpo_megatron.chat.template import Template
from igpo_megatron.types import UserError
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

MOST_BARRED = 1024
"""Most entries that vLLM accepts in a list of allowed or biased tokens."""


def turn_ends(tokenizer: Any, template: Template | None) -> tuple[int, ...]:
    """Every token that ends a turn, the template's own first. Raises UserError if there is none."""
    written = template.end_of_turn() if template is not None else None
    folder = tokenizer.name_or_path
    found = [written, tokenizer.eos_token_id, *(_eos_of_files(Path(folder)) if folder else ())]
    # Ids that the tokenizer does not have can neither be sampled nor written.
    known = set(tokenizer.get_vocab().values())
    ends = tuple(token for token in dict.fromkeys(found) if token in known)
    if not ends:
        raise UserError(
            "the model's tokenizer has no eos token and its chat template writes none behind an assistant's message, so a turn could "
            "never end; set eos_token in tokenizer_config.json"
        )
    if template is not None and written is None:
        end = tokenizer.convert_ids_to_tokens(ends[0])
        template.notes.append(f"the chat template writes no token of its tokenizer behind an assistant's message, so {end} ends a turn")
    return ends


def stop_tokens(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ends of a turn that a model with `vocab_size` rows of embedding can sample. Raises UserError if it cannot sample the first."""
    ends = turn_ends(tokenizer, Template(tokenizer) if tokenizer.chat_template else None)
    if ends[0] >= vocab_size:
        raise UserError(f"the end-of-turn token {ends[0]} is beyond the {vocab_size} rows of the model's embedding: no turn could end")
    return tuple(token for token in ends if token < vocab_size)


def barred_rows(tokenizer: Any, vocab_size: int) -> list[int]:
    """Rows of the embedding, [0, vocab_size), without a token in the tokenizer: they are padding and must never be sampled."""
    return sorted(set(range(vocab_size)).difference(tokenizer.get_vocab().values()))


def sampling_limits(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """vLLM's SamplingParams that bar the `barred_rows`; empty if there are none. Raises UserError if they are more than vLLM can bar."""
    real = sorted(token for token in set(tokenizer.get_vocab().values()) if token < vocab_size)
    barred = barred_rows(tokenizer, vocab_size)
    if not barred:
        return {}
    if len(barred) <= min(len(real), MOST_BARRED):
        return {"logit_bias": dict.fromkeys(barred, float("-inf"))}
    if len(real) <= MOST_BARRED:
        return {"allowed_token_ids": real}
    raise UserError(
        f"the model's embedding has {vocab_size:,} rows, {len(barred):,} of them without a token in its tokenizer; vLLM can keep the "
        f"policy from sampling {MOST_BARRED:,} at most: give the model its own tokenizer, or cut vocab_size and the embedding"
    )


def _eos_of_files(folder: Path) -> list[int]:
    """eos_token_id as vLLM reads it: from generation_config.json, else from config.json; empty if neither has one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json_loads_untrusted(path.read_bytes())
        except BadJson as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        found = settings.get("eos_token_id") if isinstance(settings, dict) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise UserError(f"{path}: eos_token_id is {found!r}; expected the number of a token, or a list of them")
        return ids
    return []
