"""A run in FP8 that begins at a checkpoint in bf16: the optimizer's float32 copies are its weights, bit for bit."""

import pytest
import torch
from gpu.conftest import RECIPES, has_recipe
from gpu.test_training import command, fp8, run
from support.pretrain_jobs import Job

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory

# One step that changes next to nothing.
STILL = ["--train-iters", "1", "--lr", "1e-12", "--min-lr", "1e-12", "--lr-warmup-iters", "0"]


def test_masters_are_the_weights_of_the_checkpoint(transformer_engine, packs, visible, tmp_path):
    """Though the model's own are rounded to FP8. In one process, because starting it takes longer than a run."""
    recipes = [one for one in RECIPES if one != "delayed" and has_recipe(one)]  # which keeps parameters in bf16
    if not recipes:
        pytest.skip(f"FP8 needs a newer GPU than {torch.cuda.get_device_name()}")
    start, saved = tmp_path / "start", {recipe: tmp_path / recipe for recipe in recipes}
    jobs = [Job(tmp_path / "bf16", command(packs, *STILL, "--save", f"{start}"))]
    for recipe, path in saved.items():
        paths = ["--pretrained-checkpoint", f"{start}", "--save", f"{path}"]
        jobs.append(Job(tmp_path / f"run_{recipe}", command(packs, *fp8(recipe), *STILL, *paths)))
    run(jobs, visible)
    before = TorchDistDirectory(start)
    parameters = [key for key in before.shapes if not key.startswith("optimizer.")]
    assert parameters
    for recipe, path in saved.items():
        after = TorchDistDirectory(path)
        for parameter in parameters:
            master = after.read(f"optimizer.state.param.{parameter}")
            expected, where = before.read(parameter).float(), f"{recipe}, {parameter}"
            torch.testing.assert_close(master, expected, atol=1e-9, rtol=0, msg=lambda text, at=where: f"{at}: {text}")
