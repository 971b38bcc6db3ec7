"""Image files of every mode, broken ones, and ones with EXIF rotation."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from common.data import images as image_files
from common.data.images import normalise, range_notes, read_image
from common.errors import UserError
from common.files.inputs import find
from common.machine.seeds import generator


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


# Grey images with more than 8 bits, and with floats.

RAMP = np.linspace(0, 1, 256, dtype=np.float64).reshape(16, 16)


def ramp(highest: int) -> np.ndarray:
    """Levels i = 0 ... 255 at the lowest value that has this level in the range from 0 to `highest`."""
    return (np.arange(256) * ((highest + 1) // 256)).reshape(16, 16)


DEEP = {
    "floats from 0 to 1": (RAMP.astype(np.float32), "from 0 to 1"),
    "floats of 8 bits": (ramp(255).astype(np.float32), "of 8 bits"),
    "floats of 12 bits": (ramp(4095).astype(np.float32), "of 12 bits"),
    "floats of 16 bits": (ramp(65535).astype(np.float32), "of 16 bits"),
    "32 bits, 8 used": (ramp(255).astype(np.int32), "of 8 bits"),
    "32 bits, 12 used": (ramp(4095).astype(np.int32), "of 12 bits"),
    "32 bits, 16 used": (ramp(65535).astype(np.int32), "of 16 bits"),
    "16 bits, 8 used": (ramp(255).astype(np.uint16), "of 8 bits"),
    "16 bits, 12 used": (ramp(4095).astype(np.uint16), "of 12 bits"),
    "16 bits": (ramp(65535).astype(np.uint16), "of 16 bits"),
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_and_float_images_are_scaled_by_their_range_and_noted(case: str, tmp_path: Path):
    """None becomes black, and each gets all 256 levels; only the range that a type is made for goes without a note."""
    values, name = DEEP[case]
    Image.fromarray(values).save(tmp_path / "deep.tif")
    image = read_image(tmp_path / "deep.tif")
    assert image.dtype == torch.uint8 and image.flatten(1).tolist() == [list(range(256))] * 3
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    files = [tmp_path / "plain.png", tmp_path / "deep.tif", tmp_path / "missing.png"]
    notes = range_notes(3, files.__getitem__)
    if name == "of 16 bits":
        assert not notes
    else:
        assert len(notes) == 1 and f"deep.tif); by their highest value they are read as images {name} (1)" in notes[0]
    assert range_notes(1, files.__getitem__) == range_notes(0, files.__getitem__) == []


def test_images_of_different_ranges_are_noted_to_differ_in_brightness(tmp_path: Path):
    for i, highest in enumerate((65535, 4095, 65535)):
        Image.fromarray(ramp(highest).astype(np.uint16)).save(tmp_path / f"{i}.png")
    notes = range_notes(3, lambda i: tmp_path / f"{i}.png")
    assert "of 16 bits (2), of 12 bits (1); images of different ranges do not have the same brightness" in notes[0]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 65536]], dtype=np.int32),
        np.array([[-1, 5]], dtype=np.int32),
        np.array([[-0.5, 0.5]], dtype=np.float32),
        np.array([[0.0, np.nan]], dtype=np.float32),
        np.array([[0.0, np.inf]], dtype=np.float32),
        np.array([[0.0, 70000.0]], dtype=np.float32),
    ],
    ids=str,
)
def test_values_without_a_known_range_are_refused_by_name(values: np.ndarray, tmp_path: Path):
    Image.fromarray(values).save(tmp_path / "wild.tif")
    with pytest.raises(UserError, match=r"wild\.tif has values from .* to .*; expected 0 to 1 .* convert it to 8 bits"):
        read_image(tmp_path / "wild.tif")


def test_a_deep_tiff_in_which_0_is_white_is_refused_by_name(tmp_path: Path):
    """Pillow inverts such images of 8 bits, but not those of 16."""
    path, values = tmp_path / "scan.tif", (np.arange(64).reshape(8, 8) * 1024).astype(np.uint16)
    Image.fromarray(values).save(path)
    assert read_image(path)[0, -1, -1] == 252
    Image.fromarray(values).save(path, tiffinfo={image_files.PHOTOMETRIC: 0})
    with pytest.raises(UserError, match=r"In the image .*scan\.tif, 0 is white .*; convert it to 8 bits\.$"):
        read_image(path)


def sixteen_bit_png(path: Path, values: np.ndarray) -> None:
    """Write (H, W, 3) uint16 as a PNG, which Pillow cannot."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_colour_images_of_16_bits_of_which_12_are_used_are_refused_by_name(tmp_path: Path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8, 1).repeat(3, axis=2)
    sixteen_bit_png(tmp_path / "deep.png", ramp * 65535)
    assert read_image(tmp_path / "deep.png").max() == 255
    sixteen_bit_png(tmp_path / "black.png", ramp * 0)
    assert read_image(tmp_path / "black.png").max() == 0
    sixteen_bit_png(tmp_path / "camera.png", ramp * 4095)
    with pytest.raises(UserError, match=r"camera\.png has 16 bits a channel and uses 12 of them; convert"):
        read_image(tmp_path / "camera.png")


def test_a_png_with_two_megabytes_of_metadata_is_read(tmp_path: Path):
    """Pillow refuses a text of more than one megabyte, as photo editors write it, before and after the pixels."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    Image.new("RGB", (6, 4), (7, 8, 9)).save(tmp_path / "edited.png", pnginfo=text)
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    assert read_image(tmp_path / "edited.png")[:, 0, 0].tolist() == [7, 8, 9]
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK, "other readers keep their limit"


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "TGA", "PCX", "DDS", "SGI", "JPEG2000", "ICNS", "IM"])
def test_only_the_promised_formats_are_opened_whatever_the_name(form: str, tmp_path: Path):
    """For an EPS, Pillow starts Ghostscript where it is installed."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 32)).save(tmp_path / "saved", format=form)
    (tmp_path / "saved").rename(path)
    with pytest.raises(
        UserError, match=r"photo.jpg is broken or no image \(its content is in none of the formats JPEG"
    ):
        read_image(path)
    assert range_notes(1, lambda index: path) == [] and not image_files.hides_orientation(path)


def test_pillow_opens_images_in_one_place():
    root = Path(image_files.__file__).parents[2]
    folders = [root / name for name in ("common", "detr", "vit", "seq2seq", "scripts")]
    files = [*(file for folder in folders for file in folder.rglob("*.py")), *root.glob("*.py")]
    assert [file.name for file in files if "Image.open(" in file.read_text("utf-8")] == ["images.py"]


@pytest.mark.timeout(60)
def test_a_named_pipe_has_no_range(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    assert range_notes(1, lambda index: tmp_path / "a.png") == []


@pytest.mark.parametrize(
    ("suffix", "form"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"), (".ppm", "PPM"), (".pgm", "PPM"), (".JPE", "JPEG")],
)
def test_images_with_rarer_endings_are_listed_and_read(suffix: str, form: str, tmp_path: Path):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    Image.new("RGB", (6, 4), (90, 90, 90)).save(tmp_path / f"photo{suffix}", format=form)
    (file,) = find(str(tmp_path), (), [])
    assert (read_image(file.path).float() - 90).abs().max() < 5
