"""Image classification as the trainer and the evaluator see it: cross-entropy, class names, accuracy."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.data import batching
from common.data.images import list_images, read_image
from common.errors import UserError
from common.report.pictures import pad_and_stack, write_picture
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Count, Positive
from vit.criterion import cross_entropy as loss
from vit.criterion.cross_entropy import LossOptions
from vit.data.protocol import ImageData
from vit.evaluation import attention_maps, pictures
from vit.evaluation.accuracy import ClassificationMetric, check_labels
from vit.evaluation.neighbours import Bank
from vit.importing import adopt as importing

FROM_SCRATCH = (
    100_000  # images of photographs' size; the paper's figure 4 needs millions, its successors ImageNet's 1.3
)
PHOTOGRAPH = 96  # pixels; smaller images are sets that small models learn from scratch


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What prediction gives beside the class.

    top: how many classes are listed.
    attention: which pictures of attention are made: "none", "maps" (one layer, each head) or "rollout" (up to a layer).
    layer: of the pictures, from 0, or from the end by -1 and so on.
    neighbours: k, for evaluation also by the k nearest training images in feature space; 0 = not.
    """

    top: Positive
    attention: Literal["none", "maps", "rollout"]
    layer: int
    neighbours: Count


class Classification:
    """One class for each image. `data` may stay unopened for prediction alone."""

    goal = Goal("top1", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("classes", "channels", "image_size")

    def __init__(self, *, data: ImageData, loss: LossOptions, predict: PredictOptions):
        self.data, self.loss_options, self.options = data, loss, predict
        self._classes: list[str] | None = None
        self._bank: Bank | None = None

    @property
    def classes(self) -> list[str]:
        """The data set's classes in order of index, or the checkpoint's once `restore` has been called."""
        if self._classes is None:
            self._classes = list(self.data.classes())
        return self._classes

    def model_arguments(self) -> dict[str, Any]:
        """Number of classes, and the images' channels and (height, width)."""
        return {
            "classes": len(self.classes),
            "channels": self.data.channels,
            "image_size": tuple(self.data.image_size),
        }

    def state(self) -> dict[str, Any]:
        """The classes' names, by index."""
        return {"classes": self.classes}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the classes from a checkpoint; raises UserError when it has none, as an imported file without a head."""
        self._classes = list(state["classes"])
        if not self._classes:
            raise UserError(
                "The checkpoint has no head and so knows no classes; train one on images of yours from it first "
                "(train.py checkpoint=FILE)."
            )

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Files of Google, torchvision, timm and transformers; as many classes as ours are taken to be ours."""
        height, width = self.data.image_size
        return importing.adopt(tensors, self._classes, (height, width))

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Number of images; raises UserError for a label that is no class, at which a GPU would fail without a name."""
        check_labels(batch["ids"], batch["labels"], len(self.classes))
        if "other_labels" in batch:
            check_labels(batch["ids"], batch["other_labels"], len(self.classes), "the one to mix with sample")
        return {"images": float(len(batch["labels"]))}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, which users' tasks may call for one version."""
        return self.normalisers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the step's images; see vit/criterion/cross_entropy.py."""
        logits = self._forward(model, batch)
        labels = (batch["labels"], batch.get("other_labels"), batch.get("shares"))
        return loss.cross_entropy(self.loss_options, logits, *labels) / normalisers["images"], {}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer per image: log_probabilities (K,), label, name and probability of the likeliest class.

        With `attention` also maps (1 or heads, h, w); with `neighbours` also nearest, the class they vote for.
        """
        logits = self._forward(model, batch)
        scores = logits.float().log_softmax(dim=-1).cpu()  # (B, K)
        labels = scores.argmax(dim=-1).tolist()
        answers: list[Answer] = [
            {"log_probabilities": s, "label": k, "name": self.classes[k], "probability": float(s[k].exp())}
            for s, k in zip(scores, labels, strict=True)
        ]
        extra: dict[str, Any] = {}
        if self.options.attention != "none":
            extra["maps"] = self._maps(model, batch)
        if self.options.neighbours:
            extra["nearest"] = self._nearest(model, batch).tolist()
        return [answer | {key: extra[key][i] for key in extra} for i, answer in enumerate(answers)]

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(self._images(model, batch))
        return logits

    def _images(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model sees, in fp32 in any precision: the places that a crop samples do not fit into half types."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            images: Tensor = self.data.inputs(batch, device)
        return images

    def _maps(self, model: Any, batch: Batch) -> Tensor:
        """Where the model looked: (B, heads, h, w) in one layer, (B, 1, h, w) for the rollout up to it."""
        if not all(hasattr(model, name) for name in ("patches", "pooling", "before_patches")):
            raise UserError(
                f"task.predict.attention={self.options.attention}: {type(model).__name__} does not say where its "
                "patches are (patches, pooling, before_patches); use attention=none."
            )
        images = self._images(model, batch)
        layers = attention_maps.watch(model, images, self.options.layer)
        grid = model.patches.grid(images.shape[-2], images.shape[-1])
        where = (model.before_patches, model.pooling == "token", grid)
        if self.options.attention == "rollout":
            return attention_maps.rollout(layers, *where)[:, None].cpu()
        return attention_maps.attention_map(layers[-1], *where).cpu()

    def _nearest(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the nearest training images are, by their features: (B,)."""
        if self._bank is None:
            size = self.data.batch_size
            shares = batching.evaluation(self.data, "train", batch_size=size, rank=0, world=1, workers=0)
            pairs = [(self._features(model, part), part["labels"]) for part in shares]
            features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
            self._bank = Bank(features, labels.to(features.device), len(self.classes))
        return self._bank.vote(self._features(model, batch), self.options.neighbours)

    def _features(self, model: nn.Module, batch: Batch) -> Tensor:
        features = getattr(model, "features", None)
        if features is None:
            raise UserError(f"task.predict.neighbours: {type(model).__name__} has no method features(images); use 0.")
        found: Tensor = features(self._images(model, batch))
        return found.float()

    def read(self, input: str) -> Iterator[Batch]:
        """One image file, or a folder of them, as batches of one, resized as in evaluation."""
        for path in list_images(Path(input)):
            yield self.data.collate([self.data.view(read_image(path), path)])

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each image's classes as JSON, and pictures of attention where there are maps; one line each.

        classes is a list of {name, probability}, the likeliest first; nearest is what the neighbours vote for.
        """
        for i, (path, answer) in enumerate(zip(batch["files"], answers, strict=True)):
            scores = answer["log_probabilities"]
            best = scores.argsort(descending=True, stable=True)[: self.options.top].tolist()  # of equals the first
            found = [{"name": self.classes[k], "probability": round(float(scores[k].exp()), 4)} for k in best]
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{Path(path).name}.classes.json"  # never a name of the user's own pictures
            content: dict[str, Any] = {"file": str(path), "classes": found}
            line = f"{Path(path).name}: " + ", ".join(f"{one['name']} {one['probability']:.3f}" for one in found)
            if "nearest" in answer:
                content["nearest"] = self.classes[answer["nearest"]] if answer["nearest"] >= 0 else None
                line += f"; nearest training images: {content['nearest']}"
            target.write_text(json.dumps(content, indent=1))
            if "maps" in answer:
                image = self.data.thumbnails(batch, i + 1)[i]
                one = len(answer["maps"]) == 1  # the rollout: there is no head to show beside the mean
                sheet = (
                    pictures.heat(image, answer["maps"][0]) if one else pictures.attention_sheet(image, answer["maps"])
                )
                write_picture(sheet, folder / f"{Path(path).name}.attention.png")
            yield line

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """uint8 (B, 3, H, W) of the first `count` images with what they were taken for, for the log."""
        drawn = []
        for image, label, answer in zip(
            self.data.thumbnails(batch, count), batch["labels"].tolist(), answers, strict=False
        ):
            text = f"{answer['name']} {answer['probability']:.2f}"
            drawn.append(pictures.labelled(image, text, None if label < 0 else answer["label"] == label))
        return pad_and_stack(drawn)

    def metric(self, split: Split) -> ClassificationMetric:
        """Accuracy, loss and confusions on `split`.

        Raises UserError when the data's classes are not those that the model has learnt.
        """
        self._bank = None  # of weights that may have changed since
        theirs = list(self.data.classes())
        nameless = all(name == f"class {i}" for i, name in enumerate(self.classes))  # an imported file
        if theirs != self.classes and not (nameless and len(theirs) == len(self.classes)):
            raise UserError(
                f"The data have {len(theirs)} classes ({_some(theirs)}), and this model has learnt "
                f"{len(self.classes)} ({_some(self.classes)}); evaluate it on data of its own classes, or train on "
                "these data from checkpoint=FILE."
            )
        return ClassificationMetric(theirs, self.data.count(split))

    def advice(self, pretrained: bool) -> list[str]:
        """What the data call for before the first step."""
        count = self.data.count("train")
        if pretrained or count >= FROM_SCRATCH or max(self.data.image_size) < PHOTOGRAPH:
            return []
        return [
            f"the model starts without any weights and there are only {count:,} training images: a ViT learns little "
            f"from fewer than {FROM_SCRATCH:,} photographs that way; start from checkpoint=FILE (Google's, "
            "torchvision's, timm's or transformers' weights)."
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """What the newest answers call for: all images taken for one class."""
        if len(answers) < 10 or len({answer["label"] for answer in answers}) > 1:
            return []
        return [
            f'all images are taken for "{answers[0]["name"]}": lower optimizer.lr, give schedule.warmup more steps, or '
            "start from checkpoint=FILE."
        ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
