"""Positions of prompts, compared with those of the exported code."""

import torch

from neo_megatron.hf.configuration_neo import NEOChatConfig
from neo_megatron.hf.positions_neo import image_numbers, image_token_positions, text_positions
from neo_megatron.vllm_plugin.positions import in_image, prompt_positions

START, CONTEXT, END = 7, 8, 9


def test_positions_are_those_of_the_exported_code():
    config = NEOChatConfig(img_start_token_id=START, img_context_token_id=CONTEXT)
    grids = torch.tensor([[4, 6], [2, 2]])  # patches; rows and columns of tokens are half as many
    # Also an <img> without an image, whose next token is two after it.
    tokens = [1, START, *[CONTEXT] * 6, END, 2, START, CONTEXT, END, START, 3, 4]
    ids = torch.tensor([tokens])
    images = image_numbers(ids, config)
    hw = torch.zeros(len(tokens), 2, dtype=torch.int64)
    hw[images[0] >= 0] = image_token_positions(images, grids, 2)

    positions, later = prompt_positions(tokens, [(2, 2, 3), (11, 1, 1)], START, CONTEXT)

    t = text_positions(ids, torch.zeros_like(ids), config)[0]
    torch.testing.assert_close(positions[0], t)
    torch.testing.assert_close(in_image(positions[1:]).T, hw)
    assert len(tokens) + later == t[-1] + 1
    # vLLM gives generated tokens their t on all axes.
    assert in_image(torch.tensor([0, 1, 30])).tolist() == [0, 0, 0]
