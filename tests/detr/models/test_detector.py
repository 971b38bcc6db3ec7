"""The detector against transformers' DETR, and its outputs for an image alone against those within a batch."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.attention import record_attention
from common.nn.resnet import BackboneOptions
from detr.models.detector import Detector, PositionOptions
from tests.detecting import batch, pictures

SINE = PositionOptions(kind="sine", temperature=10000.0, at_input=False)
LEARNED = PositionOptions(kind="learned", temperature=10000.0, at_input=False)


def detector(name: str = "resnet50", seed: int = 0, **changed: Any) -> Detector:
    """The paper's model with two layers each by default; every tensor is random, norms and biases too."""
    name, _, dilation = name.partition(" ")
    small = name == "small"
    backbone = BackboneOptions(
        name=name,
        weights="none",
        dilation=bool(dilation),
        frozen=0 if small else 2,
    )
    arguments: dict[str, Any] = {
        "classes": 91,
        "backbone": backbone,
        "width": 256,
        "heads": 8,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "feedforward": 2048,
        "dropout": 0.0,
        "pre_norm": False,
        "queries": 100,
        "positions": SINE,
        "auxiliary": True,
        "official_padding": False,
    }
    torch.manual_seed(seed)
    model = Detector(**{**arguments, **changed})
    randomise(model, seed)
    return model.eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Sample norms and biases: their initial ones and zeros would hide a swapped pair.

    Some matrices are scaled up, as by training; otherwise all queries and images have nearly the same outputs.
    """
    rng = generator("detector", seed)
    growth = {"project.weight": 30, "class_head.weight": 4, "box_head.0.weight": 4, "box_head.2.weight": 4}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1 and name.endswith("weight"):
                low = 0.3 if name.startswith("backbone.") else 0.7
                tensor.uniform_(low, low + 0.6, generator=rng)
            elif tensor.dim() == 1:
                tensor.normal_(std=0.1, generator=rng)
            elif name.endswith("in_proj.weight"):
                tensor[: 2 * len(tensor) // 3] *= 3  # queries and keys
            else:
                tensor *= growth.get(name, 1)


def stacked_outputs(model: nn.Module, images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
    """The outputs of all layers: logits (L, B, Q, K + 1), boxes_cxcywh (L, B, Q, 4)."""
    layers = model(images, sizes)
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[-1]}


def names_in_transformers(ours: str) -> list[str]:
    """The tensors of transformers' DETR (5.x) that one of ours corresponds to: three for a projection to q, k and v."""
    last = 2 if ours.startswith("decoder.") else 1
    name = ours
    for pattern, replacement in (
        (r"^backbone\.", "model.backbone.model."),
        (r"^positions\.rows\.", "model.position_embedding.row_embeddings."),
        (r"^positions\.columns\.", "model.position_embedding.column_embeddings."),
        (r"^project\.", "model.input_projection."),
        (r"^queries\.", "model.query_position_embeddings."),
        (r"^class_head\.", "class_labels_classifier."),
        (r"^box_head\.0\.", "bbox_predictor.layers.0."),
        (r"^box_head\.2\.", "bbox_predictor.layers.1."),
        (r"^box_head\.4\.", "bbox_predictor.layers.2."),
        (r"^(encoder|decoder)\.", r"model.\1."),
        (r"\.blocks\.", ".layers."),
        (r"\.cross_attention\.", ".encoder_attn."),
        (r"\.attention\.", ".self_attn."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.feed_forward\.expand\.", ".mlp.fc1."),
        (r"\.feed_forward\.contract\.", ".mlp.fc2."),
        (r"\.residuals\.0\.norm\.", ".self_attn_layer_norm."),
        (rf"\.residuals\.{last}\.norm\.", ".final_layer_norm."),
        (r"\.residuals\.1\.norm\.", ".encoder_attn_layer_norm."),
        (r"decoder\.norm\.", "decoder.layernorm."),
    ):
        name = re.sub(pattern, replacement, name)
    return [name.replace("in_proj", f"{x}_proj") for x in "qkv"] if "in_proj" in name else [name]


def transformers_detr(ours: Detector, **changed: Any) -> nn.Module:
    """transformers' DETR for COCO with our weights, built offline from a config."""
    from transformers import DetrConfig, DetrForObjectDetection

    layers = {"encoder_layers": len(ours.encoder.blocks), "decoder_layers": len(ours.decoder.blocks)}
    theirs = DetrForObjectDetection(DetrConfig(num_labels=91, **layers, **changed)).eval()
    tensors = {}
    for name, tensor in ours.state_dict().items():
        names = names_in_transformers(name)
        tensors |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    theirs.load_state_dict(tensors)
    return theirs


def all_layers(theirs: nn.Module, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """The outputs of each decoder layer of transformers' DETR, in our format.

    They are computed from its layers by its norm and heads. Its `auxiliary_outputs` differ from the official code's:
    with `auxiliary_loss`, the next layer receives the normalised output of a layer.
    """
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: states.append(output))
        for layer in theirs.model.decoder.layers
    ]
    mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.long)
    for row, (height, width) in zip(mask, sizes.tolist(), strict=True):
        row[:height, :width] = 1
    last = theirs(pixel_values=images, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    normalised = theirs.model.decoder.layernorm(torch.stack(states))
    outputs = {
        "logits": theirs.class_labels_classifier(normalised),
        "boxes_cxcywh": theirs.bbox_predictor(normalised).sigmoid(),
    }
    torch.testing.assert_close(outputs["logits"][-1], last.logits)
    torch.testing.assert_close(outputs["boxes_cxcywh"][-1], last.pred_boxes)
    return outputs


def max_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any logit or coordinate."""
    assert actual.keys() == expected.keys()
    assert all(actual[name].shape == expected[name].shape for name in actual)
    return max((actual[name] - expected[name]).abs().max().item() for name in actual)


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("resnet50", {}, {}),
        ("resnet50 DC5", {}, {"dilation": True}),
        ("resnet50", {"positions": LEARNED}, {"position_embedding_type": "learned"}),
        ("resnet50", {"encoder_layers": 6, "decoder_layers": 6}, {}),
    ],
    ids=["sine", "DC5", "learned positions", "whole"],
)
@torch.no_grad()
def test_the_outputs_of_every_decoder_layer_are_those_of_transformers_detr(
    name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Measured: 1.1e-5 at most, for logits up to 7 in fp32."""
    assert_parity(detector(name, official_padding=True, **ours), theirs, ((120, 97), (64, 161), (128, 128)))


@pytest.mark.slow
@torch.no_grad()
def test_the_papers_model_has_the_outputs_of_transformers_detr_at_the_papers_image_sizes() -> None:
    """Measured: 6.2e-6."""
    assert_parity(detector(official_padding=True, encoder_layers=6, decoder_layers=6), {}, ((800, 608), (480, 1066)))


def assert_parity(model: Detector, theirs: dict[str, Any], sizes: tuple[tuple[int, int], ...]) -> None:
    padded = batch(pictures(*sizes))
    expected = all_layers(transformers_detr(model, **theirs), *padded)
    logits, difference = expected["logits"], max_difference(stacked_outputs(model, *padded), expected)
    print(f"{difference:.1e} for logits up to {logits.abs().max():.1f}")
    assert logits.std(2).mean() > 0.01 < logits.std(1).mean(), "all queries or all images have the same outputs"
    assert difference < 5e-5


@torch.no_grad()
def test_without_padding_both_settings_of_official_padding_agree_with_transformers_detr() -> None:
    images, sizes = batch(pictures((96, 127)))
    for official_padding in (False, True):
        model = detector(official_padding=official_padding)
        expected = all_layers(transformers_detr(model), images, sizes)
        assert max_difference(stacked_outputs(model, images, sizes), expected) < 1e-4
        assert max_difference(stacked_outputs(model, images, None), expected) < 1e-4


def test_gradients_are_those_of_transformers_detr() -> None:
    """Of random linear functions of logits and boxes, in float64 (with learned positions, since sines are fp32)."""
    ours = detector(official_padding=True, positions=LEARNED).double()
    theirs = transformers_detr(ours, position_embedding_type="learned").double()
    images, sizes = batch(pictures((64, 97), (90, 60)))
    actual, expected = stacked_outputs(ours, images.double(), sizes), all_layers(theirs, images.double(), sizes)
    assert max_difference(actual, expected) < 1e-11
    rng = generator("direction")
    directions = {name: torch.randn(value.shape, generator=rng) for name, value in expected.items()}
    for outputs in (actual, expected):
        torch.stack([(outputs[name] * directions[name]).sum() for name in actual]).sum().backward()

    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    of_theirs = dict(theirs.named_parameters())
    reference = {name: torch.cat([of_theirs[x].grad for x in names_in_transformers(name)]) for name in trained}
    norm = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    for name, parameter in trained.items():
        error = (parameter.grad - reference[name]).norm()
        # Where the true gradient is zero (a key's bias), the reference is rounding error; hence the norm of all.
        assert error < 1e-9 * reference[name].norm() + 1e-13 * norm, (name, error / norm)


def count_parameters(**changed: Any) -> tuple[int, int]:
    backbone = BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2)
    arguments = {"width": 256, "heads": 8, "encoder_layers": 6, "decoder_layers": 6, "feedforward": 2048}
    arguments |= {"queries": 100, "dropout": 0.1, "pre_norm": False, "positions": SINE, "auxiliary": True}
    with torch.device("meta"):
        model = Detector(classes=91, backbone=backbone, official_padding=False, **{**arguments, **changed})
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trains in counts if trains)


def test_the_number_of_parameters_is_the_official_models() -> None:
    """R50 with COCO's 92 logits; pre-norm adds the encoder's last norm."""
    assert count_parameters() == (41_524_768, 41_302_368)
    assert count_parameters(pre_norm=True) == (41_525_280, 41_302_880)
    assert count_parameters(positions=LEARNED)[0] == 41_524_768 + 2 * 50 * 128


MODELS = {
    "small": {"width": 64, "heads": 4, "feedforward": 128, "queries": 16, "pre_norm": True, "classes": 4},
    "resnet18": {"feedforward": 512},
    "resnet50": {"feedforward": 512},
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_detections_do_not_depend_on_what_else_is_in_the_batch(name: str, training: bool) -> None:
    """Measured: 1e-5 at most, for logits up to 7; official padding changes the same outputs by more than 1."""
    image, large, small = pictures((70, 101), (288, 353), (40, 161))
    model = detector(name, **MODELS[name]).train(training)
    alone = stacked_outputs(model, image[None], None)
    in_batch = {key: value[:, 1:2] for key, value in stacked_outputs(model, *batch([large, image, small])).items()}
    print(f"{name}: {max_difference(in_batch, alone):.1e}")
    assert max_difference(in_batch, alone) < 5e-5

    official = detector(name, **MODELS[name], official_padding=True).train(training)
    in_batch = {key: value[:, 1:2] for key, value in stacked_outputs(official, *batch([large, image, small])).items()}
    assert max_difference(in_batch, alone) > 0.1, "otherwise the assertion above could not fail"


@pytest.mark.parametrize("name", ["small", "resnet18"])
@torch.no_grad()
def test_the_rest_of_the_batch_changes_rounding_alone(name: str) -> None:
    """In float64 the difference is smaller by the ratio of the precisions."""
    image, larger = (picture.double() for picture in pictures((70, 101), (161, 200)))
    model = detector(name, **MODELS[name]).double()
    padded, sizes = batch([image, larger])
    in_batch = {key: value[:, :1] for key, value in stacked_outputs(model, padded, sizes).items()}
    assert max_difference(in_batch, stacked_outputs(model, image[None], None)) < 1e-12


@torch.no_grad()
def test_permuting_images_permutes_outputs() -> None:
    model = detector("resnet18")
    images = pictures((64, 97), (90, 60), (33, 33))
    order = [2, 0, 1]
    expected = {key: value[:, order] for key, value in stacked_outputs(model, *batch(images)).items()}
    assert max_difference(stacked_outputs(model, *batch([images[i] for i in order])), expected) < 1e-4


@torch.no_grad()
def test_an_image_may_have_one_pixel() -> None:
    outputs = stacked_outputs(detector("small", **MODELS["small"]), torch.zeros(1, 3, 1, 1), None)
    assert outputs["boxes_cxcywh"].shape == (2, 1, 16, 4) and outputs["logits"].isfinite().all()


@torch.no_grad()
def test_without_auxiliary_only_the_last_layer_has_outputs() -> None:
    images, sizes = batch(pictures((64, 97), (90, 60)))
    every_layer = stacked_outputs(detector("resnet18", decoder_layers=3), images, sizes)
    last = stacked_outputs(detector("resnet18", decoder_layers=3, auxiliary=False), images, sizes)
    assert every_layer["logits"].shape == (3, 2, 100, 92) and every_layer["boxes_cxcywh"].shape == (3, 2, 100, 4)
    assert all(torch.equal(last[key], every_layer[key][-1:]) for key in every_layer)


@pytest.mark.parametrize("changed", [{}, {"pre_norm": True}, {"positions": LEARNED}], ids=str)
def test_every_trainable_parameter_gets_a_gradient(changed: dict[str, Any]) -> None:
    model = detector("resnet18", dropout=0.1, **changed).train()
    outputs = stacked_outputs(model, *batch(pictures((64, 97), (90, 60))))
    (outputs["logits"].square().sum() + outputs["boxes_cxcywh"].square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name
        # The decoder's input is zero, so its first self-attention has zero gradients.
        zero_input = name.startswith(("decoder.blocks.0.attention.", "decoder.blocks.0.residuals.0."))
        assert parameter.grad is None or zero_input or parameter.grad.any(), name


@torch.no_grad()
def test_outputs_are_in_full_precision_under_autocast() -> None:
    model = detector("resnet18")
    images, sizes = batch(pictures((64, 97), (90, 60)))
    exact = stacked_outputs(model, images, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        half = stacked_outputs(model, images, sizes)
    assert half["logits"].dtype == half["boxes_cxcywh"].dtype == torch.float32
    assert max_difference({"boxes": half["boxes_cxcywh"]}, {"boxes": exact["boxes_cxcywh"]}) < 0.1


@torch.no_grad()
def test_cross_attention_can_be_recorded_and_is_zero_on_padding() -> None:
    model = detector("resnet18")
    images, sizes = batch(pictures((64, 97), (90, 60)))
    with record_attention(model) as maps:
        model(images, sizes)
    name = "decoder.blocks.1.cross_attention"
    real = model.backbone(images, sizes)[-1].real.flatten(1)  # (B, M)
    (attention,) = maps[name]  # (B, h, Q, M)
    assert attention.shape == (2, 8, 100, real.shape[1])
    assert not attention.masked_select(~real[:, None, None]).any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 8, 100))


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.width=100 must be divisible by model.heads=8 and by 4"):
        detector("small", width=100)


def test_fetch_weights_loads_the_backbone(tmp_path: Any) -> None:
    source = detector("resnet18", seed=1).backbone
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    path = str(tmp_path / "resnet18.pth")
    model = detector("resnet18", backbone=BackboneOptions(name="resnet18", weights=path, dilation=False, frozen=2))
    assert not torch.equal(model.backbone.conv1.weight, source.conv1.weight)
    model.fetch_weights()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.backbone.state_dict().items())
