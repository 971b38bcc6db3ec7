import torch

from common.report.colours import BLUES, HEAT, ramp


def test_a_ramp_passes_through_its_anchors_and_interpolates_between_them() -> None:
    """Halfway from white to (190, 215, 235) is (222.5, 235, 245), rounded to even."""
    values = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.125]])
    colours = ramp(values, BLUES)
    assert colours.shape == (3, 2, 3) and colours.dtype == torch.uint8
    assert [tuple(colours[:, i // 3, i % 3].tolist()) for i in range(6)] == [*BLUES, (222, 235, 245)]


def test_values_outside_the_range_are_clamped() -> None:
    assert ramp(torch.tensor([-0.1, 1.1]), HEAT).T.tolist() == [[*HEAT[0]], [*HEAT[-1]]]
