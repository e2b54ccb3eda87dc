"""Fine-tuning with the plain Trainer of transformers: packs with images, the loss and the gradients of ours."""

import copy
import json

import pytest
import torch
from support.golden_packs import flattened, load
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="accelerate is missing, which the Trainer of transformers asks for")


def documents(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The documents of a golden pack as a user's data set has them; the first has all the images."""
    bounds = inputs["seq_boundaries"].tolist()
    rows = [
        {"input_ids": inputs["input_ids"][0, start:end].tolist(), "labels": inputs["labels"][start:end].tolist()}
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    rows[0] |= {key: inputs[key] for key in ("pixel_values", "grid_hw") if key in inputs}
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Documents -> one pack: tokens as transformers concatenates them, and consecutive images."""
    texts = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    pack = DataCollatorWithFlattening(return_tensors="pt")(texts)
    for key in ("pixel_values", "grid_hw"):
        if values := [row[key] for row in rows if key in row]:
            pack[key] = torch.cat(values)
    return pack


def train(model, data, collator, directory, **settings) -> dict[str, float]:
    """One step; what the Trainer logs of it."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=1e9,
        **settings,
    )
    trainer = Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer.state.log_history[0]


def test_packed_documents_over_two_micro_batches(model, golden, tmp_path):
    """Four documents in two packs, one with images: the mean over all labels of the global batch."""
    packs = [load(golden, "inputs", name) for name in ("pack1", "textonly")]
    meta = json.loads((golden / "meta.json").read_text())
    labels = [int((pack["labels"] != -100).sum()) for pack in packs]
    losses = [meta[f"untied_{name}"]["loss_token"] for name in ("pack1", "textonly")]
    expected = sum(count * loss for count, loss in zip(labels, losses, strict=True)) / sum(labels)
    data = [row for pack in packs for row in documents(pack)]
    logged = train(model, data, collate, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert logged["loss"] == pytest.approx(expected, abs=1e-4)


def test_weighted_loss_and_gradients(model, golden, tmp_path):
    """Weights that are one on average, as the Trainer divides by the number of labels: NEO's loss by square roots."""
    inputs = load(golden, "inputs", "pack1")
    weight, trained = inputs["loss_weight_square"], inputs["labels"] != -100
    pack = flattened(inputs) | {"loss_weight": (weight * trained.sum() / weight[trained].sum())[None]}
    logged = train(model, [pack], lambda rows: rows[0], tmp_path, per_device_train_batch_size=1)
    gradients = load(golden, "grads_untied", "pack1").values()
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    meta = json.loads((golden / "meta.json").read_text())["untied_pack1"]
    assert logged["loss"] == pytest.approx(meta["loss"], abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("as_packs", [True, False])
def test_evaluation_with_metrics(model, golden, tmp_path, as_packs):
    """Logits and labels of batches of other lengths, one of them without images, reach `compute_metrics`."""
    packs = [load(golden, "inputs", name) for name in ("pack1", "textonly")]
    data = [row for pack in packs for row in documents(pack)] if not as_packs else [flattened(pack) for pack in packs]
    expected, losses = [], []
    with torch.no_grad():
        for row in data:
            one = row if as_packs else collate([row])
            output = model(**one)
            right = (output.logits[:, :-1].argmax(dim=-1) == one["labels"][:, 1:])[one["labels"][:, 1:] != -100]
            expected.append(right)
            losses.append(output.loss)

    def accuracy(prediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        assert logits.shape[:2] == labels.shape and len(logits) == len(data)
        trained = labels[:, 1:] != -100
        return {"accuracy": float((logits[:, :-1].argmax(axis=-1) == labels[:, 1:])[trained].mean())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=1, disable_tqdm=True
    )
    collator = (lambda rows: rows[0]) if as_packs else collate
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=arguments,
        eval_dataset=data,
        data_collator=collator,
        compute_metrics=accuracy,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(torch.cat(expected).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
