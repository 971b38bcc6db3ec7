"""Files of other programs as checkpoints: the same outputs without further keys, a teacher's weights, and refusals."""

import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from common.config.compose import configure
from common.errors import UserError
from common.train.assembly import assemble, load
from scripts.import_weights import main

STUDENT = ["model=vit", "model.width=8", "model.layers=1", "model.heads=1", "model.feedforward=8", "trainer.device=cpu"]


@pytest.fixture
def network() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3)
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of two images each, by folder."""
    for k in range(10):
        for split in ("train", "val", "test"):
            (tmp_path / split / f"kind{k}").mkdir(parents=True)
            image = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
            torchvision.io.write_png(image, str(tmp_path / split / f"kind{k}" / "a.png"))
    return tmp_path


def keys(folder: Path) -> list[str]:
    return ["data=imagefolder", f"data.root={folder}", "data.image_size=32"]


def outputs(file: Path, images: Tensor) -> Tensor:
    model, _ = load(file, "trainer.device=cpu")
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def test_the_checkpoint_gives_the_programs_outputs_and_teaches(network, folder, capsys):
    foreign = folder / "a network.pth"
    torch.save(network.state_dict(), foreign)
    arguments = [f"checkpoint={foreign}", "model=resnet18", *keys(folder)]
    assert main(arguments) == 0
    file = foreign.with_suffix(".imported.pt")
    command = capsys.readouterr().out.splitlines()[-1].partition("python evaluate.py ")[2]
    assert shlex.split(command) == [f"checkpoint={file}"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(outputs(file, images), network(images).detach(), rtol=1e-5, atol=1e-5)

    student = ["train", [*STUDENT, *keys(folder), "model.patch_size=8"]]
    with pytest.raises(UserError, match=r"write it as a checkpoint, which does: python scripts/import_weights\.py "):
        assemble(configure(student[0], [*student[1], f"task.distillation.teacher={foreign}"]))
    parts = assemble(configure(student[0], [*student[1], f"task.distillation.teacher={file}"]))
    torch.testing.assert_close(parts.task.teacher.model(images), network(images), rtol=1e-5, atol=1e-5)
    assert "its 10 classes; they are taken to have the order of the data's: kind0, kind1" in parts.weights_line


def test_what_cannot_be_written_is_refused_and_nothing_is_replaced(network, folder, capsys):
    foreign, output = folder / "network.pth", folder / "ours.pt"
    torch.save(network.state_dict(), foreign)
    arguments = [f"checkpoint={foreign}", *keys(folder), "--output", str(output)]
    assert main(arguments) == 2 and "import_weights.py needs model=NAME" in capsys.readouterr().err
    assert main([*arguments, "model=resnet34"]) == 2 and "weights of another model" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "model=resnet18"]) == 0 and output.exists()
    before = output.read_bytes()
    assert main([*arguments, "model=resnet18"]) == 2 and "exists already; name another" in capsys.readouterr().err
    assert main([f"checkpoint={output}", "--output", str(folder / "copy.pt")]) == 2
    assert "is a checkpoint of this program already" in capsys.readouterr().err
    assert output.read_bytes() == before and not (folder / "copy.pt").exists()
