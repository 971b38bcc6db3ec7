"""Prediction of lanes for users' images: options, records, pictures and files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.data.image_objects import exif_of, to_image
from common.files.names import answer_file
from common.files.output import write_answer
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, draw_on, predict_each
from common.task import Answer, Batch
from common.types import Fraction
from detr.data.protocol import LaneData
from detr.evaluation.lane_pictures import draw_lanes
from detr.tasks.image_input import ImageInput, describe_input


@dataclass(frozen=True, kw_only=True)
class LanePredictOptions:
    """The options of prediction for users' images; evaluation takes lanes that are more probable than none.

    threshold: minimum score of lanes that are drawn and listed.
    """

    threshold: Fraction


class LanePrediction(ImageInput, ABC):
    """The part of the task `LaneShapes` that predicts for users' inputs."""

    data: LaneData
    options: LanePredictOptions

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image; see `LaneShapes.answers`."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Find the lanes of an image; returns a list of {points, parameters, score}, the highest score first.

        `points` are x and y in pixels of the image, from the upper to the lower end, at rows that are a 72nd of its
        height apart. `parameters` are (upper, lower, k, f, m, n, b'', b'''), relative to the image; see
        detr/models/lstr.py. `input` is an image that `common.data.image_objects.to_image` accepts. For several images,
        which are given as a list, a folder or a pattern, the result is a list with one such list per image. If `input`
        is a batch (a dict), the result is that of `answers`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        image = to_image(input, exif_of(self.data))
        (answer,) = self.answers(model, self.data.collate([self.data.view(image, Path("image"))]))
        lanes = self._selected(answer)
        picture = partial(_draw, lanes=lanes)
        return Records(lanes, draw=partial(draw_on, input, exif_of(self.data), picture))

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each image with its lanes, and the lanes {points, parameters, score} as JSON; yield a line per image.

        The files are named like those of detection (see `DetectionPrediction.show`): photo.jpg.lanes.jpg and .json, or
        for a video clip.mp4.lanes.mp4 and .jsonl.
        """
        rows = zip(batch["files"], batch["names"], batch["originals"], answers, strict=True)
        for i, (path, name, image, answer) in enumerate(rows):
            lanes = self._selected(answer)
            picture, content = _draw(image, lanes), {"lanes": [_rounded(lane) for lane in lanes]}
            if "frames" in batch:
                video = answer_file(folder, name, ".lanes.mp4")
                batch["videos"][i].add(video, Path(path), batch["frames"][i], picture, content)
            else:
                write_picture(picture, answer_file(folder, name, ".lanes.jpg"))
                write_answer(answer_file(folder, name, ".lanes.json"), Path(path), content)
            summary = f"{len(lanes)} lane{'' if len(lanes) == 1 else 's'}"
            yield f"{describe_input(batch, i, name)}: {summary} (score >= {self.options.threshold:g})"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images of the batch with their lanes, for the log: uint8 (n, 3, H, W)."""
        pictures = []
        for image, original, answer in list(zip(batch["images"], batch["original_sizes"], answers, strict=True))[
            :count
        ]:
            scale = [to / of for to, of in zip(image.shape[-2:], original.tolist(), strict=True)]
            lanes = self._selected(answer)
            for lane in lanes:
                lane["points"] = [[x * scale[1], y * scale[0]] for x, y in lane["points"]]
            pictures.append(_draw(image.cpu(), lanes))
        return pad_and_stack(pictures)

    def _selected(self, answer: Answer) -> list[dict[str, Any]]:
        """Return the records {points, parameters, score} of lanes with a score of at least `threshold`.

        The highest score comes first. Lanes without a point in the image are left out.
        """
        rows = answer["rows"].tolist()
        records = []
        for score, curve, lane in zip(
            answer["scores"].tolist(), answer["curves"].tolist(), answer["lanes"], strict=True
        ):
            points = [[x, y] for x, y in zip(lane.tolist(), rows, strict=True) if x >= 0]
            if score >= self.options.threshold and points:
                records.append({"points": points, "parameters": curve, "score": score})
        return sorted(records, key=lambda record: -record["score"])


def _draw(image: Tensor, lanes: list[dict[str, Any]]) -> Tensor:
    return draw_lanes(image, [lane["points"] for lane in lanes], [lane["score"] for lane in lanes])


def _rounded(lane: dict[str, Any]) -> dict[str, Any]:
    """Round points to hundredths of a pixel, and scores, for files."""
    points = [[round(x, 2), round(y, 2)] for x, y in lane["points"]]
    return {"points": points, "parameters": lane["parameters"], "score": round(lane["score"], 4)}
