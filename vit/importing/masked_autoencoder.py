"""Import masked autoencoders of facebookresearch/mae and of transformers (He et al. 2022, arXiv 2111.06377).

Files without a decoder, as published for pre-training, are imported without one. The tensors of the encoder have the
names of timm's ViTs or of those of transformers.
"""

from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections
from common.weights.renaming import Row, Table, rename, with_prefixes
from common.weights.unwrapping import floats
from vit.importing import positions
from vit.importing.adopt import recognise, unwrap
from vit.importing.layouts import LAYOUTS


def _decoder_rows(decoder: str, block: str, blocks: list[Row]) -> list[Row]:
    """Return the rows of the decoder, whose tensors' names begin with `decoder`; `block` is the start of a block's."""
    return [
        (f"{decoder}mask_token", "mask_token"),
        (f"{decoder}decoder_embed.", "decoder_embedding."),
        (f"{decoder}decoder_pos_embed", "decoder_positions"),
        (f"{decoder}decoder_norm.", "decoder.norm."),
        (f"{decoder}decoder_pred.", "pixels."),
        *with_prefixes(f"{decoder}{block}", "decoder.blocks.{i}.", blocks),
    ]


def _block_rows(layout: str, start: str) -> list[Row]:
    """Return the rows of the layout's blocks (theirs, ours), without the start of the names."""
    rows = [(theirs, ours) for theirs, ours in LAYOUTS[layout].names.rows if theirs.startswith(start)]
    return [(theirs.removeprefix(start), ours.removeprefix("encoder.blocks.{i}.")) for theirs, ours in rows]


DECODERS = {
    "timm": _decoder_rows("", "decoder_blocks.{i}.", _block_rows("timm", "blocks.{|*.}{i}.")),
    "transformers": _decoder_rows(
        "decoder.", "decoder_layers.{i}.", _block_rows("transformers", "{vit.|*.|}{layers|encoder.layer}.{i}.")
    ),
}


def adopt(content: dict[str, Any], image_size: tuple[int, int] | None = None) -> Adopted:
    """Convert the content of a file to the weights of `vit.models.masked_autoencoder.MaskedAutoencoder`.

    `image_size` is (H, W) of the config in pixels, as in `vit.importing.adopt.adopt`. Raises UserError for a file that
    is no masked autoencoder and no plain ViT with a class token.
    """
    tensors, left_out = unwrap(content)
    layout = recognise(tensors)
    if layout not in DECODERS:
        raise UserError(_refusal(f"it has the layout of {layout}"))
    names = Table(*DECODERS[layout], *LAYOUTS[layout].names.rows)
    parts = rename(floats(tensors), names.to_ours, r"(head|fc_norm|classifier)\..*")
    heads = [name for name in parts.tensors if name.startswith(("head.", "pooled_norm.", "representation."))]
    weights = {name: tensor for name, tensor in parts.tensors.items() if name not in heads}
    if parts.unknown:
        raise UserError(_refusal(f"it has {parts.unknown[0]}"))
    weights = projections.join(weights, zero_biases=True)
    required = ("patches.weight", "class_token", "positions", "encoder.norm.weight")
    if missing := next((name for name in required if name not in weights), None):
        raise UserError(_refusal(f"it has nothing for {missing}"))
    side = weights["patches.weight"].shape[-1]
    grid = (image_size[0] // side, image_size[1] // side) if image_size else None
    notes = []
    for table in ("positions", "decoder_positions"):
        if table in weights:
            rows = weights.pop(table).flatten(0, -2)  # (1, 1 + N, C) -> (1 + N, C)
            read = positions.read_grid(len(rows), 1, 0, grid)
            weights |= _split_table(table, rows, read)
            notes += [note for note in read.notes if note not in notes]
    weights |= {name: weights[name].flatten() for name in ("class_token", "mask_token") if name in weights}
    return Adopted(weights, {}, left_out + parts.left_out + [parts.sources[name] for name in heads], tuple(notes))


def _split_table(name: str, rows: Tensor, read: positions.GridReading) -> dict[str, Tensor]:
    """Split a table of positions (1 + N, C) into that of the class token (C,) and those of the patches (h, w, C)."""
    if read.before != 1:
        raise UserError(_refusal(f"its {len(rows)} positions have none of a class token"))
    return {f"{name}.token": rows[0], f"{name}.grid": rows[1:].unflatten(0, read.grid)}


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is not a masked autoencoder ({reason}); give a file of facebookresearch/mae or of "
        "transformers' ViTMAE as published, or a file that this program wrote."
    )
