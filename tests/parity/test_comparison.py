"""Both forms of a NEO on one pack: equal forms agree, and a difference is found where it is."""

import shutil
import sys

import pytest
import torch
from support.paths import TOOLS
from support.processes import run_forked

from neo_megatron import command_line
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.cli import verify_checkpoint
from neo_megatron.data.chat import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The argument order of load:UserWarning")

TOOL = TOOLS / "verify_checkpoint.py"
LAYER = "language_model.model.layers.3."


@pytest.fixture
def verify(megatron, monkeypatch, capsys):
    """Runs the tool in this process, whose process group it uses; gives its exit code and what it printed."""
    monkeypatch.setattr(verify_checkpoint, "_one_process", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify_checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.run("verify_checkpoint", verify_checkpoint.main)
        return stopped.value.code, capsys.readouterr().out

    return run


def test_two_forms_of_one_model_agree(golden, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    done = run_forked(TOOL, golden / "ckpt_untied", tmp_path / "megatron")
    assert done.returncode == 0, done.stdout
    parts = [line.split("  ")[0] for line in done.stdout.splitlines() if "e-0" in line]
    layers = ["layer 0 (pre-buffer)", "layer 1 (pre-buffer)", "layer 2", "layer 3", "layer 4"]
    assert parts == ["patch embedding", *layers, "final norm", "logits", "loss"]
    assert "they agree" in done.stdout and "UserWarning" not in done.stdout


@pytest.mark.filterwarnings("ignore:.*UserWarning")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_published_neo_unify(verify, golden, tmp_path, kind):
    """Its understanding branch; its directory does not tell the ids of the image tokens, the conversion does."""
    unify = shutil.copytree(golden / "u1" / kind, tmp_path / "unify", copy_function=shutil.copyfile)
    (unify / "added_tokens.json").unlink()
    convert_hf_to_megatron(unify, tmp_path / "megatron", tokenizer=load_tokenizer(golden / "tokenizer"))
    code, printed = verify(unify, tmp_path / "megatron")
    assert code == 0 and "they agree" in printed, printed


def test_a_tied_head_and_bfloat16(verify, variant, tmp_path):
    def change(tensors):
        del tensors["language_model.lm_head.weight"]
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    hf = variant(change, tie_word_embeddings=True)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    code, printed = verify(hf, tmp_path / "megatron")
    assert code == 0, printed


def swap_gate_and_up(tensors):
    gate, up = LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def swap_two_key_heads(tensors):
    name = LAYER + "self_attn.k_proj_hw.weight"
    tensors[name] = tensors[name].roll(32, dims=0).contiguous()


def turn_the_kernel(tensors):
    name = "vision_model.embeddings.dense_embedding.weight"
    tensors[name] = tensors[name].transpose(2, 3).contiguous()


def nudge_the_norm(tensors):
    tensors["language_model.model.norm.weight"][5] *= 1.01


@pytest.mark.parametrize(
    "change, part",
    [
        (swap_gate_and_up, "layer 3"),
        (swap_two_key_heads, "layer 3"),
        (turn_the_kernel, "patch embedding"),
        (nudge_the_norm, "final norm"),
    ],
)
def test_the_first_part_that_differs_is_named(verify, golden, variant, tmp_path, change, part):
    convert_hf_to_megatron(variant(change), tmp_path / "megatron")
    code, printed = verify(golden / "ckpt_untied", tmp_path / "megatron")
    assert code == 1 and f"they differ: {part} is the first part" in printed


def test_other_sizes_are_named(verify, golden, variant, tmp_path):
    other = variant(img_start_token_id=5)
    convert_hf_to_megatron(other, tmp_path / "megatron")
    code, _ = verify(golden / "ckpt_untied", tmp_path / "megatron")
    assert "differ in image_start_token_id (897, 5)" in code
    code, _ = verify(golden, tmp_path / "megatron")
    assert code.startswith("verify_checkpoint: ") and "is a directory of other files, not a NEO" in code


def test_a_damaged_checkpoint_is_not_compared(verify, golden, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    file = max((tmp_path / "megatron" / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, _ = verify(golden / "ckpt_untied", tmp_path / "megatron")
    assert code.startswith("verify_checkpoint: ") and "is damaged between bytes" in code


def test_the_pack_has_what_can_go_wrong(golden):
    """Documents with none, one and two images, each wider or higher than the other, and padding after them."""
    from neo_megatron.parity.pack import made_pack

    sizes = read_sizes(golden / "ckpt_untied")
    pack = made_pack(sizes)
    rows = pack.for_transformers()
    assert rows["grid_hw"].tolist() == [[4, 6], [8, 2], [2, 4]]
    assert [(row == sizes.image_start_token_id).sum().item() for row in rows["input_ids"]] == [0, 1, 2]
    context = rows["input_ids"] == sizes.image_context_token_id
    assert context.sum() == rows["grid_hw"].prod(dim=-1).sum() // 4 == len(pack.packed["image_token_index"])
    assert len(rows["pixel_values"]) == 48 and pack.length < len(pack.packed["tokens"][0])
    again = made_pack(sizes)
    assert all(torch.equal(value, again.packed[name]) for name, value in pack.packed.items())
    assert not torch.equal(pack.packed["tokens"], made_pack(sizes, seed=1).packed["tokens"])
