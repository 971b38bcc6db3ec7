"""The backbone against torchvision's, and images alone against padded ones."""

import copy
import itertools
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.resnet import Backbone, BackboneOptions, real_positions

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet50 DC5", "resnet101 DC5"]


def options(name: str = "resnet18", **changed: object) -> BackboneOptions:
    """Options from a name; `resnet50 DC5` has dilation."""
    name, _, dilation = name.partition(" ")
    return BackboneOptions(**{"name": name, "weights": "none", "dilation": bool(dilation), "frozen": 0, **changed})


def randomise_norms(model: nn.Module, seed: int) -> None:
    """Fill the norms' affine parameters and statistics at random: ones and zeros would hide a mistake."""
    rng = generator("backbone", seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.3, 0.9, generator=rng)
            elif tensor.dim() == 1:
                tensor.normal_(std=0.3, generator=rng)


def backbone(name: str = "resnet18", *, official_padding: bool = False, seed: int = 0, **changed: object) -> Backbone:
    torch.manual_seed(seed)
    model = Backbone(options(name, **changed), official_padding=official_padding)
    randomise_norms(model, seed)
    return model


def images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, *size, dtype=dtype, generator=generator(*size)) for size in sizes]


def batch(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images padded with zeros at bottom and right to the largest size, as by `collate`, and their sizes."""
    sizes = torch.tensor([picture.shape[1:] for picture in pictures])
    padded = torch.zeros(len(pictures), 3, *sizes.amax(0).tolist(), dtype=pictures[0].dtype)
    for picture, canvas in zip(pictures, padded, strict=True):
        canvas[:, : picture.shape[1], : picture.shape[2]] = picture
    return padded, sizes


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value."""
    return ((a - b).abs().max() / b.abs().max()).item()


class Torchvisions(nn.Module):
    """torchvision's ResNet up to its last stage, with torchvision's frozen norm."""

    def __init__(self, name: str):
        super().__init__()
        name, _, dilation = name.partition(" ")
        dilate = [False, False, True] if dilation else None
        make = getattr(torchvision.models, name)
        self.net = make(weights=None, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=dilate)
        self.net.avgpool, self.net.fc = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@pytest.mark.parametrize("name", RESNETS)
def test_features_and_gradients_are_torchvisions(name: str) -> None:
    """In float64, because our norms are folded into the weights, which fp32 would round differently."""
    torch.manual_seed(1)
    theirs = Torchvisions(name)
    randomise_norms(theirs, 1)
    ours = Backbone(options(name), official_padding=False)
    ours.load_state_dict(theirs.net.state_dict())
    ours.double(), theirs.double()
    (picture,) = images((65, 33), dtype=torch.float64)
    features, real = ours(picture[None], None)
    expected = theirs(picture[None])
    assert real is None and features.shape[1] == ours.channels
    assert difference(features, expected) < 1e-12

    direction = torch.randn(features.shape, dtype=features.dtype, generator=generator("direction"))
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.net.named_parameters())
    assert our_parameters.keys() == their_parameters.keys()
    gradients = zip(
        torch.autograd.grad(features, list(our_parameters.values()), direction),
        torch.autograd.grad(expected, [their_parameters[key] for key in our_parameters], direction),
        strict=True,
    )
    assert max(difference(our_gradient, their_gradient) for our_gradient, their_gradient in gradients) < 1e-11


@pytest.mark.parametrize("height, width", [(1, 1), (32, 32), (63, 33), (64, 97), (31, 129)])
def test_features_of_any_size_are_torchvisions_in_fp32(height: int, width: int) -> None:
    theirs = Torchvisions("resnet18")
    randomise_norms(theirs, 2)
    ours = Backbone(options(), official_padding=False)
    ours.load_state_dict(theirs.net.state_dict())
    (picture,) = images((height, width))
    with torch.no_grad():
        features, _ = ours(picture[None], None)
        assert features.shape == (1, 512, -(-height // 32), -(-width // 32))
        assert difference(features, theirs(picture[None])) < 1e-5  # rounding, through 18 layers


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet50", "resnet50 DC5")]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ["small", "resnet18", *LARGE])
def test_features_do_not_depend_on_the_rest_of_the_batch(name: str, training: bool) -> None:
    model = backbone(name).train(training)
    stride = 8 if "small" in name else 16 if "DC5" in name else 32
    pictures = images((33, 70), (161, 129), (64, 31))
    with torch.no_grad():
        together, real = model(*batch(pictures))
        for i, picture in enumerate(pictures):
            height, width = (-(-side // stride) for side in picture.shape[1:])
            alone, _ = model(picture[None], None)
            assert alone.shape[2:] == (height, width)
            assert difference(together[i, :, :height, :width], alone[0]) < 1e-5
            assert real[i].sum() == height * width and real[i, :height, :width].all()


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "resnet50 DC5"])
def test_official_padding_leaks_into_the_features(name: str) -> None:
    """The control of the test above."""
    model = backbone(name, official_padding=True)
    pictures = images((64, 96), (192, 192))  # multiples of 32, for which the official mask is exact
    with torch.no_grad():
        alone, _ = model(pictures[0][None], None)
        together, real = model(*batch(pictures))
    height, width = alone.shape[2:]
    assert real[0].sum() == height * width
    assert difference(together[0, :, :height, :width], alone[0]) > 1e-2


def test_gradients_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = backbone("resnet50").double()
    pictures = images((33, 70), (97, 129), dtype=torch.float64)
    direction = torch.randn(1, 2048, 4, 5, dtype=torch.float64, generator=generator("direction"))

    def gradient(features: Tensor, real: Tensor | None) -> list[Tensor]:
        value = features * direction[:, :, : features.shape[2], : features.shape[3]]
        value = value if real is None else value * real[:, None]
        return list(torch.autograd.grad(value.sum(), list(model.parameters())))

    together = gradient(*model(*batch(pictures)))
    alone = [gradient(*model(picture[None], None)) for picture in pictures]
    for of_batch, *of_images in zip(together, *alone, strict=True):
        assert difference(of_batch, sum(of_images)) < 1e-10


@pytest.mark.parametrize("official_padding", [False, True])
def test_sizes_that_fill_the_batch_change_nothing(official_padding: bool) -> None:
    model = backbone("resnet18", official_padding=official_padding)
    pictures = torch.stack(images((65, 40), (65, 40)))
    with torch.no_grad():
        expected, _ = model(pictures, None)
        features, real = model(pictures, torch.tensor([[65, 40]] * 2))
    assert torch.equal(features, expected) and real.all()


def test_official_mask_is_the_padded_mask_at_the_nearest_position() -> None:
    """65 rows become three positions: ours divide the true height; the official mask is read at rows 0, 21 and 43."""
    default, official = backbone("resnet18"), backbone("resnet18", official_padding=True)
    padded, sizes = batch(images((32, 64), (33, 64), (65, 60)))
    with torch.no_grad():
        _, ours = default(padded, sizes)
        _, theirs = official(padded, sizes)
    assert ours[:, :, 0].sum(1).tolist() == [1, 2, 3]
    assert theirs[:, :, 0].sum(1).tolist() == [2, 2, 3]


def test_real_positions_follow_layers_that_halve() -> None:
    sizes = torch.tensor([[1, 64], [33, 7], [64, 32]])
    for stride in (1, 2, 4, 8, 16, 32):
        real = real_positions((64, 64), sizes, stride)
        height, width = 64, 64
        rows, columns = sizes.unbind(1)
        for _ in range(stride.bit_length() - 1):
            height, width, rows, columns = (height + 1) // 2, (width + 1) // 2, (rows + 1) // 2, (columns + 1) // 2
        assert real.shape == (3, height, width)
        assert torch.equal(real.sum((1, 2)), rows * columns)


@pytest.mark.parametrize("frozen", [0, 1, 2, 5])
def test_frozen_parts_get_no_gradient_and_all_others_do(frozen: int) -> None:
    model = backbone("resnet18", frozen=frozen)
    features, _ = model(*batch(images((33, 40), (64, 64))))
    if frozen < 5:
        features.square().sum().backward()
    parts = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
    for name, parameter in model.named_parameters():
        trained = parts[name.split(".")[0]] >= frozen
        assert parameter.requires_grad is trained, name
        assert (parameter.grad is not None and parameter.grad.any().item()) is trained, name


def test_frozen_norms_are_buffers_with_torchvisions_names() -> None:
    model = backbone("resnet50")
    assert not any("bn" in name or "downsample.1" in name for name, _ in model.named_parameters())
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_buffers()} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
    }


def test_small_has_stride_8_and_resnets_32_or_16_dilated() -> None:
    for name, stride, channels in [("small", 8, 128), ("resnet34", 32, 512), ("resnet50 DC5", 16, 2048)]:
        model = backbone(name)
        with torch.no_grad():
            features, _ = model(torch.zeros(1, 3, 64, 128), None)
        assert features.shape == (1, channels, 64 // stride, 128 // stride) and model.channels == channels


def test_channels_last_and_half_precision_run() -> None:
    model = backbone("resnet18")
    padded, sizes = batch(images((64, 70), (96, 96)))
    with torch.no_grad():
        expected, _ = model(padded, sizes)
        features, _ = model(padded.to(memory_format=torch.channels_last), sizes)
        assert difference(features, expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            half, _ = model(padded, sizes)
        assert difference(half.float(), expected) < 0.1


def test_dilation_of_basic_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="needs resnet50 or resnet101, not resnet18"):
        backbone("resnet18 DC5")


def test_cached_weights_follow_every_write():
    """Folded weights are cached without gradients; writes to weights and statistics, and other types, take effect."""
    model = backbone("resnet18").eval()
    (picture,) = images((64, 64))

    def features() -> torch.Tensor:
        with torch.no_grad():
            return model(picture[None], None)[0]

    outputs = [features(), features()]
    assert torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1.5)
        outputs.append(features())
        model.layer2[0].downsample[1].running_var.mul_(2)
        outputs.append(features())
    model.load_state_dict(backbone("resnet18").state_dict())
    randomise_norms(model, 7)
    outputs.append(features())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs[1:]))
    fresh = backbone("resnet18").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(picture[None], None)[0], outputs[-1])
    trained = model(picture[None], None)[0].detach()  # by another kernel, with another order of sums
    torch.testing.assert_close(trained, outputs[-1], msg="training computes the same")
    with torch.no_grad():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(picture[None], None)[0], outputs[-1]), "copies and pickles compute the same"
    with torch.autocast("cpu", torch.bfloat16):
        assert features().dtype == torch.bfloat16
    assert torch.equal(features(), outputs[-1])
