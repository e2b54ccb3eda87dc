"""The packs of the ablations, and language models to put a pre-buffer in front of."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from arms import LAYERS
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.model.mask import AttentionRule

ROOT = Path(__file__).parents[2]
PIXELS, VOCABULARY, SEQUENCE, INIT_STD = 16384, 512, 256, 0.1  # as in the quickstart
PACKS = {"shapes": ("shapes",), "questions": ("questions", "shapes"), "test": ("test",), "texts": ("texts",)}
TEXT_STEPS, PACKS_PER_STEP = 400, 8


def write_packs(scratch: Path) -> None:
    """Packs of the quickstart's data sets, and of its training questions as texts, where they are not yet."""
    if (scratch / "packs" / "texts").exists():
        return
    data = scratch / "data"
    _python(
        *("examples/quickstart/prepare_data.py", "--output", data, "--pixels", PIXELS, "--vocabulary", VOCABULARY),
        *("--questions-per-sample", 1, "--attention-form", "separate"),
    )
    registry = yaml.safe_load((data / "registry.yaml").read_text())
    (data / "texts.json").write_text(json.dumps(texts(json.loads((data / "questions.json").read_text()))))
    registry["texts"] = {**registry["questions"], "annotation_path": "texts.json"}
    (data / "registry.yaml").write_text(yaml.safe_dump(registry))
    for name, parts in PACKS.items():
        shards, packs = scratch / "shards" / name, scratch / "packs" / name
        _python(
            *("tools/preprocess_data.py", "--registry", data / "registry.yaml", "--datasets", *parts),
            *("--tokenizer", data / "tokenizer", "--output", shards, "--image-store", "patches"),
            *("--min-pixels", PIXELS, "--max-pixels", PIXELS, "--records-per-shard", 2048, "--on-error", "fail"),
        )
        _python("tools/pack_data.py", "--data", shards, "--output", packs, "--seq-length", SEQUENCE)


def texts(records: Sequence[dict]) -> list[dict]:
    """Every question without its image, to be answered, and every answer, to be given its question."""
    made = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        question = question.removeprefix("<image>\n")
        for asked, given in ((question, answer), (answer, question)):
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": given}]
            made.append({"conversations": turns})
    return made


def write_start(scratch: Path, pre_buffer: int, seed: int) -> Path:
    """A NEO of `arms.LAYERS` layers in Hugging Face form: a pre-buffer in front of a language model.

    Its Megatron form is next to it, with `-megatron` after its name.
    """
    start = scratch / "starts" / f"{pre_buffer}-{seed}"
    if not start.with_name(start.name + "-megatron").exists():
        tokenizer = load_tokenizer(scratch / "data" / "tokenizer")
        qwen3 = train_qwen3(scratch, LAYERS - pre_buffer)
        init_from_qwen3(qwen3, start, pre_buffer, patch_embedding_size=64, tokenizer=tokenizer, seed=seed)
        _widen(start / "model.safetensors", pre_buffer)
        convert_hf_to_megatron(start, start.with_name(start.name + "-megatron"))
    return start


def _widen(weights: Path, pre_buffer: int) -> None:
    """Gives what is drawn at 0.02 the deviation of the quickstart: so small a model hardly learns from less."""
    tensors = load_file(weights)
    layers = tuple(f"language_model.model.layers.{layer}." for layer in range(pre_buffer))
    for name, tensor in tensors.items():
        if name.startswith(layers) and "norm" not in name:
            tensor *= INIT_STD / 0.02
    save_file(tensors, weights, metadata={"format": "pt"})


def train_qwen3(scratch: Path, layers: int) -> Path:
    """Trains a Qwen3 on texts; returns it in Hugging Face form."""
    directory = scratch / "qwen3" / str(layers)
    if directory.exists():
        return directory
    sizes = read_sizes(scratch / "data" / "model")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            head_dim=sizes.head_dim,
            vocab_size=sizes.vocab_size,
            tie_word_embeddings=False,
            initializer_range=INIT_STD,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEXT_STEPS)
    dataset = PackDataset(scratch / "packs" / "texts", TEXT_STEPS * PACKS_PER_STEP, seed=0, images="none")
    for step in range(TEXT_STEPS):
        batch = collate([dataset[step * PACKS_PER_STEP + number] for number in range(PACKS_PER_STEP)])
        allowed = AttentionRule(batch["document"], batch["image"]).dense()[:, None]
        hidden = model.model(
            batch["tokens"],
            attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf),
            position_ids=batch["positions_thw"][..., 0].long(),
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[batch["target_index"]])
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"language model on texts, layers {layers}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(directory)
    return directory


def _python(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
