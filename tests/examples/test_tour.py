"""The cells of examples/tour.ipynb run in order in one process, and show what their text says."""

import json
import math

import pytest
from support.paths import ROOT
from support.processes import run_python

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
# Megatron's state is that of a process, so the cells get a process of their own.
RUN = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
names = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
pack, mask = names["pack"], names["mask"]
json.dump(
    {
        "first_loss": names["first_loss"],
        "last_loss": names["last_loss"],
        "vocabulary": names["sizes"].vocab_size,
        "tokens": len(pack["tokens"]),
        "samples": pack["samples"],
        "mask_shape": list(mask.shape),
        "mask": mask.tolist(),
        "document": pack["document"].tolist(),
        "image": pack["image"].tolist(),
        "row_sums": names["weights"].sum(dim=1).tolist(),
        "outside": names["weights"][~mask].abs().max().item(),
    },
    open(sys.argv[2], "w"),
)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    room = tmp_path_factory.mktemp("tour")
    (room / "run.py").write_text(RUN)
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(room), "HF_HUB_OFFLINE": "1"}
    done = run_python(room / "run.py", NOTEBOOK, room / "shown.json", environment=environment)
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads((room / "shown.json").read_text())


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8 and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_the_mask_is_causal_in_documents_and_mutual_in_images(shown):
    length, document, image = shown["tokens"], shown["document"], shown["image"]
    assert length == 128 and shown["mask_shape"] == [length, length] and shown["samples"] > 1
    for query in range(length):
        for key in range(length):
            same_document = document[query] == document[key] != -1
            same_image = image[query] == image[key] != -1
            allowed = query == key or (same_document and (key < query or same_image))
            assert shown["mask"][query][key] == allowed, (query, key)


def test_the_loss_starts_near_log_of_the_vocabulary_and_falls(shown):
    assert shown["first_loss"] == pytest.approx(math.log(shown["vocabulary"]), abs=0.3)
    assert shown["last_loss"] < shown["first_loss"] - 1


def test_attention_sums_to_one_and_respects_the_mask(shown):
    assert shown["row_sums"] == pytest.approx([1] * shown["tokens"], abs=1e-5)
    assert shown["outside"] == 0
