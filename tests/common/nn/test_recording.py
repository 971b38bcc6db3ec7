import pytest
import torch
from torch import Tensor, nn

from common.nn.attention import Attention, record_attention
from common.nn.recording import Samples, record_samples


class Sampler(nn.Module):
    """A module with the contract of `record_samples`: its points are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded_samples: list[Samples] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, 2) -> x."""
        if self.recorded_samples is not None:
            self.recorded_samples.append(Samples(x[:, :, None, None, None], torch.ones(*x.shape[:2], 1, 1, 1)))
        return x


def test_each_call_is_recorded_under_its_modules_name_and_only_inside_the_context():
    model = nn.ModuleDict({"a": Sampler(), "b": nn.Sequential(nn.Linear(2, 2), Sampler())})
    first, second = torch.rand(1, 3, 2), torch.rand(1, 5, 2)
    model["a"](first)
    with record_samples(model) as samples:
        model["a"](first)
        model["a"](second)
    model["a"](first)
    assert {name: len(calls) for name, calls in samples.items()} == {"a": 2, "b.1": 0}
    assert torch.equal(samples["a"][1].locations[:, :, 0, 0, 0], second) and samples["a"][0].references is None
    assert model["a"].recorded_samples is None


def test_recording_ends_with_an_error_inside_the_context():
    model = Sampler()
    with pytest.raises(RuntimeError, match="stop"), record_samples(model):
        raise RuntimeError("stop")
    assert model.recorded_samples is None


def test_sampled_and_full_attention_are_recorded_apart():
    model = nn.ModuleList([Sampler(), Attention(width=4, heads=2)])
    with record_samples(model) as samples, record_attention(model) as maps:
        pass
    assert [*samples] == ["0"] and [*maps] == ["1"]
