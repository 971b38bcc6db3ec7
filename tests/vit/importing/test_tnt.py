"""TNT files of timm and of the authors give the logits of timm's model; timm's legacy network is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import CLASSES, as_authors_tnt
from foreign_files import TNT_LAYERS as LAYERS
from foreign_files import TNT_PATCH as PATCH
from foreign_files import TNT_SIDE as SIDE
from foreign_files import TNT_WIDTH as WIDTH
from foreign_files import timms_tnt as peer
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.train import assembly
from vit.importing.formats import adopt

timm_tnt = pytest.importorskip("timm.models.tnt")

SHAPE = [
    *("model=tnt", "data=imagefolder", f"model.patch_size={PATCH}", "model.word_stride=4", f"model.width={WIDTH}"),
    *("model.heads=2", f"model.layers={LAYERS}", f"model.feedforward={4 * WIDTH}", "trainer.device=cpu"),
    *("model.inner.width=12", "model.inner.heads=4", "model.inner.feedforward=48"),
]


def loaded(content: dict[str, Any], folder: Path, *keys: str) -> Any:
    torch.save(content, folder / "tnt.pth.tar")
    return assembly.load(folder / "tnt.pth.tar", *SHAPE, f"data.image_size={SIDE}", *keys)


def images(height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(3, 3, height, width, generator=generator("images"))


@pytest.mark.parametrize("kind", ["timm", "authors", "authors under a wrapper"])
def test_files_give_the_logits_of_timm(kind: str, tmp_path: Path) -> None:
    theirs = peer()
    state = theirs.state_dict() if kind == "timm" else as_authors_tnt(theirs.state_dict())
    assert ("blocks.1.outer_mlp.fc1.weight" in state) == (kind != "timm")
    if kind != "timm":
        read = peer()
        nn.init.zeros_(read.head.weight)
        read.load_state_dict(timm_tnt.checkpoint_filter_fn(dict(state), read))
        assert torch.equal(read(images()), theirs(images())), "timm reads the same file"
    content = {"state_dict": {f"module.{n}": t for n, t in state.items()}} if kind.endswith("wrapper") else state
    model, task = loaded(content, tmp_path)
    with torch.no_grad():
        logits, expected = model(images()), theirs(images())
    assert expected.std() > 0.3 and (expected - expected[:1]).abs().max() > 0.1, "the logits vary"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # fp32 sums of some hundred terms
    assert task.classes == [f"class {i}" for i in range(CLASSES)]


def test_the_file_of_tnt_s_is_that_of_its_preset(tmp_path: Path) -> None:
    import timm

    state = {name: tensor.half() for name, tensor in timm.create_model("tnt_s_patch16_224").state_dict().items()}
    torch.save(state, tmp_path / "tnt_s.pth")
    model, task = assembly.load(tmp_path / "tnt_s.pth", "model=tnt_s", "trainer.device=cpu")
    assert len(task.classes) == 1000 and model.tokens == 197


def test_positions_are_resampled_as_in_timm_at_another_image_size(tmp_path: Path) -> None:
    theirs, larger = peer(), peer(img_size=(48, 24))
    larger.load_state_dict(timm_tnt.checkpoint_filter_fn(theirs.state_dict(), larger))
    torch.save(theirs.state_dict(), tmp_path / "tnt.pth")
    model, _ = assembly.load(tmp_path / "tnt.pth", *SHAPE, "data.image_size=[48,24]")
    with torch.no_grad():
        torch.testing.assert_close(model(images(48, 24)), larger(images(48, 24)), rtol=0, atol=1e-5)


def test_every_number_of_a_file_is_used_exactly_once() -> None:
    """The elements of a file are the numbers from 0 upwards; the imported elements must be the same numbers."""
    file, count = {}, 0
    for name, tensor in peer().state_dict().items():
        file[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        count += tensor.numel()
    numbers = torch.cat([tensor.flatten() for tensor in adopt(file, None, (SIDE, SIDE)).weights.values()])
    assert torch.equal(numbers.sort().values, torch.arange(count, dtype=torch.float64))


def test_a_grid_that_is_not_square_is_read_from_the_image_size_and_unused_entries_are_listed() -> None:
    file = as_authors_tnt(peer(img_size=(16, 24)).state_dict())
    adopted = adopt({"state_dict": file, "epoch": 3}, ["a"] * CLASSES, (16, 24))
    assert adopted.weights["positions.grid"].shape == (2, 3, WIDTH) and adopted.left_out == ["outer_tokens"]
    assert any("data.mean=[0.5,0.5,0.5]" in note for note in adopted.notes) and "order of the data" in adopted.notes[-1]
    with pytest.raises(
        UserError, match=r"6 positions of patches, which do not form a square grid; .*data\.image_size="
    ):
        adopt(file, None, (64, 64))
    square = peer().state_dict()
    assert adopt(square, None, (64, 64)).weights["positions.grid"].shape == (4, 4, WIDTH)
    wide = adopt(square, None, (16, 64))
    assert wide.weights["positions.grid"].shape == (2, 8, WIDTH) and "and not as 4 x 4" in wide.notes[0]


def test_a_run_starts_from_a_file_with_other_classes(tmp_path: Path) -> None:
    model, task = loaded(peer().state_dict(), tmp_path)
    task.restore({"classes": [f"class {i}" for i in range(3)]})
    message = assembly.load_initial_weights(model, task, tmp_path / "tnt.pth.tar")
    assert "re-initialised: head.weight, head.bias" in message and "unused" not in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.pop("cls_token"), "nothing for class_token"),
        (lambda file: file.update({"blocks.0.attn_in.qk.bias": torch.zeros(24)}), r"blocks\.0\.attn_in\.qk\.bias"),
    ],
)
def test_variants_are_refused_with_the_name_of_a_tensor(change: Any, reason: str) -> None:
    file = peer().state_dict()
    change(file)
    with pytest.raises(UserError, match=rf"variant of TNT that is not supported \(it has {reason}\); give a TNT of"):
        adopt(file, None, (SIDE, SIDE))


def test_timms_legacy_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"it has blocks\.0\.proj\.bias\); .* not timm's tnt_s_legacy"):
        adopt(peer(legacy=True).state_dict(), None, (SIDE, SIDE))


def test_a_missing_tensor_of_a_block_is_reported_when_the_model_is_restored(tmp_path: Path) -> None:
    file = peer().state_dict()
    file.pop("blocks.1.attn_out.v.weight")
    with pytest.raises(UserError, match=r"1 tensors are missing .* encoder\.blocks\.1\.attention\.in_proj\.weight"):
        loaded(file, tmp_path)
