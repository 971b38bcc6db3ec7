"""Deformable DETR in its four published variants against transformers, and an image alone against one in a batch."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.resnet import BackboneOptions
from detr.criterion.answers import Targets, group_by_set
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions
from detr.models.deformable_detector import DeformableDetector
from detr.models.levels import SamplingOptions, SinePositionOptions
from tests.detecting import batch, pictures

QUERIES = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "four levels": {"refine": False, "two_stage": False},
    "refinement": {"refine": True, "two_stage": False},
    "two stages": {"refine": True, "two_stage": True},
    "one level": {
        "refine": False,
        "two_stage": False,
        "sampling": SamplingOptions(maps=1, levels=1, points=4),
    },
}
SMALL = {
    "backbone": BackboneOptions(name="small", weights="none", dilation=False, frozen=0),
    "sampling": SamplingOptions(maps=2, levels=3, points=2),
    "width": 64,
    "heads": 4,
    "pre_norm": True,
    "positions": SinePositionOptions(kind="sine", temperature=20.0, at_input=True, centred=True),
}
SIZES = ((130, 161), (160, 120), (141, 150))


def deformable(variant: str, *, width: int = 256, layers: int = 2, **changed: Any) -> DeformableDetector:
    """The paper's model with two layers each by default; every tensor is random, also those that start at zero."""
    arguments: dict[str, Any] = {
        "classes": 7,
        "logits": 7,
        "backbone": BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2),
        "sampling": SamplingOptions(maps=3, levels=4, points=4),
        "width": width,
        "heads": 8,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "feedforward": 128,
        "dropout": 0.0,
        "pre_norm": False,
        "queries": QUERIES,
        "positions": SinePositionOptions(kind="sine", temperature=10000.0, at_input=False, centred=True),
        "auxiliary": True,
        "official_padding": False,
        **VARIANTS[variant],
    }
    torch.manual_seed(0)
    model = DeformableDetector(**{**arguments, **changed})
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Sample every tensor that is constant at the start: norms, biases, sampling offsets, weights and box heads."""
    rng = generator("deformable")
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=rng)
        elif tensor.dim() == 1 and name.endswith("weight"):
            tensor.uniform_(0.7, 1.3, generator=rng)
        elif "sampling_offsets.bias" in name:
            tensor.add_(torch.randn(tensor.shape, generator=rng))
        elif tensor.dim() == 1:
            tensor.normal_(std=0.3, generator=rng)
        elif re.search(r"sampling_offsets|attention_weights|box_head.*4\.weight|reference_points", name):
            tensor.normal_(std=0.1, generator=rng)


def names_in_transformers(ours: str) -> list[str]:
    """The names in transformers' Deformable DETR that one of ours corresponds to: three for a projection to q, k, v."""
    last = 2 if ours.startswith("decoder.") else 1
    name = ours
    for pattern, replacement in (
        (r"^backbone\.", "model.backbone.model."),
        (r"^project\.(\d)\.conv\.", r"model.input_proj.\1.0."),
        (r"^project\.(\d)\.norm\.", r"model.input_proj.\1.1."),
        (r"^level_embedding", "model.level_embed"),
        (r"^queries\.", "model.query_position_embeddings."),
        (r"^reference_points\.", "model.reference_points."),
        (r"^proposals\.project\.", "model.enc_output."),
        (r"^proposals\.norm\.", "model.enc_output_norm."),
        (r"^box_embedding\.0\.", "model.pos_trans."),
        (r"^box_embedding\.1\.", "model.pos_trans_norm."),
        (r"^class_head\.(\d)\.", r"class_embed.\1."),
        (r"^class_head\.", "class_embed.0."),
        (r"^box_head\.(\d)\.(\d\.)", r"bbox_embed.\1.layers.\2"),
        (r"^box_head\.(\d\.)", r"bbox_embed.0.layers.\1"),
        (r"layers\.2\.(weight|bias)$", r"layers.1.\1"),
        (r"layers\.4\.(weight|bias)$", r"layers.2.\1"),
        (r"^(encoder|decoder)\.blocks\.", r"model.\1.layers."),
        (r"\.cross_attention\.", ".encoder_attn."),
        (r"\.attention\.", ".self_attn."),
        (r"(encoder_attn|encoder.*self_attn)\.out_proj\.", r"\1.output_proj."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.feed_forward\.expand\.", ".mlp.fc1."),
        (r"\.feed_forward\.contract\.", ".mlp.fc2."),
        (r"\.residuals\.0\.norm\.", ".self_attn_layer_norm."),
        (rf"\.residuals\.{last}\.norm\.", ".final_layer_norm."),
        (r"\.residuals\.1\.norm\.", ".encoder_attn_layer_norm."),
    ):
        name = re.sub(pattern, replacement, name)
    return [name.replace("in_proj.", f"{x}_proj.") for x in "qkv"] if ".in_proj" in name else [name]


def transformers_model(ours: DeformableDetector, variant: str) -> nn.Module:
    """transformers' Deformable DETR with our weights, built offline from a config.

    With refinement and one stage, transformers ties the class heads of all layers. In the paper's code, they are as
    independent as the box heads, so they are untied here.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

    levels = ours.sampling.levels
    backbone = TimmBackboneConfig(
        backbone="resnet18",
        use_pretrained_backbone=False,
        out_indices=[2, 3, 4] if levels > 1 else [4],
    )
    theirs = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            num_labels=7,
            backbone_config=backbone,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_queries=QUERIES,
            two_stage_num_proposals=QUERIES,
            num_feature_levels=levels,
            auxiliary_loss=True,
            class_cost=2,
            with_box_refine=VARIANTS[variant]["refine"],
            two_stage=VARIANTS[variant]["two_stage"],
        )
    ).eval()
    if ours.guided:
        theirs.class_embed = nn.ModuleList(copy.deepcopy(head) for head in theirs.class_embed)
    tensors = theirs.state_dict()
    missing = set(tensors)
    for name, tensor in ours.state_dict().items():
        names = names_in_transformers(name)
        for their_name, part in zip(names, tensor.chunk(len(names)), strict=True):
            # Heads that are one module in ours are several in theirs.
            shared = not ours.guided and their_name.startswith(("class_embed.0.", "bbox_embed.0."))
            copies = [their_name.replace("embed.0.", f"embed.{i}.") for i in range(2)] if shared else [their_name]
            copies += [f"model.decoder.{key}" for key in copies if f"model.decoder.{key}" in tensors]
            for key in copies:
                assert tensors[key].shape == part.shape, key
                tensors[key] = part
                missing.discard(key)
    assert not missing
    theirs.load_state_dict(tensors)
    return theirs


def targets() -> list[dict[str, Tensor]]:
    """Objects of the images in transformers' format; the second image has none."""
    rng = generator("objects")
    objects = []
    for count in (3, 0, 5):
        centres, sides = torch.rand(count, 2, generator=rng), torch.rand(count, 2, generator=rng) * 0.3 + 0.05
        boxes = torch.cat((centres * 0.6 + 0.2, sides), 1).double()
        objects.append({"class_labels": torch.randint(0, 7, (count,), generator=rng), "boxes": boxes})
    return objects


def pixel_mask(images: Tensor, sizes: Tensor) -> Tensor:
    mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.long)
    for row, (height, width) in zip(mask, sizes.tolist(), strict=True):
        row[:height, :width] = 1
    return mask


def run_transformers(theirs: nn.Module, images: Tensor, sizes: Tensor) -> tuple[list[dict[str, Tensor]], Any]:
    """The outputs of each decoder layer in our format, and all that transformers returns."""
    outputs = theirs(pixel_values=images, pixel_mask=pixel_mask(images, sizes), labels=targets())
    layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    return [{"logits": x["logits"], "boxes_cxcywh": x["pred_boxes"]} for x in layers], outputs


@pytest.fixture
def exact_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers encodes proposals in fp32 in any precision; here, in that of the proposals."""
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    def encode(self: Any, proposals: Tensor) -> Tensor:
        width = self.config.d_model // 2
        rows = []
        for channel in range(width):
            angle = proposals.sigmoid() * 2 * math.pi / 10000 ** (2 * (channel // 2) / width)
            rows.append(angle.cos() if channel % 2 else angle.sin())
        return torch.stack(rows, -1).flatten(2)

    monkeypatch.setattr(theirs.DeformableDetrModel, "get_proposal_pos_embed", encode)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("exact_proposals")
def test_outputs_losses_and_gradients_are_those_of_transformers(variant: str) -> None:
    """In float64, on a padded batch of unequal sizes.

    transformers leaves out the loss of the proposals; here, its criterion computes it from its own proposals.
    """
    ours = deformable(variant, official_padding=True).double()
    theirs = transformers_model(ours, variant).double()
    images, sizes = batch([picture.double() for picture in pictures(*SIZES)])
    actual = group_by_set(ours(images, sizes))
    expected, outputs = run_transformers(theirs, images, sizes)
    for layer, reference in zip(actual["queries"], expected, strict=True):
        assert layer["logits"].std() > 0.1 and layer["boxes_cxcywh"].std(1).mean() > 0.01
        for name, value in reference.items():
            assert (layer[name] - value).abs().max() < 1e-9, name

    loss = sum(value.sum() for value in our_losses(actual).values())
    reference_loss = outputs.loss + (proposal_loss(theirs, outputs) if variant == "two stages" else 0)
    assert abs(loss.item() - reference_loss.item()) < 1e-9 * reference_loss.item()
    loss.backward()
    reference_loss.backward()
    assert_equal_gradients(ours, theirs)


def our_losses(sets: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    loss = LossOptions(
        class_weight=1,
        box_weight=5,
        giou_weight=2,
        no_object=0.1,
        classification="sigmoid",
        focal_alpha=0.25,
        focal_gamma=2.0,
    )
    criterion = Criterion(loss, MatcherOptions(class_cost=2, box_cost=5, giou_cost=2))
    objects = targets()
    counts, labels = [len(x["boxes"]) for x in objects], torch.cat([x["class_labels"] for x in objects])
    values = {}
    for name, layers in sets.items():
        of_set = torch.zeros_like(labels) if name == "proposals" else labels
        truth = Targets(counts, of_set, torch.cat([x["boxes"] for x in objects]))
        terms = criterion(name, layers, truth, criterion.normalisers(name, counts, counts))
        values |= {f"{name} {term}": value for term, value in terms.items()}
    return values


def proposal_loss(theirs: nn.Module, outputs: Any) -> Tensor:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = DeformableDetrImageLoss(matcher, 7, 0.25, ["labels", "boxes"])
    boxes = outputs.enc_outputs_coord_logits.sigmoid()
    labels = [{**x, "class_labels": torch.zeros_like(x["class_labels"])} for x in targets()]
    terms = criterion({"logits": outputs.enc_outputs_class, "pred_boxes": boxes}, labels)
    return terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]


def assert_equal_gradients(ours: DeformableDetector, theirs: nn.Module) -> None:
    """Copies of a head in transformers are separate parameters; their gradients are added."""
    of_theirs = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    scale = torch.stack([gradient.norm() for gradient in of_theirs.values()]).norm()
    compared = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = []
        for their_name in names_in_transformers(name):
            shared = not ours.guided and their_name.startswith(("class_embed.0.", "bbox_embed.0."))
            copies = [their_name.replace("embed.0.", f"embed.{i}.") for i in range(2)] if shared else [their_name]
            copies += [f"model.decoder.{key}" for key in copies]
            parts.append(sum(of_theirs[key] for key in copies if key in of_theirs))
        expected = torch.cat(parts)
        assert parameter.grad is not None, name
        error = (parameter.grad - expected).norm()
        assert error < 1e-9 * expected.norm() + 1e-12 * scale, (name, float(error / expected.norm()))
        compared += 1
    assert compared > 60


@pytest.mark.parametrize(
    "changed, parameters, tensors",
    [
        ({}, 40_069_665, 521),
        ({"refine": True}, 40_849_660, 561),
        ({"refine": True, "two_stage": True}, 41_181_529, 574),
        ({"sampling": SamplingOptions(maps=1, levels=1, points=4)}, 34_066_593, 509),
    ],
    ids=list(VARIANTS),
)
def test_parameter_counts_are_those_of_the_official_models(
    changed: dict[str, Any], parameters: int, tensors: int
) -> None:
    backbone = BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2)
    size = {"classes": 91, "logits": 91, "layers": 6, "feedforward": 1024, "queries": 300, "backbone": backbone}
    torch.manual_seed(0)
    model = deformable("four levels", **{**size, **changed})
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


ALONE = [*((variant, {}) for variant in VARIANTS), *((variant, SMALL) for variant in list(VARIANTS)[:3])]


@pytest.mark.parametrize("variant, changed", ALONE, ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_an_image_alone_has_the_outputs_that_it_has_beside_a_larger_one(variant: str, changed: dict[str, Any]) -> None:
    """In float64, where the difference is rounding alone; the top-k of proposals could differ by rounding in fp32."""
    model = deformable(variant, **changed).double()
    image, larger = (picture.double() for picture in pictures((70, 101), (161, 140)))
    alone, together = model(image[None], None), model(*batch([image, larger]))
    for first, second in zip(alone, together, strict=True):
        if first.get("set") == "proposals":  # the tokens of another map
            assert first["logits"][first["real"]].shape == second["logits"][0][second["real"][0]].shape
            first = {name: first[name][first["real"]] for name in ("logits", "boxes_cxcywh")}
            second = {name: second[name][0][second["real"][0]] for name in ("logits", "boxes_cxcywh")}
            assert all((first[name] - second[name]).abs().max() < 1e-10 for name in first)
            continue
        for name, value in first.items():
            assert (value[0] - second[name][0]).abs().max() < 1e-10, name


@torch.no_grad()
def test_with_official_padding_an_image_depends_on_its_padding() -> None:
    """The control of the test before."""
    model = deformable("four levels", official_padding=True).double()
    image, larger = (picture.double() for picture in pictures((70, 101), (161, 140)))
    alone, together = model(image[None], None)[-1], model(*batch([image, larger]))[-1]
    assert (alone["logits"][0] - together["logits"][0]).abs().max() > 1e-4


@pytest.mark.parametrize("side", [1, 9, 33])
@torch.no_grad()
def test_tiny_images_have_queries_from_valid_tokens_alone(side: int) -> None:
    """There are fewer tokens than queries, so tokens are repeated; padding is never selected."""
    model = deformable("two stages", **SMALL)
    image, larger = pictures((side, side), (120, 120))
    alone, together = model(image[None], None), model(*batch([image, larger]))
    for name in ("logits", "boxes_cxcywh"):
        assert alone[-1][name].shape[1] == QUERIES
        assert (alone[-1][name][0] - together[-1][name][0]).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient(variant: str) -> None:
    model = deformable(variant, **SMALL | VARIANTS[variant], dropout=0.1).train()
    layers = model(*batch(pictures((64, 97), (90, 60))))
    torch.stack([x["logits"].square().sum() + x["boxes_cxcywh"].square().sum() for x in layers]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_refinement_adds_to_the_boxes_of_the_layer_before() -> None:
    """With box heads that predict zero, every layer repeats the first layer's boxes, also with another query."""
    model = deformable("refinement", **SMALL, layers=3)
    for head in list(model.box_head)[1:]:
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)
    layers = model(pictures((64, 80))[0][None], None)
    torch.testing.assert_close(layers[1]["boxes_cxcywh"], layers[0]["boxes_cxcywh"])
    torch.testing.assert_close(layers[2]["boxes_cxcywh"], layers[0]["boxes_cxcywh"])
    assert (layers[2]["logits"] - layers[0]["logits"]).abs().max() > 1e-3


@torch.no_grad()
def test_outputs_are_in_full_precision_under_autocast() -> None:
    model = deformable("two stages", **SMALL)
    images, sizes = batch(pictures((64, 97), (90, 60)))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, sizes)
    assert all(layer[name].dtype == torch.float32 for layer in half for name in ("logits", "boxes_cxcywh"))
    assert all(layer["boxes_cxcywh"].isfinite().all() for layer in half)


@pytest.mark.parametrize("name", ["resnet34", pytest.param("resnet101", marks=pytest.mark.slow)])
@torch.no_grad()
def test_other_backbones_fit(name: str) -> None:
    backbone = BackboneOptions(name=name, weights="none", dilation=False, frozen=2)
    outputs = deformable("refinement", backbone=backbone)(pictures((64, 70))[0][None], None)
    assert outputs[-1]["logits"].isfinite().all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"width": 60}, "model.width=60 must be divisible by model.heads=8 and by 4"),
        ({"two_stage": True}, "model.two_stage=true needs model.refine=true"),
        ({"refine": True, "auxiliary": False}, "model.auxiliary=false trains the heads of the last layer only"),
        ({"sampling": SamplingOptions(maps=3, levels=2, points=4)}, "levels=2 must be at least model.sampling.maps=3"),
        ({"sampling": SamplingOptions(maps=5, levels=5, points=4)}, "model.sampling.maps=5, but resnet18 has 4 stages"),
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        deformable("four levels", **changed)
