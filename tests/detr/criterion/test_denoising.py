"""Denoising queries: their number, noise, groups and matches, which depend on an image's own objects and seed alone."""

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from detr.criterion.answers import Matches, Targets
from detr.criterion.boxes import to_xyxy
from detr.criterion.denoising import DenoisingOptions, denoising_queries

DINO = DenoisingOptions(number=100, contrastive=True, label_noise=0.25, box_noise=0.4)
DN = DenoisingOptions(number=20, contrastive=False, label_noise=0.2, box_noise=0.4)
CLASSES = 7


def targets(counts: list[int]) -> Targets:
    rng = generator("targets")
    count = sum(counts)
    boxes = torch.rand(count, 4, generator=rng) * torch.tensor([0.3, 0.3, 0.2, 0.2]) + torch.tensor(
        [0.3, 0.3, 0.1, 0.1]
    )
    return Targets(counts, torch.randint(CLASSES, (count,), generator=rng), boxes)


def build(options: DenoisingOptions, of: Targets, seeds: list[int] | None = None) -> tuple[dict[str, Tensor], Matches]:
    built = denoising_queries(options, of, seeds or list(range(len(of.counts))), CLASSES)
    assert built is not None
    return built


@pytest.mark.parametrize("count, groups", [(0, 0), (1, 100), (3, 33), (10, 10), (40, 2), (60, 1), (150, 1)])
def test_the_number_of_groups_is_that_of_the_official_code_for_each_image(count: int, groups: int) -> None:
    assert DINO.groups(count) == groups and DINO.rows(count) == 2 * groups * count


@pytest.mark.parametrize("options", [DINO, DN], ids=["DINO", "DN"])
def test_an_images_queries_do_not_depend_on_its_batch(options: DenoisingOptions) -> None:
    both = targets([2, 5])
    alone = Targets([2], both.labels[:2], both.boxes[:2])
    first, second = build(options, alone, [3])[0], build(options, both, [3, 9])[0]
    rows = options.rows(2)
    for name, values in first.items():
        assert torch.equal(values[0, :rows], second[name][0, :rows]), name
    assert not second["real"][0, rows:].any() and second["real"][1, : options.rows(5)].all()


def test_another_seed_is_other_noise_and_the_same_seed_is_the_same() -> None:
    boxes = [build(DINO, targets([3]), [seed])[0]["boxes"] for seed in (1, 1, 2)]
    assert torch.equal(boxes[0], boxes[1]) and not torch.equal(boxes[0], boxes[2])


def test_positive_copies_are_matched_with_their_objects_and_negative_ones_with_none() -> None:
    counts = [2, 0, 3]
    hints, matches = build(DINO, targets(counts))
    assert not matches.layers.any() and len(matches.queries) == sum(DINO.groups(n) * n for n in counts)
    for image, query, target in zip(*(x.tolist() for x in matches[1:]), strict=True):
        count, start = counts[image], sum(counts[:image])
        copy, number = divmod(query, count)
        assert copy % 2 == 0 and target == start + number, "a group holds positives, then negatives"
        assert hints["groups"][image, query] == copy // 2


def test_corners_move_by_the_paper_s_distances() -> None:
    """Section 3.3: positives by less than half the sides times the noise, negatives by once to twice as much."""
    of = targets([4])
    hints, _ = build(DINO, of)
    copies = torch.arange(DINO.rows(4)) // 4
    own = of.boxes[torch.arange(DINO.rows(4)) % 4]
    moved = (to_xyxy(hints["boxes"][0]) - to_xyxy(own)).abs() / (own[:, 2:].repeat(1, 2) / 2 * 0.4)
    positive, negative = moved[copies % 2 == 0], moved[copies % 2 == 1]
    assert positive.max() <= 1.0001 and positive.max() > 0.9 and positive.mean().sub(0.5).abs() < 0.1
    assert negative.min() >= 0.9999 and negative.max() <= 2.0001 and negative.mean().sub(1.5).abs() < 0.1


def test_centres_and_sides_move_by_the_distances_of_dn_detr() -> None:
    """Section 4: the centre by up to half a side times the noise, a side by up to itself times the noise."""
    of = targets([4])
    boxes = build(DN, of)[0]["boxes"][0]
    own = of.boxes[torch.arange(DN.rows(4)) % 4]
    moved = (boxes - own).abs() / own[:, 2:].repeat(1, 2) / 0.4
    assert moved[:, :2].max() <= 0.5001 and moved[:, 2:].max() <= 1.0001 and moved[:, 2:].max() > 0.6


def test_boxes_stay_within_the_image() -> None:
    of = Targets([2], torch.tensor([0, 1]), torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.05, 0.9, 0.1, 0.2]]))
    corners = to_xyxy(build(DINO, of)[0]["boxes"])
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6


def test_labels_are_replaced_with_the_stated_probability() -> None:
    """A quarter is replaced by a random label, which is the same label in one of seven cases: 3/14 are wrong."""
    of = targets([10])
    wrong, total = 0.0, 0
    for seed in range(60):
        labels = build(DINO, of, [seed])[0]["labels"][0]
        wrong += float((labels != of.labels[torch.arange(len(labels)) % 10]).sum())
        total += len(labels)
    assert abs(wrong / total - 3 / 14) < 0.012  # three standard deviations of 12,000 draws


@pytest.mark.parametrize("options, counts", [(DINO, [0, 0]), (DenoisingOptions(
    number=0, contrastive=True, label_noise=0.0, box_noise=0.0), [2])])  # fmt: skip
def test_without_objects_or_without_queries_there_are_no_hints(options: DenoisingOptions, counts: list[int]) -> None:
    assert denoising_queries(options, targets(counts), [0] * len(counts), CLASSES) is None
