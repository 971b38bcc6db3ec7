import torch

from common.report.colours import BLUES, HEAT, ramp


def test_a_ramp_meets_its_anchors_and_lies_between_them() -> None:
    """White to (190, 215, 235) by a half: (222.5, 235, 245), to even."""
    values = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.125]])
    colours = ramp(values, BLUES)
    assert colours.shape == (3, 2, 3) and colours.dtype == torch.uint8
    assert [tuple(colours[:, i // 3, i % 3].tolist()) for i in range(6)] == [*BLUES, (222, 235, 245)]


def test_values_outside_count_as_the_ends() -> None:
    assert ramp(torch.tensor([-0.1, 1.1]), HEAT).T.tolist() == [[*HEAT[0]], [*HEAT[-1]]]
