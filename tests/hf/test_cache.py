"""The cache of `generate()`: used in every version of transformers, under its name of it, or an error says why not."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, StaticCache

from neo_megatron.hf.modeling_neo import NEOChatModel

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 870, "eos_token_id": 1023}
# transformers 5.24 renamed it.
NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@pytest.fixture
def computed(model):
    """How many tokens every forward computes."""
    lengths: list[int] = []
    hook = model.language_model.get_decoder().register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    yield lengths
    hook.remove()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_every_token_is_computed_once(model, document, computed, settings):
    model.generate(**document, **(GREEDY | {"min_new_tokens": 12} | settings))
    assert computed == [document["input_ids"].shape[1]] + [1] * 11


def test_without_a_cache_all_tokens_are_computed_again(model, document, computed):
    model.generate(**document, **GREEDY, min_new_tokens=12, use_cache=False)
    length = document["input_ids"].shape[1]
    assert computed == list(range(length, length + 12))


def test_the_name_of_the_cache(model, document, monkeypatch):
    """This version of transformers passes it under the name that the other tests say it has."""
    passed = set()

    def prepare(input_ids, **kwargs):
        passed.update(name for name in ("cache", "past_key_values") if kwargs.get(name) is not None)
        return NEOChatModel.prepare_inputs_for_generation(model, input_ids, **kwargs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare)
    monkeypatch.setattr(model, "_validate_model_kwargs", lambda kwargs: None)
    model.generate(**document, **GREEDY)
    assert passed == {NAME}


@torch.no_grad()
def test_both_names_of_the_cache_work(model, document):
    """Of the argument, in every version; and an output has what this version and those before call it."""
    ids, images = document["input_ids"], {key: document[key] for key in ("pixel_values", "grid_hw")}
    logits, answer = model(**document).logits[:, 60:], model.generate(**document, **GREEDY)
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :60], **images, use_cache=True)
        assert torch.equal(model.generate(**document, **GREEDY, **{name: first.past_key_values}), answer)
        first = model(ids[:, :60], **images, use_cache=True)
        assert first[NAME] is first.past_key_values
        rest = model(ids[:, 60:], **{name: first.past_key_values})
        torch.testing.assert_close(rest.logits, logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, **images, cache=transformers.DynamicCache(), past_key_values=transformers.DynamicCache())


def test_a_cache_under_an_unknown_name_is_an_error(model, document, monkeypatch):
    """As 5.24 was to the code before it: generation went on without a cache, and said nothing."""

    def prepare(input_ids, **kwargs):
        if NAME in kwargs:
            kwargs["kv_store"] = kwargs.pop(NAME)
        return NEOChatModel.prepare_inputs_for_generation(model, input_ids, **kwargs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare)
    monkeypatch.setattr(model, "_validate_model_kwargs", lambda kwargs: None)
    with pytest.raises(TypeError, match="generate.. got kv_store, which NEO does not take"):
        model.generate(**document, **GREEDY)


def test_a_transformers_that_passes_no_cache_is_an_error(model, document):
    """`forward` makes the cache of the first step where a version gives none; the second step must have it."""
    length = document["input_ids"].shape[1]
    assert model.prepare_inputs_for_generation(**document, use_cache=True, prompt_length=length)["use_cache"]
    with pytest.raises(RuntimeError, match="hands no cache to NEO.* 4.57 to 5.24"):
        model.prepare_inputs_for_generation(**document, use_cache=True, prompt_length=length - 1)
    trained = copy.deepcopy(model).train()
    assert trained(**document, use_cache=True).past_key_values.get_seq_length() == length
    assert trained(**document).past_key_values is None
    trained.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="allows no cache: pass use_cache=False"):
        trained(**document, use_cache=True)
    with torch.no_grad():
        assert trained(**document, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_static_caches_are_refused(model, document, kind):
    with pytest.raises(ValueError, match="leave cache_implementation unset"):
        model.generate(**document, max_new_tokens=2, cache_implementation=kind)


def test_a_static_cache_given_by_the_user_is_refused(model, document):
    cache = StaticCache(config=model.config.llm_config, max_cache_len=200)
    with pytest.raises(ValueError, match="leave cache_implementation unset"):
        model(**document, past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values is a tuple: pass a DynamicCache"):
        model(**document, past_key_values=())


def test_continuous_batching_is_refused(model, document):
    with pytest.raises(NotImplementedError, match="NEO has no continuous batching"):
        model.generate_batch([document["input_ids"][0].tolist()], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_a_prompt_in_chunks_is_refused(model, document, how):
    settings = {"prefill_chunk_size": 16, "max_new_tokens": 2}
    given = settings if how == "argument" else {"generation_config": GenerationConfig(**settings)}
    with pytest.raises(ValueError, match="its images must not be cut: leave prefill_chunk_size unset"):
        model.generate(**document, **given)


def test_only_the_new_tokens_are_refused(model, document):
    """`generate` needs all tokens, as positions follow from them."""
    ids = document["input_ids"]
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    cache = model(ids[:, :60], **images, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="42 tokens over a cache of 60: pass all tokens"):
        model.generate(ids[:, 60:], past_key_values=cache, **GREEDY)


@pytest.fixture(scope="module")
def draft(model):
    """A model that often agrees with the other, and often does not."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * parameter.std() * noise
    return other


@torch.no_grad()
def test_a_draft_model_changes_no_token(model, draft, document, computed):
    """It looks at the images itself; if it is not a NEO, it has the tokens alone."""
    settings = GREEDY | {"max_new_tokens": 30}
    expected = model.generate(**document, **settings).tolist()
    assert draft.generate(**document, **settings).tolist() != expected
    config = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config, **heads)).eval()
    for assistant, fewer in ((draft, True), (qwen3, False)):
        computed.clear()
        assert model.generate(**document, **settings, assistant_model=assistant).tolist() == expected
        assert (len(computed) < 30) or not fewer


@torch.no_grad()
def test_a_draft_may_copy_image_tokens_of_the_prompt(model, document, computed):
    """The prompt ends as it begins, so that what is looked up goes on with its first image."""
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    ids = torch.cat([document["input_ids"], document["input_ids"][:, :8]], dim=1)
    expected = model.generate(ids, **images, **GREEDY).tolist()
    computed.clear()
    assert model.generate(ids, **images, **GREEDY, prompt_lookup_num_tokens=12).tolist() == expected
    assert computed[0] == ids.shape[1] + 12
    assert (document["input_ids"][:, 8:20] == model.config.image_token_id).any()
