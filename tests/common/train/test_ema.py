"""The moving average of weights: its recursion, its application to the model, and its state."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.files import checkpoint
from common.train.ema import Average


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def change(model: nn.Module, seed: int) -> None:
    """Change parameters and buffers, as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    model(torch.randn(5, 3, generator=generator, dtype=torch.float64))


def test_the_average_follows_its_recursion_with_a_growing_decay():
    """After update n (from 0): average = d average + (1 - d) weights, d = min(0.3, (1 + n) / (10 + n))."""
    model = make_model()
    average = Average(model, 0.3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for d in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):  # 4 / 13 is above 0.3
        change(model, int(1000 * d))
        average.update(model)
        expected = {name: d * expected[name] + (1 - d) * p.detach() for name, p in model.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(average.weights[name], value, rtol=0, atol=1e-14)
    assert average.updates == 5


def test_buffers_are_those_of_the_model():
    model = make_model()
    average = Average(model, 0.999)
    change(model, 0)
    average.update(model)
    for name, value in model.named_buffers():
        assert torch.equal(average.weights[name], value)
    assert int(average.weights["1.num_batches_tracked"]) == 1


def test_the_model_computes_with_the_average_inside_and_is_restored_on_exit():
    model = make_model().eval()
    average = Average(model, 0.9)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    change(model, 1)
    x = torch.randn(5, 3, dtype=torch.float64)
    output = model(x)
    with average.applied(model):
        assert not torch.equal(model(x), output)
        for name, value in model.state_dict().items():
            assert torch.equal(value, old[name])
    assert torch.equal(model(x), output)
    with pytest.raises(KeyError), average.applied(model):
        raise KeyError
    assert torch.equal(model(x), output)


def test_a_model_compiled_in_place_computes_with_the_average_and_is_not_compiled_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = make_model().eval()
    average = Average(model, 0.9)
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        model.compile(backend=backend)
        change(model, 1)
        own = model(x)
        compilations = len(compiled)
        assert compilations > 0
        average_keys = list(average.weights)
        with average.applied(model):
            torch.testing.assert_close(model(x), before)
        assert torch.equal(model(x), own) and len(compiled) == compilations
    average.update(model)
    assert list(average.weights) == average_keys == list(model.state_dict())


def test_shared_weights_stay_equal():
    model = make_model()
    model[2] = nn.Linear(3, 4).double()
    model[2].weight = model[0].weight
    average = Average(model, 0.9)
    with torch.no_grad():
        model[0].weight += 1
    average.update(model)
    assert torch.equal(average.weights["0.weight"], average.weights["2.weight"])


def test_a_restored_average_continues_bit_for_bit(tmp_path):
    model = make_model()
    average = Average(model, 0.9)
    for seed in range(3):
        change(model, seed)
        average.update(model)
    checkpoint.save(tmp_path / "a.pt", {"average": average.state_dict()})
    restored = Average(make_model(seed=1), 0.9)
    restored.load_state_dict(checkpoint.load(tmp_path / "a.pt")["average"])
    change(model, 3)
    for each in (average, restored):
        each.update(model)
    assert restored.updates == average.updates == 4
    for name, value in average.weights.items():
        assert torch.equal(restored.weights[name], value)


def test_the_averaged_weights_load_into_a_model():
    model = make_model()
    average = Average(model, 0.9)
    second = make_model(seed=1)
    second.load_state_dict(average.state_dict()["weights"], strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_another_models_average_is_refused():
    average = Average(make_model(), 0.9)
    with pytest.raises(UserError, match="another model"):
        average.load_state_dict(Average(nn.Linear(2, 2), 0.9).state_dict())
