"""Tensors that may be missing start as in a new NEO and are listed; another type on request, and no overflow unseen."""

import json

import pytest
import torch
from safetensors.torch import load_file

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory, write_torch_dist

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
LAYERS = "language_model.model.layers."


def drop(*patterns):
    def change(tensors):
        for name in [name for name in tensors if any(pattern in name for pattern in patterns)]:
            del tensors[name]

    return change


def round_trip(source, tmp_path, tokenizer, **options):
    missing = convert_hf_to_megatron(source, tmp_path / "megatron", **options)
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer)
    return {name: str(start) for name, start in missing.items()}, load_file(tmp_path / "hf" / "model.safetensors")


def quarters_of_heads(projection, heads=4):
    """The published rule: per head the 1st and 3rd quarter of its rows, and both again."""
    by_head = []
    for head in projection.chunk(heads):
        first, _, third, _ = head.chunk(4)
        by_head += [first, third, first, third]
    return torch.cat(by_head)


def test_each_missing_tensor_is_listed_and_starts_as_in_a_new_neo(variant, golden, tokenizer, tmp_path):
    """Two pre-buffer layers, then the post-LLM."""
    source = variant(drop("_hw.", "_norm_h.", "lm_head", "dense_embedding.bias"))
    patterns = ["*_proj_hw.weight", "*_norm_h.weight", HEAD, "vision_model.*.bias"]
    listed, neo = round_trip(source, tmp_path, tokenizer, allow_missing=patterns)
    complete = load_file(golden / "ckpt_untied" / "model.safetensors")
    assert listed.keys() == complete.keys() - load_file(source / "model.safetensors").keys()
    attention = f"{LAYERS}3.self_attn."
    assert listed[f"{attention}q_proj_hw.weight"] == f"rows and columns of {attention}q_proj.weight"
    assert listed[f"{attention}k_proj_hw.weight"] == "all 0" and listed[f"{attention}q_norm_h.weight"] == "all 1"
    assert listed[f"{LAYERS}1.self_attn.k_proj_hw.weight"] == "drawn from N(0, 0.02)"
    assert listed[HEAD] == f"copy of {EMBEDDING}"
    assert listed["vision_model.embeddings.dense_embedding.bias"].startswith("drawn evenly from within 0.0")

    for name, tensor in complete.items():
        assert name in listed or torch.equal(neo[name], tensor), name
    assert torch.equal(neo[HEAD], neo[EMBEDDING])
    queries = neo[f"{attention}q_proj.weight"]
    assert torch.equal(neo[f"{attention}q_proj_hw.weight"], quarters_of_heads(queries))
    assert not neo[f"{attention}k_proj_hw.weight"].any() and (neo[f"{attention}q_norm_h.weight"] == 1).all()
    assert neo[f"{LAYERS}1.self_attn.k_proj_hw.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    again = tmp_path / "again"
    again.mkdir()
    assert all(
        torch.equal(neo[name], tensor)
        for name, tensor in round_trip(source, again, tokenizer, allow_missing=patterns)[1].items()
    )


def test_a_pattern_allows_only_the_tensors_that_it_matches(variant, tmp_path):
    source = variant(drop("layers.2.self_attn.q_norm_h", "layers.4.mlp.up_proj"))
    with pytest.raises(ValueError, match=f"lacks {LAYERS}4.mlp.up_proj.weight: "):
        convert_hf_to_megatron(source, tmp_path / "megatron", allow_missing=["*_norm_h.weight"])


def test_a_copy_of_a_missing_tensor_is_refused(variant, tmp_path):
    source = variant(drop("layers.4.self_attn.q_proj"))
    with pytest.raises(ValueError, match="q_proj_hw.weight starts as rows and columns of .* which is missing too"):
        convert_hf_to_megatron(source, tmp_path / "megatron", allow_missing=["*.q_proj*"])
    assert not (tmp_path / "megatron").exists()


def test_missing_tensors_of_a_megatron_checkpoint(golden, tokenizer, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    saved = TorchDistDirectory(tmp_path / "megatron")
    dropped = {"output_layer.weight", "decoder.layers.4.self_attention.linear_qk_hw.weight"}
    tensors = {key: saved.read(key) for key in saved.shapes if key not in dropped}
    part = tmp_path / "part"
    part.mkdir()
    stored = [StoredTensor(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    write_torch_dist(part, stored, tensors.values(), saved.common_state())
    with pytest.raises(ValueError, match="lacks decoder.layers.4.self_attention.linear_qk_hw.weight, output_layer"):
        convert_megatron_to_hf(part, tmp_path / "hf", tokenizer)
    patterns = ["output_layer.*", "*.linear_qk_hw.weight"]
    missing = convert_megatron_to_hf(part, tmp_path / "hf", tokenizer, allow_missing=patterns)
    attention = f"{LAYERS}4.self_attn."
    assert missing.keys() == {HEAD, f"{attention}q_proj_hw.weight", f"{attention}k_proj_hw.weight"}
    neo, complete = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", golden / "ckpt_untied"))
    assert all(torch.equal(neo[name], tensor) for name, tensor in complete.items() if name not in missing)
    assert torch.equal(neo[HEAD], neo[EMBEDDING]) and not neo[f"{attention}k_proj_hw.weight"].any()
    assert torch.equal(neo[f"{attention}q_proj_hw.weight"], quarters_of_heads(neo[f"{attention}q_proj.weight"]))


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_missing_tensors_of_a_qwen3_are_listed_by_their_names_in_the_neo(variant, tmp_path):
    source = variant(drop("layers.0.mlp.up_proj"), "qwen3_untied")
    options = {"pre_buffer_layers": 2, "patch_embedding_size": 32}
    with pytest.raises(ValueError, match="lacks model.layers.0.mlp.up_proj.weight"):
        init_from_qwen3(source, tmp_path / "neo", **options)
    missing = init_from_qwen3(source, tmp_path / "neo", **options, allow_missing=["model.layers.0.mlp.*"])
    name = f"{LAYERS}2.mlp.up_proj.weight"
    assert {name: str(start) for name, start in missing.items()} == {name: "drawn from N(0, 0.02)"}
    drawn = load_file(tmp_path / "neo" / "model.safetensors")[name]
    assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_a_copy_of_a_missing_tensor_of_a_qwen3_is_refused(variant, tmp_path):
    source = variant(drop("layers.1.self_attn.q_proj"), "qwen3_untied")
    with pytest.raises(ValueError, match="q_proj_hw.weight starts as rows and columns of .* which is missing too"):
        init_from_qwen3(source, tmp_path / "neo", 1, 32, allow_missing=["*.q_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_rounded_as_torch_rounds(golden, tokenizer, tmp_path, dtype):
    """Out of Megatron and into it give the same: every value rounded once."""
    source = golden / "ckpt_untied"
    expected = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    convert_hf_to_megatron(source, tmp_path / "complete")
    convert_megatron_to_hf(tmp_path / "complete", tmp_path / "out", tokenizer, dtype=dtype)
    _, through = round_trip(source, tmp_path, tokenizer, dtype=dtype)
    for actual in (load_file(tmp_path / "out" / "model.safetensors"), through):
        assert actual.keys() == expected.keys()
        assert all(actual[name].dtype == dtype and torch.equal(actual[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_a_neo_of_another_dtype_from_a_qwen3(golden, tmp_path):
    init_from_qwen3(golden / "qwen3_untied", tmp_path / "neo", 1, 32, dtype=torch.bfloat16)
    init_from_qwen3(golden / "qwen3_untied", tmp_path / "exact", 1, 32)
    neo, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("neo", "exact"))
    assert all(torch.equal(neo[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_an_overflow_names_the_tensor(variant, tmp_path):
    def blow_up(tensors):
        tensors[f"{LAYERS}1.mlp.up_proj.weight"][3, 4] = 1e5

    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: a value exceeds what torch.float16 can hold"):
        convert_hf_to_megatron(variant(blow_up), tmp_path / "megatron", dtype=torch.float16)
    assert not (tmp_path / "megatron").exists()


def test_parts_of_different_dtypes_need_one_dtype(variant, tokenizer, tmp_path):
    def halve(tensors):
        name = f"{LAYERS}1.self_attn.k_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    source = variant(halve)
    with pytest.raises(ValueError, match="differ in dtype: choose one with --dtype"):
        convert_hf_to_megatron(source, tmp_path / "megatron")
    expected = load_file(source / "model.safetensors")
    _, actual = round_trip(source, tmp_path, tokenizer, dtype=torch.float32)
    assert all(torch.equal(actual[name], tensor.float()) for name, tensor in expected.items())


def test_a_damaged_piece_is_not_exported(golden, tokenizer, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    file = tmp_path / "megatron" / "release" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(b"archive/data/0") + 2000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="__0_0.distcp: embedding.word_embeddings.weight: Bad CRC-32"):
        convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer)
    assert not (tmp_path / "hf").exists()
