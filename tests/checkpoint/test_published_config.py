"""Every published form of `config.json` loads; missing and wrong values are corrected from the tensors, with a note."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.checkpoint.names import LM_HEAD, hf_shapes
from neo_megatron.checkpoint.neo_directory import open_neo, read_sizes
from neo_megatron.checkpoint.published_config import complete_config
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.model.config import NeoSizes


@pytest.fixture
def checkpoint(golden, tmp_path):
    """The golden checkpoint with another configuration: ``edit`` changes it in place, the tensors stay."""

    def make(edit) -> Path:
        directory = tmp_path / "checkpoint"
        shutil.copytree(golden / "ckpt_untied", directory)
        config = json.loads((directory / "config.json").read_text())
        edit(config)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture
def expected(golden) -> NeoSizes:
    return read_sizes(golden / "ckpt_untied")


def wrap_numbers(config):
    for part in (config["vision_config"], config["llm_config"]):
        part.update({key: [value] for key, value in part.items() if isinstance(value, int | float)})
    config.update({key: [config[key]] for key in ("img_start_token_id", "img_context_token_id")})


def without_layer_types(config):
    del config["llm_config"]["layer_types"]


def as_transformers_5_writes_it(config):
    llm = config["llm_config"]
    llm["rope_parameters"] = {"rope_type": "default", "rope_theta": llm.pop("rope_theta")}


@pytest.mark.parametrize("edit", [wrap_numbers, without_layer_types, as_transformers_5_writes_it])
def test_every_form_is_the_same_model(checkpoint, expected, edit):
    neo = open_neo(checkpoint(edit))
    assert neo.sizes == expected and not neo.said


def test_a_mislabelled_checkpoint_is_recognised_by_its_tensors(checkpoint, expected, tokenizer, tmp_path):
    """As users report of a released stage-1 checkpoint: declared as an InternVL, with code that is not there."""

    def edit(config):
        config["model_type"] = "internvl_chat"
        config["architectures"] = ["InternVLChatModel"]
        config["auto_map"] = {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoTokenizer": "somebody/else--tokenization_else.Tokenizer",
        }

    directory = checkpoint(edit)
    with pytest.warns(UserWarning) as said:
        convert_hf_to_megatron(directory, tmp_path / "megatron")
    sentences = " ".join(str(warning.message) for warning in said)
    assert "model_type is 'internvl_chat', but the tensors are a NEO's" in sentences
    assert "auto_map names configuration_internvl_chat.py, modeling_internvl_chat.py, not there" in sentences
    assert "tokenization_else" not in sentences
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer)
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["model_type"] == "neo_chat" and NeoSizes.from_hf(exported) == expected
    tensors = [load_file(path / "model.safetensors") for path in (directory, tmp_path / "hf")]
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


def test_sizes_missing_in_the_config_come_from_the_tensors(checkpoint, expected):
    def edit(config):
        for part, kept in (("llm_config", ("extra_num_layers",)), ("vision_config", ("min_pixels", "max_pixels"))):
            config[part] = {key: config[part][key] for key in kept}
        del config["tie_word_embeddings"]

    neo = open_neo(checkpoint(edit))
    assert neo.sizes == expected
    assert "head_dim is missing: 32, as in the tensors" in neo.said
    assert "num_hidden_layers is missing: 5, as in the tensors" in neo.said
    assert "downsample_ratio is missing: 0.5, as in the tensors" in neo.said
    assert "rope_theta_hw is missing: 10000.0, as in the published models" in neo.said
    assert "tie_word_embeddings is missing: False, as in the tensors" in neo.said


@pytest.mark.parametrize(
    "named, extra, layers, sentence",
    [
        (3, None, (2, 3), "extra_num_layers is missing: 2, as num_hidden_layers is 3 of 5 layers"),
        (3, 2, (2, 3), "num_hidden_layers is 3, without the pre-buffer: 5, as in the tensors"),
        (5, None, (0, 5), "extra_num_layers is missing: 0, so all layers count as post-LLM"),
    ],
)
def test_layers_are_counted_in_the_tensors(checkpoint, named, extra, layers, sentence):
    def edit(config):
        config["llm_config"] |= {"num_hidden_layers": named, "extra_num_layers": extra}

    neo = open_neo(checkpoint(edit))
    assert (neo.sizes.pre_buffer_layers, neo.sizes.post_llm_layers) == layers
    assert len(neo.said) == 1 and neo.said[0].startswith(sentence)


@pytest.mark.parametrize("name", ["neo-2b", "neo-9b"])
def test_the_published_models_need_no_count_of_the_pre_buffer(name, tmp_path):
    sizes = sizes_of(name)
    config = sizes.to_hf()
    del config["llm_config"]["extra_num_layers"]
    completed, said = complete_config(config, hf_shapes(sizes), tmp_path)
    assert NeoSizes.from_hf(completed) == sizes
    assert [sentence for sentence in said if "as in the published model of these sizes" in sentence]


def without_ids(config):
    del config["img_start_token_id"], config["img_context_token_id"]


@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_ids_of_image_tokens_come_from_the_tokenizer(checkpoint, tokenizer, expected, kept):
    """Any of the files in which tokenizers of transformers 4 and 5 say what was added to them."""
    directory = checkpoint(without_ids)
    added = {token: number for number, token in tokenizer.added_tokens_decoder.items()}
    tokenizer.save_pretrained(directory)
    (directory / "added_tokens.json").write_text(json.dumps({str(token): number for token, number in added.items()}))
    decoder = {str(number): {"content": str(token)} for token, number in added.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    for path in directory.glob("*token*"):
        if path.name != kept:
            path.unlink()
    neo = open_neo(directory)
    assert neo.sizes == expected
    assert "img_start_token_id is missing: 897, as in the tokenizer" in neo.said


def test_without_a_tokenizer_the_ids_are_those_of_qwen3_or_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="config.json lacks img_start_token_id, and no tokenizer there knows <img>"):
        open_neo(checkpoint(without_ids))  # 1,024 rows do not hold Qwen3's ids
    sizes = sizes_of("neo-2b")
    config = sizes.to_hf()
    without_ids(config)
    completed, said = complete_config(config, hf_shapes(sizes), tmp_path)
    assert (completed["img_start_token_id"], completed["img_context_token_id"]) == (151670, 151669)
    assert "img_start_token_id is missing: 151670, as on Qwen3's tokenizer" in said


def test_tying_stated_by_the_decoder_alone(variant, golden):
    """The default of the model's configuration in transformers."""
    llm = json.loads((golden / "ckpt_untied" / "config.json").read_text())["llm_config"]
    directory = variant(lambda tensors: tensors.pop(LM_HEAD), llm_config={**llm, "tie_word_embeddings": True})
    neo = open_neo(directory)
    assert neo.sizes.tie_word_embeddings and "there is no head: read as True" in neo.said[0]


@pytest.mark.parametrize(
    "asked",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"use_sliding_window": True},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
    ],
)
def test_unsupported_settings_are_refused(checkpoint, asked):
    directory = checkpoint(lambda config: config["llm_config"].update(asked))
    with pytest.raises(ValueError, match=f"llm_config sets {next(iter(asked))} to .*plain Qwen3"):
        open_neo(directory)


def test_a_run_takes_the_sizes_of_any_form(checkpoint, expected):
    """`--neo-model DIR`, with weights next to the configuration or without."""

    def edit(config):
        del config["llm_config"]["head_dim"]

    directory = checkpoint(edit)
    assert sizes_of(str(directory)) == expected
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="key 'head_dim' is missing"):
        sizes_of(str(directory))


@pytest.mark.parametrize(
    "part, key, value, sentence",
    [
        ("llm_config", "num_hidden_layers", "5", "num_hidden_layers in llm_config is '5'"),
        ("llm_config", "rope_parameters", 3, "rope_parameters in llm_config is 3"),
        ("llm_config", "num_key_value_heads", 0, "num_query_groups is 0: it must be a whole number"),
        ("llm_config", "head_dim", 32.5, "head_dim is 32.5: it must be a whole number"),
        ("llm_config", "rms_norm_eps", float("nan"), "norm_epsilon is nan: it must be a positive number below 1"),
        ("llm_config", "rms_norm_eps", 10**38, "it must be a positive number below 1"),
        ("llm_config", "rope_theta", 10**38, "it must be a positive number below 1e.18"),
        ("llm_config", "num_hidden_layers", 10**9, "1000000000 layers are out of range: give 1 to"),
        ("vision_config", "downsample_ratio", 0, "a size in it is not a number"),
        ("vision_config", "rope_theta_vision", "ten", "a size in it is not a number"),
    ],
)
def test_an_impossible_value_is_one_sentence_with_the_file(checkpoint, part, key, value, sentence):
    """Nor is memory taken for as many layers as a broken file says."""
    directory = checkpoint(lambda config: config[part].update({key: value}))
    with pytest.raises(ValueError, match=f"{directory}/config.json: .*{sentence}"):
        open_neo(directory)


@pytest.mark.parametrize(
    "name, contents",
    [
        ("tokenizer.json", {"added_tokens": ["<img>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "<img>"}}}),
        ("added_tokens.json", {"<img>": None}),
    ],
)
def test_invalid_added_tokens_are_one_sentence_with_the_file(checkpoint, name, contents):
    directory = checkpoint(without_ids)
    (directory / name).write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"{directory}/{name}: its added tokens are not a list of words and ids"):
        open_neo(directory)


def test_another_model_is_refused(golden):
    with pytest.raises(ValueError, match="checkpoint of a Qwen3, not a NEO .*qwen3-to-neo"):
        open_neo(golden / "qwen3_untied")


def test_a_wrong_size_is_an_error_and_not_corrected(checkpoint):
    def edit(config):
        config["llm_config"]["intermediate_size"] = 128

    with pytest.raises(ValueError, match=r"gate_proj.weight of shape \[96, 64\] instead of \[128, 64\]"):
        open_neo(checkpoint(edit))


def quantised(config):
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}


def of_another_template(config):
    config["template"] = "internvl2_5"


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (quantised, r"has a quantization_config \(awq\): this is a quantised checkpoint"),
        (of_another_template, "has the template 'internvl2_5', and NEO knows 'neo1_0'"),
    ],
)
def test_another_kind_of_checkpoint_is_named(checkpoint, tmp_path, edit, sentence):
    directory = checkpoint(edit)
    with pytest.raises(ValueError, match=f"{directory}/config.json {sentence}"):
        convert_hf_to_megatron(directory, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


UNIFY = GOLDEN / "u1" / "dense"


def test_a_neo_unify_is_told_apart_by_its_tensors():
    """Its model_type and architecture are those of NEO 1.0; its generation branch is left out, and said so."""
    neo = open_neo(UNIFY)
    assert neo.sizes.attention_form == "in-head" and neo.sizes.head_dim == 32 and neo.sizes.num_layers == 5
    assert any("so this is a NEO-unify (SenseNova-U1), not a NEO 1.0" in sentence for sentence in neo.said)
    branch = [name for name in neo.source.shapes if "mot_gen" in name or "fm_modules" in name]
    assert f"the {len(branch)} tensors of the generation branch are left out" in neo.said and len(branch) > 50


@pytest.mark.parametrize(("form", "other"), [("separate", "in-head"), ("in-head", "separate")])
def test_a_form_that_the_tensors_do_not_have_is_refused(golden, tmp_path, form, other):
    source = UNIFY if form == "in-head" else golden / "ckpt_untied"
    directory = shutil.copytree(source, tmp_path / "checkpoint", copy_function=shutil.copyfile)
    config = json.loads((directory / "config.json").read_text())
    config["llm_config"]["attention_form"] = other
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"attention_form is '{other}', but the tensors have .*: write '{form}'"):
        open_neo(directory)


def test_a_configuration_of_a_neo_unify_with_the_tensors_of_a_neo_is_read_by_its_tensors(checkpoint):
    neo = open_neo(checkpoint(lambda config: config.update(fm_head_dim=1536)))
    assert neo.sizes.attention_form == "separate"
    assert (
        "fm_head_dim belongs to a NEO-unify (SenseNova-U1), but the tensors are those of a NEO 1.0: ignored" in neo.said
    )


@pytest.mark.parametrize("lacking", ["q_norm_hw", "k_proj"])
def test_a_neo_unify_that_lacks_a_tensor_is_refused(tmp_path, lacking):
    directory = shutil.copytree(UNIFY, tmp_path / "checkpoint", copy_function=shutil.copyfile)
    tensors = load_file(directory / "model.safetensors")
    name = f"language_model.model.layers.3.self_attn.{lacking}.weight"
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        open_neo(directory)


@pytest.fixture
def unify(tmp_path):
    """A published NEO-unify with another configuration: ``edit`` changes it in place, the tensors stay."""

    def make(kind: str, edit) -> Path:
        directory = shutil.copytree(GOLDEN / "u1" / kind, tmp_path / "unify", copy_function=shutil.copyfile)
        config = json.loads((directory / "config.json").read_text())
        edit(config["llm_config"], config)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def without_rotation(llm, config):
    del llm["rope_theta"], llm["rope_theta_hw"], llm["max_position_embeddings"]


def rotation_in_a_dictionary(llm, config):
    llm["rope_parameters"] = {"rope_type": "default", "rope_theta": llm["rope_theta"]}
    llm["rope_theta"] = None


def one_expert_of_a_qwen3(llm, config):
    llm["num_experts"] = 1


def experts_of_another_model(llm, config):
    llm |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "model_type": "qwen3_moe"}


def head_tied_at_the_top(llm, config):
    config["tie_word_embeddings"] = True


def limits_at_the_top(llm, config):
    config["max_pixels"] = 2**24


def experts_uncounted(llm, config):
    del llm["num_experts"], llm["moe_intermediate_size"]


def experts_as_transformers_5_names_them(llm, config):
    llm["num_local_experts"] = llm.pop("num_experts")


@pytest.mark.parametrize(
    ("kind", "edit", "sentence"),
    [
        ("dense", without_rotation, "rope_theta is missing: 5000000.0, as in the published models"),
        ("moe", without_rotation, "rope_theta is missing: 10000000.0, as in the published models"),
        ("dense", rotation_in_a_dictionary, None),
        ("dense", one_expert_of_a_qwen3, "num_experts is 1, but the tensors have no experts: read as a dense model"),
        ("dense", experts_of_another_model, "num_experts is 8, but the tensors have no experts: read as a dense model"),
        ("dense", head_tied_at_the_top, "a NEO-unify has it in llm_config: read as False"),
        ("dense", limits_at_the_top, "max_pixels is 16777216 at the top of config.json: read as 65536"),
        ("moe", experts_uncounted, "num_experts is missing: 8, as in the tensors"),
        ("moe", experts_as_transformers_5_names_them, None),
    ],
)
def test_any_configuration_of_a_neo_unify_is_that_of_its_tensors(unify, kind, edit, sentence):
    published = open_neo(GOLDEN / "u1" / kind)
    neo = open_neo(unify(kind, edit))
    assert neo.sizes == published.sizes
    added = [said for said in neo.said if said not in published.said]
    assert bool(added) == bool(sentence) and any(sentence in said for said in added) == bool(sentence)


def test_experts_are_normalised_only_where_the_configuration_says_so(unify):
    """The default of a Qwen3-MoE, which no published model has."""
    neo = open_neo(unify("moe", lambda llm, config: llm.pop("norm_topk_prob")))
    assert not neo.sizes.norm_topk_prob
    assert "norm_topk_prob is missing: False, as by default in a Qwen3-MoE" in neo.said


def test_two_rotary_bases_are_refused(unify):
    directory = unify("dense", lambda llm, config: llm.update(rope_parameters={"rope_theta": 1e6}))
    with pytest.raises(ValueError, match=r"rope_theta 5000000.0 and, in rope_parameters, 1000000.0: delete the wrong"):
        open_neo(directory)


def test_a_qwen3_that_counts_one_expert_is_dense():
    config = sizes_of("neo-2b").to_hf()
    config["llm_config"]["num_experts"] = 1
    assert NeoSizes.from_hf(config) == sizes_of("neo-2b")
    alone = sizes_of("u1-a3b").replace(num_experts=1, experts_per_token=1)
    assert NeoSizes.from_hf(alone.to_hf()) == alone
