"""The policy in transformers, for generation: prefill, one token for every running sequence, scores, new weights.

    prefill   contexts padded on the right, causal: no token sees the padding, whose keys are overwritten before they are used
    decode    one token per slot at its own position, with a mask of the positions filled so far
    score     as prefill, without the cache

transformers' own continuous batching (as of 5.17 and 5.19) does not suffice: it samples a batch from one generator, so a request's result
depends on the others in the batch; it stops at token ids but not at texts, scores no prompts, and cannot be paused for new weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from igpo_megatron.engines.torch_engine import weights as torch_weights
from igpo_megatron.engines.torch_engine.cache import SlotCache
from igpo_megatron.types import NamedTensors, UserError

_LOGIT_ROWS = 512
"""Rows of fp32 logits in memory at once while sequences are scored."""


class TorchModel:
    """One model with `slots` sequences of up to `capacity` tokens. Not thread-safe."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, slots: int, capacity: int) -> None:
        """Raises UserError if a layer does not attend to all earlier tokens, or if the model scales or caps its head's logits."""
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        finally:
            if bar:
                logging.enable_progress_bar()
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if kinds != {DynamicLayer}:
            raise UserError(
                f"{folder}: rollout.engine.backend=torch serves models whose layers attend to all earlier tokens; this one's caches are "
                f"{sorted(kind.__name__ for kind in kinds)}; use backend=vllm"
            )
        # For bf16 on Hopper torch prefers cuDNN's attention, which takes tenths of a second to plan each new shape: here every length that
        # turns reach. torch's other kernels need no planning.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._require_plain_logits(folder)
        self._places = torch_weights.places(self._model)
        shape = self._model.config.get_text_config()
        head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        self._cache_shape = (slots, shape.num_key_value_heads, capacity, head_size)
        self._num_layers, self._dtype, self.vocab_size = shape.num_hidden_layers, dtype, int(shape.vocab_size)
        self._shapes: list[torch.Size] = []
        self._cache: SlotCache | None = None
        self.take_cache()

    # ---- tokens

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]], first_slot: int) -> torch.Tensor:
        """Fill the slots from `first_slot` on; returns the logits after each context. [rows, V]"""
        cache = self._slots
        cache.window.first_slot, cache.window.positions = first_slot, None
        hidden = self._hidden(self._padded(contexts), past_key_values=cache, use_cache=True)
        last = torch.tensor([len(context) - 1 for context in contexts], device=self._device)
        return self._logits(hidden[torch.arange(len(contexts), device=self._device), last])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Put token `tokens[i]` at `positions[i]` of slot i, filled up to there; returns the logits after it. [rows, V]"""
        cache = self._slots
        at = torch.tensor(positions, device=self._device)
        cache.window.positions, cache.window.length = at, max(positions) + 1
        seen = torch.arange(cache.window.length, device=self._device) <= at[:, None]
        rows = torch.tensor(tokens, device=self._device)[:, None]
        hidden = self._hidden(rows, position_ids=at[:, None], attention_mask=seen[:, None, None], past_key_values=cache, use_cache=True)
        return self._logits(hidden[:, 0])

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[list[float]]:
        """Raw log-probs (temperature 1, among all rows of the embedding) of each sequence's tokens from `firsts` on."""
        hidden = self._hidden(self._padded(sequences), use_cache=False)
        wanted = [hidden[row, first - 1 : len(ids) - 1] for row, (ids, first) in enumerate(zip(sequences, firsts, strict=True))]
        targets = [token for ids, first in zip(sequences, firsts, strict=True) for token in ids[first:]]
        found: list[float] = []
        for rows, tokens in zip(torch.cat(wanted).split(_LOGIT_ROWS), torch.tensor(targets).split(_LOGIT_ROWS), strict=True):
            logprobs = torch.log_softmax(self._logits(rows).float(), -1)
            found += logprobs.gather(-1, tokens.to(self._device)[:, None])[:, 0].tolist()
        scores = iter(found)
        return [[next(scores) for _ in range(len(ids) - first)] for ids, first in zip(sequences, firsts, strict=True)]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        self._slots.move(source, target, length)

    # ---- weights and memory

    def load(self, named_tensors: NamedTensors, version: int, engine: str) -> int:
        """Replace all weights; returns their bytes. Raises SyncError naming `engine` and the first tensor that is missing or wrong."""
        return torch_weights.load(named_tensors, self._places, version, engine)

    def leave(self) -> None:
        """Free the memory of weights and cache; their contents are lost."""
        self._cache = None
        parameters = list(self._model.parameters())
        self._shapes = [parameter.shape for parameter in parameters]
        self._places = {}
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def take_weights(self) -> None:
        """Allocate the weights again; they must be loaded before anything is computed."""
        for parameter, shape in zip(self._model.parameters(), self._shapes, strict=True):
            parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        self._places = torch_weights.places(self._model)

    def take_cache(self) -> None:
        """Allocate the cache, at first or again."""
        self._cache = SlotCache(self._num_layers, self._cache_shape, self._dtype, self._device)

    # ---- inside

    @property
    def _slots(self) -> SlotCache:
        assert self._cache is not None, "the cache was given back"
        return self._cache

    def _padded(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, contexts))
        return torch.tensor([[*context, *[0] * (longest - len(context))] for context in contexts], device=self._device)

    def _hidden(self, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        """[rows, tokens, hidden]"""
        hidden: torch.Tensor = self._model.base_model(input_ids=rows, **options).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _require_plain_logits(self, folder: Path) -> None:
        """`_logits` must equal the model's own logits; some families, such as Granite, scale them afterwards."""
        ids = torch.tensor([[0, 1]], device=self._device)
        whole, ours = self._model(input_ids=ids, use_cache=False).logits, self._logits(self._hidden(ids, use_cache=False))
        if float((whole - ours).abs().max()) > 0.02 * float(whole.abs().max()):
            raise UserError(
                f"{folder}: rollout.engine.backend=torch serves models whose logits are their head times the last hidden states; those of "
                f"{type(self._model).__name__} are not; use backend=vllm"
            )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden)
        return logits
