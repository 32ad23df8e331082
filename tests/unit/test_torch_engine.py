"""The engine that needs no vLLM, against transformers' own forward of whole sequences, token by token."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, make_hf_folder
from transformers import AutoModelForCausalLM

from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.config.load import build
from igpo_megatron.engines.api import EngineError, EnginesEnded
from igpo_megatron.engines.factory import open_engines
from igpo_megatron.engines.torch_engine import engine as torch_engine
from igpo_megatron.engines.torch_engine.cache import SlotLayer
from igpo_megatron.engines.torch_engine.engine import TorchEngine, _Turn
from igpo_megatron.engines.torch_engine.model import TorchModel
from igpo_megatron.types import Canary, Completion, SamplingRequest, SyncError, UserError

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
PROMPT = [1, 85, 96, 110, 64, 87, 2]
TOKENS = 650
"""Of the tokenizer; the embedding has six rows more."""

CLOSE = 1e-4
"""fp32 rounding of log-probs; a wrong mask or position moves them by more than 1e-2."""

LONG = [(7 * number + number**2) % 600 + 20 for number in range(200)]


def settings(*overrides: str) -> Any:
    own = [f"model.path={POLICY}", "model.dtype=fp32", "run.device=cpu", "rollout.max_context=256"]
    return build({}, [*own, "rollout.engine.backend=torch", "rollout.engine.kv_cache_mib=64", *overrides])


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with open_engines(settings()) as started:
        assert isinstance(started, TorchEngine)
        yield started


@cache
def policy(scale: float = 1.0) -> Any:
    """The tied demo policy in transformers, its embedding (and so its head) scaled."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model


@torch.no_grad()
def logits_of(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """[tokens, V] behind every token."""
    found: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return found


def logprobs(model: Any, token_ids: Sequence[int], temperature: float = 1.0, rows: int | None = None) -> torch.Tensor:
    """Log-prob of every token but the first, among the first `rows` of the embedding."""
    logits = logits_of(model, token_ids)[:-1, :rows] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def context(number: int) -> list[int]:
    """Contexts of different lengths."""
    return [*PROMPT * (1 + number % 5), *range(40, 41 + number % 7)]


def generate(engine: TorchEngine, numbers: Sequence[int], temperature: float = 1.0, **options: Any) -> list[Completion]:
    """Turn `number` with seed `number`, all at once, of different lengths."""

    async def ask() -> list[Completion]:
        def one(number: int) -> Any:
            asked = {"max_tokens": 8 + number % 9, "temperature": temperature, **options}
            return engine.generate(SamplingRequest(context(number), seed=number, key="q", **asked))

        return await asyncio.gather(*map(one, numbers))

    return asyncio.run(ask())


def weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    reader = HfReader(POLICY)
    return {name: reader.get(name) * (scale if "embed_tokens" in name else 1.0) for name in reader.names()}


def send(engine: TorchEngine, version: int, scale: float = 1.0, **options: Any) -> dict[str, float]:
    return engine.update_weights(weights(scale).items(), version, **options)


def canary_of(scale: float) -> Canary:
    return Canary(tuple(LONG[:65]), tuple(logprobs(policy(scale), LONG[:65]).tolist()), max_gap=1e-3)


# ---- tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_a_batch_says_what_each_says_alone_and_what_transformers_says(engine: TorchEngine, temperature: float) -> None:
    together = generate(engine, range(12), temperature)
    for number, done in enumerate(together):
        (alone,) = generate(engine, [number], temperature)
        assert done.token_ids == alone.token_ids and done.logprobs == pytest.approx(alone.logprobs, abs=CLOSE)
        whole, start = [*context(number), *done.token_ids], len(context(number)) - 1
        expected = logprobs(policy(), whole, temperature or 1.0, TOKENS)[start:]
        assert torch.allclose(torch.tensor(done.logprobs), expected, atol=CLOSE)
        if temperature == 0:
            assert done.token_ids == logits_of(policy(), whole)[start:-1, :TOKENS].argmax(-1).tolist()
    assert len({len(context(number)) for number in range(12)}) > 5 and len({tuple(done.token_ids) for done in together}) > 3


def largest_gap(found: Sequence[Completion], expected: Sequence[Completion]) -> float:
    """Of log-probs; infinite where tokens differ."""
    if [done.token_ids for done in found] != [done.token_ids for done in expected]:
        return math.inf
    return max(abs(a - b) for one, two in zip(found, expected, strict=True) for a, b in zip(one.logprobs, two.logprobs, strict=True))


def all_see_everything(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "attention_mask": torch.ones_like(options["attention_mask"])}


def one_position_late(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "position_ids": options["position_ids"] + 3}


def one_token_unseen(options: dict[str, Any]) -> dict[str, Any]:
    mask = options["attention_mask"].clone()
    mask[..., 1] = False
    return {**options, "attention_mask": mask}


@pytest.mark.parametrize("wrong", [all_see_everything, one_position_late, one_token_unseen])
def test_a_wrong_mask_or_position_would_be_seen(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]) -> None:
    right, hidden = generate(engine, range(12), 0.0), TorchModel._hidden

    def damaged(self: TorchModel, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        return hidden(self, rows, **(wrong(options) if "attention_mask" in options else options))

    monkeypatch.setattr(TorchModel, "_hidden", damaged)
    assert largest_gap(generate(engine, range(12), 0.0), right) > 1e-2


def test_padding_on_the_wrong_side_would_be_seen(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate(engine, range(12), 0.0)

    def left(self: TorchModel, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, contexts))
        return torch.tensor([[*[0] * (longest - len(ids)), *ids] for ids in contexts])

    monkeypatch.setattr(TorchModel, "_padded", left)
    assert largest_gap(generate(engine, range(12), 0.0), right) > 1e-2


def test_more_turns_than_slots_take_their_turn_and_say_the_same(engine: TorchEngine) -> None:
    """Three slots: turns of different lengths end, the last ones move, and waiting ones begin between two tokens of others."""
    expected = generate(engine, range(14))
    with open_engines(settings("rollout.engine.max_num_seqs=3")) as small:
        assert small._slots == 3
        found = generate(small, range(14))
    assert largest_gap(found, expected) < CLOSE and len({len(done.token_ids) for done in found}) > 4


def test_the_last_slot_must_be_moved_whole(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(engine, range(14))
    monkeypatch.setattr(TorchModel, "move", lambda self, source, target, length: self._slots.move(source, target, length - 1))
    assert largest_gap(generate(engine, range(14)), expected) > 1e-2


def test_sampled_frequencies_are_the_probabilities(engine: TorchEngine) -> None:
    """2,000 seeds for one token at temperature 2: within 4 standard errors, where the probabilities of temperature 1 are far away."""
    count = 2000

    async def ask() -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(SamplingRequest(PROMPT, max_tokens=1, temperature=2.0, seed=7919 * seed, key="q")) for seed in range(count))
        )

    drawn = torch.tensor([done.token_ids[0] for done in asyncio.run(ask())]).bincount(minlength=TOKENS) / count
    logits = logits_of(policy(), PROMPT)[-1, :TOKENS]
    expected = torch.softmax(logits / 2, -1)
    likely = expected.topk(12).indices
    errors = (expected * (1 - expected) / count).sqrt()
    assert ((drawn - expected).abs() < 4 * errors)[likely].all()
    assert not ((drawn - torch.softmax(logits, -1)).abs() < 4 * errors)[likely].all()


def test_equal_seeds_sample_equal_tokens_and_others_do_not(engine: TorchEngine) -> None:
    async def ask(seed: int) -> list[int]:
        return (await engine.generate(SamplingRequest(PROMPT, max_tokens=24, temperature=1.5, seed=seed, key="q"))).token_ids

    first, again, other = asyncio.run(ask(5)), asyncio.run(ask(5)), asyncio.run(ask(6))
    assert first == again != other


def test_entropies_are_those_of_transformers(engine: TorchEngine) -> None:
    for top in (-1, 10):
        for number, done in zip((3, 4), generate(engine, [3, 4], 0.7, top_logprobs=top), strict=True):
            start = len(context(number)) - 1
            rows = torch.log_softmax(logits_of(policy(), [*context(number), *done.token_ids])[start:-1, :TOKENS] / 0.7, -1)
            kept = rows if top == -1 else rows.topk(top).values
            among = torch.tensor([top == -1 or token in row.topk(top).indices for token, row in zip(done.token_ids, rows, strict=True)])
            assert torch.allclose(torch.tensor(done.entropies)[among], -(kept.exp() * kept).sum(-1)[among], atol=CLOSE)
            assert among.sum() > 3
    assert not generate(engine, [3])[0].entropies


# ---- ends


def test_turns_end_at_their_end_token_at_their_length_or_with_the_context(engine: TorchEngine) -> None:
    found = generate(engine, range(40), max_tokens=40)
    assert {done.finish for done in found} == {"stop", "length"}
    for done in found:
        ended = done.token_ids[-1] in engine._stop_tokens
        assert (done.finish == "stop") == ended and (ended or len(done.token_ids) == 40)
        assert not engine._stop_tokens.intersection(done.token_ids[:-1])

    async def ask(length: int) -> Completion:
        return await engine.generate(SamplingRequest(LONG[:1] * length, max_tokens=40, temperature=1.0, seed=1, key="q"))

    assert len(asyncio.run(ask(254)).token_ids) <= 2
    with pytest.raises(EngineError, match=r"engine 0 refused a turn: 256 tokens leave no room in rollout.max_context"):
        asyncio.run(ask(256))


def test_a_stop_string_ends_a_turn_with_the_token_that_completes_it(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = generate(engine, [0], 2.0, max_tokens=40)
    text = [engine._tokenizer.decode(whole.token_ids[:count]) for count in range(len(whole.token_ids) + 1)]
    # From the middle of the third token's text to the middle of the seventh's.
    stop = text[7][len(text[2]) + 1 : len(text[6]) + 1]
    assert len(stop) > 2 and stop not in text[6]
    monkeypatch.setattr(engine, "_stop_strings", (stop, "never written"))
    monkeypatch.setattr(engine, "_stop_window", len(stop.encode()))
    (done,) = generate(engine, [0], 2.0, max_tokens=40)
    assert (done.token_ids, done.finish) == (whole.token_ids[:7], "stop")


def test_a_stop_string_in_tokens_of_one_letter_is_seen_whole() -> None:
    engine = TorchEngine(settings("rollout.protocol=search_r1"))
    letters = engine._tokenizer.convert_tokens_to_ids(list("so </search>"))
    for count in range(1, len(letters) + 1):
        turn = _Turn(SamplingRequest([1], 100, 1.0, 0, "q"), random.Random(0), token_ids=letters[:count])
        assert engine._finish(turn) == ("stop" if count == len(letters) else None)


def test_the_stop_strings_are_the_protocols() -> None:
    assert "</search>" in TorchEngine(settings("rollout.protocol=search_r1"))._stop_strings
    assert TorchEngine(settings())._stop_strings == ()


def test_rows_of_the_embedding_without_a_token_are_never_sampled_but_scored(engine: TorchEngine) -> None:
    """These weights make one of the six rows the likeliest everywhere."""
    changed = weights()
    hidden = policy()(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0, -1].detach()
    embedding = changed["model.embed_tokens.weight"]
    embedding[TOKENS:] = 5 * hidden / hidden.norm() ** 2
    assert int((embedding @ hidden).argmax()) < TOKENS  # not yet
    embedding[TOKENS:] *= 10
    assert int((embedding @ hidden).argmax()) >= TOKENS
    engine.update_weights(changed.items(), 3)
    for temperature in (0.0, 1.0):
        assert all(token < TOKENS for done in generate(engine, range(8), temperature, max_tokens=4) for token in done.token_ids)
    scored = asyncio.run(engine.score_probe([*PROMPT, TOKENS], len(PROMPT), key="q")).logprobs[0]
    assert scored > math.log(1 / 6) - 0.2  # nearly all of the probability is theirs
    send(engine, 4)


# ---- scores


def test_probes_are_scored_together_as_transformers_scores_them(engine: TorchEngine) -> None:
    cases = [(LONG[:length], first) for length, first in ((9, 1), (120, 100), (64, 63), (200, 150), (2, 1))]

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(engine.score_probe(ids, first, key="q") for ids, first in cases),
            engine.generate(SamplingRequest(PROMPT, max_tokens=8, temperature=1.0, seed=0, key="q")),
        )

    *scores, _ = asyncio.run(ask())
    for (ids, first), score in zip(cases, scores, strict=True):
        expected = logprobs(policy(), ids)[first - 1 :]
        assert len(score.logprobs) == len(ids) - first
        assert torch.allclose(torch.tensor(score.logprobs), expected, atol=CLOSE)
        # The rows of the embedding that are never sampled count: raw scores are not those of sampling.
        assert not torch.equal(torch.tensor(score.logprobs), logprobs(policy(), ids, rows=TOKENS)[first - 1 :])


# ---- weights


def test_new_weights_are_served_at_once_also_by_the_tied_head(engine: TorchEngine) -> None:
    metrics = send(engine, 5, 0.9, canary=canary_of(0.9))
    assert metrics["canary_gap"] < 1e-4 and metrics["sync/mib"] == pytest.approx(sum(w.nbytes for w in weights().values()) / 2**20)
    score = asyncio.run(engine.score_probe(LONG[:60], 1, key="q"))
    assert score.weight_version == 5
    assert torch.allclose(torch.tensor(score.logprobs), logprobs(policy(0.9), LONG[:60]), atol=CLOSE)
    assert not torch.allclose(torch.tensor(score.logprobs), logprobs(policy(), LONG[:60]), atol=1e-2)
    (greedy,) = generate(engine, [1], 0.0)
    assert greedy.weight_version == 5
    assert greedy.token_ids == logits_of(policy(0.9), [*context(1), *greedy.token_ids])[len(context(1)) - 1 : -1].argmax(-1).tolist()
    send(engine, 6)


def test_turns_in_flight_outlive_a_sync_and_carry_the_weights_they_began_with(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is frozen after a few tokens; the tokens before the sync are the old weights', those behind it are the new ones' alone."""
    send(engine, 20)
    reached, may_go_on, decode = threading.Event(), threading.Event(), TorchModel.decode
    steps = iter(range(1000))

    def slowly(self: TorchModel, *arguments: Any) -> torch.Tensor:
        if next(steps) == 5:
            reached.set()
            assert may_go_on.wait(60)
        return decode(self, *arguments)

    monkeypatch.setattr(TorchModel, "decode", slowly)

    async def across() -> tuple[list[Completion], Completion]:
        asked = [
            asyncio.ensure_future(engine.generate(SamplingRequest(context(number), max_tokens=30, temperature=1.0, seed=number, key="q")))
            for number in range(6)
        ]
        await asyncio.to_thread(reached.wait, 60)
        sending = asyncio.ensure_future(asyncio.to_thread(send, engine, 21, 0.9, canary=canary_of(0.9)))
        while not engine._frozen:  # else the turns could end before their weights change
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert not sending.done(), "weights were exchanged within a step"
        late = asyncio.ensure_future(engine.generate(SamplingRequest(context(7), max_tokens=8, temperature=1.0, seed=7, key="q")))
        may_go_on.set()
        await sending
        return await asyncio.gather(*asked), await late

    def by(scale: float, number: int, done: Completion) -> torch.Tensor:
        """Tokens whose log-probs are those of the weights of `scale`, given all before."""
        whole = [*context(number), *done.token_ids]
        return (torch.tensor(done.logprobs) - logprobs(policy(scale), whole, rows=TOKENS)[len(context(number)) - 1 :]).abs() < CLOSE

    found, late = asyncio.run(across())
    crossed = 0
    for number, done in enumerate(found):
        old, new = by(1.0, number, done), by(0.9, number, done)
        assert done.weight_version == 20 and bool(old[0]) and bool((old | new).all())
        crossed += not bool(old.all())
    assert crossed > 3, "no turn was in flight"
    assert late.weight_version == 21 and bool(by(0.9, 7, late).all())
    send(engine, 22)


def damaged(kind: str) -> list[tuple[str, torch.Tensor]]:
    found = weights()
    name = "model.layers.1.self_attn.k_proj.weight"
    if kind == "missing":
        del found[name]
    if kind == "transposed":
        found["model.layers.1.mlp.up_proj.weight"] = found["model.layers.1.mlp.up_proj.weight"].T
    if kind == "nan":
        found[name] = found[name].clone()
        found[name][3, 3] = torch.nan
    if kind == "stale":
        found["model.layers.1.mlp.up_proj.weight"] = found["model.layers.1.mlp.up_proj.weight"] * 1.2
    extra = {"twice": [(name, found[name])] if name in found else [], "unknown": [("model.layers.9.norm.weight", torch.ones(1))]}
    return [*found.items(), *extra.get(kind, [])]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", r"sync 1: engine 0 received 49 of 50 tensors; model.layers.1.self_attn.k_proj.weight is missing"),
        ("transposed", r"up_proj.weight of shape \[128, 384\]; its model has \[384, 128\]"),
        ("nan", r"received model.layers.1.self_attn.k_proj.weight with values that are not finite numbers"),
        ("twice", r"received model.layers.1.self_attn.k_proj.weight, which was sent twice"),
        ("unknown", r"received model.layers.9.norm.weight, which its model does not have"),
        ("stale", r"engine 0 does not serve the policy's weights: after sync 1"),
    ],
)
def test_damaged_weights_end_the_run_before_anything_is_sampled_from_them(kind: str, expected: str) -> None:
    with open_engines(settings()) as engine:
        with pytest.raises(SyncError, match=expected):
            engine.update_weights(damaged(kind), 1, canary_of(1.0))
        with pytest.raises(SyncError, match=expected):
            generate(engine, [0])
        with pytest.raises(SyncError, match=expected):
            send(engine, 2)


def test_attention_on_a_gpu_makes_no_plan_for_every_new_length() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    with open_engines(settings()):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_an_engine_that_sleeps_holds_no_memory_and_wakes_with_the_next_weights(engine: TorchEngine) -> None:
    expected = generate(engine, range(4), 0.0)
    engine.sleep()
    assert sum(parameter.nbytes for parameter in engine._served._model.parameters()) == 0 and engine._served._cache is None
    seen: list[bool] = []

    async def asked_in_its_sleep() -> Completion:
        waits = asyncio.ensure_future(engine.generate(SamplingRequest(context(1), max_tokens=9, temperature=0.0, seed=0, key="q")))
        await asyncio.sleep(0.05)
        assert not waits.done()
        # The cache comes back when the policy has left, not before.
        exported = lambda: seen.append(engine._served._cache is None)  # noqa: E731
        await asyncio.to_thread(send, engine, 30, 1.0, canary=canary_of(1.0), exported=exported)
        return await waits

    done = asyncio.run(asked_in_its_sleep())
    assert seen == [True] and (done.token_ids, done.weight_version) == (expected[1].token_ids, 30)
    assert [again.token_ids for again in generate(engine, range(4), 0.0)] == [before.token_ids for before in expected]


def test_an_engine_sleeps_when_the_last_request_has_ended(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, prefill = threading.Event(), TorchModel.prefill

    def slowly(self: TorchModel, *arguments: Any) -> torch.Tensor:
        assert may_go_on.wait(60)
        return prefill(self, *arguments)

    monkeypatch.setattr(TorchModel, "prefill", slowly)

    async def ask() -> Completion:
        asked = asyncio.ensure_future(engine.generate(SamplingRequest(PROMPT, max_tokens=9, temperature=0.0, seed=0, key="q")))
        await asyncio.sleep(0)
        sleeping = asyncio.ensure_future(asyncio.to_thread(engine.sleep))
        await asyncio.sleep(0.05)
        assert not sleeping.done() and engine._served._cache is not None
        may_go_on.set()
        await sleeping
        return await asked

    assert asyncio.run(ask()).token_ids and engine._served._cache is None
    send(engine, 31)


# ---- trouble


@pytest.mark.parametrize("method", ["prefill", "decode", "score"])
def test_what_the_engine_cannot_compute_ends_the_run_in_one_sentence_for_everybody(method: str) -> None:
    with open_engines(settings()) as engine:
        setattr(engine._served, method, lambda *arguments: 1 / 0)

        async def ask() -> list[Any]:
            turns = [engine.generate(SamplingRequest(PROMPT, max_tokens=200, temperature=3.0, seed=0, key="q")) for _ in range(3)]
            return await asyncio.gather(*turns, engine.score_probe(PROMPT, 3, key="q"), return_exceptions=True)

        for _ in range(2):  # those in flight, and those that come later
            found = asyncio.run(ask())
            assert [type(error) for error in found] == [EnginesEnded] * 4
            assert str(found[0]) == "engine 0 failed: ZeroDivisionError: division by zero"


def test_whoever_was_just_answered_does_not_keep_the_others_from_being_told() -> None:
    """The loop hears of nothing before the thread has ended: answered turns still look as if somebody waited for them."""
    with open_engines(settings("rollout.engine.request_timeout_s=60")) as engine:
        engine._served.decode = lambda *arguments: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        engine._freeze()

        async def ask() -> list[Any]:
            lengths = [1, 2] * 4
            asked = [
                asyncio.ensure_future(engine.generate(SamplingRequest(PROMPT, max_tokens=most, temperature=0.0, seed=0, key="q")))
                for most in lengths
            ]
            await asyncio.sleep(0)
            engine._resume()
            engine._thread.join(60)
            engine.close()
            return await asyncio.gather(*asked, return_exceptions=True)

        assert [type(found) for found in asyncio.run(ask())] == [Completion, EnginesEnded] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_run_by_name(temperature: float) -> None:
    with open_engines(settings()) as engine:
        engine._served.prefill = lambda *arguments: torch.full((1, 656), torch.nan)  # type: ignore[method-assign]
        with pytest.raises(EnginesEnded, match="engine 0 failed: ArithmeticError: it computed logits that are not finite numbers"):
            generate(engine, [0], temperature)


def test_scores_that_are_no_log_probs_are_refused(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (math.nan, -math.inf, 0.5):
        monkeypatch.setattr(engine._served, "score", lambda *arguments, wrong=wrong: [[-1.0, wrong]])
        with pytest.raises(EngineError, match=r"engine 0 scored a probe with .*, which are no log-probs"):
            asyncio.run(engine.score_probe(LONG[:5], 3, key="q"))


def test_a_bad_request_is_refused_alone(engine: TorchEngine) -> None:
    async def ask() -> list[Any]:
        bad = ([], [656], [-1])
        asked = [engine.generate(SamplingRequest(ids, max_tokens=4, temperature=0.0, seed=0, key="q")) for ids in (*bad, PROMPT)]
        too_long = engine.score_probe([5] * 257, 250, key="q")
        return await asyncio.gather(too_long, *asked, return_exceptions=True)

    longest, *refused, good = asyncio.run(ask())
    assert str(longest) == "engine 0 refused a probe: 257 tokens leave no room in rollout.max_context"
    assert all(isinstance(error, EngineError) and "beyond the 656 rows" in str(error) for error in refused)
    assert isinstance(good, Completion)


def test_contexts_are_prefilled_together_up_to_a_number_of_padded_tokens_and_not_where_nobody_waits(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "_BATCH_TOKENS", 70)
    seen: list[list[int]] = []
    prefill = TorchModel.prefill

    def counted(self: TorchModel, contexts: Sequence[Sequence[int]], first_slot: int) -> torch.Tensor:
        seen.append([len(ids) for ids in contexts])
        return prefill(self, contexts, first_slot)

    monkeypatch.setattr(TorchModel, "prefill", counted)

    async def ask() -> None:
        engine._freeze()
        asked = [
            asyncio.ensure_future(engine.generate(SamplingRequest(LONG[:length], max_tokens=1, temperature=0.0, seed=0, key="q")))
            for length in (30, 35, 36, 5, 100, 9)
        ]
        await asyncio.sleep(0)
        asked[3].cancel()
        await asyncio.sleep(0)
        engine._resume()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(ask())
    assert seen == [[30, 35], [36], [100], [9]]


def test_a_turn_that_is_given_up_leaves_its_slot(engine: TorchEngine) -> None:
    async def ask() -> Completion:
        given_up = [
            asyncio.ensure_future(engine.generate(SamplingRequest(LONG[:9], max_tokens=240, temperature=3.0, seed=n, key="q")))
            for n in range(30)
        ]
        await asyncio.sleep(0.02)
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        done = await engine.generate(SamplingRequest(context(2), max_tokens=10, temperature=1.0, seed=2, key="q"))
        assert engine._running == []
        return done

    expected = generate(engine, [2])[0]
    done = asyncio.run(ask())
    assert (done.token_ids, done.logprobs) == (expected.token_ids, pytest.approx(expected.logprobs, abs=CLOSE))


def test_a_turn_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engines(settings("rollout.engine.request_timeout_s=0.05")) as engine:
        engine._freeze()
        with pytest.raises(EngineError, match=r"engine 0 did not answer a turn within rollout.engine.request_timeout_s=0.05"):
            generate(engine, [0])


def test_closing_ends_the_thread_and_tells_whoever_waits() -> None:
    with open_engines(settings()) as engine:
        engine._freeze()

        async def ask() -> None:
            waits = asyncio.ensure_future(engine.generate(SamplingRequest(PROMPT, max_tokens=4, temperature=0.0, seed=0, key="q")))
            await asyncio.sleep(0.02)
            engine.close()
            await waits

        with pytest.raises(EnginesEnded, match="the engines were closed"):
            asyncio.run(ask())
        assert not engine._thread.is_alive()


# ---- families


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_is_served_as_transformers_computes_it_and_takes_the_folders_names(tmp_path: Path, name: str) -> None:
    folder, other = make_hf_folder(tmp_path / "one", name), tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(other)
    served = TorchModel(folder, dtype=torch.float32, device=torch.device("cpu"), slots=3, capacity=64)
    reader = HfReader(other)
    served.load(((key, reader.get(key)) for key in reader.names()), 1, "engine 0")
    contexts = [LONG[:20], LONG[:7], LONG[3:40]]
    contexts = [[token % 150 for token in ids] for ids in contexts]
    logits = served.prefill(contexts, 0)
    for step in range(3):
        expected = torch.stack([logits_of(model, ids)[-1] for ids in contexts])
        assert torch.allclose(logits, expected, atol=2e-4), step
        tokens = logits.argmax(-1).tolist()
        positions = [len(ids) for ids in contexts]
        contexts = [[*ids, token] for ids, token in zip(contexts, tokens, strict=True)]
        logits = served.decode(tokens, positions)


def test_a_model_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=16)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers attend to all earlier tokens; this one's caches are .*Sliding.*use backend=vllm"):
        TorchModel(tmp_path, dtype=torch.float32, device=torch.device("cpu"), slots=1, capacity=8)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(GraniteConfig(**sizes, num_key_value_heads=2, logits_scaling=8.0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"their head times the last hidden states; those of GraniteForCausalLM are not; use backend=vllm"):
        TorchModel(tmp_path, dtype=torch.float32, device=torch.device("cpu"), slots=1, capacity=8)


def test_slots_that_were_never_filled_are_zeros() -> None:
    """What a mask hides has weight 0, and 0 times what memory happens to hold may be NaN."""
    served = TorchModel(POLICY, dtype=torch.float32, device=torch.device("cpu"), slots=2, capacity=16)
    layer = served._slots.layers[0]
    assert isinstance(layer, SlotLayer) and not layer.values.any() and not layer.keys.any()


def test_a_forward_pass_that_hangs_ends_a_sync_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    prefill = TorchModel.prefill

    def hangs(model: TorchModel, contexts: Sequence[Sequence[int]], first_slot: int) -> torch.Tensor:
        begun.set()
        go_on.wait(60)
        return prefill(model, contexts, first_slot)

    monkeypatch.setattr(TorchModel, "prefill", hangs)

    async def ask(engine: Any) -> None:
        waits = asyncio.ensure_future(engine.generate(SamplingRequest(PROMPT, max_tokens=4, temperature=0.0, seed=0, key="q")))
        await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(EnginesEnded, match=r"engine 0 did not stop for new weights within sync.base_s=0.1"):
            engine.update_weights([], 1)
        with pytest.raises(EnginesEnded, match="did not stop for new weights"):
            await waits  # whoever waits is told
        go_on.set()

    with open_engines(settings("sync.base_s=0.1")) as started:
        asyncio.run(ask(started))
