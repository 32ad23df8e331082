"""The demo policy before any training: a tokenizer that makes names copyable, and initial weights that can copy.

A model of 0.9 M parameters learns to copy names from passages into queries and answers within minutes if (a) a name has the same
tokens wherever it stands and none of them is a whole name, and (b) two attention heads start out as a previous-token head and an
induction head (arXiv 2209.11895). From an ordinary initialisation the same data teaches hardly any copying in that time.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from world_facts import World

VOCAB = 640
WORDS_AS_ONE_TOKEN = 20
"""A lower-case word that occurs this often becomes one token."""

CALL_OPENING = '{"name": "search", "arguments": {"query": "'
CALL_CLOSING = '"}}'
FINAL_THINK = "<think>I can answer now.</think>\n"
"""The think text of every final turn; with `<answer>` behind it, it is the demo's probe."""

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HIDDEN, LAYERS, HEADS, FFN = 128, 4, 4, 384
ROPE_THETA = 1e6
EMBEDDING_STD = 0.05
"""Large against the residual updates of the first layers, so that what heads copy is not drowned."""

RESIDUAL_SCALE = 0.2
PREVIOUS_TOKEN_SHARPNESS = 8.0
INDUCTION_SHARPNESS = 4.0


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a space is glued to lower-case words only: a name has the same tokens after a space, quote or tag.

    Each capitalised word counts once and template words count thousands of times, so template words become single tokens and names
    fall into reusable syllables ("J ord an").
    """
    texts = [*(passage.text for passage in world.passages), *(question.text for question in world.questions)]
    names: set[str] = set()
    words: Counter[str] = Counter()
    for text in texts:
        for word in re.findall(r"[A-Z][a-z]*| ?[a-z]+", text):
            if word[0].isupper():
                names.add(word)
            else:
                words[word] += 1
    templates = [
        "I need the country of",
        "I can answer now.",
        "No results.",
        "user assistant",
        "country capital currency language continent code",
    ]
    often = [word for word, count in words.items() if count >= WORDS_AS_ONE_TOKEN]
    corpus = [*sorted(names), *(text for text in [*often, *templates] for _ in range(3000))]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}|[^\s\p{L}\p{N}]|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Ordinary tokens, not special ones: their text stays visible to parsers, and a call's JSON frame costs two tokens.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*TAGS, CALL_OPENING, CALL_CLOSING)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def initial_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A random Qwen2 (fp32, tied, one key-value head per query head) with copying heads in its first two layers."""
    torch.manual_seed(seed)
    vocab = -(-len(tokenizer) // 16) * 16
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(EMBEDDING_STD / config.initializer_range)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(RESIDUAL_SCALE)
            layer.mlp.down_proj.weight.mul_(RESIDUAL_SCALE)
        _add_copying_heads(model, torch.Generator().manual_seed(seed + 1))
    return model


def _add_copying_heads(model: Qwen2ForCausalLM, generator: torch.Generator) -> None:
    """Half the heads of layer 0 attend to the previous token and write its identity aside; half of layer 1 look up what followed it.

    Previous token: q and k are constant (biases), and their phase differs by one position, so RoPE makes the score peak at distance
    1. Induction: q reads the current token, k the identity that layer 0 wrote there, both on the dimensions that RoPE hardly turns.
    """
    size = HIDDEN // HEADS
    heads = HEADS // 2
    frequency = ROPE_THETA ** (-torch.arange(0, size, 2).float() / size)
    turning = (frequency > 0.03).float()
    still = [i for i in range(size // 2) if frequency[i] < 0.006]
    still_dims = still + [i + size // 2 for i in still]
    rank = min(len(still_dims) * heads, heads * size, HIDDEN // 2)

    def orthonormal(columns: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0][:, :columns]

    read, aside, value = orthonormal(rank).T, orthonormal(rank), orthonormal(heads * size).T
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        for attention in (first, second):
            attention.q_proj.weight[rows] *= RESIDUAL_SCALE
            attention.k_proj.weight[rows] *= RESIDUAL_SCALE
        first.k_proj.bias[rows] = PREVIOUS_TOKEN_SHARPNESS * torch.cat((turning, torch.zeros(size // 2)))
        first.q_proj.bias[rows] = PREVIOUS_TOKEN_SHARPNESS * torch.cat((torch.cos(frequency) * turning, torch.sin(-frequency) * turning))
        copied = min(size, rank - head * size)
        if copied > 0:
            part = slice(head * size, head * size + copied)
            first.v_proj.weight[part] = read[part]
            first.o_proj.weight[:, part] = 2 * EMBEDDING_STD * aside[:, part]
        matched = slice(head * len(still_dims), min((head + 1) * len(still_dims), rank))
        dims = [head * size + dim for dim in still_dims][: matched.stop - matched.start]
        if dims:
            second.q_proj.weight[dims] = INDUCTION_SHARPNESS * read[matched]
            second.k_proj.weight[dims] = INDUCTION_SHARPNESS * aside[:, matched].T
        second.v_proj.weight[rows] = value[rows]
        second.o_proj.weight[:, rows] = 3 * EMBEDDING_STD * value[rows].T


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def name_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of tokens made of letters only: the pieces of names."""
    return [number for number, text in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if text.isalpha()]
