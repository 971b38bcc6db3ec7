"""A small SAM with random weights, the same network in transformers, and prompts for tests."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.seeds import generator
from detr.importing import sam as importing
from detr.models.image_encoder import ViTOptions
from detr.models.mask_decoder import DecoderOptions
from detr.models.prompt_encoder import BOTTOM_RIGHT, TOP_LEFT
from detr.models.sam import Sam

SIZE, PATCH, WIDTH, CELLS = 48, 8, 16, 24  # CELLS: side of the masks' maps

HF_NAMES = (  # official name -> that of transformers, applied in this order
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"\.norm(\d|_final)", r".layer_norm\1"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
)


def small_sam(dtype: torch.dtype = torch.float64) -> Sam:
    """A SAM of 6 x 6 patches and windows of 4 x 4, so that windows are padded; every tensor is random."""
    torch.manual_seed(0)
    model = Sam(
        image_size=SIZE,
        patch_size=PATCH,
        width=WIDTH,
        mask_channels=8,
        encoder=ViTOptions(width=24, heads=3, layers=3, feedforward=40, window=4, global_layers=[1], drop_path=0.0),
        decoder=DecoderOptions(layers=2, heads=2, feedforward=32, iou_hidden=24),
    )
    redraw(model)
    return model.eval().to(dtype)


def redraw(model: nn.Module) -> None:
    """Give every tensor of a model random values of a size at which activations neither vanish nor saturate."""
    rng = generator("redraw")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.uniform_(0.7, 1.3, generator=rng)
            else:
                inputs = tensor[0].numel() if tensor.ndim > 1 else 25
                tensor.normal_(std=max(0.3, inputs**-0.5), generator=rng)


def transformers_sam(model: Sam) -> Any:
    """Transformers' SamModel with the weights of `small_sam`."""
    from transformers import SamConfig, SamModel
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

    vision = SamVisionConfig(
        hidden_size=24,
        output_channels=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=WIDTH // 2,
        mlp_dim=40,
    )
    prompts = SamPromptEncoderConfig(hidden_size=WIDTH, image_size=SIZE, patch_size=PATCH, mask_input_channels=8)
    # The official decoder has torch.nn.LayerNorm with its default epsilon, and transformers' default is 1e-6.
    decoder = SamMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=24, layer_norm_eps=1e-5
    )
    # "eager" attention would compute the softmax in fp32 in an fp64 model, too.
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    peer = SamModel._from_config(config, attn_implementation="sdpa").eval().to(next(model.parameters()).dtype)
    tensors = {hf_name(name): tensor for name, tensor in importing.export(model.state_dict()).items()}
    frequencies = tensors["prompt_encoder.shared_embedding.positional_embedding"]
    peer.load_state_dict({**tensors, "shared_image_embedding.positional_embedding": frequencies})
    return peer


def hf_name(name: str) -> str:
    for pattern, replacement in HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def images(count: int = 2, size: tuple[int, int] = (SIZE, SIZE), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, *size, generator=generator("images", *size), dtype=dtype)


def prompts(
    kind: str, *, image: list[int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prompts of one kind, and the same as keyword arguments of transformers' prompt encoder (one image a prompt).

    `kind` lists what each prompt has: "points" (two, of which the second is background), "box" or "mask".
    """
    count, rng = len(image), generator("prompts", kind, seed)
    points = torch.rand(count, 2, 2, generator=rng, dtype=dtype) * SIZE
    corners = torch.rand(count, 2, 2, generator=rng, dtype=dtype).sort(dim=1).values * SIZE
    masks = torch.randn(count, CELLS, CELLS, generator=rng, dtype=dtype)
    labels = torch.tensor([1, 0]).expand(count, -1)
    parts: list[tuple[Tensor, Tensor]] = []
    theirs: dict[str, Any] = {"input_points": None, "input_labels": None, "input_boxes": None, "input_masks": None}
    ours = {"image": torch.tensor(image)}
    if "points" in kind:
        parts.append((points, labels))
        theirs |= {"input_points": points[:, None], "input_labels": labels[:, None]}
    if "box" in kind:
        parts.append((corners, torch.tensor([TOP_LEFT, BOTTOM_RIGHT]).expand(count, -1)))
        theirs["input_boxes"] = corners.flatten(1)[:, None]
    if "mask" in kind:
        ours["masks"] = masks
        theirs["input_masks"] = masks[:, None]
    ours |= {
        "points": torch.cat([points for points, _ in parts], 1),
        "labels": torch.cat([labels for _, labels in parts], 1),
    }
    return ours, theirs
