"""One real vLLM engine under Ray: its log-probs, new weights, many seeded requests, its death."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from demo_runs import DemoRuns, alive, listening, signal_to

from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.algorithms.info_gain import rendered_probes
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import build, load
from igpo_megatron.engines import fleet
from igpo_megatron.engines.actor import engine_environment, engine_options
from igpo_megatron.engines.api import EnginesEnded, EngineService
from igpo_megatron.engines.factory import open_engines
from igpo_megatron.engines.fleet import EngineState
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.tools.registry import make_tools
from igpo_megatron.training import evaluate
from igpo_megatron.types import Canary, Completion, ProbeScore, SamplingRequest, SyncError
from igpo_megatron.weights.send import check_canary

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
PROMPT = [1, 85, 96, 110, 64, 87, 2]
TOKENS = 650
"""Of the tokenizer: the six further rows of the embedding are never sampled, so sampled log-probs leave them out; scores do not."""


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written here damages the weights that the engine receives: see faulty_worker."""
    path = tmp_path_factory.mktemp("faults") / "fault"
    path.write_text("")
    return path


@pytest.fixture(scope="module")
def pool(fault_file: Path) -> Iterator[EnginePool]:
    config = build(
        {
            "model": {"path": str(POLICY), "dtype": "fp32"},
            "run": {"device": "cpu"},
            "rollout": {
                "max_context": 512,
                "branching": {"name": "arpo", "entropy": "full"},
                "engine": {"kv_cache_mib": 64, "max_num_seqs": 64, "max_restarts": 0, "health_interval_s": 0.5},
            },
            "sync": {"bucket_mib": 1},
        }
    )

    def environment(*arguments: object, **options: bool) -> dict[str, str]:
        extra = {"PYTHONPATH": str(Path(__file__).parent), "FAULT_FILE": str(fault_file)}
        return {**engine_environment(*arguments, **options), **extra}

    def arguments(*arguments: object, **options: bool) -> dict[str, object]:
        return {**engine_options(*arguments, **options), "worker_extension_cls": "faulty_worker.Extension"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "engine_environment", environment)
        patch.setattr(fleet, "engine_options", arguments)
        with EnginePool(config) as started:
            yield started


def policy(scale: float = 1.0) -> torch.nn.Module:
    """The tied demo policy in transformers, its embedding (and so its head) scaled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model


def logprobs(model: torch.nn.Module, token_ids: list[int], temperature: float = 1.0, rows: int | None = None) -> torch.Tensor:
    """Log-prob of every token but the first, among the first `rows` of the embedding."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1, :rows].detach() / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def generate(pool: EnginePool, count: int, temperature: float, max_tokens: int = 24, prompt: list[int] = PROMPT) -> list:
    async def all_at_once() -> list:
        return await asyncio.gather(
            *(
                pool.generate(SamplingRequest(prompt, max_tokens=max_tokens, temperature=temperature, seed=number, key=str(number)))
                for number in range(count)
            )
        )

    return asyncio.run(all_at_once())


def send(pool: EngineService, version: int, scale: float, canary: Canary | None = None) -> Mapping[str, float]:
    reader = HfReader(POLICY)
    weights = ((name, reader.get(name) * (scale if "embed_tokens" in name else 1.0)) for name in reader.names())
    return pool.update_weights(weights, version, canary)


def canary_of(scale: float) -> Canary:
    """What transformers says of fixed tokens."""
    return Canary(tuple(LONG[:65]), tuple(logprobs(policy(scale), LONG[:65]).tolist()), max_gap=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_transformers_at_the_sampling_temperature(pool: EnginePool, temperature: float) -> None:
    model = policy()
    for done in generate(pool, 4, temperature):
        expected = logprobs(model, [*PROMPT, *done.token_ids], temperature, TOKENS)[len(PROMPT) - 1 :]
        assert torch.allclose(torch.tensor(done.logprobs), expected, atol=1e-4)
    assert not torch.allclose(torch.tensor(done.logprobs), logprobs(model, [*PROMPT, *done.token_ids], 1.3)[len(PROMPT) - 1 :], atol=1e-2)


def test_entropies_are_those_of_transformers_over_all_tokens_or_the_likeliest(pool: EnginePool) -> None:
    model = policy()

    async def ask(top: int) -> Completion:
        return await pool.generate(SamplingRequest(PROMPT, max_tokens=12, temperature=0.7, seed=3, key="0", top_logprobs=top))

    for top in (-1, 10):
        done = asyncio.run(ask(top))
        logits = model(torch.tensor([[*PROMPT, *done.token_ids]])).logits[0, len(PROMPT) - 1 : -1, :TOKENS].detach() / 0.7
        logprobs = torch.log_softmax(logits, -1)
        kept = logprobs if top == -1 else logprobs.topk(10).values
        found, expected = torch.tensor(done.entropies), -(kept.exp() * kept).sum(-1)
        # The sampled token is added to the ten likeliest where it is not among them.
        among = [top == -1 or token in row.topk(10).indices for token, row in zip(done.token_ids, logprobs, strict=True)]
        assert torch.allclose(found[among], expected[among], atol=1e-4) and sum(among) > 6
        assert len(found) == len(done.token_ids)
    assert not asyncio.run(ask(0)).entropies


def test_equal_seeds_sample_equal_tokens(pool: EnginePool) -> None:
    first, again = (generate(pool, 6, 1.0) for _ in range(2))
    assert [done.token_ids for done in first] == [done.token_ids for done in again]
    assert len({tuple(done.token_ids) for done in first}) > 1


def test_rows_of_the_embedding_without_a_token_are_never_sampled(pool: EnginePool) -> None:
    """The embedding has 656 rows, the tokenizer 650 tokens; these weights make one of the six the likeliest everywhere."""
    reader = HfReader(POLICY)
    embedding = reader.get("model.embed_tokens.weight").clone()
    model = policy()
    hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0, -1].detach()
    embedding[TOKENS:] = 50 * hidden / hidden.norm() ** 2
    assert int((embedding @ hidden).argmax()) >= TOKENS
    names = reader.names()
    pool.update_weights(((name, embedding if "embed_tokens" in name else reader.get(name)) for name in names), 3)
    for temperature in (0.0, 1.0):
        assert all(token < TOKENS for done in generate(pool, 8, temperature, max_tokens=4) for token in done.token_ids)
    send(pool, 4, 1.0)


def test_hundreds_of_seeded_requests_with_long_prompts_do_not_hurt_the_engine(pool: EnginePool) -> None:
    found = generate(pool, 200, 1.0, max_tokens=8, prompt=PROMPT * 40)
    assert len(found) == 200 and all(done.finish in ("stop", "length") for done in found)
    check_health(pool)


def check_health(pool: EnginePool) -> None:
    for member in pool._fleet.members:
        pool._fleet.wait_for(member, member.actor.check_health.remote(), "is not healthy", 60)


def score(pool: EnginePool, token_ids: list[int], first: int, cached: bool) -> tuple[ProbeScore, int]:
    """Straight from the actor: log-probs with their weight version, cached tokens."""
    import ray

    return ray.get(pool._fleet.members[0].actor.score.remote(token_ids, first, cached=cached), timeout=60)


LONG = [(7 * number + number**2) % 600 + 20 for number in range(400)]


def test_probes_are_scored_from_the_cache_as_without_it_wherever_the_context_ends(pool: EnginePool) -> None:
    """Contexts that end before, on and after block borders, each probe three times over: the known ways to read rows nobody wrote."""
    expected = logprobs(policy(), LONG[:170])
    hits = []
    for first in (*range(60, 68), *range(124, 132), 160):
        probe = LONG[: first + 9]
        wanted = expected[first - 1 : first + 8]
        for _ in range(3):
            found, hit = score(pool, probe, first, cached=True)
            hits.append(hit > first - 1)
            assert torch.allclose(torch.tensor(found.logprobs), wanted, atol=1e-4), first
    assert any(hits) and not all(hits)  # the guard had to act, and the cache was of use


def test_a_probe_score_carries_the_weights_it_came_from(pool: EnginePool) -> None:
    model, other = policy(), policy(1.25)
    for version, scale, source in ((11, 1.25, other), (12, 1.0, model)):
        send(pool, version, scale)
        found = asyncio.run(pool.score_probe(LONG[:100], 90, key="q"))
        assert found.weight_version == version
        assert torch.allclose(torch.tensor(found.logprobs), logprobs(source, LONG[:100])[89:], atol=1e-3)


def test_the_scoring_self_test_passes_on_a_sound_engine_and_says_how_close_it_was(pool: EnginePool) -> None:
    assert pool.self_test_scoring() < 1e-4


def test_new_weights_are_served_at_once_also_by_the_tied_head(pool: EnginePool) -> None:
    tokens = torch.randint(3, 600, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    (before,) = pool.score_on_each(tokens)
    assert torch.allclose(torch.tensor(before[1:]), logprobs(policy(), tokens), atol=1e-4)
    send(pool, version=5, scale=0.9)
    (after,) = pool.score_on_each(tokens)
    expected = logprobs(policy(0.9), tokens)
    assert torch.allclose(torch.tensor(after[1:]), expected, atol=1e-4)
    # What a stale head or a stale engine would have said is far away, and the canary says so.
    assert float((torch.tensor(before[1:]) - expected).abs().max()) > 0.05
    canary = Canary(tuple(tokens), tuple(expected.tolist()), 1e-3)
    assert check_canary(canary, after[1:], version=5, engine=0) < 1e-3
    with pytest.raises(SyncError, match="engine 0"):
        check_canary(canary, before[1:], version=5, engine=0)
    (greedy,) = generate(pool, 1, 0.0)
    assert greedy.weight_version == 5
    model, context = policy(0.9), list(PROMPT)
    for token in greedy.token_ids:
        assert token == int(model(torch.tensor([context])).logits[0, -1].argmax())
        context.append(token)
    send(pool, version=6, scale=1.0)
    (back,) = pool.score_on_each(tokens)
    assert back == pytest.approx(before, abs=1e-5)


def test_handles_of_cuda_ipc_pass_vllms_encoder_on_their_way_to_the_workers(pool: EnginePool) -> None:
    """Such a handle is what torch.multiprocessing makes of a tensor on a GPU: classes, types and bytes."""
    import ray

    memory = (torch.storage.UntypedStorage, torch.bfloat16, 0, b"h" * 64, 12, 0, b"r", 0, b"e", False, False)
    handle = (torch.Tensor, (2, 3), (3, 1), 0, *memory)
    native_info = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]], "ipc_handles": [{"GPU-0a1b": handle}]}
    actor = pool._fleet.members[0].actor
    ((row,),) = ray.get(actor.load_bucket.remote({"number": 0, "native_info": native_info}), timeout=60)
    assert row[0] == repr(native_info)


def test_requests_in_flight_outlive_a_sync_and_carry_the_weights_they_began_with(pool: EnginePool) -> None:
    """Turns before, across and after a sync; none is lost, and each that saw one version only is as its seed says."""
    send(pool, version=20, scale=1.0)
    canary = canary_of(0.9)  # here, because the turns would end while it is made

    async def ask(number: int, max_tokens: int) -> Completion:
        return await pool.generate(SamplingRequest([*PROMPT, 40 + number], max_tokens=max_tokens, temperature=1.0, seed=number, key="q"))

    async def probe() -> int:
        return (await pool.score_probe(LONG[:200], 190, key="q")).weight_version

    async def across() -> tuple[list[Completion], list[Completion], list[int]]:
        first = [asyncio.ensure_future(ask(number, 400)) for number in range(12)]
        await asyncio.ensure_future(ask(99, 4))  # first come, first served: when this short turn has ended, all others are under way
        syncing = asyncio.ensure_future(asyncio.to_thread(send, pool, 21, 0.9, canary))
        during, probes = [], []
        while not syncing.done():
            during.append(asyncio.ensure_future(ask(len(during), 8)))
            probes.append(asyncio.ensure_future(probe()))
            await asyncio.sleep(0.01)
        await syncing
        return await asyncio.gather(*first), await asyncio.gather(*during), await asyncio.gather(*probes)

    def by(scale: float, number: int, done: Completion) -> torch.Tensor:
        """Tokens of a turn that the weights of `scale` sampled."""
        context = [*PROMPT, 40 + number]
        expected = logprobs(policy(scale), context + done.token_ids, rows=TOKENS)[len(context) - 1 :]
        return (torch.tensor(done.logprobs) - expected).abs() < 2e-4

    first, during, probes = asyncio.run(across())
    assert all(done.weight_version == 20 and done.finish in ("stop", "length") for done in first)
    crossed = 0
    for number, done in enumerate(first):
        old, new = by(1.0, number, done), by(0.9, number, done)
        assert bool((old | new).all()) and bool(old[0])  # every token by one of the two, the first by the older
        crossed += not bool(old.all())
    assert crossed > 0, "no turn was in flight"
    # Who came in while the engine was frozen has seen the new weights only, and says so.
    assert during[-1].weight_version == probes[-1] == 21 and all(done.finish in ("stop", "length") for done in during)
    assert bool(by(0.9, len(during) - 1, during[-1]).all())
    again = asyncio.run(ask(len(during) - 1, 8))
    assert (again.weight_version, again.token_ids) == (21, during[-1].token_ids)


def test_both_backends_write_the_same_greedy_rollouts_and_score_alike(pool: EnginePool, tmp_path: Path) -> None:
    """vLLM and transformers on the demo's questions: every column of the rollout file but log-probs is equal, and those nearly are."""
    demo = DemoRuns(tmp_path, tmp_path)
    settings = ["rollout.max_context=512", "parallel.data=1", "rollout.engine.backend=torch", "rollout.engine.kv_cache_mib=64"]
    config = load(demo.arguments("both")[0], [*demo.arguments("both")[1:], *settings])
    prompts = evaluate.questions(config)[:8]
    tables, scores = {}, {}
    with open_engines(config) as other:
        for name, engine in {"vllm": pool, "torch": other}.items():
            send(engine, 25, 1.0)
            chat = ChatFormat(load_tokenizer(POLICY), config.rollout, config.reward)
            probes_of = partial(rendered_probes, render_probe=chat.render_probe, config=config.reward)
            tools = make_tools(config, chat.count_tokens, chat.protocol.hit)
            with Rollouter(engine, tools, chat, config.rollout, seed=1, probes_of=probes_of) as rollouter:
                groups = rollouter.start(rollouter.run(prompts, samples=1, salt=1, temperature=0.0, probe=True)).result()
            write_rollouts(tmp_path / f"{name}.parquet", 1, groups)
            tables[name] = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
            scores[name] = [group.probe_scores for group in groups]
    taken = [[logprobs_apart(row) for row in tables[name]] for name in ("vllm", "torch")]
    assert [rest for rest, _ in taken[0]] == [rest for rest, _ in taken[1]]
    left, right = ([value for _, found in part for value in found] for part in taken)
    assert len(left) > 200 and left == pytest.approx(right, abs=1e-3)
    assert sum(len(found) for found in scores["vllm"]) > 16
    for one, two in zip(scores["vllm"], scores["torch"], strict=True):
        assert one.keys() == two.keys()
        for key, score in one.items():
            assert score.weight_version == two[key].weight_version == 25
            assert score.logprobs == pytest.approx(two[key].logprobs, abs=1e-3)


def logprobs_apart(value: Any) -> tuple[Any, list[float]]:
    """A row of a rollout file without its floats, and the floats."""
    found: list[float] = []

    def walk(part: Any) -> Any:
        if isinstance(part, float):
            found.append(part)
            return "a float"
        if isinstance(part, dict):
            return {key: walk(inner) for key, inner in part.items()}
        return [walk(inner) for inner in part] if isinstance(part, list) else part

    return walk(value), found


FAULTS = {
    "dropped": ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.k_proj.bias did not arrive in its place"),
    "swapped": ("model.layers.2.self_attn.k_proj.weight", "has the values of model.layers.2.self_attn.k_proj.weight"),
    "stale": ("model.embed_tokens.weight", "model.embed_tokens.weight still has its values from the previous sync"),
    "transposed": ("model.layers.0.self_attn.o_proj.weight", "o_proj.weight has other values than were exported"),
    "cast": ("model.norm.weight", "model.norm.weight is bfloat16 and was exported as float32"),
    "rounded": ("model.layers.3.mlp.up_proj.weight", "up_proj.weight has other values"),
    "zeroed_end": ("model.layers.1.mlp.gate_proj.weight", "gate_proj.weight has other values"),
    "kept": ("model.layers.2.mlp.down_proj.weight", "does not serve the policy's weights: after sync"),
    "truncated": ("model.layers.3.mlp.down_proj.weight", r"down_proj.weight \(float32 \[127, 384\]\) could not be loaded"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_damaged_weights_are_caught_before_anything_is_sampled_from_them(pool: EnginePool, fault_file: Path, kind: str) -> None:
    import ray

    name, expected = FAULTS[kind]
    scales = iter((0.95, 1.05))
    send(pool, version=30, scale=next(scales))
    fault_file.write_text(f"{kind} {name}")
    scale = next(scales)
    try:
        with pytest.raises(SyncError, match=expected):
            send(pool, 31, scale, canary_of(scale))
    finally:
        fault_file.write_text("")
    assert [member.state for member in pool._fleet.members] == [EngineState.STALE]
    with pytest.raises(SyncError, match=expected):  # nobody is served
        generate(pool, 1, 1.0)
    if kind == "truncated":  # the last: vLLM refused in the middle of a layer, and cannot go on
        return
    # A run ends here. For the next case the engine is brought back, and the same transfer without the fault passes.
    member, pool._fleet.problem = pool._fleet.members[0], None
    if kind != "kept":
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(member.actor.finish_update.remote(0))
    assert send(pool, 32, scale, canary_of(scale))["canary_gap"] < 1e-3
    assert generate(pool, 1, 1.0)[0].weight_version == 32


def test_an_engine_is_as_urgent_as_its_run_and_one_process_computes(pool: EnginePool) -> None:
    """Ray's own niceness of 15 would let whatever else runs on the machine go before it."""
    actor = psutil.Process(pool._fleet.members[0].process)
    children = actor.children(recursive=True)
    assert {process.nice() for process in [actor, *children]} == {psutil.Process().nice()}
    assert sum(process.name().startswith("VLLM::") for process in children) == 1


def test_everything_listens_on_loopback_only(pool: EnginePool) -> None:
    actor = psutil.Process(pool._fleet.members[0].process)
    found = listening([actor, *actor.children(recursive=True), *psutil.Process().children(recursive=True)])
    assert found and {address.rpartition(":")[0] for address in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_engine_is_named_within_seconds_and_nothing_is_left_behind(pool: EnginePool) -> None:
    """Last of the module: the engine does not come back."""
    actor = psutil.Process(pool._fleet.members[0].process)
    engine = [actor, *actor.children(recursive=True)]

    async def kill_while_generating() -> None:
        work = asyncio.ensure_future(pool.generate(SamplingRequest(PROMPT, max_tokens=400, temperature=1.0, seed=0, key="k")))
        await asyncio.sleep(0.05)
        for process in engine[1:]:
            signal_to(process, signal.SIGKILL)
        await work

    started = time.monotonic()
    pool._fleet.problem = None
    pool._fleet.set_state(pool._fleet.members[0], EngineState.HEALTHY)  # which the last fault made it lose
    with pytest.raises(EnginesEnded, match=r"engine 0 died .*rollout.engine.max_restarts=0 restarts of it have been used"):
        asyncio.run(kill_while_generating())
    assert time.monotonic() - started < 60
    with pytest.raises(EnginesEnded, match="engine 0"):
        check_health(pool)
    with pytest.raises(EnginesEnded, match="engine 0 died"):
        send(pool, version=99, scale=1.0)
    weights, folder = pool._weights.path, pool._fleet._cluster.folder
    pool.close()
    assert not weights.exists() and not folder.exists()
    assert alive(engine) == []
