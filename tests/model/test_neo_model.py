"""The model beyond the golden numbers: positions of the head, several packs at once, a tied head."""

import torch

from neo_megatron.model.micro_batch import model_inputs


def test_the_head_runs_on_trained_positions_only(build, text_inputs):
    model = build()
    rows = []
    model.output_layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    nll = model(**text_inputs(list(range(32))), target_index=torch.tensor([4, 9]), targets=torch.tensor([5, 10]))
    assert rows == [2] and nll.shape == (2,)


def test_nothing_to_train_on_gives_an_empty_loss_and_zero_gradients(build, text_inputs):
    model = build()
    nothing = torch.zeros(0, dtype=torch.int64)
    model(**text_inputs([1, 2, 3, 4]), target_index=nothing, targets=nothing).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_packs_of_a_micro_batch_do_not_see_each_other(build):
    """Two packs with an image each: together they give what each gives alone."""
    model = build()
    draw = torch.Generator().manual_seed(0)
    length, image_tokens = 12, 4

    def pack() -> dict[str, torch.Tensor]:
        image = -torch.ones(length, dtype=torch.int32)
        start = int(torch.randint(1, length - image_tokens - 1, (), generator=draw))
        image[start : start + image_tokens] = 0
        positions = torch.randint(0, 2, (length, 3), generator=draw, dtype=torch.int32)
        return {
            "tokens": torch.randint(0, 64, (1, length), generator=draw),
            "positions_thw": positions[None],
            "document": torch.zeros(1, length, dtype=torch.int32),
            "image": image[None],
            "image_token_index": torch.arange(start, start + image_tokens),
            "patches": torch.randint(0, 256, (image_tokens, 4, 768), generator=draw, dtype=torch.uint8),
            "target_index": torch.tensor([2, length - 2]),
            "targets": torch.tensor([7, 8]),
        }

    first, second = pack(), pack()
    both = {name: torch.cat((first[name], second[name])) for name in first}
    both["image_token_index"][image_tokens:] += length
    both["target_index"][2:] += length
    losses = [model(**model_inputs(packs, first_stage=True, last_stage=True)) for packs in (first, second, both)]
    torch.testing.assert_close(torch.cat(losses[:2]), losses[2], atol=1e-6, rtol=0)


def test_images_are_split_between_sequence_parallel_ranks():
    packs = {
        "tokens": torch.zeros(2, 8, dtype=torch.int64),
        "positions_thw": torch.arange(48).view(2, 8, 3),
        "document": torch.zeros(2, 8),
        "image": torch.zeros(2, 8),
        "image_token_index": torch.tensor([2, 3, 4, 5, 14, 15]),  # tokens 2-5 of the first pack, 6 and 7 of the second
        "patches": torch.arange(6)[:, None, None],
    }
    parts = [model_inputs(packs, True, False, sequence_rank=rank, sequence_ranks=2) for rank in (0, 1)]
    assert [part["patches"].flatten().tolist() for part in parts] == [[0, 1], [2, 3, 4, 5]]
    # Rows of [token, pack]: token 2 of pack 0 is row 4 of the first half; token 6 of pack 1 is row 5 of the second.
    assert [part["image_token_index"].tolist() for part in parts] == [[4, 6], [0, 2, 5, 7]]
    assert parts[1]["image_token_position"].tolist() == [[13, 14], [16, 17], [43, 44], [46, 47]]
    assert "targets" not in parts[0]


def test_a_tied_head_is_the_embedding(build, text_inputs):
    model = build(tie_word_embeddings=True)
    assert "output_layer.weight" not in dict(model.named_parameters())
    logits = model(**text_inputs([1, 2, 3]))
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(0)
    assert logits.any() and not model(**text_inputs([1, 2, 3])).any()
