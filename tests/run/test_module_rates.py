"""Factors and steps of modules: what is read, what is refused, and that a late start is that of a fresh AdamW."""

from argparse import Namespace

import pytest
import torch

from neo_megatron.errors import ConfigError
from neo_megatron.run.module_rates import ModuleRates, scales, starts

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

EVALUATES = "--skip-train --valid-data-path x --eval-iters 1 --load x"
SHARDED = "--use-megatron-fsdp --data-parallel-sharding-strategy optim"


def test_entries_are_read():
    assert scales("patch_embedding=2 post_llm=0.1, post_llm.mlp=1e-3") == {
        "patch_embedding": 2,
        "post_llm": 0.1,
        "post_llm.mlp": 1e-3,
    }
    assert starts("post_llm@2000") == {"post_llm": 2000}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--lr-scale post_llm", "--lr-scale 'post_llm' is not of the form post_llm=0.1"),
        ("--lr-scale post_llm=fast", "is not of the form"),
        ("--lr-scale post_llm=0", "give a number above 0"),
        ("--lr-scale post_llm=-1", "give a number above 0"),
        ("--lr-scale post_llm=inf", "give a number above 0"),
        ("--lr-scale post_llm=nan", "give a number above 0"),
        ("--lr-scale post_llm=1,post_llm=2", "--lr-scale names post_llm twice"),
        ("--lr-scale postllm=2", "--lr-scale postllm: this model has no such module; its parts are patch_embedding"),
        ("--lr-scale pre_buffer=2 --pre-buffer-num-layers 0", "--lr-scale pre_buffer: this model has no such module"),
        ("--lr-scale embedding=2 --decoupled-lr 1e-4", "--lr-scale and --decoupled-lr"),
        (f"--lr-scale embedding=2 {EVALUATES}", "--skip-train only evaluates"),
        (f"--lr-scale embedding=2 {SHARDED}", "--lr-scale and --unfreeze are not for --use-megatron-fsdp"),
        (f"--training-stage 1 --unfreeze post_llm@5 {SHARDED}", "are not for --use-megatron-fsdp"),
        ("--attention-tiles table", "--attention-tiles chooses a kernel of a GPU, and this machine has none"),
        ("--lr-scale post_llm=2 --lr-warmup-init 1e-6 --lr-warmup-iters 5", "leave --lr-warmup-init out"),
        ("--training-stage 2 --unfreeze post_llm@5", "--training-stage 2 trains everything from its first step"),
        ("--training-stage 1 --unfreeze post_llm=5", "is not of the form post_llm@2000"),
        ("--training-stage 1 --unfreeze post_llm@0", "give a number above 0"),
        ("--training-stage 1 --unfreeze post_llm@2.5", "is not of the form post_llm@2000"),
        ("--training-stage 1 --unfreeze pre_buffer@5", "--unfreeze pre_buffer: --training-stage 1 trains it"),
        ("--training-stage 1 --unfreeze post_llm@100", "the run ends after 100 steps"),
    ],
)
def test_what_cannot_work_is_refused(parse, flags, sentence):
    with pytest.raises(ConfigError) as error:
        parse(f"--train-iters 100 {flags}")
    assert sentence in str(error.value)


def test_the_head_of_tied_embeddings_has_no_name_of_its_own(parse):
    with pytest.raises(ConfigError, match=r"no such module \(tied to embedding\)"):
        parse("--neo-model neo-2b --train-iters 100 --lr-scale output_layer=2")


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("start", [1, 7])
def test_a_late_start_is_that_of_a_fresh_optimizer(beta2, start):
    """One AdamW that has counted from the run's start, with zero gradients before, against one that begins late."""
    torch.manual_seed(0)
    settings = dict(lr=1e-2, betas=(0.9, beta2), eps=1e-15, weight_decay=0.1)
    late = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    fresh = torch.nn.Parameter(late.detach().clone())
    ours, reference = torch.optim.AdamW([late], **settings), torch.optim.AdamW([fresh], **settings)
    group = ours.param_groups[0]
    group.update(unfreeze_step=start, wd_mult=1.0)
    args = Namespace(
        lr_scale="",
        unfreeze=f"post_llm@{start}",
        optimizer="adam",
        adam_beta1=0.9,
        adam_beta2=beta2,
        no_load_optim=False,
    )
    rates = ModuleRates(args)
    rates._optimizer = ours
    rates._scheduler = Namespace(get_lr=lambda group: 1e-2, get_wd=lambda group: 0.1)
    before = late.detach().clone()
    for done in range(start + 20):
        args.curr_iteration = done
        gradient = torch.randn(50, dtype=torch.float64)
        late.grad = gradient if done >= start else torch.zeros_like(gradient)
        rates.begin_step()
        ours.step()
        if done < start:
            assert torch.equal(late, before)
        else:
            fresh.grad = gradient.clone()
            reference.step()
            torch.testing.assert_close(late, fresh, atol=1e-12, rtol=1e-9)


def test_a_late_start_of_muon_needs_no_correction():
    """Newton-Schulz gives the direction of a momentum whatever its length; AdamW has the rest of the parameters."""
    args = Namespace(lr_scale="", unfreeze="post_llm@5", optimizer="muon", adam_beta1=0.9, adam_beta2=0.999)
    args.no_load_optim, args.curr_iteration = False, 5
    rates = ModuleRates(args)
    muon, adam = dict(unfreeze_step=5, wd_mult=1.0), dict(unfreeze_step=5, wd_mult=1.0, optimizer="adam")
    rates._optimizer = Namespace(param_groups=[muon, adam])
    rates._scheduler = Namespace(get_lr=lambda group: 1e-2, get_wd=lambda group: 0.1)
    rates.begin_step()
    assert (muon["lr"], muon["weight_decay"]) == (1e-2, 0.1)
    corrections = [(1 - 0.999**steps) ** 0.5 / (1 - 0.9**steps) for steps in (1, 6)]
    assert adam["lr"] == pytest.approx(1e-2 * corrections[0] / corrections[1])
