"""From Qwen3 to NEO: what the rules fix is bit-equal to the published code, the rest is drawn as they say."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.checkpoint.names import hf_shapes
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.hf.modeling_neo import NEOChatModel

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
STEM = "vision_model.embeddings."


def initialised(source, output, **arguments) -> dict[str, torch.Tensor]:
    init_from_qwen3(source, output, **{"pre_buffer_layers": 2, "patch_embedding_size": 32, **arguments})
    return load_file(output / "model.safetensors")


@pytest.fixture
def qwen3(golden):
    return golden / "qwen3_untied"


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_the_fixed_part_is_the_published_one(golden, qwen3, tmp_path):
    neo = initialised(qwen3, tmp_path / "neo")
    expected = load_file(golden / "init_untied_expected.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(neo.pop("language_model." + name), tensor), name
    drawn = json.loads((golden / "init_report.json").read_text())["untied"]["prebuffer"]
    stem = {f"{STEM}{part}_embedding.{kind}" for part in ("patch", "dense") for kind in ("weight", "bias")}
    assert neo.keys() == {"language_model." + name for name in drawn} | stem
    for name, report in drawn.items():
        tensor = neo["language_model." + name]
        assert list(tensor.shape) == report["shape"]
        if report["std"] == 0:
            assert (tensor == report["mean"]).all(), name
        else:  # five standard errors of a sample of this size
            assert tensor.std().item() == pytest.approx(0.02, abs=5 * 0.02 / math.sqrt(2 * tensor.numel())), name
            assert abs(tensor.mean().item()) < 5 * 0.02 / math.sqrt(tensor.numel()), name


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_the_patch_embedding_is_drawn_as_a_convolution(qwen3, tmp_path):
    """PyTorch: uniform within 1/sqrt(fan_in), weight and bias."""
    neo = initialised(qwen3, tmp_path / "neo")
    for part, fan_in in (("patch", 3 * 16 * 16), ("dense", 32 * 2 * 2)):
        weight, bias = neo[f"{STEM}{part}_embedding.weight"], neo[f"{STEM}{part}_embedding.bias"]
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < weight.abs().max() <= bound and 0.7 * bound < bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_the_seed_decides_what_is_drawn(qwen3, tmp_path):
    first = initialised(qwen3, tmp_path / "first", seed=7)
    same = initialised(qwen3, tmp_path / "same", seed=7)
    other = initialised(qwen3, tmp_path / "other", seed=8)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])


def drop_head(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.filterwarnings("ignore:no tokenizer given")
@pytest.mark.parametrize("tied", [True, False])
def test_a_missing_head_is_the_embedding(variant, tmp_path, tied):
    neo = initialised(variant(drop_head, "qwen3_untied", tie_word_embeddings=tied), tmp_path / "neo")
    assert read_sizes(tmp_path / "neo").tie_word_embeddings == tied
    assert (HEAD in neo) == (not tied)
    if not tied:
        assert torch.equal(neo[HEAD], neo[EMBEDDING])


@pytest.mark.filterwarnings("ignore:no tokenizer given")
@pytest.mark.parametrize("rows", [1000, 1030])
def test_the_vocabulary_is_cut_or_gets_zero_rows(qwen3, tmp_path, rows):
    neo, old = initialised(qwen3, tmp_path / "neo", vocab_size=rows), load_file(qwen3 / "model.safetensors")
    for name in (HEAD, EMBEDDING):
        before = old[name.removeprefix("language_model.")]
        assert len(neo[name]) == rows
        assert torch.equal(neo[name][:1024], before[:rows])
        assert not neo[name][1024:].any()
    assert read_sizes(tmp_path / "neo").vocab_size == rows


def test_the_tokenizer_comes_along(qwen3, variant, tokenizer, tmp_path):
    """909 tokens with NEO's: 1024 rows stay; 905 rows grow to a number that tensor parallelism divides."""
    initialised(qwen3, tmp_path / "neo", tokenizer=tokenizer)
    sizes = read_sizes(tmp_path / "neo")
    assert (sizes.vocab_size, sizes.image_context_token_id, sizes.image_start_token_id) == (1024, 896, 897)
    added = json.loads((tmp_path / "neo" / "tokenizer.json").read_text())["added_tokens"]
    assert ("<IMG_CONTEXT>", 896) in [(token["content"], token["id"]) for token in added]

    def cut(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:905].clone()

    neo = initialised(variant(cut, "qwen3_untied", vocab_size=905), tmp_path / "grown", tokenizer=tokenizer)
    assert len(neo[EMBEDDING]) == len(neo[HEAD]) == 1024 and not neo[EMBEDDING][905:].any()
    with pytest.raises(ValueError, match="909 tokens, the model has 900"):
        initialised(qwen3, tmp_path / "small", tokenizer=tokenizer, vocab_size=900)


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_the_stored_dtype_stays(variant, tmp_path):
    def to_bfloat16(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    neo = initialised(variant(to_bfloat16, "qwen3_untied"), tmp_path / "neo")
    assert {tensor.dtype for tensor in neo.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "neo" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {name: tuple(t.shape) for name, t in neo.items()} == hf_shapes(read_sizes(tmp_path / "neo"))


def test_without_a_tokenizer_it_says_which_ids_it_takes(qwen3, tmp_path):
    with pytest.warns(UserWarning, match="151669 and 151670"):
        initialised(qwen3, tmp_path / "neo")


@pytest.mark.filterwarnings("ignore:no tokenizer given")
@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"model_type": "qwen2"}, "has the model_type 'qwen2'"),
        ({"attention_bias": True}, "sets attention_bias"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
        ({"intermediate_size": 97}, r"down_proj.weight of shape \[64, 96\] instead of \[64, 97\]"),
    ],
)
def test_only_a_complete_plain_qwen3_is_accepted(variant, tmp_path, keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialised(variant(source="qwen3_untied", **keys), tmp_path / "neo")
    assert not (tmp_path / "neo").exists()


@pytest.mark.filterwarnings("ignore:no tokenizer given")
@pytest.mark.parametrize(
    "key, value",
    [("hidden_size", "64"), ("num_key_value_heads", 0), ("rope_theta", None), ("num_hidden_layers", 10**9)],
)
def test_an_invalid_size_is_refused_in_one_sentence(variant, tmp_path, key, value):
    with pytest.raises(ValueError, match="must be a|out of range: give"):
        initialised(variant(source="qwen3_untied", **{key: value}), tmp_path / "neo")


@pytest.mark.parametrize(
    "asked",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        {"hidden_act": "gelu"},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
)
def test_unsupported_settings_of_qwen3_are_refused(variant, tmp_path, asked):
    with pytest.raises(ValueError, match=f"config.json sets {next(iter(asked))} to .*plain Qwen3"):
        initialised(variant(source="qwen3_untied", **asked), tmp_path / "neo")


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_every_tensor_keeps_its_dtype_and_new_ones_get_the_commonest(variant, tmp_path):
    """As some Qwen3s are stored: matrices in bfloat16, norms in float32."""

    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.dim() > 1})

    source = variant(halve, "qwen3_untied")
    neo, old = initialised(source, tmp_path / "neo"), load_file(source / "model.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"):
        kept = neo[f"language_model.{name}".replace("layers.0", "layers.2")]
        assert kept.dtype == old[name].dtype and torch.equal(kept, old[name])
    assert neo["language_model.model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:no tokenizer given")
@pytest.mark.parametrize("pre_buffer_layers", [0, 2])
def test_a_qwen3_moe_keeps_its_experts(qwen3_moe, tmp_path, pre_buffer_layers):
    """Without a pre-buffer the NEO computes on text what the Qwen3-MoE did; a pre-buffer has experts as well."""
    directory, model = qwen3_moe
    neo = initialised(directory, tmp_path / "neo", pre_buffer_layers=pre_buffer_layers, vocab_size=1024)
    sizes = read_sizes(tmp_path / "neo")
    assert (sizes.num_experts, sizes.experts_per_token, sizes.expert_ffn_hidden_size) == (8, 2, 48)
    source = load_file(directory / "model.safetensors")
    for name in ("mlp.gate.weight", "mlp.experts.5.down_proj.weight", "self_attn.k_norm.weight"):
        new = f"language_model.model.layers.{pre_buffer_layers + 1}.{name}"
        assert torch.equal(neo[new], source[f"model.layers.1.{name}"]), name
    if pre_buffer_layers:
        assert neo["language_model.model.layers.0.mlp.experts.7.up_proj.weight"].std() > 0.01
        return
    convert_hf_to_megatron(tmp_path / "neo", tmp_path / "megatron")  # complete in the other form, too
    ours = NEOChatModel.from_pretrained(tmp_path / "neo", dtype=torch.float32).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_in_head_channels_are_those_of_qwen3(qwen3, tmp_path):
    """Every channel is kept, in pairs that rotate as they did: t has every other frequency."""
    neo = initialised(qwen3, tmp_path / "neo", attention_form="in-head")
    source = load_file(qwen3 / "model.safetensors")
    d, layer = 32, "language_model.model.layers.3.self_attn."
    for part, heads in (("q", 4), ("k", 2)):
        weight = source[f"model.layers.1.self_attn.{part}_proj.weight"].view(heads, d, -1)
        norm = source[f"model.layers.1.self_attn.{part}_norm.weight"]
        ours = neo[f"{layer}{part}_proj.weight"].view(heads, d, -1)
        ours_norm = torch.cat([neo[f"{layer}{part}_norm{axes}.weight"] for axes in ("", "_hw")])
        order = [int((weight[0] == row).all(dim=1).nonzero()) for row in ours[0]]
        assert sorted(order) == list(range(d))
        assert torch.equal(ours, weight[:, order]) and torch.equal(ours_norm, norm[order])
        # Qwen3 rotates i with i + d/2 by theta^(-2i/d), NEO's t half j with j + d/4 by theta^(-2j/(d/2)).
        for j in range(d // 4):
            assert order[j] == 2 * j and order[j + d // 4] == order[j] + d // 2
        # h and w have d/4 channels each, again in pairs of two halves.
        for start in (d // 2, 3 * d // 4):
            for j in range(d // 8):
                assert order[start + j + d // 8] == order[start + j] + d // 2
    for part in ("v", "o"):
        assert torch.equal(neo[f"{layer}{part}_proj.weight"], source[f"model.layers.1.self_attn.{part}_proj.weight"])
    assert read_sizes(tmp_path / "neo").attention_form == "in-head"


@pytest.mark.filterwarnings("ignore:no tokenizer given")
def test_zero_norms_are_for_keys_of_their_own(qwen3, tmp_path):
    with pytest.raises(
        ValueError, match="--key-hw-init zero-norm: the attention form in-head has no keys of their own"
    ):
        initialised(qwen3, tmp_path / "neo", attention_form="in-head", key_hw_init="zero-norm")
