"""The task of promptable masks (Kirillov et al. 2023, arXiv 2304.02643): a mask for each point or box."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.errors import UserError
from common.machine.device import compute_dtype
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Positive
from detr.criterion.clicks import PromptingOptions, Sampled, add_clicks, first_prompts, sample_objects
from detr.criterion.mask_maps import real_cells, to_cells
from detr.criterion.prompted_masks import MaskLossOptions, mask_losses
from detr.data.protocol import MaskData
from detr.evaluation.interaction import interact
from detr.evaluation.prompt_metric import PromptMetric
from detr.importing import sam
from detr.tasks.prompt_prediction import PromptPrediction
from detr.tasks.prompting import PromptOptions as PromptOptions

MIN_IMAGES_FROM_SCRATCH = 10_000  # SAM was trained on 11 million images, and its encoder was pretrained before
UPSCALING = 4  # factor from the side of the image embedding to that of the masks' map


class PromptableMasks(PromptPrediction):
    """The task of masks for prompts. The model has the methods of `detr.models.promptable.PromptableModel`.

    In a step, some objects of each image are prompted by a point or a box. Of the three masks for this prompt, the one
    with the lowest loss is trained, and the others with the weight `loss.others`. Further clicks correct the mask with
    the highest predicted IoU; then there is one mask. Evaluation prompts every object with up to `clicks` central
    clicks.

    The objects and the first prompts are functions of each sample's seed. Clicks after the first depend on the model's
    outputs; rounding errors, which depend on how a step is split, may change them.
    """

    goal = Goal("mIoU_1", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        data: MaskData,
        prompting: PromptingOptions,
        loss: MaskLossOptions,
        clicks: Positive,
        predict: PromptOptions,
    ):
        self.data, self.prompting, self.loss_options, self.clicks = data, prompting, loss, clicks
        self.options = predict
        self.unanswered: list[str] = []
        self.per_micro_batch = ("clicks after the first",) if prompting.rounds > 1 else ()
        if not hasattr(data, "request_masks"):
            raise UserError(
                f"data._target_={type(data).__name__} has no masks, which promptable models need; give data with masks "
                "(data=nested_shapes, shapes, coco or coco_panoptic), or another model."
            )
        data.request_masks()

    def model_arguments(self) -> dict[str, Any]:
        """Return no arguments: nothing in the model depends on the data."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return an empty state: masks have no classes."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing: prediction needs nothing but the model."""

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Import an official file of SAM."""
        return sam.adopt(tensors)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return the number of prompts of a batch: that of prompted objects with a pixel, times the rounds."""
        masks = batch["masks"][self._sample(batch).objects]
        return {"prompts": float(masks.flatten(1).any(1).sum()) * self.prompting.rounds}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted terms of all rounds, each averaged over the prompts of the step."""
        promptable: Any = model
        features: Tensor = promptable.encode(self._images(model, batch))
        sampled = self._sample(batch)
        if not len(sampled.images):
            return features.float().sum() * 0, {}
        cells = UPSCALING * features.shape[-1]
        cell = promptable.image_size / cells
        sizes = batch["sizes"].to(features.device)
        targets = to_cells(batch["masks"][sampled.objects], promptable.image_size, cells)
        real = real_cells(sizes, promptable.image_size, cells)[sampled.images]
        weights = targets.flatten(1).any(1) / normalisers["prompts"]  # (N,), 0 for an object without a pixel
        prompts = first_prompts(self.prompting, sampled, targets, sizes, cell)
        terms = []
        for number in range(self.prompting.rounds):
            outputs = promptable.decode(features, prompts)
            kept = slice(1, None) if number == 0 else slice(0, 1)
            logits, predicted = outputs["masks"][:, kept], outputs["ious"][:, kept]
            losses = mask_losses(logits, predicted, targets, real, self.loss_options)
            # A product of vectors would be in bf16 under autocast.
            terms.append(torch.stack([(term * weights).sum() for term in losses]))
            if number + 1 < self.prompting.rounds:
                best = logits[torch.arange(len(logits), device=logits.device), predicted.argmax(1)].detach()
                uniforms = sampled.uniforms[:, 2 + number]
                prompts = add_clicks({**prompts, "masks": best}, best > 0, targets, real, uniforms, cell)
        options = self.loss_options
        factors = {"focal": options.focal_weight, "dice": options.dice_weight, "iou": options.iou_weight}
        sums = torch.stack(terms).sum(0).unbind()
        parts = {name: factor * term for (name, factor), term in zip(factors.items(), sums, strict=True)}
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return the masks for a user's prompts, or in evaluation those for simulated clicks on every object.

        See `PromptPrediction.prompted` and `detr.evaluation.interaction.interact`.
        """
        promptable: Any = model
        features = promptable.encode(self._images(model, batch))
        if "prompts" in batch:
            return self.prompted(promptable, features, batch)
        return interact(promptable, features, batch["masks"], batch["counts"], batch["sizes"], self.clicks)

    def metric(self, split: Split) -> PromptMetric:
        """Create a metric for `split`."""
        return PromptMetric(self.data.count(split), self.clicks)

    def split_advice(self, split: Split) -> list[str]:
        """Return warnings about the annotations of `split`."""
        return list(self.data.advice(split)) if hasattr(self.data, "advice") else []

    def advice(self, pretrained: bool) -> list[str]:
        """Return warnings about the annotations, and about too few images to train without pretrained weights."""
        lines = [warning for split in SPLITS for warning in self.split_advice(split)]
        count = self.data.count("train")
        if pretrained or count >= MIN_IMAGES_FROM_SCRATCH or getattr(self.data, "drawn", False):
            return lines
        return [
            *lines,
            f"the model starts without pretrained weights and there are only {count} training images, from which "
            "masks of photographs are hardly learnt; start from checkpoint=FILE (an official SAM).",
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if no mask overlaps its object."""
        ious = [float(iou) for answer in answers for iou in answer["ious"].flatten()]
        if not ious or max(ious) > 0.05:
            return []
        return ["no mask overlaps its object in the first validation images: train longer, or lower optimizer.lr."]

    def _sample(self, batch: Batch) -> Sampled:
        if "seeds" not in batch:
            raise UserError("Simulated prompts need a seed for each sample: batch['seeds'], which the loader adds.")
        return sample_objects(self.prompting, batch["counts"], batch["seeds"], batch["masks"])

    def _images(self, model: nn.Module, batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        return normalise(batch["images"].to(device), batch["sizes"].to(device), compute_dtype(device))
