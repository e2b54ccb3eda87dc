"""The head in chunks gives what it gives at once, and holds the logits of one chunk; test_golden has it in parallel."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_megatron.model import head_loss
from neo_megatron.model.head_loss import in_chunks

POSITIONS, HIDDEN, WORDS = 50, 64, 40


class Widest(TorchDispatchMode):
    """Remembers the most rows of WORDS logits that one operation has made."""

    rows = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == WORDS and x.shape[0] != HIDDEN:
                self.rows = max(self.rows, x.shape[0])
        return out


@pytest.mark.parametrize("at_once", [7, 25, 50, 1])
def test_values_and_gradients_are_those_of_float64(at_once, monkeypatch):
    monkeypatch.setattr(head_loss, "LOGIT_BYTES", at_once * WORDS * 4)
    draw = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(POSITIONS, HIDDEN, generator=draw), torch.randn(WORDS, HIDDEN, generator=draw)
    weight /= 8
    targets = torch.randint(WORDS, (POSITIONS,), generator=draw)
    towards = torch.rand(POSITIONS, generator=draw)
    calls = []

    def nll(x, targets, weight):
        return torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")

    given = [x.requires_grad_() for x in (rows, weight)]

    def head(rows, targets):
        calls.append(len(rows))
        return nll(rows, targets, weight)

    widest = Widest()
    with widest:
        actual = in_chunks(head, rows, targets, WORDS)
        gradients = torch.autograd.grad(actual, given, towards)
    assert sum(calls) == POSITIONS * (1 if at_once == POSITIONS else 2)  # again in the backward, if in chunks
    assert widest.rows <= at_once
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = nll(exact[0], targets, exact[1])
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=0)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact, towards.double()), strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=0)


def test_nothing_to_train_on():
    nothing = torch.zeros(0, HIDDEN, requires_grad=True)
    assert in_chunks(lambda rows, targets: rows.sum(dim=1), nothing, torch.zeros(0), WORDS).shape == (0,)
