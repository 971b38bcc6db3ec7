"""The task of a masked autoencoder: predict the pixels of masked patches (He et al. 2022, arXiv 2111.06377)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.data.image_objects import exif_of, to_image
from common.data.images import read_image
from common.errors import UserError
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.machine.seeds import mix
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, predict_each
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Seed
from vit.criterion.masked_pixels import (
    MaskOptions,
    masked_error,
    masked_patches,
    patch_images,
    patch_pixels,
    patch_statistics,
    sample_visible,
)
from vit.data.protocol import ImageData
from vit.evaluation.reconstruction import ReconstructionMetric, draw_reconstruction
from vit.importing import masked_autoencoder as importing


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of evaluation and prediction: the seed of the masks."""

    seed: Seed


class MaskedAutoencoding:
    """Pre-training of a ViT on images, whose labels are not used.

    In training, an image's mask depends on the run's seed, the epoch and the image; in evaluation and prediction, on
    `predict.seed` and the image's id. So no mask depends on the rest of the batch.
    """

    goal = Goal("loss", higher_is_better=False, undefined=None)
    handed_on: ClassVar[tuple[str, ...]] = ("channels", "image_size")

    def __init__(self, *, data: ImageData, mask: MaskOptions, predict: PredictOptions):
        self.data, self.mask, self.options = data, mask, predict
        self.unanswered: list[str] = []

    def model_arguments(self) -> dict[str, Any]:
        """Return the model's arguments that the data determine: channels, (height, width)."""
        return {"channels": self.data.channels, "image_size": tuple(self.data.image_size)}

    def state(self) -> dict[str, Any]:
        """Return an empty dict, since there are no classes."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing, since there is no state."""

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a file of MAE's authors or of transformers; see vit/importing/masked_autoencoder.py."""
        height, width = self.data.image_size
        return importing.adopt(tensors, (height, width))

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return {"images": the number of images in the batch}; all images have as many masked patches."""
        return {"images": float(len(batch["labels"]))}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's part of the step's mean over all masked patches of the error of their pixels.

        This part is the sum over the batch's images of their mean error, divided by the number of images of the whole
        step. The returned dict is empty, because the loss has no other terms.
        """
        if "seeds" not in batch:
            raise UserError("Masking needs a seed for each sample: batch['seeds'], which the loader adds.")
        images = self._images(model, batch)
        errors, _, _ = self._predict(model, images, batch["seeds"])
        return errors.sum() / normalisers["images"], {}

    def _predict(self, model: Any, images: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the error of each image (B,), the predicted pixels (B, N, P), and the masked patches (B, N)."""
        rows, columns = model.patches.grid(images.shape[-2], images.shape[-1])
        visible = sample_visible(self.mask, seeds, len(images), rows * columns).to(images.device)
        masked = masked_patches(visible, rows * columns)
        predicted = model(images, visible)
        return masked_error(self.mask, predicted, images, masked, model.patches.size), predicted, masked

    def _images(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the model's input without autocast, as in classification."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            images: Tensor = self.data.inputs(batch, device)
        return images

    @torch.no_grad()
    def answers(self, model: Any, batch: Batch) -> list[Answer]:
        """Return one answer (a dict) for each image.

        An answer has loss (a float), masked (bool (rows, columns) of patches) and reconstruction, uint8 (3, H, W): the
        image with predicted pixels in masked patches. If the loss normalises the pixels of patches, the predicted ones
        get the mean and the variance of the true ones.
        """
        images = self._images(model, batch)
        size = model.patches.size
        grid = model.patches.grid(images.shape[-2], images.shape[-1])
        seeds = [mix(self.options.seed, id) for id in batch["ids"]]
        errors, predicted, masked = self._predict(model, images, seeds)
        truth = patch_pixels(images, size)
        if self.mask.normalise:
            mean, deviation = patch_statistics(truth)
            predicted = predicted * deviation + mean
        pixels = torch.where(masked[:, :, None], predicted.to(truth.dtype), truth)
        drawn = self._displayed(patch_images(pixels, size, grid)).cpu()
        maps = masked.unflatten(1, grid).cpu()
        return [
            {"loss": loss, "masked": map, "reconstruction": picture}
            for loss, map, picture in zip(errors.tolist(), maps, drawn, strict=True)
        ]

    def _displayed(self, images: Tensor) -> Tensor:
        """Undo the normalisation of the model's input: (B, channels, H, W) -> uint8 (B, 3, H, W)."""
        mean, std = (
            torch.tensor(getattr(self.data, key), device=images.device, dtype=torch.float32).view(-1, 1, 1)
            for key in ("mean", "std")
        )
        scaled = ((images * std + mean) * 255).round().nan_to_num(0).clamp(0, 255).to(torch.uint8)
        return scaled.expand(-1, 3, -1, -1)

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Return [{"loss": the error of the masked patches}] for an image, which Jupyter displays as a picture.

        `input` is an image, a list, a folder or a pattern, as for a classifier. For a batch (a dict), the result is
        `answers(model, input)`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        batch = self.data.collate([self.data.view(to_image(input, exif_of(self.data)), Path("image"))])
        (answer,) = self.answers(model, batch)
        return Records([{"loss": answer["loss"]}], draw=partial(self._draw, batch, 0, answer))

    def read(self, input: str) -> Iterator[Batch]:
        """Yield a batch of one image, resized and cropped as in evaluation, for each image that `input` names.

        The batch also has `names`. Images that cannot be read are treated as by a classifier.
        """
        return read_each(input, self._read_batches, self.unanswered)

    def _read_batches(self, file: InputFile) -> Iterator[Batch]:
        image = read_image(file.path, exif=exif_of(self.data), content=file.content)
        yield self.data.collate([self.data.view(image, file.path)]) | {"names": [file.name]}

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each answer under `folder` as a JSON file with its loss and a picture; yield a line of text for it.

        The picture shows the image with grey masked patches, the reconstruction, and the image.
        """
        for i, (name, path, answer) in enumerate(zip(batch["names"], batch["files"], answers, strict=True)):
            masked = answer["masked"]
            content = {"loss": round(answer["loss"], 6), "masked": int(masked.sum()), "patches": masked.numel()}
            write_answer(answer_file(folder, name, ".reconstruction.json"), Path(path), content)
            write_picture(self._draw(batch, i, answer), answer_file(folder, name, ".reconstruction.png"))
            yield f"{printable(name)}: loss {answer['loss']:.4f} on {content['masked']} of {content['patches']} patches"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images with their reconstructions, for the log: uint8 (n, 3, H, W)."""
        return pad_and_stack([self._draw(batch, i, answer) for i, answer in enumerate(answers[:count])])

    def _draw(self, batch: Batch, index: int, answer: Answer) -> Tensor:
        image = self.data.thumbnails(batch, index + 1)[index]
        return draw_reconstruction(image, answer["reconstruction"], answer["masked"])

    def metric(self, split: Split) -> ReconstructionMetric:
        """Return an empty metric of the loss for `split`."""
        return ReconstructionMetric(self.data.count(split))

    def split_advice(self, split: Split) -> list[str]:
        """Return the data's warnings about `split`."""
        return list(self.data.advice(split)) if hasattr(self.data, "advice") else []

    def advice(self, pretrained: bool) -> list[str]:
        """Return the data's warnings."""
        return [warning for split in SPLITS for warning in self.split_advice(split)]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return an empty list."""
        return []
