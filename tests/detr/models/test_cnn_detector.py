"""torchvision's detectors as our models: parity with torchvision called directly, padding, precisions, gradients."""

import copy
from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.detection as torchvision_detection
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from common.config.check import build
from common.config.compose import configure
from common.data.images import MEAN, STD
from common.errors import UserError

SMALL = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos")
R50 = {
    "faster_rcnn_r50_fpn": torchvision_detection.fasterrcnn_resnet50_fpn,
    "mask_rcnn_r50_fpn": torchvision_detection.maskrcnn_resnet50_fpn,
    "retinanet_r50_fpn": torchvision_detection.retinanet_resnet50_fpn,
    "fcos_r50_fpn": torchvision_detection.fcos_resnet50_fpn,
}
CLASSES = 3
EVERYTHING = ("model.detections.threshold=0", "model.detections.limit=50")
UNNORMALISED = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def built(name: str, *overrides: str) -> Any:
    """A model of CLASSES classes with random weights, without weights of ImageNet."""
    torch.manual_seed(0)
    weights = [] if name in SMALL else ["model.backbone.weights=none"]
    model = build(configure("train", [f"model={name}", *weights, *overrides])["model"], classes=CLASSES)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Redraw the last layers, which start near zero, and the biases, so that anchors differ in boxes and scores."""
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name and "bn" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
        if any(word in name for word in ("cls_", "bbox_", "module_list", "mask_fcn_logits")) and parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(3, *size, generator=rng) for size in sizes]


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A batch of images (B, 3, H, W), zero in the padding, and their sizes (B, 2)."""
    sizes = torch.tensor([part.shape[1:] for part in parts])
    batch = torch.zeros(len(parts), 3, *sizes.amax(0).tolist())
    for image, part in zip(batch, parts, strict=True):
        image[:, : part.shape[1], : part.shape[2]] = part
    return batch, sizes


def objects(*counts: int, size: tuple[int, int] = (64, 64)) -> list[dict[str, Tensor]]:
    """Random boxes and, for models that read them, masks of the whole image."""
    rng = torch.Generator().manual_seed(3)
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, generator=rng) * 24
        boxes = torch.cat([corners, corners + 8 + 16 * torch.rand(count, 2, generator=rng)], dim=1)
        labels = torch.randint(0, CLASSES, (count,), generator=rng)
        masks = (torch.rand(count, *size, generator=rng) > 0.4).byte()
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return targets


def assert_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], shift: int, tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert len(our["scores"]) > 3
        torch.testing.assert_close(our["scores"], their["scores"], rtol=0, atol=tolerance)
        torch.testing.assert_close(our["boxes"], their["boxes"], rtol=0, atol=100 * tolerance)
        assert torch.equal(our["labels"] + shift, their["labels"])
        assert ("masks" in our) == ("masks" in their)
        if "masks" in our:
            assert our["masks"].std() > 0.01
            torch.testing.assert_close(our["masks"], their["masks"], rtol=0, atol=20 * tolerance)


def reference(model: Any, name: str) -> nn.Module:
    """torchvision's own detector with the same weights; its batch norms in evaluation mode are frozen ones."""
    kwargs: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 50}
    if name.startswith(("faster", "mask")):
        kwargs = {f"box_{key}": value for key, value in kwargs.items()}
    theirs: nn.Module = R50[name](
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + model.background,
        min_size=64,
        max_size=96,
        **UNNORMALISED,
        **kwargs,
    )
    missing, unexpected = theirs.load_state_dict(model.net.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return theirs.to(memory_format=torch.channels_last)


# In the memory layout of our convolutions, because random weights amplify rounding: in the other layout, scores differ
# by 4e-5 and boxes by up to 1e-2 pixels.
@pytest.mark.slow
@pytest.mark.parametrize("name", R50)
def test_detections_and_losses_of_the_published_models_are_torchvisions(name: str) -> None:
    model = built(name, *EVERYTHING)
    theirs = reference(model, name)
    parts = images((64, 96), (64, 70))
    with torch.no_grad():
        answers = model.eval()(*padded(parts))["detections"]
        assert_same(answers, theirs.eval()(parts), model.background, 1e-5)
    for module in theirs.train().modules():
        module.training = module.training and not isinstance(module, nn.BatchNorm2d)
    targets = objects(2, 3)
    shifted = [{**target, "labels": target["labels"] + model.background} for target in targets]
    torch.manual_seed(5)
    for _ in parts:
        torch.empty(1).uniform_()  # torchvision samples the size to which it resizes
    losses = model.train()(*padded(parts), targets)["losses"]
    torch.manual_seed(5)
    expected = theirs(parts, shifted)
    assert losses.keys() == expected.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_detections_and_losses_are_torchvisions_on_a_list_without_padding(name: str) -> None:
    model = built(name, *EVERYTHING)
    theirs = copy.deepcopy(model.net)
    theirs.transform = GeneralizedRCNNTransform(50, 64, *UNNORMALISED.values())
    parts = images((50, 64), (64, 50))
    with torch.no_grad():
        answers = model.eval()(*padded(parts))["detections"]
        assert_same(answers, theirs.eval()(parts), model.background, 1e-6)
    targets = objects(1, 4)
    torch.manual_seed(5)
    for _ in parts:
        torch.empty(1).uniform_()  # torchvision samples the size to which it resizes
    losses = model.train()(*padded(parts), targets)["losses"]
    torch.manual_seed(5)
    expected = theirs.train()(parts, [{**t, "labels": t["labels"] + model.background} for t in targets])
    assert losses.keys() == expected.keys()
    assert all(torch.equal(loss, expected[key]) for key, loss in losses.items())


@pytest.mark.parametrize("name", SMALL)
def test_an_image_alone_has_the_detections_that_it_has_beside_a_larger_one(name: str) -> None:
    model = built(name, *EVERYTHING).eval()
    parts = images((50, 40), (96, 70), (60, 33), (40, 130))
    with torch.no_grad():
        together = model(*padded(parts))["detections"]
        for part, answer in zip(parts, together, strict=True):
            assert_same([answer], model(part[None], None)["detections"], 0, 1e-5)
        larger = model.official_padding = True
        others = model(*padded(parts))["detections"]
    assert larger and not torch.equal(others[0]["scores"], together[0]["scores"]), "the control"
    assert model.per_micro_batch[-1] == "padding"


@pytest.mark.parametrize("name", SMALL)
def test_tensors_have_torchvisions_names_with_a_prefix(name: str) -> None:
    model = built(name)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"net"}
    assert set(model.decided_by_data) <= {key.rpartition(".")[0] for key in model.state_dict()} | {
        "net.roi_heads.box_predictor"
    }


@pytest.mark.parametrize("name", SMALL)
def test_images_without_objects_have_a_finite_loss(name: str) -> None:
    model = built(name).train()
    losses = model(*padded(images((64, 64), (64, 64))), objects(0, 0))["losses"]
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = built(name).train()
    parts = padded(images((64, 64), (64, 64), (64, 64)))  # one image may sample no anchor of the coarsest map
    torch.stack(list(model(*parts, objects(4, 4, 4))["losses"].values())).sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_under_autocast_anchors_and_last_layers_are_in_full_precision(name: str) -> None:
    model = built(name, *EVERYTHING).eval()
    net = model.net
    with_regions = name in ("faster_rcnn", "mask_rcnn")
    last = net.rpn.head.bbox_pred if with_regions else net.head.regression_head.bbox_reg
    generator = net.rpn.anchor_generator if with_regions else net.anchor_generator
    seen: list[Tensor] = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    generator.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (answer,) = model(images((64, 96))[0][None].bfloat16(), None)["detections"]
        losses = model.train()(images((64, 96))[0][None].bfloat16(), None, objects(3))["losses"]
    assert len(seen) > 3 and {output.dtype for output in seen} == {torch.float32}
    assert answer["boxes"].dtype == answer["scores"].dtype == torch.float32
    assert not torch.equal(answer["boxes"], answer["boxes"].bfloat16().float())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", SMALL)
def test_a_copy_computes_the_same(name: str) -> None:
    model = built(name, *EVERYTHING).eval()
    part = images((64, 64))[0][None]
    with torch.no_grad():
        assert_same(copy.deepcopy(model)(part, None)["detections"], model(part, None)["detections"], 0, 1e-7)


def test_only_the_backbone_is_compiled() -> None:
    model = built("fcos", *EVERYTHING).eval()
    part = images((64, 64))[0][None]
    with torch.no_grad():
        expected = model(part, None)["detections"]
        model.compile(backend="eager")
        assert_same(model(part, None)["detections"], expected, 0, 1e-6)
    assert model._compiled_call_impl is None and model.net.backbone._compiled_call_impl is not None


def test_frozen_parts_are_those_that_torchvision_freezes() -> None:
    with torch.device("meta"):
        model = built_on_meta("faster_rcnn_r50_fpn")
    frozen = {key.split(".")[3] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def built_on_meta(name: str, *overrides: str) -> Any:
    return build(configure("train", [f"model={name}", *overrides])["model"], classes=CLASSES)


@pytest.mark.parametrize("name", [*R50, "ssd"])
def test_the_published_models_have_torchvisions_tensors(name: str) -> None:
    function = {**R50, "ssd": torchvision_detection.ssd300_vgg16}[name]
    with torch.device("meta"):
        model = built_on_meta(name)
        theirs = function(weights=None, weights_backbone=None, num_classes=CLASSES + model.background)
    shapes = {f"net.{key}": value.shape for key, value in theirs.state_dict().items() if "num_batches" not in key}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


MISTAKES = {
    "model=faster_rcnn model.anchors.sizes=[[8],[16]]": "expected 3 lists of sizes of equal length",
    "model=retinanet model.anchors.sizes=[[8],[16],[32,40]]": "expected 3 lists of sizes of equal length",
    "model=retinanet model.anchors.ratios=[]": "at least one ratio",
    "model=retinanet model.width=48": "model.width=48 must be divisible by 32",
    "model=fcos model.width=48": "model.width=48 must be divisible by 32",
    "model=fcos model.backbone.frozen=4": "model.backbone.frozen=4: small has 3 parts",
    "model=fcos model.backbone.weights=imagenet_v1": "the backbone small has no pretrained weights",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_sentence(line: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[line].replace("[", r"\[")):
        build(configure("train", line.split())["model"], classes=CLASSES)


@pytest.mark.slow
def test_ssd_on_our_normalised_images_is_torchvisions_on_images_in_0_to_1() -> None:
    model = built("ssd", *EVERYTHING)
    torch.manual_seed(0)
    theirs = torchvision_detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, score_thresh=0.0, detections_per_img=50
    )
    theirs.load_state_dict(model.net.state_dict())
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    raw = [torch.rand(3, 90, 200), torch.rand(3, 120, 60)]
    batch = padded([(image - mean) / std for image in raw])
    with torch.no_grad():
        answers = model.eval()(*batch)["detections"]
        assert_same(answers, theirs.eval()(raw), 1, 1e-4)
    targets = objects(2, 3)
    losses = model.train()(*batch, targets)["losses"]
    expected = theirs.train()(raw, [{**target, "labels": target["labels"] + 1} for target in targets])
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-3, atol=1e-3)
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"net.backbone.features.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    vgg = {
        key: value.shape for key, value in torchvision.models.vgg16().features.state_dict(prefix="features.").items()
    }
    assert {key: value.shape for key, value in model.pretrained_part().state_dict().items()} == vgg
