"""The slim ResNet against torchvision's blocks with the same weights, and for images beside larger ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from common.errors import UserError
from common.machine.seeds import generator
from detr.models.slim_resnet import SlimOptions, SlimResNet
from tests.detecting import batch, pictures

PAPER = {"blocks": [1, 2, 2, 2], "channels": [16, 32, 64, 128], "stem": "large", "norm": "batch"}


def slim(**changes: Any) -> SlimResNet:
    """A network with random weights, norms and biases too, in float64."""
    network = SlimResNet(SlimOptions(**{**PAPER, **changes})).double()
    rng = generator("slim")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.1, generator=rng)
    return network


def torchvisions(ours: SlimResNet) -> nn.Sequential:
    """The paper's backbone of torchvision's blocks; the stem's norm is frozen, the others are live."""

    def stage(inputs: int, channels: int, count: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        first = BasicBlock(inputs, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(count - 1)))

    names = ["conv1", "bn1", "relu", "pool", "layer1", "layer2", "layer3", "layer4"]
    modules = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), FrozenBatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    modules += [stage(16, 16, 1, 1), stage(16, 32, 2, 2), stage(32, 64, 2, 2), stage(64, 128, 2, 2)]
    network = nn.Sequential()
    for name, module in zip(names, modules, strict=True):
        network.add_module(name, module)
    network.double().load_state_dict(ours.state_dict())
    return network


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("images"))


@pytest.mark.parametrize("training", [True, False])
def test_features_equal_torchvisions_blocks(training):
    ours = slim().train(training)
    theirs, x = torchvisions(ours).train(training), images(2, 3, 75, 130)
    ((features, real, stride),) = ours(x, None)
    assert stride == 32
    assert real is None and features.shape[-2:] == ours.grid(75, 130) == (3, 5)
    # Observed: 1e-15 relative. The frozen norm is folded into the convolution, which rounds differently.
    assert torch.allclose(features, theirs(x), rtol=1e-9, atol=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize(("stem", "norm"), [("large", "batch"), ("small", "group"), ("large", "group")])
def test_an_image_beside_a_larger_one_has_the_features_that_it_has_alone(stem, norm):
    network = slim(stem=stem, norm=norm).eval()
    first, second = (picture.double() for picture in pictures((70, 90), (130, 150)))
    padded, sizes = batch([first, second])
    ((together, real, _),) = network(padded, sizes)
    for i, picture in enumerate((first, second)):
        alone = network(picture[None], None)[0].features
        height, width = alone.shape[-2:]
        assert torch.allclose(together[[i], :, :height, :width], alone, rtol=1e-9, atol=1e-12)
        assert real[i].sum() == height * width and real[i, :height, :width].all()


def test_group_norms_do_not_depend_on_the_batch_in_training_and_batch_norms_do():
    x = images(3, 3, 64, 64)
    for norm, independent in (("group", True), ("batch", False)):
        network = slim(norm=norm).train()
        together, alone = network(x, None)[0].features[:1], network(x[:1], None)[0].features
        assert torch.allclose(together, alone, rtol=1e-9, atol=1e-12) == independent


@pytest.mark.parametrize("blocks", [[], [1, 1]])
def test_stages_need_blocks_and_channels(blocks):
    with pytest.raises(UserError, match=r"model.backbone.blocks=.* one number for each stage"):
        SlimOptions(blocks=blocks, channels=[16], stem="small", norm="group")
