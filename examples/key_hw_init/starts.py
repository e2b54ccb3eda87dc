"""Prepares the comparison: packs of the quickstart's images and texts, and a Qwen3 trained on the texts."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.model.mask import AttentionRule

ROOT = Path(__file__).parents[2]
PIXELS, VOCABULARY, SEQUENCE = 16384, 512, 256
TEXT_SHARE = 0.3
QWEN3_STEPS, PACKS_PER_STEP = 400, 8


def write_packs(scratch: Path) -> dict[str, Path]:
    """Packs of images and texts, 7 tokens to 3 as in stage 1, and of texts alone, for training and held out."""
    data, packs = (
        scratch / "data",
        {name: scratch / "packs" / name for name in ("mixed", "text-questions", "text-test")},
    )
    if all(path.exists() for path in packs.values()):
        return packs
    _python(
        "examples/quickstart/prepare_data.py",
        "--output",
        data,
        "--pixels",
        PIXELS,
        "--vocabulary",
        VOCABULARY,
        "--questions-per-sample",
        1,
    )
    registry = yaml.safe_load((data / "registry.yaml").read_text())
    for split in ("questions", "test"):
        name = f"text-{split}"
        path = data / f"{name}.json"
        path.write_text(json.dumps([_text_record(r) for r in json.loads((data / f"{split}.json").read_text())]))
        registry[name] = {**registry[split], "annotation_path": str(path.resolve())}
    (data / "registry.yaml").write_text(yaml.safe_dump(registry))
    for name in ("questions", "text-questions", "text-test"):
        _python(
            *("tools/preprocess_data.py", "--registry", data / "registry.yaml", "--datasets", name),
            *("--tokenizer", data / "tokenizer", "--output", scratch / "shards" / name, "--on-error", "fail"),
            *("--min-pixels", PIXELS, "--max-pixels", PIXELS, "--image-store", "encoded"),
        )
    images, text = (_pack(scratch, name, name) for name in ("questions", "text-questions"))
    share = 100 * images / text * TEXT_SHARE / (1 - TEXT_SHARE)
    _pack(scratch, "mixed", "questions", f"text-questions%{share:.0f}")
    _pack(scratch, "text-test", "text-test")
    return packs


def _pack(scratch: Path, name: str, *parts: str) -> int:
    """Packs shards; returns the tokens of the packs."""
    shards, packs = (scratch / "shards" / part for part in parts), scratch / "packs" / name
    _python("tools/pack_data.py", "--data", *shards, "--output", packs, "--seq-length", SEQUENCE)
    return json.loads((packs / "manifest.json").read_text())["counts"]["tokens"]


def _text_record(record: dict) -> dict:
    """A question about an image as a text-only task: to generate the question."""
    question, answer = (turn["value"] for turn in record["conversations"])
    return {
        "conversations": [
            {"from": "human", "value": answer},
            {"from": "gpt", "value": question.removeprefix("<image>\n")},
        ]
    }


def train_qwen3(scratch: Path, packs: dict[str, Path]) -> Path:
    """Trains a Qwen3 of the size of the quickstart's post-LLM on texts; returns it in Hugging Face form."""
    if (scratch / "qwen3").exists():
        return scratch / "qwen3"
    sizes = read_sizes(scratch / "data" / "model")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.post_llm_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            head_dim=sizes.head_dim,
            vocab_size=sizes.vocab_size,
            tie_word_embeddings=sizes.tie_word_embeddings,
            initializer_range=0.1,  # about 1/sqrt(hidden size), as in the quickstart
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, QWEN3_STEPS)
    dataset = PackDataset(packs["text-questions"], QWEN3_STEPS * PACKS_PER_STEP, seed=0, images="none")
    for step in range(QWEN3_STEPS):
        batch = collate([dataset[step * PACKS_PER_STEP + number] for number in range(PACKS_PER_STEP)])
        allowed = AttentionRule(batch["document"], batch["image"]).dense()[:, None]
        logits = model(
            batch["tokens"],
            attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf),
            position_ids=batch["positions_thw"][..., 0].long(),
        ).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[batch["target_index"]], batch["targets"], reduction="none"
        )
        loss = (nll * batch["target_weight"]).sum() / batch["target_weight"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"Qwen3 on texts: loss {loss.item():.3f} after {QWEN3_STEPS} steps", flush=True)
    model.save_pretrained(scratch / "qwen3")
    return scratch / "qwen3"


def _python(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
