"""Image files of every mode, broken ones, ones with EXIF rotation, and the images of a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import images as image_files
from common.data.images import list_images, normalise, read_image
from common.errors import UserError
from common.machine.seeds import generator


def test_the_images_of_a_folder_are_sorted_by_name(tmp_path: Path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    files = list_images(tmp_path)
    assert [file.name for file in files] == ["a.JPG", "b.png"]
    assert list_images(files[0]) == files[:1]


def test_a_folder_without_images_and_a_missing_one_are_errors(tmp_path: Path):
    for missing in (tmp_path / "nothing", tmp_path / "photos/notes"):
        with pytest.raises(UserError, match=missing.name):
            list_images(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        list_images(tmp_path / "empty")


def test_the_error_for_a_truncated_file_or_another_format_names_the_file(tmp_path: Path):
    for ending in ("jpg", "png"):
        intact = tmp_path / f"intact.{ending}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(intact)
        broken = tmp_path / f"broken.{ending}"
        broken.write_bytes(intact.read_bytes()[:-800])
        assert read_image(intact).shape == (3, 50, 50)
        with pytest.raises(UserError, match=f"broken.{ending} is broken"):
            read_image(broken)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"gone.jpg is missing"):
        read_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode: str, tmp_path: Path):
    """Left half dark, right half bright, in every mode."""
    levels = np.zeros((40, 60), dtype=np.uint8)
    levels[:, 30:] = 255
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(levels.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(levels).convert("RGB").convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = read_image(path, (40, 60))
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert image[:, :, :30].max() <= 1 and image[:, :, 30:].min() >= 254


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (60, 40), (200, 100, 50)).convert("CMYK").save(path, quality=95)
    assert (read_image(path).float().mean(dim=(1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 3


def test_grey_of_16_bits_keeps_its_middle_levels(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 100 * 256 + 7, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").unique().tolist() == [100]


def test_exif_turns_an_image_only_when_the_annotations_are_turned(tmp_path: Path):
    """60 x 40 pixels stored with "turn by 90 degrees clockwise": the bright top is at the right when upright."""
    levels = np.zeros((40, 60), dtype=np.uint8)
    levels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.fromarray(levels).save(path, exif=exif)
    stored, turned = read_image(path, (40, 60)), read_image(path, (60, 40))
    assert stored.shape == (3, 40, 60) and stored[:, :16].min() > 200 and stored[:, 24:].max() < 50
    assert turned.shape == (3, 60, 40) and turned[:, :, 24:].min() > 200 and turned[:, :, :16].max() < 50
    assert torch.equal(read_image(path), turned)  # a user's picture, without annotations
    with pytest.raises(UserError, match=r"photo.jpg"):
        read_image(path, (40, 61))


def with_exif(path: Path, orientation: int, width: int = 60, height: int = 40) -> Path:
    """An image with a bright top as stored, and an EXIF orientation."""
    levels = np.zeros((height, width), dtype=np.uint8)
    levels[: height // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(levels).save(path, exif=exif)
    return path


def test_exif_is_applied_or_ignored_with_and_without_annotations(tmp_path: Path):
    """Orientation 3 is a turn by 180 degrees: the bright top is at the bottom when upright."""
    path = with_exif(tmp_path / "photo.png", 3)
    stored, turned = read_image(path, (40, 60)), read_image(path)
    assert stored[:, :16].min() == 255 and turned[:, 24:].min() == 255 and turned[:, :16].max() == 0
    for size in (None, (40, 60)):
        assert torch.equal(read_image(path, size, "apply"), turned)
        assert torch.equal(read_image(path, size, "ignore"), stored)


def test_an_image_whose_size_contradicts_the_choice_is_refused_with_the_key(tmp_path: Path):
    path = with_exif(tmp_path / "photo.jpg", 6)
    assert read_image(path, (60, 40), "apply").shape == (3, 60, 40)
    with pytest.raises(UserError, match=r"has 40 x 60 pixels, but .* 60 x 40; give data.exif=ignore or auto, or corr"):
        read_image(path, (40, 60), "apply")
    with pytest.raises(UserError, match=r"has 60 x 40 pixels, but .* 40 x 60; give data.exif=apply or auto, or corr"):
        read_image(path, (60, 40), "ignore")
    with pytest.raises(UserError, match=r"say 61 x 40; correct its width"):
        read_image(path, (40, 61), "ignore")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("orientation", "size", "hidden"),
    [
        *[(1, (60, 40), False), (2, (60, 40), True), (3, (60, 40), True), (4, (60, 40), True), (5, (60, 40), False)],
        *[(6, (60, 40), False), (6, (40, 40), True), (8, (40, 40), True), (9, (40, 40), False)],
    ],
)
def test_an_orientation_is_hidden_if_the_size_is_the_same_both_ways(
    suffix: str, orientation: int, size: tuple[int, int], hidden: bool, tmp_path: Path
):
    assert image_files.hides_orientation(with_exif(tmp_path / f"photo.{suffix}", orientation, *size)) is hidden


def test_a_file_without_orientation_hides_none(tmp_path: Path):
    for suffix in ("jpg", "png", "tif", "gif", "bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"plain.{suffix}")
        assert not image_files.hides_orientation(tmp_path / f"plain.{suffix}")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert not image_files.hides_orientation(tmp_path / "broken.jpg")
    assert not image_files.hides_orientation(tmp_path / "missing.jpg")


@pytest.mark.parametrize("implementation", ["_in_strips", "_at_once"])
def test_normalising_agrees_with_a_plain_computation_and_padding_is_zero(implementation, monkeypatch):
    monkeypatch.setattr(image_files, "STRIP_ROWS", 4)
    monkeypatch.setattr(image_files, "_in_strips", getattr(image_files, implementation))
    images = torch.zeros(2, 3, 6, 9, dtype=torch.uint8)
    sizes = torch.tensor([[6, 5], [4, 9]])
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        pixels = torch.randint(0, 256, (3, height, width), generator=generator("image"))
        image[:, :height, :width] = pixels
    floats, half = normalise(images, sizes), normalise(images, sizes, torch.bfloat16)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for i, (height, width) in enumerate(sizes.tolist()):
        expected = (images[i, :, :height, :width].permute(1, 2, 0).numpy() / 255 - mean) / std
        result = floats[i, :, :height, :width].permute(1, 2, 0).double().numpy()
        np.testing.assert_allclose(result, expected, atol=2e-6)  # fp32 rounding of values up to 2.7
        assert (floats[i, :, height:] == 0).all() and (floats[i, :, :, width:] == 0).all()
    assert torch.equal(half, floats.bfloat16()) and floats.is_contiguous(memory_format=torch.channels_last)
    assert normalise(images, sizes, torch.float64).dtype == torch.float64
