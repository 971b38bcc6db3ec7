"""The task of modelling images pixel by pixel, as image GPT does.

Chen et al. 2020, "Generative Pretraining from Pixels" (ICML), sections 2 and 3. A palette turns the pixels of an
image into tokens. The model predicts them, and may classify the image as well.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from common.data import batching
from common.data.image_objects import exif_of, to_image
from common.data.images import read_image
from common.data.names import composed
from common.errors import UserError
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.machine import distributed
from common.machine.device import full_precision
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, predict_each
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Positive
from vit.criterion import cross_entropy, pixels
from vit.criterion.cross_entropy import LossOptions
from vit.criterion.pixels import PixelLossOptions
from vit.data.protocol import NormalisedImages
from vit.evaluation import pictures
from vit.evaluation.accuracy import check_labels
from vit.evaluation.code_length import CodeLengthMetric
from vit.importing import image_gpt as importing
from vit.tasks import sampling
from vit.tasks.sampling import SAMPLES, SampleOptions
from vit.tokenizers.palette import Palette

MAX_PALETTE_IMAGES = 10_000  # maximum number of training images to which the palette is fitted


class ImageModellingState(TypedDict):
    """The content of `ImageModelling.state`, which is stored in a checkpoint."""

    palette: list[list[float]]  # V colours, each a list with a value from -1 to 1 per channel
    lossless: bool  # whether they are all colours of the training images
    classes: list[str]  # names, by index


class ImageModelling:
    """Prediction of the pixels of images and, if `loss.classification` is above 0, of their classes.

    The palette has at most `colours` colours and is fitted to the training images. A run that starts from a checkpoint
    takes the checkpoint's palette instead.
    """

    handed_on: ClassVar[tuple[str, ...]] = ("colours", "classes", "image_size")
    state_schema = ImageModellingState

    def __init__(
        self, *, data: NormalisedImages, colours: Positive, loss: PixelLossOptions, predict: SampleOptions
    ) -> None:
        self.data, self.colours, self.loss_options, self.options = data, colours, loss, predict
        self.masks, self.classifies = loss.objective == "masked", loss.classification > 0
        bits = "bits_per_masked_pixel" if self.masks else "bits_per_pixel"
        self.goal = Goal("top1", higher_is_better=True) if self.classifies else Goal(bits, higher_is_better=False)
        self._palette: Palette | None = None
        self._has_lost_colours = False  # whether an evaluated image has a colour outside a lossless palette
        self._classes: list[str] | None = None
        self.unanswered: list[str] = []

    @property
    def palette(self) -> Palette:
        """The palette: that of the checkpoint after `restore` or `inherit`; otherwise it is fitted at the first use.

        It is fitted on rank 0 to the training images, without augmentation, or to `MAX_PALETTE_IMAGES` of them.
        """
        if self._palette is None:
            with torch.device("cpu"):  # the model may be under construction on another device
                fitted = self._fitted_palette() if distributed.is_main() else None
            self._palette = distributed.broadcast(fitted)
        return self._palette

    def _fitted_palette(self) -> Palette:
        data, cpu = self.data, torch.device("cpu")
        batches = batching.evaluation(
            data, "train", batch_size=data.batch_size, rank=0, world=1, workers=0, samples=MAX_PALETTE_IMAGES
        )
        parts = [self._pixels(batch, cpu) for batch in batches]  # (B, channels, H, W) each
        return Palette.fit(torch.cat([part.permute(0, 2, 3, 1).flatten(0, 2) for part in parts]), self.colours)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index: those of the data or, after `restore`, those of the checkpoint."""
        if self._classes is None:
            self._classes = list(self.data.classes())
        return self._classes

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of colours, that of classes (0 without a classifier), and the (height, width) of images."""
        return {
            "colours": len(self.palette),
            "classes": len(self.classes) if self.classifies else 0,
            "image_size": tuple(self.data.image_size),
        }

    def state(self) -> dict[str, Any]:
        """Return the palette and the names of the classes; see ImageModellingState."""
        colours, lossless = self.palette.colours.tolist(), self.palette.lossless and not self._has_lost_colours
        return {"palette": colours, "lossless": lossless, "classes": self.classes}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the palette and the classes of a checkpoint; raises UserError for a damaged palette."""
        self.inherit(state)
        self._classes = list(state["classes"])

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over the palette of a checkpoint from which a run starts, as its weights have learnt these colours."""
        if not state["palette"] or len({len(colour) for colour in state["palette"]}) != 1:
            raise UserError("The palette in the checkpoint is not a list of colours; give another checkpoint.")
        self._palette = Palette(torch.tensor(state["palette"], device="cpu"), state["lossless"])
        self._has_lost_colours = False

    def adopt(self, tensors: dict[str, Any], folder: Path) -> Adopted:
        """Convert a file of the authors or of transformers; see vit/importing/image_gpt.py."""
        return importing.adopt(tensors, self._classes, folder)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return {"images": the number of images in the batch, "pixels": the number of their pixels}.

        Raises UserError for mixed images, and for a label outside the classes.
        """
        if "other_labels" in batch:
            raise UserError(
                "data.augmentation.mixup and cutmix mix images, whose pixels cannot be modelled; give 0 for both."
            )
        if self.classifies:
            check_labels(batch["ids"], batch["labels"], len(self.classes))
        images = len(batch["labels"])
        return {"images": float(images), "pixels": float(images * math.prod(self.data.image_size))}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's part of the step's loss, in nats; see vit/criterion/pixels.py.

        With a classifier, the parts "generation" and "classification" are returned, too, without their weights.
        """
        options = self.loss_options
        tokens, masked, outputs = self._forward(model, batch)
        nats = pixels.pixel_nats(outputs.colours, tokens)  # (B, N)
        if masked is None:
            generation = nats.sum() / normalisers["pixels"]
        else:
            generation = pixels.masked_means(nats, masked).sum() / normalisers["images"]
        if not self.classifies:
            return options.generation * generation, {}
        labels = batch["labels"].to(tokens.device)
        total = cross_entropy.cross_entropy(LossOptions(smoothing=options.smoothing), outputs.classes, labels)
        classification = total / normalisers["images"]
        parts = {"generation": generation.detach(), "classification": classification.detach()}
        return options.generation * generation + options.classification * classification, parts

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Any]:
        """Return the colours of the pixels (B, N), which of them are masked (B, N) or None, and the model's outputs."""
        device = next(model.parameters()).device
        tokens = self.tokens(batch, device)
        if not self.masks:
            return tokens, None, model(tokens)
        masked = self.sample_masks(batch, device)
        return tokens, masked, model(tokens, masked)

    def _pixels(self, batch: Batch, device: torch.device) -> Tensor:
        """Recover the pixel values from the model's usual input: uint8 (B, channels, H, W)."""
        with full_precision(device):
            images = self.data.inputs(batch, device)
            mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.data.mean, self.data.std))
            return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the colours of a batch's pixels: int64 (B, N).

        Raises UserError if images and palette differ in their channels.
        """
        images = self._pixels(batch, device)
        if images.shape[1] != self.palette.channels:
            raise UserError(
                f"The images have {images.shape[1]} channels, and the palette of the checkpoint has "
                f"{self.palette.channels}; give data with the same number of channels, 1 (grey) or 3 (RGB)."
            )
        return self.palette.encode(images)

    def _note_lost_colours(self, batch: Batch, tokens: Tensor) -> None:
        """Note whether a pixel is not of a palette that held all colours of the images to which it was fitted."""
        if self.palette.lossless and not self._has_lost_colours:
            height, width = self.data.image_size
            decoded = self.palette.decode(tokens, (height, width))
            self._has_lost_colours = not torch.equal(decoded, self._pixels(batch, tokens.device).cpu())

    def sample_masks(self, batch: Batch, device: torch.device) -> Tensor:
        """Sample masks (B, N) from the images' seeds in training, and otherwise from their ids, so that they are fixed.

        Repeated views of an image share a seed, to which the number of the view is added.
        """
        count = len(batch["labels"])
        seeds = batch["seeds"] if "seeds" in batch else batch["ids"]
        views = count // len(seeds)
        keys = [f"{seed} {view}" for seed in seeds for view in range(views)]
        return pixels.sample_masks(keys, math.prod(self.data.image_size), self.loss_options.masked).to(device)

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return one answer (a dict) for each image.

        An answer has nats (the sum over predicted pixels), pixels (their number) and bits (H, W), the bits of each
        pixel, or 0 where it is not predicted. With a classifier, it also has log_probabilities (K,), and label, name
        and probability of the most probable class. For what answers to batches of `read` have in addition, see
        vit/tasks/sampling.py.
        """
        if "samples" in batch:
            return self._sampled(model)
        tokens, masked, outputs = self._forward(model, batch)
        self._note_lost_colours(batch, tokens)
        nats = pixels.pixel_nats(outputs.colours, tokens)
        nats = nats if masked is None else nats * masked
        counts = [tokens.shape[1]] * len(tokens) if masked is None else masked.sum(1).tolist()
        bits = (nats / math.log(2)).view(len(nats), *self.data.image_size).float().cpu()
        sums = nats.double().sum(1).tolist()
        answers: list[Answer] = [
            {"nats": total, "pixels": count, "bits": map} for total, count, map in zip(sums, counts, bits, strict=True)
        ]
        if outputs.classes is not None:
            for answer, scores in zip(answers, outputs.classes.float().log_softmax(-1).cpu(), strict=True):
                label = int(scores.argmax())
                answer |= {"log_probabilities": scores, "label": label, "name": self.classes[label]}
                answer["probability"] = float(scores[label].exp())
        return self._completed(model, batch, tokens, answers) if "complete" in batch else answers

    def _completed(self, model: nn.Module, batch: Batch, tokens: Tensor, answers: list[Answer]) -> list[Answer]:
        """Add completions to the answers; see vit/tasks/sampling.py. A masked model samples none."""
        if self.masks:
            return answers
        size = self._image_size()
        added = sampling.complete(model, self.palette, self.options, tokens, size, batch["ids"])
        return [answer | extra for answer, extra in zip(answers, added, strict=True)]

    def _sampled(self, model: nn.Module) -> list[Answer]:
        """Sample whole images; see vit/tasks/sampling.py."""
        if self.masks:
            raise UserError(
                "A model with task.loss.objective=masked cannot sample images pixel by pixel; train one with "
                "task.loss.objective=autoregressive."
            )
        return sampling.sample_images(model, self.palette, self.options, self._image_size())

    def _image_size(self) -> tuple[int, int]:
        height, width = self.data.image_size
        return height, width

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Return an image's bits per pixel and, with a classifier, its most probable class as a list of one record.

        `input` is an image that `common.data.image_objects.to_image` accepts. For several images (a list, a folder, or
        a pattern), the result is a list of such lists. Jupyter displays an image's completions. For a batch (a dict),
        the result is `answers(model, input)`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        batch = self.data.collate([self.data.view(to_image(input, exif_of(self.data)), Path("image"))])
        (answer,) = self.answers(model, batch | {"complete": True})
        return Records(
            [sampling.record(answer)], draw=partial(sampling.draw, answer) if "completions" in answer else None
        )

    def read(self, input: str) -> Iterator[Batch]:
        """Yield a batch of one image for each image that `input` names, resized as in evaluation, to be completed.

        input=samples, if there is no file of this name, yields one batch without images, for which whole images are
        sampled. Images in a folder that cannot be read are skipped, and the reasons are added to `unanswered`.
        """
        if input == SAMPLES and not Path(input).exists():
            yield {"ids": list(range(self.options.candidates)), "samples": True}
            return
        yield from read_each(input, self._read_batches, self.unanswered)

    def _read_batches(self, file: InputFile) -> Iterator[Batch]:
        image = read_image(file.path, exif=exif_of(self.data), content=file.content)
        yield self.data.collate([self.data.view(image, file.path)]) | {"names": [file.name], "complete": True}

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write a picture of each image's completions and a JSON file with its bits; yield a line for each image.

        For sampled images, one picture of all of them, samples.png, is written.
        """
        if "samples" in batch:
            write_picture(sampling.draw_sheet(answers), folder / f"{SAMPLES}.png")
            yield from (
                f"sample {i}: {answer['bits_per_pixel']:.3f} bits per pixel" for i, answer in enumerate(answers)
            )
            return
        for name, path, answer in zip(batch["names"], batch["files"], answers, strict=True):
            record = sampling.record(answer)
            write_answer(answer_file(folder, name, ".pixels.json"), Path(path), record)
            if "completions" in answer:
                write_picture(sampling.draw(answer), answer_file(folder, name, ".completions.png"))
            line = f"{printable(name)}: {record['bits_per_pixel']:.3f} bits per pixel"
            yield line + (f"; {printable(record['name'])} {record['share']:.3f}" if "name" in record else "")

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images, and beside each the bits of its pixels, for the log: uint8 (n, 3, H, W)."""
        images = self.data.thumbnails(batch, count)
        return pad_and_stack([pictures.draw_heat_map(i, a["bits"]) for i, a in zip(images, answers, strict=False)])

    def metric(self, split: Split) -> CodeLengthMetric:
        """Return an empty metric; raises UserError if the model has a classifier of other classes than the data's.

        Of an imported classifier without class names, only the number of classes is compared.
        """
        classes = list(self.data.classes())
        nameless = [f"class {i}" for i in range(len(classes))]  # importing.adopt gives these names
        same = [*map(composed, self.classes)] == [*map(composed, classes)]
        if self.classifies and not same and self.classes != nameless:
            raise UserError(
                f"The data have the classes {', '.join(classes[:3])}, ..., and this model has learnt "
                f"{', '.join(self.classes[:3])}, ...; evaluate it on data of its own classes, or train on these data "
                "from checkpoint=FILE."
            )
        return CodeLengthMetric(self.palette.channels, classes, self.masks, self.data.count(split))

    def evaluation_notes(self) -> list[str]:
        """Return a sentence on what the bits measure."""
        count = len(self.palette)
        if self.palette.lossless and not self._has_lost_colours:
            return [f"the {count} colours are all that these images have: the bits code the pixels themselves"]
        return [
            f"the bits code which of {count} palette colours is nearest to a pixel, not its value: they cannot be "
            "compared with bits per dimension of RGB values"
        ]

    def split_advice(self, split: Split) -> list[str]:
        """Return the data's warnings about `split`."""
        return list(self.data.advice(split)) if hasattr(self.data, "advice") else []

    def advice(self, pretrained: bool) -> list[str]:
        """Return the data's warnings about all splits."""
        return [warning for split in SPLITS for warning in self.split_advice(split)]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if `answers` need more bits than a model that has learnt nothing; otherwise nothing."""
        count = sum(answer["pixels"] for answer in answers)
        bits = sum(answer["nats"] for answer in answers) / math.log(2) / max(1, count)
        if bits <= math.log2(len(self.palette)) + 1e-3:
            return []
        return [
            f"{bits:.2f} bits per pixel are more than the {math.log2(len(self.palette)):.2f} of equal probabilities: "
            "lower optimizer.lr, or give schedule.warmup more steps."
        ]
