"""Models call their linear maps as modules: hooks see every map, and other programs' tools work on opened models.

Distances are root mean squares of differences, relative to the standard deviation of the outputs. With 8-bit weights
and inputs they were 1 to 10 % here. Heads are not quantised, as usual: a random DETR's queries give nearly equal
answers.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic
from torch.nn.utils import prune

from common.config.check import build
from common.config.compose import configure
from common.machine.seeds import generator
from common.nn.linear import Linear, Projections, Tied, opened

Call = Callable[[nn.Module], Tensor]
MAX_INT8_DISTANCE = 0.15
HEADS = ("head", "class_head", "box_head", "output")
SMALL = {
    "vit": ["model.layers=2"],
    "swin": ["model.patch_size=2"],
    "seq2seq": ["model.encoder_layers=1", "model.decoder_layers=1"],
    "gpt": ["model.layers=2"],
    "gpt_translator": ["model.layers=2"],
    "detr": ["model.encoder_layers=1", "model.decoder_layers=1"],
}
MODELS = {
    "vit": [],
    "vit, multiply": ["model.embedding=multiply", "model.representation=24", "model.blocks.qk_norm=true"],
    "swin": [],
    "seq2seq": [],
    "seq2seq, untied": ["model.tied=none", "model.output_bias=true"],
    "gpt": [],
    "gpt_translator": [],
    "detr": [],
}


def randomised(model: nn.Module) -> nn.Module:
    """The model with every parameter perturbed at random, including those initialised with zeros."""
    rng = generator("opened")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 * parameter.std() if parameter.dim() > 1 and parameter.any() else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=rng) * spread)
            if name.endswith("in_proj.weight"):
                parameter[: 2 * len(parameter) // 3] *= 2  # queries and keys, so that attention is not uniform
    return model.eval()


@pytest.fixture(params=MODELS)
def model_and_call(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    """A model of each kind, and a function from the model to its outputs (..., C)."""
    torch.manual_seed(0)
    name, rng = request.param.partition(",")[0], generator("inputs")
    section = configure("train", [f"model={name}", *SMALL[name], *MODELS[request.param]])["model"]
    if name in ("vit", "swin"):
        pixels = torch.randn(16, 1, 8, 8, generator=rng)
        return randomised(build(section, classes=10, channels=1, image_size=(8, 8))), lambda model: model(pixels)
    if name == "detr":
        pixels = torch.randn(3, 3, 64, 64, generator=rng)
        sizes = torch.tensor([[64, 64], [40, 64], [64, 32]])
        model = randomised(build(section, classes=5))
        nn.init.normal_(model.queries.weight, std=3)  # so that their answers differ
        return model, lambda model: torch.stack(
            [torch.cat([*outputs.values()], -1) for outputs in model(pixels, sizes)]
        )
    if name == "gpt":
        texts = torch.randint(50, (8, 9), generator=rng)
        return randomised(build(section, vocabulary=50)), lambda model: model(texts)
    tied = "untied" not in request.param
    model = randomised(build(section, vocabularies=(50, 50), joint=tied))
    source, target = (torch.randint(4, 50, (8, length), generator=rng) for length in (9, 7))
    lengths = torch.tensor([9, 9, 5, 9, 1, 2, 9, 9])

    def translate(model: nn.Module) -> Tensor:
        """Logits by teacher forcing and, if no gradient is needed, also token by token."""
        whole = model(source, lengths, target)
        if torch.is_grad_enabled():
            return whole
        state = model.encode(source, lengths)
        return torch.cat([whole, *(model.step(state, tokens)[:, None] for tokens in target.unbind(1))], dim=1)

    return model, translate


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.flatten(0, -2).std(0).mean())


def maps(model: nn.Module, *types: type[nn.Module]) -> dict[str, nn.Module]:
    """The modules of exactly these types."""
    return {name: module for name, module in model.named_modules() if type(module) in types}


def is_no_head(name: str) -> bool:
    return name.split(".")[0] not in HEADS


@torch.no_grad()
def test_hooks_fire_for_every_projection_with_its_inputs_and_outputs(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    projections, tensors = maps(model, Linear, Projections, Tied), {}
    for name, module in projections.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: tensors.update({name: (inputs[0], output)}))
    call(model)
    assert tensors.keys() == projections.keys()
    assert not maps(model, nn.Linear), "all maps are our own type"
    for name, module in maps(model, Linear).items():
        x, y = tensors[name]
        assert (x.shape[-1], y.shape[-1]) == (module.in_features, module.out_features), name
        torch.testing.assert_close(y, nn.functional.linear(x, module.weight, module.bias), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hook_that_changes_a_maps_output_changes_the_models_output(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    expected = call(model)
    for name, module in maps(model, Linear, Tied).items():
        handle = module.register_forward_hook(lambda _, inputs, output: output + torch.arange(output.shape[-1]))
        assert not torch.allclose(call(model), expected), name
        handle.remove()


@torch.no_grad()
def test_an_opened_model_has_plain_maps_and_equal_outputs_and_the_original_is_unchanged(
    model_and_call: tuple[nn.Module, Call],
) -> None:
    model, call = model_and_call
    names, expected = [*model.state_dict()], call(model)
    plain = opened(model)
    assert not maps(plain, Linear, Projections, Tied) and not plain.training
    joint_count = len(maps(model, Projections))
    assert len(maps(plain, nn.Linear)) == len(maps(model, Linear, Tied)) + 3 * joint_count
    torch.testing.assert_close(call(plain), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    for parameter in plain.parameters():
        parameter.zero_()
    assert [*model.state_dict()] == names and torch.equal(call(model), expected)


def test_gradients_of_an_opened_model_are_those_of_the_model(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    plain = opened(model)
    for variant in (model, plain):
        call(variant).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name in [*expected]:
        if "in_proj." in name:
            prefix, leaf = name.rsplit(".", 1)
            gradients[name] = torch.cat([gradients[f"{prefix}.{part}.{leaf}"] for part in "qkv"])
        elif gradients[name] is None:  # of patches: their weight has four axes
            gradients[name] = gradients[name.replace("patches.", "patches.multiply.")].view_as(expected[name])
    tolerance = 1e-4 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=tolerance, msg=name)


@torch.no_grad()
def test_torch_ao_quantises_every_map_of_an_opened_model_but_its_heads(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    expected, plain = call(model), opened(model)
    quantisable = {name for name in maps(plain, nn.Linear) if is_no_head(name)}
    quantised = quantize_dynamic(plain, dict.fromkeys(quantisable, default_dynamic_qconfig), dtype=torch.qint8)
    assert maps(quantised, torch.ao.nn.quantized.dynamic.Linear).keys() == quantisable and len(quantisable) > 10
    assert not any(is_no_head(name) for name in maps(quantised, nn.Linear))
    assert 1e-5 < distance(call(quantised), expected) < MAX_INT8_DISTANCE


@torch.no_grad()
def test_torch_ao_replaces_every_map_by_its_type(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    expected, plain = call(model), opened(model)
    count = len(maps(plain, nn.Linear))
    quantised = quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert len(maps(quantised, torch.ao.nn.quantized.dynamic.Linear)) == count and not maps(quantised, nn.Linear)
    assert not torch.equal(call(quantised), expected)


@torch.no_grad()
def test_torchao_quantises_the_maps_of_an_opened_model_but_for_its_heads(
    model_and_call: tuple[nn.Module, Call],
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, call = model_and_call
    expected, plain = call(model), opened(model)
    quantisable = {name: module for name, module in maps(plain, nn.Linear).items() if is_no_head(name)}
    quantization.quantize_(
        plain,
        quantization.Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: type(module) is nn.Linear and is_no_head(name),
    )
    replaced = {name for name, module in maps(plain, nn.Linear).items() if _is_quantised(module.weight)}
    assert replaced == quantisable.keys() and len(replaced) > 10
    assert 1e-5 < distance(call(plain), expected) < MAX_INT8_DISTANCE


def _is_quantised(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao") or type(weight.data).__module__.startswith("torchao")


class LowRank(nn.Module):
    """Two narrow linear maps, as another program would insert them."""

    def __init__(self, plain: nn.Linear, rank: int):
        super().__init__()
        left, values, right = torch.linalg.svd(plain.weight.detach(), full_matrices=False)
        self.inward = nn.Linear(plain.in_features, len(values[:rank]), bias=False)
        self.outward = nn.Linear(len(values[:rank]), plain.out_features)
        self.inward.weight.data = right[:rank]
        self.outward.weight.data = left[:, :rank] * values[:rank]
        self.outward.bias.data = torch.zeros(plain.out_features) if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.outward(self.inward(x))


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 1000], ids=["low", "full"])
def test_every_map_can_be_replaced_by_a_low_rank_pair(model_and_call: tuple[nn.Module, Call], rank: int) -> None:
    model, call = model_and_call
    expected, plain = call(model), opened(model)
    for name in maps(plain, nn.Linear):
        plain.set_submodule(name, LowRank(plain.get_submodule(name), rank))
    error = distance(call(plain), expected)
    assert error < 1e-3 if rank == 1000 else error > 0.01


@torch.no_grad()
def test_pruning_nothing_changes_nothing_and_pruning_half_does(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    expected = call(model)
    for amount in (0.0, 0.5):
        plain = opened(model)
        for module in maps(plain, nn.Linear).values():
            prune.l1_unstructured(module, "weight", amount)
        error = distance(call(plain), expected)
        assert error < 1e-3 if amount == 0 else error > 0.01


@torch.no_grad()
def test_a_weight_changed_through_data_after_inference_takes_effect(model_and_call: tuple[nn.Module, Call]) -> None:
    model, call = model_and_call
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            before = call(model)
            parameter.data.mul_(1.5).add_(0.01 * torch.randn(parameter.shape, generator=generator(name)))
            after = call(model)
            fresh = copy.deepcopy(model)  # without cached weights
            assert not torch.equal(after, before), name
            assert torch.equal(after, call(fresh)), name


def test_a_tied_output_adds_no_key_and_stays_tied_in_copies() -> None:
    embedding = nn.Embedding(7, 5)
    model = nn.ModuleDict({"embedding": embedding, "output": Tied(embedding)})
    assert [*model.state_dict()] == ["embedding.weight"] == [name for name, _ in model.named_parameters()]
    copied, x = copy.deepcopy(model), torch.randn(2, 5, generator=generator("tied"))
    with torch.no_grad():
        copied["embedding"].weight.zero_()
        assert not copied["output"](x).any() and model["output"](x).any()
    plain = opened(model)
    assert plain["output"].weight is plain["embedding"].weight is not model["embedding"].weight
