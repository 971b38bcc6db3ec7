"""Import another program's file into one of this package's classifiers, chosen by the names of the file's tensors."""

from typing import Any

from common.task import Adopted
from vit.importing import adopt as plain_vit
from vit.importing import resnet, swin, tnt


def adopt(content: dict[str, Any], classes: list[str] | None, image_size: tuple[int, int]) -> Adopted:
    """Convert a file of a ResNet, a TNT, a Swin Transformer or a ViT; its arguments are those of `adopt.adopt`.

    Raises UserError for any other file.
    """
    tensors, _ = plain_vit.unwrap(content)
    if resnet.recognises(tensors):
        return resnet.adopt(content, classes)
    if tnt.recognises(tensors):
        return tnt.adopt(content, classes, image_size)
    if swin.recognise(tensors):
        return swin.adopt(content, classes)
    return plain_vit.adopt(content, classes, image_size)
