"""Masks on the map of a promptable model and back."""

import torch

from detr.criterion.mask_maps import real_cells, to_cells, to_pixels


def test_a_cell_belongs_to_the_object_that_fills_more_than_half_of_it() -> None:
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[0, :2, :3] = True  # two rows of three columns: one full cell of 2 x 2, and half of the next
    mask[0, 4, 4:6] = mask[0, 5, 4] = True  # three of four pixels
    cells = to_cells(mask, image_size=8, cells=4)
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 0, 0] = expected[0, 2, 2] = True
    assert torch.equal(cells, expected)


def test_a_small_object_does_not_vanish() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 3, 3] = mask[0, 3, 4] = True
    cells = to_cells(mask, image_size=8, cells=2)
    assert cells[0].tolist() == [[True, True], [False, False]] and not cells[1].any()


def test_masks_at_the_maps_resolution_are_unchanged() -> None:
    mask = torch.rand(3, 5, 7) < 0.5
    cells = to_cells(mask, image_size=8, cells=8)
    assert torch.equal(cells[:, :5, :7], mask) and cells.sum() == mask.sum()


def test_cells_are_real_if_their_centre_is_in_the_image() -> None:
    real = real_cells(torch.tensor([[8, 3], [5, 8]]), image_size=8, cells=4)
    assert real[0].tolist() == [[True, False, False, False]] * 4  # centres at 1, 3, 5, 7; 3 is not below 3
    assert real[1, :, 0].tolist() == [True, True, False, False] and real[1, 0].all()


def test_logits_return_to_the_original_pixels_without_the_padding() -> None:
    """A map whose left half is positive, of an image that fills the left three quarters of the square."""
    logits = torch.full((1, 1, 8, 8), -1.0)
    logits[..., :4] = 1.0
    masks = to_pixels(logits, size=(16, 12), original_size=(32, 24), image_size=16) > 0
    assert masks.shape == (1, 1, 32, 24)
    assert masks[..., :15].all() and not masks[..., 17:].any()  # the edge is at 16; resizing smooths it


def test_nothing_is_resized_at_equal_sizes() -> None:
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_pixels(logits, (6, 7), (6, 7), 8), logits[..., :6, :7])
