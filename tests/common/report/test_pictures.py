import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from common.report.pictures import pad_and_stack, write_picture


def test_pictures_are_padded_with_black_and_stacked():
    tall, wide = torch.full((3, 5, 2), 7, dtype=torch.uint8), torch.full((3, 2, 4), 9, dtype=torch.uint8)
    batch = pad_and_stack([tall, wide])
    assert batch.shape == (2, 3, 5, 4) and batch.dtype == torch.uint8
    assert torch.equal(batch[0, :, :, :2], tall) and torch.equal(batch[1, :, :2], wide)
    assert batch.sum() == tall.sum() + wide.sum()


def test_a_picture_is_written_in_the_format_of_the_suffix(tmp_path):
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_picture(picture, tmp_path / "new" / "picture.png")
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "new" / "picture.png")), picture)
    write_picture(picture, tmp_path / "picture.jpg")
    assert (tmp_path / "picture.jpg").read_bytes()[:2] == b"\xff\xd8"
