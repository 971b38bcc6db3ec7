"""The two implementations of bilinear sampling agree in values and gradients, also where cells and maps end."""

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from detr.models.sampling import sample, sample_grid, sample_table

SHAPES = ((5, 4), (3, 2), (1, 1))
BATCH, QUERIES, HEADS, WIDTH, POINTS = 2, 3, 2, 3, 4
PLACES = {  # x and y relative to a map; a cell's side is 1 / 4 or 1 / 5 in the first level
    "inside": lambda u: u,
    "around the border": lambda u: u.round() + (u - 0.5) * 0.2,
    "far outside": lambda u: 1000 * (u - 0.5).sign() + u,
    "half a cell outside": lambda u: 0.5 + (u - 0.5).sign() * (0.5 + 0.125 * u),
}


def inputs(places: str = "inside", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations and weights, which require gradients."""
    rng = generator("sampling")
    shape = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    values = torch.randn(BATCH, sum(h * w for h, w in SHAPES), HEADS * WIDTH, generator=rng, dtype=dtype)
    locations = PLACES[places](torch.rand(*shape, 2, generator=rng, dtype=dtype))
    weights = torch.randn(shape, generator=rng, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (values, locations, weights))  # type: ignore[return-value]


@pytest.mark.parametrize("places", PLACES)
def test_table_and_grid_agree_in_values_and_gradients(places: str) -> None:
    tensors = inputs(places)
    table, grid = (function(tensors[0], SHAPES, *tensors[1:]) for function in (sample_table, sample_grid))
    torch.testing.assert_close(table, grid, rtol=0, atol=1e-12)
    gradient = torch.randn(table.shape, generator=generator("gradient"), dtype=table.dtype)
    ours, reference = (torch.autograd.grad(output, tensors, gradient) for output in (table, grid))
    for actual, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert reference[0].any() == (places != "far outside")


def test_at_the_centre_of_a_cell_the_sample_is_its_value() -> None:
    """One point a query, of weight 1, at each cell of one level with one head."""
    height, width = SHAPES[0]
    values = torch.randn(1, height * width, WIDTH, generator=generator("cells"), dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    locations = torch.stack([x / width, y / height], -1).double().view(1, -1, 1, 1, 1, 2)
    sampled = sample_table(values, SHAPES[:1], locations, torch.ones(locations.shape[:-1], dtype=torch.float64))
    torch.testing.assert_close(sampled, values, rtol=0, atol=1e-6)  # the centres are rounded to float32


@pytest.mark.parametrize("places", ["inside", "half a cell outside"])
def test_gradients_are_those_of_finite_differences(places: str) -> None:
    values, locations, weights = inputs(places)
    assert torch.autograd.gradcheck(lambda v, p, w: sample_table(v, SHAPES, p, w), (values, locations, weights))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_location_that_is_no_number_changes_only_its_own_output(number: float) -> None:
    """NaN gives NaN; an infinite location is outside the map."""
    values, locations, weights = inputs()
    expected = sample_table(values, SHAPES, locations, weights).unflatten(-1, (HEADS, WIDTH))
    changed = locations.detach().clone()
    changed[1, 2, 1, 0, 3, 0] = number
    changed.requires_grad_()
    output = sample_table(values, SHAPES, changed, weights)
    output.sum().backward()
    assert values.grad is not None and values.grad[0].isfinite().all()
    output = output.unflatten(-1, (HEADS, WIDTH))
    assert output[1, 2, 1].isnan().all() == (number != number)
    same = torch.ones(BATCH, QUERIES, HEADS, dtype=torch.bool)
    same[1, 2, 1] = False
    assert output[same].equal(expected[same])
    if number == number:
        others = changed.detach().clone()
        others[1, 2, 1, 0, 3, 0] = 10.0
        assert output.equal(sample_table(values, SHAPES, others, weights).unflatten(-1, (HEADS, WIDTH)))


def test_under_autocast_bf16_values_are_sampled_in_full_precision() -> None:
    """All inputs in bf16 are those of fp32 after rounding, so the outputs are equal."""
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        output = sample(tensors[0], SHAPES, *tensors[1:])
    expected = sample_table(*[tensors[0].float()], SHAPES, *[tensor.float() for tensor in tensors[1:]])
    assert output.dtype == torch.float32 and output.equal(expected)
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 for tensor in tensors)


def test_second_derivatives_are_refused() -> None:
    values, locations, weights = inputs()
    output = sample_table(values, SHAPES, locations, weights)
    gradient = torch.autograd.grad(output.square().sum(), locations, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_shapes_alone_are_enough_to_trace_it() -> None:
    """torch.compile and the count of floating-point operations run it on tensors without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = [tensor.shape for tensor in inputs()]
    with FakeTensorMode():
        values, locations, weights = (torch.empty(shape).requires_grad_() for shape in shapes)
        output = sample_table(values, SHAPES, locations, weights)
        output.sum().backward()
    assert output.shape == (BATCH, QUERIES, HEADS * WIDTH)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (values, locations, weights))
