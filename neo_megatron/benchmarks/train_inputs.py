"""Inputs of both sides of the training benchmark: a pack with three photographs, and random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.train_step import SEED
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import hf_shapes
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import NEO_TOKENS, add_neo_tokens, load_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.image import IMAGE_MEAN, IMAGE_STD
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.mask import AttentionRule

LENGTH, VOCABULARY = 1024, 1024
# About 190 tokens per image.
PIXELS = 448 * 448
# Together 1,005 tokens: 566 of images, 310 trained.
PHOTOS = (3, 5, 6)


def write_inputs(directory: Path, vocabulary: int) -> Path:
    """Writes ``packs/`` and, for this vocabulary, ``megatron-N/`` and its export ``hf-N/``; keeps existing ones."""
    if not (directory / "packs").exists():
        _write_packs(directory)
    megatron, exported = directory / f"megatron-{vocabulary}", directory / f"hf-{vocabulary}"
    if not exported.exists():
        tokenizer = load_tokenizer(directory / "tokenizer")
        sizes = NeoSizes(
            hidden_size=256,
            ffn_hidden_size=768,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=64,
            pre_buffer_layers=4,
            post_llm_layers=4,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
            patch_embedding_size=256,
            image_start_token_id=tokenizer.convert_tokens_to_ids("<img>"),
            image_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        random = directory / f"random-{vocabulary}"
        _write_random_weights(random, sizes)
        convert_hf_to_megatron(random, megatron)
        convert_megatron_to_hf(megatron, exported, tokenizer)
    return directory


def _write_packs(directory: Path) -> None:
    """Writes one pack of three records, with the functions that the commands call."""
    photos = write_photos(directory / "photos", count=8)
    records = [json.loads(line) for line in photos.read_text().splitlines()]
    _train_tokenizer(records).save_pretrained(directory / "tokenizer")
    chosen = directory / "photos" / "chosen.jsonl"
    chosen.write_text("".join(json.dumps(record) + "\n" for record in map(records.__getitem__, PHOTOS)))
    source = Source("photos", str(chosen), str(photos.parent))
    preprocess([source], directory / "tokenizer", directory / "shards", PreprocessConfig(max_pixels=PIXELS))
    write_packs([PackInput(str(directory / "shards"))], directory / "packs", LENGTH)
    _write_plain_pack(directory)


def _write_plain_pack(directory: Path) -> None:
    """The pack as the exported model takes it."""
    packs = collate([PackDataset(directory / "packs", 1, SEED)[0]])
    tokens, positions, image_index = packs["tokens"], packs["positions_thw"], packs["image_token_index"]
    labels, weight = torch.full_like(tokens, -100), torch.zeros(tokens.shape)
    labels[0, packs["target_index"] + 1] = packs["targets"]
    weight[0, packs["target_index"] + 1] = packs["target_weight"]
    mean, std = torch.tensor(IMAGE_MEAN)[:, None], torch.tensor(IMAGE_STD)[:, None]
    pixels = ((packs["patches"].unflatten(-1, (3, -1)) / 255 - mean) / std).flatten(2)
    rows, grids = [], []
    for image in packs["image"][0, image_index].unique():
        here = packs["image"][0, image_index] == image
        height, width = (positions[0, image_index[here], 1:].amax(dim=0) + 1).tolist()
        blocks = pixels[here].view(height, width, 2, 2, -1).transpose(1, 2)
        rows.append(blocks.reshape(-1, pixels.shape[-1]))
        grids.append((2 * height, 2 * width))
    save_file(
        {
            "input_ids": tokens,
            "positions_thw": positions.long(),
            "attention_mask": AttentionRule(packs["document"], packs["image"]).dense()[:, None],
            "pixel_values": torch.cat(rows),
            "grid_hw": torch.tensor(grids),
            "labels": labels,
            "loss_weight": weight,
        },
        directory / "plain.safetensors",
    )


def _train_tokenizer(records: list[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most `VOCABULARY` tokens, NEO's control tokens among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(NEO_TOKENS),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["value"] for record in records for turn in record["conversations"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    add_neo_tokens(fast)
    return fast


def _write_random_weights(directory: Path, sizes: NeoSizes) -> None:
    """Writes weights in the published form: ones for norms, N(0, 0.02) for everything else."""
    torch.manual_seed(0)
    weights = {
        name: torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape)
        for name, shape in hf_shapes(sizes).items()
    }
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(sizes.to_hf()))
