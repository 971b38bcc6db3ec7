"""The README's figure shows predictions of the three wings' checkpoints."""

import base64
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

from scripts import readme_figure

FROZEN = Path(__file__).parents[1] / "data"
SVG = "{http://www.w3.org/2000/svg}"
README_FIGURE = Path(readme_figure.__file__).with_suffix(".svg")


def pictures(figure: str) -> list[torch.Tensor]:
    encoded = re.findall(r"base64,([^\"]+)", figure)
    return [
        decode_image(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8), ImageReadMode.RGB)
        for text in encoded
    ]


@pytest.mark.slow
def test_the_figure_shows_predictions_of_three_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoints = []
    for wing in ("detr", "vit", "seq2seq"):
        with tarfile.open(FROZEN / f"{wing}_4f99cde" / "run.tar.xz") as archive:
            archive.extractall(tmp_path / wing, filter="data")
        checkpoints.append(str(max((tmp_path / wing / "run" / "checkpoints").glob("step_*.pt"))))
    assert readme_figure.main([*checkpoints, "--output", "figure.svg"]) == 0
    figure = Path("figure.svg").read_text(encoding="utf-8")
    panels = ElementTree.fromstring(figure).findall(f"{SVG}svg")
    assert len(panels) == 3
    assert len(pictures(figure)) == len(readme_figure.SHAPES) + len(readme_figure.DIGITS)
    assert readme_figure.PHRASE.split()[0] in "".join(panels[2].itertext())
    assert capsys.readouterr().out.startswith("figure.svg: ")


def test_the_readmes_figure_holds_three_panels_with_readable_images():
    figure = README_FIGURE.read_text(encoding="utf-8")
    assert len(ElementTree.fromstring(figure).findall(f"{SVG}svg")) == 3
    assert len(images := pictures(figure)) > 4
    assert all(min(image.shape[1:]) >= 64 for image in images)


def test_a_missing_checkpoint_is_refused(tmp_path, capsys):
    missing = str(tmp_path / "caf\udce9.pt")
    assert readme_figure.main([missing, missing, missing, "--output", str(tmp_path / "figure.svg")]) == 2
    assert "caf\\udce9.pt" in capsys.readouterr().err
