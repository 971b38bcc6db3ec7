"""DINO against an independent decoder, an image alone against one in a batch, and what denoising queries may see."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn.resnet import BackboneOptions
from detr.criterion.answers import Targets, group_by_set
from detr.criterion.denoising import DenoisingOptions, denoising_queries
from detr.models.dino import Dino
from detr.models.levels import SamplingOptions, SinePositionOptions
from detr.models.query_detector import Image
from tests.detecting import batch, pictures

QUERIES, CLASSES, LAYERS = 9, 5, 3
DENOISING = DenoisingOptions(number=6, contrastive=True, label_noise=0.5, box_noise=0.4)


def dino(**changed: Any) -> Dino:
    """A small DINO in which every tensor is random, also those that are constant at the start."""
    arguments: dict[str, Any] = {
        "classes": CLASSES,
        "logits": CLASSES,
        "backbone": BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2),
        "sampling": SamplingOptions(maps=3, levels=4, points=4),
        "width": 64,
        "heads": 4,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "feedforward": 96,
        "dropout": 0.0,
        "pre_norm": False,
        "queries": QUERIES,
        "positions": SinePositionOptions(kind="sine", temperature=20.0, at_input=False, centred=False),
        "two_stage": True,
        "auxiliary": True,
        "official_padding": False,
    }
    torch.manual_seed(0)
    model = Dino(**{**arguments, **changed})
    rng = generator("dino")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.7, 1.3, generator=rng)
            elif tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=rng))
            elif any(part in name for part in ("sampling_offsets", "attention_weights", "box_head.4")):
                tensor.normal_(std=0.1, generator=rng)
    return model.eval().double()


def objects(counts: list[int]) -> Targets:
    rng = generator("objects")
    labels = torch.randint(CLASSES, (sum(counts),), generator=rng)
    boxes = torch.rand(sum(counts), 4, generator=rng, dtype=torch.float64) * 0.4 + 0.1
    return Targets(counts, labels, boxes)


def inputs() -> tuple[Tensor, Tensor]:
    return batch([picture.double() for picture in pictures((130, 161), (160, 120), (141, 150))])


def hints(counts: list[int]) -> dict[str, Tensor]:
    built = denoising_queries(DENOISING, objects(counts), list(range(len(counts))), CLASSES)
    assert built is not None
    return built[0]


# The independent decoder: torch.nn's attention, transformers' deformable attention, and the rest written out.


def logit(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def mlp(weights: dict[str, Tensor], prefix: str, x: Tensor, layers: tuple[int, ...]) -> Tensor:
    for i in layers:
        x = F.linear(x, weights[f"{prefix}.{i}.weight"], weights[f"{prefix}.{i}.bias"])
        x = x.relu() if i != layers[-1] else x
    return x


def layer_norm(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


def sines(boxes: Tensor, width: int) -> Tensor:
    """Of y, x, width and height, in this order, with `width` channels each."""
    channels = []
    for coordinate in (1, 0, 2, 3):
        for channel in range(width):
            angle = 2 * math.pi * boxes[..., coordinate] / 10000 ** (2 * (channel // 2) / width)
            channels.append(angle.cos() if channel % 2 else angle.sin())
    return torch.stack(channels, -1)


def blocked(groups: Tensor, real: Tensor, heads: int) -> Tensor:
    """torch.nn's mask (B h, N, N), True where a query may not look, entry by entry."""
    count, images = groups.shape[1], len(groups)
    total = count + QUERIES
    mask = torch.zeros(images, total, total, dtype=torch.bool)
    for image in range(images):
        for i in range(total):
            for j in range(count):
                stranger = i >= count or groups[image, i] != groups[image, j]
                mask[image, i, j] = stranger or not real[image, j]
    return mask.repeat_interleave(heads, 0)


def deformable_attention(weights: dict[str, Tensor], prefix: str, heads: int, levels: int, points: int) -> nn.Module:
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    width = weights[f"{prefix}.value_proj.weight"].shape[0]
    config = DeformableDetrConfig(d_model=width, num_feature_levels=levels)
    module = theirs.DeformableDetrMultiscaleDeformableAttention(config, num_heads=heads, n_points=points).double()
    names = {name: name.replace("output_proj", "out_proj") for name in module.state_dict()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[f"{prefix}.{names[name]}"])
    return module


def plain_decoder(
    model: Dino, weights: dict[str, Tensor], image: Image, x: Tensor, boxes: Tensor, mask: Tensor | None
) -> list[dict[str, Tensor]]:
    """The layers' outputs for contents x (B, N, C) and boxes (B, N, 4), by sections 3.4 and 3.5 and the official code.

    `weights` are the decoder's parameters and the heads' by name, so that gradients can be compared.
    """
    geometry, memory = image.geometry, image.memory
    assert geometry is not None and memory.may_look is not None
    heads, width, levels = 4, x.shape[-1], len(geometry.shapes)
    ratios = torch.cat((geometry.ratios, geometry.ratios), -1)  # (B, L, 4)
    detached, tracked, outputs = boxes, boxes, []
    for i in range(LAYERS):
        block = f"decoder.blocks.{i}"
        places = detached[:, :, None] * ratios[:, None]  # (B, N, L, 4)
        positions = mlp(weights, "position_head", sines(places[:, :, 0], width // 2), (0, 2))
        q = (x + positions).transpose(0, 1)
        attended = F.multi_head_attention_forward(
            q, q, x.transpose(0, 1), width, heads,
            weights[f"{block}.attention.in_proj.weight"], weights[f"{block}.attention.in_proj.bias"], None, None,
            False, 0.0, weights[f"{block}.attention.out_proj.weight"], weights[f"{block}.attention.out_proj.bias"],
            training=False, need_weights=False, attn_mask=mask,
        )[0].transpose(0, 1)  # fmt: skip
        x = layer_norm(weights, f"{block}.residuals.0.norm", x + attended)
        module = deformable_attention(weights, f"{block}.cross_attention", heads, levels, 4)
        shapes = torch.tensor(geometry.shapes)
        sampled = torch.func.functional_call(
            module,
            {
                name: weights[f"{block}.cross_attention.{name.replace('output_proj', 'out_proj')}"]
                for name, _ in module.named_parameters()
            },
            (x + positions,),
            {
                "attention_mask": memory.may_look[:, 0, 0],
                "encoder_hidden_states": memory.values,
                "reference_points": places,
                "spatial_shapes": shapes,
                "spatial_shapes_list": list(geometry.shapes),
                "level_start_index": shapes.prod(1).cumsum(0) - shapes.prod(1),
            },
        )[0]
        x = layer_norm(weights, f"{block}.residuals.1.norm", x + sampled)
        hidden = F.linear(
            x, weights[f"{block}.feed_forward.expand.weight"], weights[f"{block}.feed_forward.expand.bias"]
        )
        contract = f"{block}.feed_forward.contract"
        x = layer_norm(
            weights,
            f"{block}.residuals.2.norm",
            x + F.linear(hidden.relu(), weights[f"{contract}.weight"], weights[f"{contract}.bias"]),
        )
        normalised = layer_norm(weights, "norm", x)
        predicted = (mlp(weights, "box_head", normalised, (0, 2, 4)) + logit(tracked)).sigmoid()
        logits = F.linear(normalised, weights["class_head.weight"], weights["class_head.bias"])
        outputs.append({"logits": logits, "boxes_cxcywh": predicted})
        tracked = (mlp(weights, "box_head", x, (0, 2, 4)) + logit(detached)).sigmoid()
        detached = tracked.detach()
    return outputs


def plain_proposals(model: Dino, weights: dict[str, Tensor], image: Image) -> tuple[dict[str, Tensor], Tensor]:
    """The selected proposals in loops over images and tokens, and their boxes without gradients (section 3.4)."""
    geometry, memory = image.geometry, image.memory
    assert geometry is not None and memory.values is not None and memory.may_look is not None
    logits, boxes = [], []
    for i in range(len(memory.values)):
        tokens, start = [], 0
        for level, (height, width) in enumerate(geometry.shapes):
            real = memory.may_look[i, 0, 0, start : start + height * width].view(height, width)
            rows, columns = int(real[:, 0].sum()), int(real[0].sum())
            for y in range(height):
                for x in range(width):
                    side = 0.05 * 2**level
                    box = torch.tensor([(x + 0.5) / columns, (y + 0.5) / rows, side, side], dtype=torch.float64)
                    if real[y, x] and bool(((box > 0.01) & (box < 0.99)).all()):
                        tokens.append((start + y * width + x, box))
            start += height * width
        features = memory.values[i][[index for index, _ in tokens]]
        features = F.linear(features, weights["proposals.project.weight"], weights["proposals.project.bias"])
        features = layer_norm(weights, "proposals.norm", features)
        scores = F.linear(features, weights["proposal_class_head.weight"], weights["proposal_class_head.bias"])
        initial = torch.stack([box for _, box in tokens])
        deltas = mlp(weights, "proposal_box_head", features, (0, 2, 4))
        best = scores.max(-1).values.topk(QUERIES).indices
        logits.append(scores[best])
        boxes.append((deltas + torch.log(initial / (1 - initial))).sigmoid()[best])
    outputs = {"logits": torch.stack(logits), "boxes_cxcywh": torch.stack(boxes)}
    return outputs, outputs["boxes_cxcywh"].detach()


def plain_forward(model: Dino, images: Tensor, sizes: Tensor, extra: dict[str, Tensor] | None) -> dict[str, Any]:
    """The outputs of all answer sets; the memory is our encoder's, which other tests compare."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    image = model.look(images, sizes)
    sets: dict[str, Any] = {}
    x = weights["queries.weight"].expand(len(images), -1, -1)
    if model.proposals is None:
        boxes = weights["query_boxes.weight"].sigmoid().expand(len(images), -1, -1)
    else:
        outputs, boxes = plain_proposals(model, weights, image)
        sets["selected"] = [outputs]
    mask, count = None, 0
    if extra is not None:
        count = extra["boxes"].shape[1]
        x = torch.cat((weights["label_embedding.weight"][extra["labels"]], x), 1)
        boxes = torch.cat((extra["boxes"], boxes), 1)
        mask = blocked(extra["groups"], extra["real"], 4)
    layers = plain_decoder(model, weights, image, x, boxes, mask)
    if count:
        sets["hints"] = [{name: value[:, :count] for name, value in layer.items()} for layer in layers]
    sets["queries"] = [{name: value[:, count:] for name, value in layer.items()} for layer in layers]
    return sets


@pytest.mark.parametrize("two_stage", [True, False], ids=["proposed boxes", "learned boxes"])
@pytest.mark.parametrize("denoised", [True, False], ids=["denoising", "alone"])
def test_outputs_and_gradients_are_those_of_an_independent_computation(two_stage: bool, denoised: bool) -> None:
    """In float64, on a padded batch of unequal sizes with 2, 0 and 3 objects, with official padding."""
    model, (images, sizes) = dino(two_stage=two_stage, official_padding=True), inputs()
    extra = hints([2, 0, 3]) if denoised else None
    actual = group_by_set(model(images, sizes, extra))
    expected = plain_forward(model, images, sizes, extra)
    assert actual.keys() == expected.keys()
    rng = generator("direction")
    totals = []
    for sets in (actual, expected):
        rng = generator("direction")
        total = torch.zeros((), dtype=torch.float64)
        for name in sorted(sets):
            for layer in sets[name]:
                for key in ("logits", "boxes_cxcywh"):
                    value = layer[key] if name != "hints" else layer[key][extra["real"]]
                    total = total + (value * torch.randn(value.shape, generator=rng, dtype=torch.float64)).sum()
        totals.append(total)
    for name, layers in expected.items():
        for layer, reference in zip(actual[name], layers, strict=True):
            real = extra["real"] if name == "hints" else slice(None)
            for key, value in reference.items():
                assert (layer[key][real] - value[real]).abs().max() < 1e-9, (name, key)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and "backbone" not in name}
    ours, theirs = (torch.autograd.grad(t, list(parameters.values()), allow_unused=True) for t in totals)
    norm = torch.stack([g.norm() for g in theirs if g is not None]).norm()
    for name, own, other in zip(parameters, ours, theirs, strict=True):
        assert (own is None) == (other is None), name
        assert own is None or (own - other).norm() < 1e-9 * other.norm() + 1e-12 * norm, name


@torch.no_grad()
def test_ordinary_queries_do_not_see_denoising_queries() -> None:
    model, (images, sizes) = dino(), inputs()
    alone = group_by_set(model(images, sizes))["queries"]
    beside = group_by_set(model(images, sizes, hints([2, 0, 3])))["queries"]
    for first, second in zip(alone, beside, strict=True):
        assert all((first[name] - second[name]).abs().max() < 1e-12 for name in first)


@torch.no_grad()
def test_a_denoising_query_sees_its_own_group_alone() -> None:
    """Another box in the first group changes its own queries, and no other group of the image."""
    model, (images, sizes) = dino(), inputs()
    extra = hints([2, 0, 3])
    changed = {**extra, "boxes": extra["boxes"].clone()}
    changed["boxes"][0, 0] = torch.tensor([0.8, 0.2, 0.1, 0.3])
    first, second = (group_by_set(model(images, sizes, x))["hints"][-1]["logits"] for x in (extra, changed))
    difference = (first - second).abs().amax(-1)[0]  # (D,)
    group = extra["groups"][0] == extra["groups"][0, 0]
    assert (difference[group] > 1e-9).all() and (difference[~group & extra["real"][0]] < 1e-12).all()


@pytest.mark.parametrize("changed", [{}, {"two_stage": False}, {"pre_norm": True}], ids=str)
@torch.no_grad()
def test_an_image_alone_has_the_outputs_that_it_has_beside_a_larger_one_with_more_objects(changed: Any) -> None:
    model = dino(**changed)
    image, larger = (picture.double() for picture in pictures((70, 101), (161, 140)))
    targets = objects([1, 4])
    own = Targets([1], targets.labels[:1], targets.boxes[:1])
    alone_hints = denoising_queries(DENOISING, own, [7], CLASSES)
    both_hints = denoising_queries(DENOISING, targets, [7, 8], CLASSES)
    assert alone_hints is not None and both_hints is not None
    alone = group_by_set(model(image[None], None, alone_hints[0]))
    together = group_by_set(model(*batch([image, larger]), both_hints[0]))
    for name, layers in alone.items():
        for first, second in zip(layers, together[name], strict=True):
            rows = first["logits"].shape[1]  # the image's own denoising queries come first
            for key in ("logits", "boxes_cxcywh"):
                assert (first[key][0] - second[key][0, :rows]).abs().max() < 1e-10, (name, key)


def test_boxes_of_a_layer_have_gradients_through_the_layer_before_and_no_further() -> None:
    """Look forward twice (section 3.5): the loss of a layer's boxes trains the layer before, too."""
    model, (images, sizes) = dino(), inputs()
    layers = group_by_set(model(images, sizes))["queries"]
    states = [block.feed_forward.contract.bias for block in model.decoder.blocks]
    own = torch.autograd.grad(layers[0]["boxes_cxcywh"].sum(), states, retain_graph=True, allow_unused=True)
    assert own[0] is not None and own[1] is None
    later = torch.autograd.grad(layers[1]["boxes_cxcywh"].sum(), states, allow_unused=True)
    assert later[0] is not None and later[1] is not None and later[2] is None


@pytest.mark.parametrize("two_stage", [True, False])
def test_every_trainable_parameter_gets_a_gradient(two_stage: bool) -> None:
    model, (images, sizes) = dino(two_stage=two_stage).train(), inputs()
    layers = model(images, sizes, hints([2, 1, 3]))
    torch.stack([x["logits"].square().sum() + x["boxes_cxcywh"].square().sum() for x in layers]).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad
        assert frozen or (parameter.grad is not None and parameter.grad.any()), name


@torch.no_grad()
def test_tiny_images_have_repeated_proposals_that_do_not_count_in_the_loss() -> None:
    model = dino()
    layers = group_by_set(model(pictures((9, 9))[0][None].double(), None))
    real = layers["selected"][0]["real"][0]
    assert 0 < real.sum() < QUERIES and layers["queries"][-1]["logits"].shape[1] == QUERIES
