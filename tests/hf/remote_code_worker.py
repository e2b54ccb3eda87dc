"""Uses an exported directory without this package.

python remote_code_worker.py EXPORTED GOLDEN SAVED
"""

import os
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

exported, golden, saved = map(Path, sys.argv[1:])
assert transformers.__version__.startswith(os.environ["EXPECTED_VERSION"]), transformers.__version__
trust = {"trust_remote_code": True}

config = AutoConfig.from_pretrained(exported, **trust)
assert config.get_text_config().num_hidden_layers == 5
tokenizer = AutoTokenizer.from_pretrained(exported, **trust)
processor = AutoProcessor.from_pretrained(exported, **trust)
assert tokenizer.padding_side == "left" and len(tokenizer) == 909
model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto", **trust).eval()
assert type(AutoModel.from_pretrained(exported, **trust)).__name__ == type(model).__name__ == "NEOChatModel"
assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 872

inputs = load_file(golden / "inputs_pack1.safetensors")
length = int(inputs["seq_boundaries"][1])
with torch.no_grad():
    logits = model(inputs["input_ids"][:, :length], inputs["pixel_values"], inputs["grid_hw"]).logits
expected = load_file(golden / "outputs_untied_pack1.safetensors")["logits"][:, :length]
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

first, second = (Image.open(golden / "images" / f"{letter}.png") for letter in "ab")
look = [{"type": "image", "image": first}, {"type": "text", "text": "What is this?"}]
compare = [{"type": "image", "image": first}, {"type": "image", "image": second}, {"type": "text", "text": "Same?"}]
chats = [
    [{"role": "user", "content": look}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": compare}],
    [{"role": "user", "content": "Hi"}],
]
template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
batch = processor.apply_chat_template(chats, **template)
assert sorted(batch) == ["attention_mask", "grid_hw", "input_ids", "pixel_values"], sorted(batch)
greedy = {"max_new_tokens": 8, "do_sample": False}
answers = model.generate(**batch, **greedy, min_new_tokens=8)[:, batch["input_ids"].shape[1] :]
for chat, answer in zip(chats, answers, strict=True):
    alone = processor.apply_chat_template(chat, **template)
    for use_cache in (True, False):
        tokens = model.generate(**alone, **greedy, min_new_tokens=8, use_cache=use_cache)
        assert tokens[0, alone["input_ids"].shape[1] :].tolist() == answer.tolist(), (chat, use_cache)
assert len(processor.batch_decode(answers, skip_special_tokens=True)) == 3
computed = []
hook = model.language_model.get_decoder().register_forward_pre_hook(
    lambda _, states: computed.append(states[0].shape[1])
)
model.generate(**batch, **greedy, min_new_tokens=8)
hook.remove()
assert computed == [batch["input_ids"].shape[1]] + [1] * 7, computed
torch.manual_seed(0)
for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
    assert model.generate(**batch, max_new_tokens=4, **settings).shape[1] <= batch["input_ids"].shape[1] + 4
answer, history = model.chat(tokenizer, None, "Hi", greedy, return_history=True)
assert history == [("Hi", answer)]
assert answer == processor.decode(answers[2], skip_special_tokens=True).strip(), (answer, history)

typed = processor.apply_chat_template([{"role": "user", "content": "<|im_end|><|im_start|>"}], **template)
assert [(typed["input_ids"] == token).sum() for token in (871, 872)] == [2, 1]

# The kernel itself, without compiling it.
flex = AutoModelForCausalLM.from_pretrained(exported, dtype="auto", attn_implementation="flex_attention", **trust)
with torch.compiler.set_stance("force_eager"), torch.no_grad():
    torch.testing.assert_close(flex.eval()(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)

pipe = pipeline("image-text-to-text", model=model, processor=processor)
said = pipe(chats[0], return_full_text=False, generate_kwargs=greedy | {"min_new_tokens": 8})[0]["generated_text"]
assert said == processor.decode(answers[0], skip_special_tokens=True), said

# What it saves is complete again, in a process that knows nothing of the first directory.
model.save_pretrained(saved)
processor.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", attn_implementation="eager", **trust).eval()
batch_again = AutoProcessor.from_pretrained(saved, **trust).apply_chat_template(chats, **template)
assert all(torch.equal(batch_again[key], batch[key]) for key in batch)
seen = again(**batch_again, output_attentions=True)
torch.testing.assert_close(seen.logits, model(**batch).logits, atol=1e-4, rtol=0)
assert len(seen.attentions) == 5
print("all is well")
