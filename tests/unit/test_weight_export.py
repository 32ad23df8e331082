"""What the policy exports is a whole model before the first byte is sent: checked tensor by tensor on their way."""

import pytest
import torch

from checkpoint_conversion.rules import Rule
from igpo_megatron.policy.weight_sync import batches, checked
from igpo_megatron.types import SyncError

EXPECTED = {"embed": (9, 8), "layers.0.q": (8, 8), "layers.0.bias": (8,)}


def weights():
    return {name: torch.randn(shape) for name, shape in EXPECTED.items()}


def test_a_whole_model_passes_unchanged():
    sent = weights()
    found = dict(checked(sent.items(), EXPECTED, torch.float32, version=1))
    assert all(found[name] is tensor for name, tensor in sent.items()) and len(found) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda sent: sent[:1] + sent[2:], "sync 4 exports 2 of 3 tensors; layers.0.q is missing"),
        (lambda sent: [*sent, sent[0]], "sync 4 exports embed, which it did already"),
        (lambda sent: [*sent, ("lm_head", torch.ones(1))], "sync 4 exports lm_head, which the model does not have"),
        (lambda sent: [("embed", sent[0][1].T), *sent[1:]], r"sync 4 exports embed of shape \[8, 9\]; the model has \[9, 8\]"),
        (lambda sent: [("embed", sent[0][1][:-1]), *sent[1:]], r"embed of shape \[8, 8\]"),
        (lambda sent: [("embed", sent[0][1].bfloat16()), *sent[1:]], "sync 4 exports embed as torch.bfloat16; the policy is torch.float32"),
    ],
)
def test_an_export_that_is_no_whole_model_is_named(change, expected):
    with pytest.raises(SyncError, match=expected):
        list(checked(change(list(weights().items())), EXPECTED, torch.float32, version=4))


def test_experts_travel_together_and_every_rule_once():
    def rule(layer, part, expert=None):
        name = f"decoder.layers.{layer}.mlp." + (f"experts.local_experts.{expert}.{part}" if expert is not None else part)
        return Rule(name, (name,), expert=expert)

    rules = [rule(0, "router"), *(rule(layer, part, expert) for layer in (0, 1) for expert in range(5) for part in ("fc1", "fc2"))]
    sizes = {rule.megatron_name: 100 for rule in rules}
    found = list(batches(rules, sizes, most_bytes=250))
    assert sorted(rule.megatron_name for batch in found for rule in batch) == sorted(sizes)
    assert [len(batch) for batch in found] == [1, *[2, 2, 1] * 4]
    for batch in found[1:]:
        assert len({(rule.megatron_name.split(".")[2], rule.megatron_name.split(".")[-1]) for rule in batch}) == 1
    assert [len(batch) for batch in batches(rules, sizes, most_bytes=1)] == [1] * 21  # never none
