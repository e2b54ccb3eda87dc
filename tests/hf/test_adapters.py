"""LoRA by peft: around the model, and around its language model as InternVL's code has it."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is missing")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "q_proj_hw"]}


@pytest.fixture
def frozen(model):
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    "part, task",
    [("model", {"task_type": "CAUSAL_LM"}), ("language_model", {"task_type": "CAUSAL_LM"}), ("language_model", {})],
)
def test_an_adapter_is_trained_saved_and_merged(frozen, model, document, tmp_path, part, task):
    inputs = document | {"attention_mask": torch.ones_like(document["input_ids"])}
    expected = model(**inputs).logits

    def adapted(base, wrap):
        """The model to call, with an adapter in place."""
        if part == "model":
            return wrap(base)
        base.language_model = wrap(base.language_model)
        return base

    tuned = adapted(frozen, lambda module: peft.get_peft_model(module, peft.LoraConfig(**LORA, **task)))
    torch.testing.assert_close(tuned(**inputs).logits, expected)
    wrapped = tuned if part == "model" else tuned.language_model
    wrapped.enable_input_require_grads()
    tuned.train()
    frozen.gradient_checkpointing_enable()
    adapters = [parameter for name, parameter in wrapped.named_parameters() if "lora" in name]
    assert len(adapters) == 2 * 3 * 5
    rate = torch.optim.SGD(adapters, lr=1e-2)
    for _ in range(2):
        rate.zero_grad()
        tuned(**inputs, labels=document["input_ids"]).loss.backward()
        rate.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters)
    changed = tuned.eval()(**inputs).logits
    assert (changed - expected).abs().max() > 1e-2
    greedy = {"max_new_tokens": 4, "do_sample": False}
    answer = tuned.generate(**inputs, **greedy)
    wrapped.save_pretrained(tmp_path)
    loaded = adapted(copy.deepcopy(model), lambda module: peft.PeftModel.from_pretrained(module, tmp_path))
    torch.testing.assert_close(loaded.eval()(**inputs).logits, changed)
    assert torch.equal(loaded.generate(**inputs, **greedy), answer)
    merged = adapted(frozen, lambda _: wrapped.merge_and_unload())
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(**inputs).logits, changed, atol=1e-4, rtol=0)
