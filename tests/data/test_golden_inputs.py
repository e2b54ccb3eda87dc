"""The tools reproduce what the published data set and collator make from the same annotations."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.image import normalise


@pytest.fixture(scope="module", params=["pack1", "textonly"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(name: str, golden: Path) -> dict[str, np.ndarray]:
    return load_file(golden / f"inputs_{name}.safetensors")


@pytest.fixture(scope="module")
def packs(name: str, published: dict, golden: Path, tokenizer: Path, run_tool: Callable, tmp_path_factory) -> Path:
    """Packs that the commands make from the annotations of the golden files."""
    folder = tmp_path_factory.mktemp(name)
    records = json.loads((golden / "meta.json").read_text())[f"untied_{name}"]["docs"]
    (folder / "annotations.json").write_text(json.dumps(records))
    preprocess = ["--input", folder / "annotations.json", "--image-root", golden, "--tokenizer", tokenizer]
    preprocess += ["--output", folder / "shards", "--min-pixels", 4096, "--max-pixels", 65536, "--workers", 1]
    done = run_tool("preprocess_data.py", *preprocess)
    assert done.returncode == 0, done.stderr
    length = published["input_ids"].shape[1]
    done = run_tool("pack_data.py", "--data", folder / "shards", "--output", folder / "packs", "--seq-length", length)
    assert done.returncode == 0, done.stderr
    return folder / "packs"


def test_tokens_positions_and_documents(packs, published):
    batch = collate([PackDataset(packs, 1, seed=0)[0]])
    length = published["input_ids"].shape[1]
    assert batch["tokens"].numpy().tolist() == published["input_ids"].tolist()
    assert batch["positions_thw"][0].numpy().tolist() == published["positions_thw"].tolist()
    sizes = np.diff(published["seq_boundaries"])
    assert batch["document"][0].numpy().tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
    # The two marks of a token, document and image, say what the published mask says in full.
    document, image = batch["document"][0].numpy(), batch["image"][0].numpy()
    order = np.arange(length)
    same_image = (image[:, None] == image) & (image >= 0)
    allowed = (document[:, None] == document) & ((order <= order[:, None]) | same_image)
    assert (allowed == published["attention_mask_dense"]).all()


@pytest.mark.parametrize("weighting", ["square", "token", "sample"])
def test_labels_and_weights(packs, published, weighting):
    batch = collate([PackDataset(packs, 1, seed=0, loss_weighting=weighting)[0]])
    trained = np.flatnonzero(published["labels"] != -100)
    assert batch["target_index"].tolist() == (trained - 1).tolist()
    assert batch["targets"].tolist() == published["labels"][trained].tolist()
    expected = published[f"loss_weight_{weighting}"]
    np.testing.assert_allclose(batch["target_weight"], expected[trained], rtol=1e-6)
    assert (np.delete(expected, trained) == 0).all()


def test_patches(packs, published, name):
    batch = collate([PackDataset(packs, 1, seed=0)[0]])
    context = 896
    assert batch["image_token_index"].tolist() == np.flatnonzero(published["input_ids"][0] == context).tolist()
    if name == "textonly":
        assert batch["patches"].shape == (0, 4, 768)
        return
    rows = normalise(batch["patches"].numpy())
    start = 0
    for height, width in published["grid_hw"]:
        tokens = rows[start : start + height * width // 4].reshape(height // 2, width // 2, 2, 2, 768)
        row_major = tokens.transpose(0, 2, 1, 3, 4).reshape(-1, 768)
        expected = published["pixel_values"][start * 4 : start * 4 + height * width]
        np.testing.assert_allclose(row_major, expected, atol=1e-6, rtol=0)
        start += height * width // 4
    assert start == len(rows)
