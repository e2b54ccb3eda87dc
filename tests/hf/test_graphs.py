"""A decoding step as one compiled graph, and the text path exported as a graph."""

import pytest
import torch
from torch.export import Dim

from neo_megatron.hf.configuration_neo import NEOChatConfig
from neo_megatron.hf.modeling_neo import NEOChatModel


@pytest.fixture(scope="module")
def small(model) -> NEOChatModel:
    """The golden model's first layer, as tracing takes seconds per layer."""
    config = NEOChatConfig(**model.config.to_dict())
    config.llm_config.num_hidden_layers = 1
    first = NEOChatModel(config).eval()
    first.load_state_dict({name: value for name, value in model.state_dict().items() if name in first.state_dict()})
    return first


@torch.no_grad()
def test_a_decoding_step_is_one_graph(small, document):
    """With images in the cache; two graphs, of a fixed and of any length, do for every step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(small, fullgraph=True, backend="aot_eager")
    expected, cache = (small(**document, use_cache=True) for _ in range(2))
    plain, cache = expected.past_key_values, cache.past_key_values
    token = expected.logits[:, -1:].argmax(dim=-1)
    for _ in range(12):
        compiled = step(token, past_key_values=cache, use_cache=True)
        expected = small(token, past_key_values=plain, use_cache=True)
        torch.testing.assert_close(compiled.logits, expected.logits, atol=1e-4, rtol=0)
        token = expected.logits[:, -1:].argmax(dim=-1)
    assert cache.get_seq_length() == document["input_ids"].shape[1] + 12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Logits(torch.nn.Module):
    """Types that a graph can have as input and output."""

    def __init__(self, model: NEOChatModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def test_the_text_path_is_exported(small):
    """For any number of rows and tokens, padded or not."""
    ids = torch.randint(0, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    exported = torch.export.export(
        Logits(small),
        (ids, torch.ones_like(ids)),
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    ).module()
    other = torch.randint(0, 800, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(other)
    mask[0, :4] = mask[1, 8:11] = 0
    torch.testing.assert_close(exported(other, mask), small(other, attention_mask=mask).logits)
