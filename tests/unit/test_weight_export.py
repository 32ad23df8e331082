"""What the policy exports is a whole model before the first byte is sent: checked tensor by tensor on their way."""

import pytest
import torch

from igpo_megatron.actor.weight_sync import checked
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
