"""Every setting of a run, with its meaning written under it. Unknown keys and unknown enum values are errors.

Sections follow the path of a question: data -> search -> rollout -> reward -> advantage -> loss -> optim, then what carries them.
Secrets are never stored: a field ending in `_env` names the environment variable that holds one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

PUBLISHED_PROBE = "\nNow there's enough information to answer\n</think>\n<answer>\n{answer}\n</answer><|im_end|>"
"""Probe text of the published IGPO code; it continues a forced `<think>`."""


class Section(BaseModel):
    """Base of every section: immutable, strict about names, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class Run(Section):
    """Where a run lives and how long it goes on."""

    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""

    folder: Path = Path("runs")
    """Parent of all run folders."""

    seed: NonNegativeInt = 0
    """Seed of question order, sampling and initial state."""

    steps: PositiveInt = 100
    """Training steps."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA when torch sees a GPU. `cpu` also works on a machine that has GPUs."""

    threads: PositiveInt = 1
    """CPU threads of each rank; 1 is safest when ranks and engines share cores."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest complete checkpoint of this run; `never` refuses a folder that already holds a run."""

    replay: Path | None = None
    """Train from this rollout file (parquet) without engines: RL on recorded rollouts, or supervised on demonstrations."""

    stop_after: Literal["none", "rollout"] = "none"
    """`rollout` writes the rollouts of each step and trains nothing: the other half of `replay`."""


class Model(Section):
    """The policy."""

    path: Path
    """Hugging Face folder with config.json, safetensors and tokenizer."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameter and activation type; gradients are accumulated and reduced in fp32."""

    backend: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Megatron's local layers, or TransformerEngine; `auto` takes te on CUDA when importable."""

    head: Literal["auto", "torch", "triton"] = "auto"
    """What turns hidden states into log-probs; `auto` takes the Triton kernels on CUDA where triton is importable."""

    head_form: Literal["auto", "fused", "chunks"] = "auto"
    """How the Triton forward runs: one fused kernel, or cuBLAS chunks; `auto` looks the sizes up in kernels/head_forms.json."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: core attention only (selective) or every layer (full)."""

    vocab_multiple: PositiveInt = 128
    """Vocabulary rows are padded to a multiple of this, so that every tensor-parallel degree up to it can share them."""


class Parallel(Section):
    """How the policy is spread over ranks: world size = tensor x pipeline x data; experts share the tensor x data ranks of a stage."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree."""

    pipeline: PositiveInt = 1
    """Pipeline-parallel degree (1F1B)."""

    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage, run interleaved: smaller bubbles, more transfers. Needs pipeline of 2 or more."""

    first_stage_layers: PositiveInt | None = None
    """Layers on the first pipeline stage, which also holds the embedding; null shares the layers evenly."""

    last_stage_layers: PositiveInt | None = None
    """Layers on the last pipeline stage, which also holds the output layer; null shares the layers evenly."""

    expert: PositiveInt = 1
    """Expert-parallel degree: each rank holds 1/expert of every layer's experts, whole. A multiple of parallel.tensor."""

    data: PositiveInt | None = None
    """Data-parallel degree; null takes what the world size leaves (as few as parallel.expert allows when `igpo train` starts the ranks)."""

    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group."""

    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""

    timeout_s: PositiveFloat = 1800
    """A collective that waits longer than this ends the job."""


class Data(Section):
    """Questions."""

    train: tuple[Path, ...] = ()
    """Parquet files of training questions (IGPO, ARPO or Search-R1 layout, recognised by their columns)."""

    eval: tuple[Path, ...] = ()
    """Parquet files of held-out questions."""

    shuffle: bool = True
    """Shuffle each epoch with `run.seed`; the order depends on seed and epoch only."""

    balance: Literal["none", "source"] = "none"
    """`source` draws every source equally often instead of in proportion to its rows."""


KEY_VARIABLES = {
    "serper": "SERPER_API_KEY",
    "brightdata": "BRIGHTDATA_API_KEY",
    "azure_bing": "AZURE_BING_API_KEY",
    "serpapi": "SERPAPI_API_KEY",
    "google_cse": "GOOGLE_API_KEY",
    "tavily": "TAVILY_API_KEY",
    "brave": "BRAVE_API_KEY",
}
"""Search back-end that needs a key -> the environment variable it is read from unless `search.api_key_env` names another."""


class Chaos(Section):
    """Faults put between the policy and the search back-end, for tests and for studies of robustness."""

    failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of queries that fail: error, timeout or rate_limited, equally often."""

    latency_s: NonNegativeFloat = 0.0
    """Mean of the exponentially distributed time added to every query."""

    seed: NonNegativeInt = 0
    """The faults of the n-th asking of a query depend on this seed, the query and n only."""


class Search(Section):
    """The tool the policy calls."""

    backend: Literal["bm25", "dense", "retriever", "serper", "brightdata", "azure_bing", "serpapi", "google_cse", "tavily", "brave"] = (
        "bm25"
    )
    """Local over `corpus`: `bm25`, `dense` (embeddings). A server of yours: `retriever` (Search-R1's POST /retrieve). Web APIs:
    `serper` (Google), `brightdata` (Bing), `serpapi` and `google_cse` (Google), `tavily`, `brave`; `azure_bing` is Bing's v7 format only:
    Microsoft retired the service, so it needs the `url` of something that still speaks it."""

    corpus: Path | None = None
    """bm25, dense: JSON lines of {id, title, text} or {id, contents}."""

    encoder: str | None = None
    """dense: sentence-transformers model, a folder or a name such as intfloat/e5-base-v2."""

    query_prefix: str = "query: "
    """dense: put before a query (e5's; other encoders have others)."""

    passage_prefix: str = "passage: "
    """dense: put before a passage."""

    vectors: Path | None = None
    """dense: file (.npz) that keeps the passages' embeddings, written where it is missing; null computes them at every start."""

    url: str | None = None
    """retriever, azure_bing: address such as http://127.0.0.1:8000/retrieve. Web APIs: null asks the provider itself."""

    api_key_env: str | None = None
    """Environment variable that holds the key; null takes the web API's usual one, e.g. SERPER_API_KEY, and sends none to a retriever."""

    zone: str | None = None
    """brightdata: name of the SERP zone."""

    engine_id: str | None = None
    """google_cse: id of the programmable search engine (cx)."""

    country: Annotated[str, Field(pattern="^[a-z]{2}$")] = "us"
    """Web APIs except tavily: country the results are meant for, two letters."""

    language: Annotated[str, Field(pattern="^[a-z]{2}$")] = "en"
    """Web APIs except tavily: language of the results, two letters."""

    top_k: PositiveInt = 5
    """Passages shown per query. More raises recall and prompt length together."""

    timeout_s: PositiveFloat = 30
    """Deadline of one attempt."""

    deadline_s: PositiveFloat = 180
    """Deadline of one search: waiting for its turn, all attempts and the pauses between them."""

    attempts: PositiveInt = 4
    """Tries per search, with exponential back-off, before the result counts as failed."""

    max_concurrency: PositiveInt = 64
    """Requests in flight at once; halved when the provider says it is too much, and raised again as it answers."""

    rate_per_s: PositiveFloat | None = None
    """Requests that may start per second; null sets no limit. Take your plan's."""

    breaker_failures: PositiveInt = 100
    """After this many failed requests in a row none is sent for `breaker_pause_s`, then one to see whether the provider is back. Take
    more than `max_concurrency`: all that is in flight may fail in a single bad moment."""

    breaker_pause_s: PositiveFloat = 10
    """Pause of the circuit breaker. Searches wait for its end if their deadline allows."""

    use_proxy: bool = False
    """Ask through the proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name."""

    mode: Literal["live", "record", "replay", "chaos"] = "live"
    """`live`: the cache, if any, then the provider. `record`: the same, and the first answer to a query is kept for good. `replay`:
    recorded answers only, a missing one stops the run. `chaos`: live, with the faults of `chaos`."""

    cache: Path | None = None
    """SQLite file of answers, those of the visit tool included, shared by all runs that name it; null keeps none. What failed is never in
    it. Not on a network disk."""

    cache_ttl_s: PositiveFloat | None = None
    """Age from which an answer is asked for again (live, chaos); null never."""

    cache_empty_ttl_s: PositiveFloat = 3600
    """The same for answers without a passage, which some providers give when something is wrong."""

    chaos: Chaos = Chaos()
    """Faults of `mode: chaos`."""

    @property
    def key_variable(self) -> str | None:
        """The environment variable that holds the key; None where none is needed."""
        return self.api_key_env or KEY_VARIABLES.get(self.backend)


class Summary(Section):
    """A model that summarises visited pages, at any server that speaks OpenAI's POST /v1/chat/completions."""

    url: str | None = None
    """Address up to the version, such as http://127.0.0.1:8001/v1; null shows the page's own text."""

    model: str | None = None
    """The model's name at that server."""

    api_key_env: str | None = None
    """Environment variable that holds the server's key, sent as a bearer token; null if it needs none."""

    max_tokens: PositiveInt = 1024
    """Tokens of a summary, reasoning included."""

    timeout_s: PositiveFloat = 120
    """Deadline of one attempt."""

    attempts: PositiveInt = 3
    """Tries per page, with exponential back-off."""

    max_concurrency: PositiveInt = 16
    """Requests in flight at once."""


class Visit(Section):
    """The visit tool (`rollout.extra_tools`): reads web pages, HTML, PDF and plain text."""

    allow_hosts: tuple[str, ...] = ()
    """Host names (or addresses, as they stand in a URL) that may be visited although their address is private, loopback or link-local."""

    content: Literal["matching", "start"] = "matching"
    """`matching`: of a long page, the passages that match the goal of the visit best (BM25); `start`: its beginning."""

    max_tokens: PositiveInt = 2048
    """Tokens of a page's text that are shown, or given to the summariser."""

    show_failures: bool = False
    """True tells the policy where a site could not be reached or took too long; false ends the trajectory in TOOL_FAILED. Pages that
    do not exist or may not be visited are always told."""

    timeout_s: PositiveFloat = 20
    """Deadline of one attempt, redirects included."""

    attempts: PositiveInt = 2
    """Tries per page, with exponential back-off, while the trouble may pass."""

    max_page_kib: PositiveInt = 8192
    """Larger pages are not read."""

    max_redirects: NonNegativeInt = 5
    """Redirects followed; each is checked as the first address is."""

    extract_timeout_s: PositiveFloat = 30
    """Time in which the text must have been taken out of a page."""

    workers: PositiveInt = 2
    """Processes that take text out of pages."""

    max_concurrency: PositiveInt = 32
    """Visits at once."""

    user_agent: str = "igpo_megatron"
    """What the tool calls itself towards sites."""

    summary: Summary = Summary()
    """The summariser."""


class Python(Section):
    """The python tool (`rollout.extra_tools`): code in a process of its own; igpo_megatron/search/python_tool.py says what is isolated."""

    allow_network: bool = False
    """Run code even where it cannot be cut off from the network, and leave it the network. False refuses to start there."""

    timeout_s: PositiveFloat = 30
    """Wall time of one call; CPU time of each of its processes, too."""

    max_memory_mib: PositiveInt = 1024
    """Address space of each process."""

    max_file_mib: PositiveInt = 64
    """All files of a call together; of each single file where the scratch folder cannot be made in memory."""

    max_processes: PositiveInt = 32
    """Processes and threads of a call."""

    max_output_kib: PositiveInt = 64
    """Output that is kept; the policy sees at most `rollout.max_observation_tokens` of it."""

    max_concurrency: PositiveInt = 8
    """Calls that run at once."""


class Engine(Section):
    """One kind of vLLM engine, placed by Ray."""

    count: PositiveInt = 1
    """Engines."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree of each engine."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes the model's."""

    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once per engine."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    """CUDA: share of each engine GPU that vLLM may take."""

    kv_cache_mib: PositiveInt = 256
    """CPU: KV-cache size of each engine."""

    threads: PositiveInt = 1
    """CPU: OpenMP threads of each engine."""

    gpu_ids: tuple[NonNegativeInt, ...] = ()
    """CUDA: devices the engines may use on this node; must not overlap the ranks' devices."""

    ray_address: str | None = None
    """Ray cluster to join (host:port); null starts one on this machine, bound to loopback."""

    start_timeout_s: PositiveFloat = 600
    """An engine that is not ready by then stops the run."""


class NoBranching(Section):
    """Independent samples."""

    name: Literal["none"] = "none"


class ArpoBranching(Section):
    """ARPO (arXiv 2507.19849, section 3.1): a group starts as a few samples and forks behind tool results that leave the policy unsure.

    Entropy is that of the first `entropy_tokens` tokens of a turn, over ln(vocabulary); dH its rise over the question's initial entropy.
    """

    name: Literal["arpo"] = "arpo"
    variant: Literal["corrected", "published"] = "corrected"
    """`corrected` (the paper): entropy of the tokens behind the result, against the mean of the first samples' first turns; short turns
    are scaled up to `entropy_tokens`. `published` (the code): entropy of the turn that made the call, against the path's own first
    measured turn, as a plain sum. The code's stale initial entropies of earlier batches, and its rounds, are in neither."""

    initial_rollouts: PositiveInt = 8
    """Samples that begin at the question; the rest of `samples_per_prompt` is the budget of forks. What no fork used begins there, too."""

    beam: Annotated[int, Field(ge=2)] = 2
    """Paths behind a fork at most, the forking one included."""

    base_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """alpha: the chance of a fork where dH = 0."""

    entropy_weight: NonNegativeFloat = 0.2
    """beta: P = alpha + beta dH, clipped to [0, 1]."""

    decision: Literal["stochastic", "threshold"] = "stochastic"
    """Fork with chance P (code), or wherever P > `threshold` (paper)."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """tau, for decision=threshold."""

    entropy_tokens: PositiveInt = 20
    """Tokens measured at the beginning of a turn."""

    entropy: Literal["top_k", "full"] = "top_k"
    """Over the `top_k` likeliest tokens, their rest ignored as published, or over the whole vocabulary (slow in vLLM when it is large)."""

    top_k: PositiveInt = 10
    """Likeliest tokens, for entropy=top_k; the sampled one is added."""


class AepoBranching(ArpoBranching):
    """AEPO (arXiv 2510.14545): ARPO's forks, rarer where a path has just forked, under a budget that a first rollout can set."""

    name: Literal["aepo"] = "aepo"  # type: ignore[assignment]
    variant: Literal["corrected", "published"] = "corrected"
    """As for arpo, and `corrected`: P = (alpha + beta dH) (1 - penalty l); `published`: P = 1 - (1 - alpha) / (1 - penalty l) + beta dH,
    which is what the code's comparison amounts to. l counts along each path (the code counts all forks of a question together)."""

    penalty: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Per decision just before on the same path that forked."""

    premonitor: bool = True
    """One rollout goes first and sets initial_rollouts to n sigmoid(budget_scale (H_root - H_tool)), H_tool its mean entropy behind tool
    results; it stays in the group, and is forked like the others (the code throws it away, and its scripts leave this off)."""

    budget_scale: NonNegativeFloat = 0.5
    """Steepness of the budget."""


Branching = Annotated[NoBranching | ArpoBranching | AepoBranching, Field(discriminator="name")]


class Rollout(Section):
    """Multi-turn trajectories."""

    prompts_per_step: PositiveInt = 32
    """Questions per training step."""

    samples_per_prompt: PositiveInt = 16
    """Trajectories per question (the group)."""

    max_turns: PositiveInt = 10
    """Turns per trajectory; a tool call in the last one ends it without running the tool."""

    max_tokens_per_turn: PositiveInt = 2000
    """Sampled tokens per turn."""

    max_context: PositiveInt = 32768
    """Tokens of prompt and all turns together, the probe included."""

    max_observation_tokens: PositiveInt = 4096
    """Tokens of one tool result; longer text is cut by tokens and its closing kept."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; policy log-probs are taken at the same temperature."""

    force_think: bool = True
    """Append `<think>` to every turn's prompt, as published; forced tokens are never trained."""

    system_prompt: str | None = None
    """System message; null sends none. `{date}` becomes the date of the run's start."""

    protocol: Literal["igpo", "search_r1", "arpo", "hermes"] = "igpo"
    """How the policy writes calls and answers: IGPO's think + tool_call or answer, Search-R1's and ARPO's tags, or native tool calls of
    Qwen and Hermes models."""

    tool_name: str = "web_search"
    """Name of the search tool in the prompt and in tool calls; protocols of tags (search_r1, arpo) always write `<search>`."""

    extra_tools: tuple[Literal["visit", "python"], ...] = ()
    """Tools beside search: `visit` reads web pages (section `visit`), `python` runs code (section `python`)."""

    max_queries: PositiveInt = 3
    """Queries of one tool call that are used; further ones are dropped."""

    resample: NonNegativeInt = 0
    """Dynamic sampling (DAPO, arXiv 2503.14476): up to this many further batches of questions replace groups whose rewards are all equal;
    where they do not suffice, such groups fill the step. 0 keeps every group."""

    tool_in_prompt: bool = True
    """Describe the tools in the prompt, through the chat template's `tools` or the protocol's own text; false for a policy that was
    taught the format."""

    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A step in which more than this share of trajectories, or of searches, fails for reasons outside the policy stops the run."""

    failed_search: Literal["mask", "end"] = "mask"
    """A search, or another tool, that fails after its retries ends its trajectory. `mask` leaves it out of the loss and of its group's
    baseline; `end` trains it, and counts it in evaluations, as it stands: with the reward of a malformed one."""

    deadline_s: PositiveFloat = 1800
    """Wall time of one trajectory."""

    branching: Branching = NoBranching()
    """How a training group grows: independent samples, or forks of them. Evaluations always draw independent samples."""

    engine: Engine = Engine()
    """The engines."""


class Reward(Section):
    """Outcome reward and information gain."""

    outcome: Literal["f1", "em", "f1_multiset"] = "f1"
    """Score of a well-formed answer, best over all aliases: F1 of sets of words (IGPO), exact match, or SQuAD's F1 (ARPO), in which
    repeated words count and articles do not."""

    format_penalty: float = -2.0
    """Reward of a malformed trajectory (IGPO -2, ARPO -1)."""

    tool_bonus: NonNegativeFloat = 0.0
    """Added to a reward above zero where both search and python were used and returned something (ARPO 0.1)."""

    overlong: tuple[NonNegativeInt, PositiveInt] | None = None
    """Overlong shaping (DAPO, arXiv 2503.14476): sampled tokens of a trajectory from which the reward falls, and where it has fallen by 1
    and stays; null leaves length alone."""

    gain: Literal["log_prob_diff", "prob_diff", "none"] = "log_prob_diff"
    """Value whose rise over a turn is the turn's gain: mean log-prob of the answer, its exponential, or no gains at all."""

    probe_template: str = PUBLISHED_PROBE
    """Text appended to the context to ask for the answer; `{answer}` is the ground truth and only its tokens are scored."""

    probe_alias: Literal["first", "shortest", "max"] = "first"
    """Which alias is probed: the first, the one with fewest tokens, or every alias with the best value taken."""

    probe_max_tokens: PositiveInt = 64
    """Ground-truth tokens probed at most; longer answers are cut (whole-page aliases exist in NQ)."""

    scorer: Literal["fold", "engine", "batched", "sequential"] = "fold"
    """`fold`: probes are leaves of the packed tree in the old-log-prob pass; `engine`: vLLM scores them beside the next turn's
    generation; `batched`, `sequential`: the published schemes, every probe with its whole context (references)."""

    evidence: bool = False
    """A second probe per turn, with the newest tool result hidden, splits each gain into evidence and own reasoning."""


class Igpo(Section):
    """IGPO (arXiv 2510.14967): turn gains and outcome, normalised over the group, summed over the remaining turns."""

    name: Literal["igpo"] = "igpo"
    normalise: Literal["separate", "joint"] = "separate"
    """z-score gains and outcomes each among themselves (paper) or in one population (code default)."""

    divide_by_std: bool = True
    """False subtracts the mean only."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between; applied after normalisation."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class IgpoLoo(Section):
    """IGPO with a leave-one-out baseline per turn index instead of mean subtraction before summing."""

    name: Literal["igpo_loo"] = "igpo_loo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class Grpo(Section):
    """GRPO (arXiv 2402.03300): group z-score of the outcome, the same for every turn."""

    name: Literal["grpo"] = "grpo"
    divide_by_std: bool = True
    """False subtracts the mean only (Dr. GRPO, arXiv 2503.20783)."""

    statistics: Literal["trajectories", "tokens"] = "trajectories"
    """What mean and std are taken over; `tokens` counts every trajectory by its length (HAPO's token-level group average, 2509.16591)."""


class Rloo(Section):
    """RLOO (arXiv 2402.14740): outcome minus the mean outcome of the other samples."""

    name: Literal["rloo"] = "rloo"


class GiGpo(Section):
    """GiGPO (arXiv 2505.10978): group z-score of the outcome plus that of the discounted outcome among visits of the same state."""

    name: Literal["gigpo"] = "gigpo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Discount of the outcome per remaining turn, for the comparison within a state."""

    step_weight: NonNegativeFloat = 1.0
    """Weight of the comparison within a state."""

    divide_by_std: bool = True
    """False subtracts means only, in both parts."""


class Arpo(Section):
    """ARPO (arXiv 2507.19849, section 3.2): group z-score of the outcome, on trees."""

    name: Literal["arpo"] = "arpo"
    attribution: Literal["soft", "hard"] = "soft"
    """A turn that several trajectories share is trained with the advantage of each (soft, published) or with their mean (hard)."""


class ReinforcePp(Section):
    """REINFORCE++ (arXiv 2501.03262): the outcome, whitened over the whole batch."""

    name: Literal["reinforce_pp"] = "reinforce_pp"


class ReinforcePpBaseline(Section):
    """REINFORCE++-baseline (arXiv 2501.03262): outcome minus the mean of its group, whitened over the whole batch."""

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class ReMax(Section):
    """ReMax (arXiv 2310.10505): outcome minus that of a greedy trajectory, which is sampled beside the group and not trained."""

    name: Literal["remax"] = "remax"


Advantage = Annotated[
    Igpo | IgpoLoo | Grpo | Rloo | Arpo | GiGpo | ReinforcePp | ReinforcePpBaseline | ReMax,
    Field(discriminator="name"),
]


class PolicyLoss(Section):
    """What the losses of reinforcement learning share."""

    sequence_level: ClassVar[bool] = False
    """True for losses whose ratios are of whole sequences: they do not add up over branches and refuse them."""

    kl_coef: NonNegativeFloat = 0.001
    """Weight of the k3 KL estimate to the reference policy; 0 keeps no reference."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Log-probs that ratios are taken against: a forward pass of the policy before the step, or those the engine sampled with (no pass)."""

    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "sequence_mean"
    """Mean over all trained tokens (DAPO); mean over trajectories of the token mean (GRPO's and IGPO's papers) or of the token sum
    (Dr. GRPO; published IGPO code)."""

    mismatch: Literal["none", "truncate", "mask", "mask_sequence"] = "none"
    """What w, the probability of a token by the trainer over that by the engine that sampled it, does to its policy gradient. `truncate`:
    times min(w, high) (TIS). `mask`: times w within [low, high], 0 outside (IcePop, arXiv 2510.18855). `mask_sequence`: 0 for all tokens
    of a trajectory where the geometric mean of w is outside, 1 for the others."""

    mismatch_bounds: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """[low, high] of `mismatch`; TIS takes high = 2, IcePop 0.5 and 5."""

    @property
    def uses_old_entropies(self) -> bool:
        """The pass before the step also takes the entropy of every token."""
        return False


class Ppo(PolicyLoss):
    """Clipped policy gradient (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729) and asymmetric bounds."""

    name: Literal["ppo"] = "ppo"
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low get no gradient when the advantage is negative."""

    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""

    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With a negative advantage the ratio counts at most this much; null turns it off."""


class Bapo(PolicyLoss):
    """BAPO (arXiv 2510.18927): PPO whose bounds move, before every optimizer step, until gains weigh as much as losses."""

    name: Literal["bapo"] = "bapo"
    lower: tuple[PositiveFloat, PositiveFloat] = (0.6, 0.9)
    """First and last value of the lower bound on ratios."""

    upper: tuple[PositiveFloat, PositiveFloat] = (1.2, 3.0)
    """First and last value of the upper bound on ratios."""

    lower_step: PositiveFloat = 0.05
    """How far the lower bound moves at a time."""

    upper_step: PositiveFloat = 0.05
    """How far the upper bound moves at a time."""

    positive_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the clipped surrogate that positive advantages shall have; the bounds move until it is reached."""

    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With a negative advantage the ratio counts at most this much; null turns it off."""


class Gspo(PolicyLoss):
    """GSPO (arXiv 2507.18071): PPO's clip on the geometric mean of a trajectory's ratios; turns keep their own advantages."""

    sequence_level: ClassVar[bool] = True

    name: Literal["gspo"] = "gspo"
    clip_low: NonNegativeFloat = 3e-4
    """Trajectories below 1 - clip_low get no gradient when the advantage is negative."""

    clip_high: NonNegativeFloat = 4e-4
    """Trajectories above 1 + clip_high get no gradient when the advantage is positive."""


class Cispo(PolicyLoss):
    """CISPO (arXiv 2506.13585): REINFORCE weighted by a clipped ratio without gradient, so that no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Ratios count at least 1 - clip_low; 1 sets no bound, as in the paper."""

    clip_high: NonNegativeFloat = 0.28
    """Ratios count at most 1 + clip_high. The paper tunes it and does not state its value; this is DAPO's."""

    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """As for ppo; the paper takes token_mean."""


class Aepo(Ppo):
    """AEPO's entropy-balanced policy optimisation (arXiv 2510.14545, section 3.3): PPO whose upper clip keeps its gradient."""

    name: Literal["aepo"] = "aepo"  # type: ignore[assignment]
    balanced_tokens: Literal["all", "high_entropy"] = "all"
    """Tokens whose gradient survives the upper clip: all (code), or the `high_entropy_share` least sure of a step (paper)."""

    high_entropy_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a step's tokens that count as high-entropy ones."""

    entropy_advantage: Literal["corrected", "published", "none"] = "corrected"
    """Advantages times 1 + a z, z the z-score of a token's entropy. `corrected`: entropies before the step, over all its tokens;
    `published`: current ones, over the tokens of a micro-batch, so that packing changes the gradient; `none`: what the published scripts
    really run, as they leave the code without entropies."""

    entropy_advantage_weight: NonNegativeFloat = 0.2
    """a."""

    @property
    def uses_old_entropies(self) -> bool:
        return self.entropy_advantage == "corrected" or self.balanced_tokens == "high_entropy"


class Sft(Section):
    """Cross-entropy on the action tokens of demonstrations."""

    name: Literal["sft"] = "sft"


Loss = Annotated[Ppo | Aepo | Bapo | Gspo | Cispo | Sft, Field(discriminator="name")]


class Optim(Section):
    """Optimizer (Adam with decoupled weight decay) and schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decay rates."""

    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""

    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm clip; 0 turns it off."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from `lr` to `min_lr`."""

    decay_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps after which the decay begins."""

    minibatches: PositiveInt = 1
    """Optimizer steps per batch of rollouts."""

    max_skipped: PositiveInt = 3
    """This many steps in a row skipped for a non-finite loss or gradient stop the run."""


class Packing(Section):
    """Rows of the packed batch."""

    row_tokens: PositiveInt = 8192
    """Token budget of a row; a tree longer than this is cut by repeating the path to the cut."""


class Sync(Section):
    """Weight transfer to the engines."""

    canary_tokens: PositiveInt = 64
    """Fixed tokens scored by policy and engine after every sync."""

    max_gap: PositiveFloat = 0.15
    """Largest |log-prob difference| allowed on the canary; a larger one stops the run. fp32 on both sides: about 1e-5."""


class Checkpoint(Section):
    """Saving."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0 saves only at the end."""

    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Eval(Section):
    """Held-out evaluation."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only where `at_ends` says so."""

    at_ends: bool = False
    """Evaluate before the first and after the last step."""

    questions: NonNegativeInt = 0
    """Questions used, the first of a fixed shuffle; 0 uses all."""

    samples: NonNegativeInt = 1
    """Samples per question at `rollout.temperature` (pass@k needs k of them); 0 for none."""

    greedy: bool = True
    """Also answer every question once at temperature 0."""


class Track(Section):
    """Metrics."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `online` without WANDB_API_KEY falls back to offline."""

    project: str = "igpo-megatron"
    """Weights & Biases project."""

    dump_every: NonNegativeInt = 1
    """Steps between rollout files; 0 writes none."""


class Config(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data = Data()
    search: Search = Search()
    visit: Visit = Visit()
    python: Python = Python()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    advantage: Advantage = Igpo()
    loss: Loss = Ppo()
    optim: Optim = Optim()
    packing: Packing = Packing()
    sync: Sync = Sync()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    track: Track = Track()
