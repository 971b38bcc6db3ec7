"""SAM against transformers' SamModel with the same random weights, and what the prompts of a batch may depend on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from detr.importing import sam as importing
from detr.models.image_encoder import ViTOptions
from detr.models.prompt_encoder import PADDING
from tests.segmenting import SIZE, hf_name, images, prompts, small_sam, transformers_sam

KINDS = ("points", "box", "points box", "points mask", "box mask", "points box mask")


def peer_outputs(peer: Any, pixels: Tensor, image: list[int], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All four masks of each prompt, by transformers' parts; `pixels` are the images, and one prompt has one image."""
    features = peer.vision_encoder(pixels).last_hidden_state
    sparse, dense = peer.prompt_encoder(**theirs)
    positions = peer.get_image_wide_positional_embeddings()
    outputs = []
    for multimask in (False, True):
        outputs.append(
            peer.mask_decoder(
                image_embeddings=features[image],
                image_positional_embeddings=positions.repeat(len(image), 1, 1, 1),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
        )
    masks, ious = (torch.cat([output[i][:, 0] for output in outputs], dim=1) for i in (0, 1))
    return {"features": features, "masks": masks, "ious": ious}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Sums in another order: 1e-12 and 1e-6 of the outputs, which are of order 1, after some dozen layers.
    [(torch.float64, 1e-9), (torch.float32, 1e-5)],
    ids=["fp64", "fp32"],
)
def test_embeddings_masks_and_ious_equal_transformers(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, pixels, image = small_sam(dtype), images(dtype=dtype), [0, 0, 1]
    ours, theirs = prompts(kind, image=image, dtype=dtype)
    with torch.no_grad():
        expected = peer_outputs(transformers_sam(model), pixels, image, theirs)
        features = model.encode(pixels)
        outputs = {"features": features, **model.decode(features, ours)}
    for name, tensor in expected.items():
        scale = float(tensor.abs().mean())
        torch.testing.assert_close(outputs[name], tensor, rtol=tolerance, atol=tolerance * max(1, scale))


def test_gradients_equal_transformers() -> None:
    model, pixels, image = small_sam(), images(), [0, 0, 1]
    ours, theirs = prompts("points box mask", image=image)
    peer = transformers_sam(model)
    losses = [
        sum(
            (outputs[name] * torch.randn(outputs[name].shape, generator=generator(name), dtype=torch.float64)).sum()
            for name in ("masks", "ious")
        )
        for outputs in (model(pixels, ours), peer_outputs(peer, pixels, image, theirs))
    ]
    for loss in losses:
        loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    named = importing.export({**gradients, "prompt_encoder.frequencies": model.prompt_encoder.frequencies})
    theirs_by_name = dict(peer.named_parameters())
    compared = 0
    for name, gradient in named.items():
        if "gaussian" in name or "no_mask_embed" in name or "not_a_point" in name:
            continue  # a buffer here, and two that these prompts do not use
        expected = theirs_by_name[hf_name(name)].grad
        # the bias of the keys shifts all scores of a query, so its gradient is zero but for rounding
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * max(1.0, scale))
        compared += 1
    relative = [gradient for name, gradient in named.items() if "rel_pos" in name]
    assert compared > 100 and len(relative) == 6 and all(gradient.abs().max() > 1e-6 for gradient in relative)


def test_a_prompt_does_not_depend_on_the_other_prompts_and_images() -> None:
    """Prompts with one point, two points, and a box with points, on two images, against each of them alone."""
    model, pixels = small_sam(), images()
    features = model.encode(pixels)
    points, _ = prompts("points", image=[1, 0, 0])
    both, _ = prompts("points box", image=[1])
    padding = torch.zeros(3, 2, 2, dtype=torch.float64) - 7
    rows = torch.cat((torch.cat((points["points"], padding), 1), both["points"]))
    labels = torch.cat((torch.cat((points["labels"], torch.full((3, 2), PADDING)), 1), both["labels"]))
    labels[1, 1] = PADDING
    together = model.decode(features, {"image": torch.tensor([1, 0, 0, 1]), "points": rows, "labels": labels})
    for i, image in enumerate([1, 0, 0, 1]):
        real = labels[i] != PADDING
        alone = {"image": torch.tensor([0]), "points": rows[i : i + 1, real], "labels": labels[i : i + 1, real]}
        expected = model.decode(model.encode(pixels[image : image + 1]), alone)
        for name in ("masks", "ious"):
            # fp64 sums in another order
            torch.testing.assert_close(together[name][i : i + 1], expected[name], rtol=1e-9, atol=1e-9)


def test_an_image_does_not_depend_on_the_size_of_its_batch() -> None:
    model = small_sam()
    small = images(1, (31, 40))
    padded = torch.zeros(2, 3, 44, 48, dtype=torch.float64)
    padded[0, :, :31, :40] = small[0]
    padded[1] = images(1, (44, 48))[0]
    torch.testing.assert_close(model.encode(padded)[:1], model.encode(small), rtol=1e-9, atol=1e-9)


def test_prompts_are_decoded_without_encoding_the_image_again() -> None:
    model, calls = small_sam(), []
    model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    features = model.encode(images())
    for kind in KINDS:
        model.decode(features, prompts(kind, image=[1, 1, 0])[0])
    assert len(calls) == 1


def test_a_larger_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.image_size=48: the images have 50 x 48 pixels; lower"):
        small_sam().encode(torch.zeros(1, 3, SIZE, SIZE + 2, dtype=torch.float64))


def test_a_global_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.encoder.width=24 must be divisible by model.encoder.heads=5"):
        ViTOptions(width=24, heads=5, layers=3, feedforward=40, window=4, global_layers=[2], drop_path=0.0)
    with pytest.raises(UserError, match=r"global_layers=\[3\]: the encoder has the blocks 0 to 2"):
        ViTOptions(width=24, heads=3, layers=3, feedforward=40, window=4, global_layers=[3], drop_path=0.0)


def test_sam_b_has_the_published_parameters_and_tensors() -> None:
    """The numbers of sam_vit_b_01ec64.pth."""
    with torch.device("meta"):
        model = build(configure("train", ["model=sam_b"])["model"])
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"image_encoder": 89_670_912, "prompt_encoder": 6_220, "mask_decoder": 4_058_340}
    assert sum(counts.values()) == 93_735_472
    assert len(importing.export(model.state_dict())) == 314


def test_layers_hold_every_parameter_once() -> None:
    model = small_sam()
    prefixes = [prefix for layer in model.layers() for prefix in layer]
    for name, _ in model.named_parameters():
        assert sum(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes) == 1, name
