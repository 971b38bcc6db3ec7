"""Names for the outputs of another program's head, since its file does not hold the names of its classes."""

from collections.abc import Sequence

from torch import Tensor

from common.task import Adopted


def with_classes(
    weights: dict[str, Tensor], classes: list[str] | None, left_out: list[str], notes: Sequence[str] = ()
) -> Adopted:
    """Return imported weights with the names of their classes, and a note on the order of the classes, if assumed.

    `head.weight` in `weights`, if there is one, is the weight of the head.
    """
    head = weights.get("head.weight")
    return Adopted(weights, {"classes": class_names(head, classes)}, left_out, (*notes, *order_note(head, classes)))


def class_names(head: Tensor | None, classes: list[str] | None) -> list[str]:
    """Name the outputs of a head with the weight `head` (K, C); None if the file has no head.

    `classes` are the names of the data's classes, None if unknown. They are returned if there are K of them, or if
    there is no head; otherwise the names are "class 0", "class 1", ... Without a head and without names, the list is
    empty.
    """
    if head is None:
        return [*classes] if classes else []
    return [*classes] if classes and len(classes) == len(head) else [f"class {i}" for i in range(len(head))]


def order_note(head: Tensor | None, classes: list[str] | None) -> list[str]:
    """Return a list with a note on the order that is assumed for the outputs of a head with the weight `head` (K, C).

    If there is no head, or the data have another number of classes, nothing is assumed, and the list is empty.
    """
    if head is None or (classes and len(classes) != len(head)):
        return []
    count = len(head)
    names = (
        f": {', '.join(classes[:3])}{', ...' if count > 3 else ''}" if classes else ", as data.class_order sorts them"
    )
    return [f"the file does not name its {count} classes; they are taken to have the order of the data's{names}"]
