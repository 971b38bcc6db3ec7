"""The detection task of CNN detectors, which compute their losses and detections themselves."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.errors import UserError
from common.machine.device import compute_dtype
from common.task import Adopted, Answer, Batch
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.masks import resize_probabilities
from detr.importing import torchvision_detectors
from detr.tasks.detection_task import DetectionTask
from detr.tasks.prediction import PredictOptions as PredictOptions

MIN_SIDE = 1e-3  # pixels; torchvision refuses boxes without an extent, also after resizing


class CnnDetection(DetectionTask):
    """The task of object detection for detectors with a loss of their own, such as Faster R-CNN.

    The model's `forward(images, sizes, targets)` returns {"losses": ...} in training mode and {"detections": ...} in
    evaluation mode, as `detr.models.cnn_detector.CnnDetector` does. The number of detections differs between images.
    """

    def __init__(self, *, data: DetectionData, predict: PredictOptions, evaluator: Evaluator, masks: bool = False):
        super().__init__(data=data, predict=predict, evaluator=evaluator)
        self.masks = masks
        if masks:
            self.request_masks()

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Import a detector of torchvision, in which the class index is the COCO category id."""
        return torchvision_detectors.adopt(tensors, self.masks)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return the number of images, by which the losses, which are means over images, are averaged."""
        return {"images": float(len(batch["counts"]))}

    def targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the objects of each image: boxes (n, 4) xyxy in pixels of the resized image, and labels (n,).

        With `masks`, also the uint8 masks (n, h, w) of the resized image. Boxes with a side below a thousandth of a
        pixel are left out.
        """
        pairs = zip(batch["boxes"].split(batch["counts"]), batch["labels"].split(batch["counts"]), strict=True)
        targets = []
        for boxes, labels in pairs:
            keep = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
            targets.append({"boxes": boxes[keep].float(), "labels": labels[keep]})
            if self.masks:
                height, width = batch["sizes"][len(targets) - 1].tolist()
                masks = batch["masks"].split(batch["counts"])[len(targets) - 1]
                targets[-1]["masks"] = masks[keep][:, :height, :width].byte()
        return targets

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the model's losses; their names are the parts for the log.

        Raises UserError if the model returns no losses.
        """
        outputs = model(*self._inputs(model, batch), self.targets(batch))
        if "losses" not in outputs:
            raise UserError(
                f"model._target_ is {type(model).__name__}, which returns no losses in training mode; the task "
                "CnnDetection needs a detector that computes them (see detr/models/cnn_detector.py)."
            )
        share = len(batch["counts"]) / normalisers["images"]
        parts = {name: loss.float() * share for name, loss in outputs["losses"].items()}
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image: boxes (n, 4) xyxy in pixels of the original image, scores (n,), labels (n,).

        With `masks`, also the boolean masks (n, H, W) in pixels of the original image. The number n of detections
        differs between images.
        """
        detections = model(*self._inputs(model, batch))["detections"]
        scales = (batch["original_sizes"] / batch["sizes"]).flip(1).repeat(1, 2)  # (B, 4) as x y x y
        answers: list[Answer] = [
            {
                "boxes": d["boxes"].float().cpu() * scale,
                "scores": d["scores"].float().cpu(),
                "labels": d["labels"].cpu(),
            }
            for d, scale in zip(detections, scales.cpu(), strict=True)
        ]
        if self.masks:
            for answer, d, size in zip(answers, detections, batch["original_sizes"].tolist(), strict=True):
                answer["masks"] = resize_probabilities(d["masks"][:, 0].float(), size).cpu() > 0.5
        return answers

    def _inputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the batch's normalised images (B, 3, H, W), and their sizes (B, 2), on the model's device.

        The sizes are heights and widths without padding, or None if no image is padded.
        """
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        return images, sizes if batch["padded"] else None

    def from_scratch(self, minimum: int) -> str:
        """Return what a CNN detector learns from few images without pretrained weights, and what to do instead."""
        return (
            f"with fewer than {minimum:,} images, pretrained weights give a far better detector (He et al. 2018, arXiv "
            "1811.08883, section 5); start from checkpoint=FILE or a name in configs/weights.yaml, or from "
            "model.backbone.weights=imagenet_v1 or a file."
        )

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if the model detects nothing in any image."""
        if not answers or any(len(answer["boxes"]) for answer in answers):
            return []
        return [
            "the model detects nothing in the first validation images, so AP is zero: train longer, lower "
            "optimizer.lr, or lower model.detections.threshold."
        ]
