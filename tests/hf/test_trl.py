"""Fine-tuning an export with TRL: SFT of text, packs and images, with LoRA, and GRPO with images."""

import copy
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("trl", minversion="1.16", reason="trl is missing")
datasets = pytest.importorskip("datasets", reason="datasets is missing")
peft = pytest.importorskip("peft", reason="peft is missing")
import trl  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

from neo_megatron.data.chat import ChatEncoder, special_ids  # noqa: E402
from neo_megatron.data.conversation import Turn  # noqa: E402
from neo_megatron.hf.processing_neo import NEOProcessor  # noqa: E402

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "q_proj_hw"], "task_type": "CAUSAL_LM"}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 1e9,
}


@pytest.fixture(scope="module")
def processor(exported) -> NEOProcessor:
    return NEOProcessor.from_pretrained(exported, min_pixels=4096, max_pixels=16384, image_grid_thw=True)


@pytest.fixture(scope="module")
def images(golden: Path) -> list[Image.Image]:
    return [Image.open(golden / "images" / f"{letter}.png").convert("RGB") for letter in "ab"]


def conversations(images: list[Image.Image] | None = None) -> "datasets.Dataset":
    asked = ["Say nought", "Say one in more words than before"]
    rows = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": f"{ask}: yes"}]}
        for ask in asked
    ]
    if images is None:
        return datasets.Dataset.from_list(rows)
    return datasets.Dataset.from_list([{**row, "images": [image]} for row, image in zip(rows, images, strict=True)])


def sft(model, data, processing_class, directory, collator=None, adapter=None, **settings):
    """One step on the first batch: the trainer, and the loss that it logged."""
    trainer = trl.SFTTrainer(
        model=copy.deepcopy(model),
        args=trl.SFTConfig(output_dir=str(directory), **{**SETTINGS, "max_length": None, **settings}),
        train_dataset=data,
        data_collator=collator,
        processing_class=processing_class,
        peft_config=adapter,
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(trainer.train_dataset))])
    trainer.train()
    logged = trainer.state.log_history[0]
    assert math.isfinite(logged["grad_norm"]) and logged["grad_norm"] > 0
    return trainer, logged["loss"], batch


def expected_loss(model, batch) -> float:
    """The model's own, over the number of labels that the Trainer counts."""
    with torch.no_grad():
        return model(**batch, num_items_in_batch=int((batch["labels"] != -100).sum())).loss.item()


@pytest.mark.parametrize("adapter", [None, LORA])
def test_sft_of_text(model, processor, tmp_path, adapter):
    lora = adapter and peft.LoraConfig(**adapter)
    trainer, loss, batch = sft(model, conversations(), processor.tokenizer, tmp_path, adapter=lora)
    assert float(loss) == pytest.approx(expected_loss(model, batch), abs=1e-3)
    changed = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert all("lora" in name for name in changed) == (adapter is not None)


def test_sft_of_packs(model, processor, tmp_path):
    """Two consecutive conversations; neither sees the other."""
    settings = {"packing": True, "max_length": 128, "per_device_train_batch_size": 1}
    _, loss, batch = sft(model, conversations(), processor.tokenizer, tmp_path, **settings)
    ends = batch["cu_seq_lens_q"].tolist()
    assert len(ends) == 3 and batch["position_ids"].shape[0] == 1
    total, count = 0.0, int((batch["labels"] != -100).sum())
    with torch.no_grad():
        for start, end in zip(ends, ends[1:], strict=False):
            alone = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
            total += model(**alone, num_items_in_batch=count).loss.item()
    assert float(loss) == pytest.approx(total, abs=1e-3)


class TextTargets(DataCollatorForVisionLanguageModeling):
    """TRL's collator, whose labels are all tokens, without those of images."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        ids = [self.processor.tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
        batch["labels"][torch.isin(batch["labels"], torch.tensor(ids))] = -100
        return batch


@pytest.mark.parametrize("adapter", [None, LORA])
def test_sft_of_images(model, processor, images, tmp_path, adapter):
    lora = adapter and peft.LoraConfig(**adapter)
    arguments = (model, conversations(images), processor, tmp_path, TextTargets(processor))
    _, loss, batch = sft(*arguments, adapter=lora)
    assert batch["image_grid_thw"].shape == (2, 3) and batch["pixel_values"].shape[0] > 8
    assert float(loss) == pytest.approx(expected_loss(model, batch), abs=1e-3)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_grpo_rewards(model, processor, images, tmp_path, adapter):
    """GRPO: each completion is sampled and scored with the images of its prompt, of which they differ in size."""
    prompts = [
        {"prompt": [{"role": "user", "content": f"Say {number}"}], "images": [image]}
        for number, image in enumerate(images)
    ]
    seen = []
    tuned = copy.deepcopy(model)
    tuned.vision_model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1].tolist(), len(output))))
    trainer = trl.GRPOTrainer(
        model=tuned,
        reward_funcs=lambda completions, **_: [float(len(said[0]["content"])) for said in completions],
        args=trl.GRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_completion_length": 6, "num_generations": 2}),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=processor,
        peft_config=adapter and peft.LoraConfig(**adapter),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert math.isfinite(float(logged["grad_norm"])) and float(logged["reward"]) > 0
    assert len(seen) >= 2 and all(image_tokens == sum(h * w // 4 for h, w in grids) for grids, image_tokens in seen)


TURNS = [
    ("user", "<image>\nWhat is it?"),
    ("assistant", "A cat, written <image>."),
    ("user", "Sure?"),
    ("assistant", "\nYes."),
]


def of_training(processor, turns, image_tokens):
    """Ids, and labels that are -100 elsewhere."""
    tokenizer = processor.tokenizer
    encoder = ChatEncoder(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer))
    (sample,) = encoder.encode([([Turn(role, text, role == "assistant") for role, text in turns], image_tokens)])
    labels = [-100] * len(sample.tokens)
    for start, end in sample.spans:
        labels[start:end] = sample.tokens[start:end].tolist()
    return sample.tokens.tolist(), labels


def messages(turns):
    return [{"role": role, "content": text.removeprefix("<image>\n")} for role, text in turns]


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_labels_are_those_of_training(processor, images, form):
    """TRL's own collator: all that assistants say, or the completion, and no more."""
    turns = [TURNS, [*TURNS[:1], ("assistant", "A dog.")]]
    if form == "messages":
        collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
        rows = [{"messages": messages(chat), "images": [image]} for chat, image in zip(turns, images, strict=True)]
    else:
        collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        turns = [[TURNS[0], TURNS[1]], turns[1]]
        rows = [
            {"prompt": messages(chat[:-1]), "completion": messages(chat[-1:]), "images": [image]}
            for chat, image in zip(turns, images, strict=True)
        ]
    batch = collate(rows)
    image_tokens = (batch["image_grid_thw"].prod(dim=-1) // 4).tolist()
    for row, chat in enumerate(turns):
        seen = batch["attention_mask"][row].bool()
        ids, labels = of_training(processor, chat, image_tokens[row : row + 1])
        assert batch["input_ids"][row][seen].tolist() == ids
        assert batch["labels"][row][seen].tolist() == labels
