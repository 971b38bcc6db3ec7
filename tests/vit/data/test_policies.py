"""RandAugment and TrivialAugment on stacks against torchvision's own transforms, one image at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from common.machine.seeds import generator
from vit.data import policies
from vit.data.policies import Policy

POLICIES: dict[Policy, Any] = {"rand": v2.RandAugment(), "trivial": v2.TrivialAugmentWide()}
NAMES = list(v2.RandAugment._AUGMENTATION_SPACE)
TOPS: dict[Policy, dict[str, float]] = {  # Cubuk et al. 2020 and Müller and Hutter 2021; shifts as parts of the side
    "rand": {
        **{"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30.0},
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    },
    "trivial": {
        **{"ShearX": 0.99, "ShearY": 0.99, "TranslateX": 32 / 224, "TranslateY": 32 / 224, "Rotate": 135.0},
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.99),
    },
}


def images(count: int, *, channels: int = 3, height: int = 23, width: int = 17) -> Tensor:
    """Noise over a slope, so that equalising and stretching have something to do."""
    drawn = generator("policies", count, channels)
    noise = torch.randint(0, 90, (count, channels, height, width), generator=drawn)
    return (noise + torch.linspace(10, 160, width)).to(torch.uint8)


def numbers(operation: int = 0, level: int = 0, sign: float = 0.75) -> np.ndarray:
    """What chooses an operation (of 14), a level (of 31) and a sign (negative below a half) in the first turn."""
    drawn = np.full((1, 3 * policies.MAX_OPERATIONS), 0.999)
    drawn[0, :3] = (operation + 0.5) / 14, (level + 0.5) / 31, sign
    return drawn


def strength(policy: Policy, name: str, level: int, height: int, width: int) -> float:
    """torchvision's magnitude of a level, without the rounding of its tables to fp32."""
    if name == "Posterize":
        return round(8 - level / 30 * {"rand": 4, "trivial": 6}[policy])
    if name == "Solarize":
        return (30 - level) / 30
    side = {"TranslateX": width, "TranslateY": height}.get(name, 1)
    return TOPS[policy].get(name, 0.0) * side * level / 30


def by_torchvision(policy: Policy, image: Tensor, name: str, magnitude: float) -> Tensor:
    transform = POLICIES[policy]
    done: Tensor = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
    )
    return done


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_their_ranges_are_torchvisions(policy: Policy) -> None:
    """At 224 pixels, of which TrivialAugment's shift is a part; fp32 keeps seven digits."""
    space = POLICIES[policy]._AUGMENTATION_SPACE
    assert list(space) == NAMES and len(policies.OPERATIONS) == 14
    for operation, (name, (magnitudes, signed)) in zip(policies.OPERATIONS, space.items(), strict=True):
        table = magnitudes(31, 224, 224)
        assert operation.signed is signed, name
        if name not in ("Posterize", "Solarize"):
            assert getattr(operation, policy) == TOPS[policy].get(name, 0), name
        if table is not None:
            expected = [strength(policy, name, level, 224, 224) for level in range(31)]
            assert table.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_is_torchvisions_at_every_strength(channels: int, name: str, policy: Policy) -> None:
    (image,) = images(1, channels=channels)
    signed = policies.OPERATIONS[NAMES.index(name)].signed
    for level in range(31):
        for sign in (0.25, 0.75):
            magnitude = strength(policy, name, level, 23, 17)
            expected = by_torchvision(policy, image, name, -magnitude if signed and sign < 0.5 else magnitude)
            drawn = numbers(NAMES.index(name), level, sign)
            if policy == "rand":
                drawn[0, 1] = 0.0  # the strength is given and not drawn
            done = policies.apply(image[None], drawn, policy, 1, level if policy == "rand" else 0)
            assert torch.equal(done[0], expected), (level, sign)
            assert done.dtype == torch.uint8 and done.shape == (1, channels, 23, 17)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Identity"])
def test_each_operation_does_something(name: str) -> None:
    stack = images(1)
    assert not torch.equal(policies.apply(stack, numbers(NAMES.index(name), 25), "rand", 1, 25), stack)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stack_is_its_images_one_by_one(policy: Policy, channels: int) -> None:
    stack = images(150, channels=channels)
    drawn = np.random.default_rng(0).random((150, 3 * policies.MAX_OPERATIONS))
    together = policies.apply(stack, drawn, policy, 3, 13)
    for i in range(150):
        alone = policies.apply(stack[i : i + 1], drawn[i : i + 1], policy, 3, 13)
        assert torch.equal(together[i : i + 1], alone), i


def test_images_of_one_stack_have_operations_of_their_own() -> None:
    """One image a hundred times, at the same strength: fourteen results, and as many again of those with a sign."""
    same = images(1).expand(400, -1, -1, -1)
    done = policies.apply(same, np.random.default_rng(0).random((400, 12)), "rand", 1, 20)
    signed = sum(operation.signed for operation in policies.OPERATIONS)
    assert len(done.flatten(1).unique(dim=0)) == 14 + signed == 23


def test_operations_come_one_after_the_other() -> None:
    """Solarized, then shifted to the left, then sheared; by torchvision's functions."""
    (image,) = images(1)
    drawn = np.full((1, 12), 0.999)
    turns = [("Solarize", 0.75), ("TranslateX", 0.25), ("ShearY", 0.75)]
    for turn, (name, sign) in enumerate(turns):
        drawn[0, 3 * turn : 3 * turn + 3] = (NAMES.index(name) + 0.5) / 14, 0.3, sign
    expected = image
    for count, (name, sign) in enumerate(turns, 1):
        magnitude = strength("rand", name, 12, 23, 17)
        expected = by_torchvision("rand", expected, name, -magnitude if sign < 0.5 else magnitude)
        assert torch.equal(policies.apply(image[None], drawn, "rand", count, 12)[0], expected)


def test_trivial_augment_does_one_operation_whatever_is_asked_of_the_other() -> None:
    stack, drawn = images(20), np.random.default_rng(0).random((20, 12))
    one = policies.apply(stack, drawn, "trivial", 0, 0)
    assert torch.equal(one, policies.apply(stack, drawn, "trivial", 4, 30))
    drawn[:, 3:] = 0.5
    assert torch.equal(one, policies.apply(stack, drawn, "trivial", 2, 9)), "the other turns' numbers are not looked at"


def test_nothing_is_done_without_a_policy_or_operations() -> None:
    stack, drawn = images(5), np.random.default_rng(0).random((5, 12))
    assert policies.apply(stack, drawn, "none", 2, 9) is stack
    assert torch.equal(policies.apply(stack, drawn, "rand", 0, 9), stack)


def test_the_given_stack_is_left_as_it_was() -> None:
    stack = images(40)
    before = stack.clone()
    policies.apply(stack, np.random.default_rng(0).random((40, 12)), "trivial", 1, 0)
    assert torch.equal(stack, before)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_the_ends_of_the_drawn_numbers_choose_the_first_and_the_last(edge: float) -> None:
    """Numbers may be 0 and are always below 1: nothing is rounded to a fifteenth operation or a thirty-second level."""
    stack, last = images(1), edge > 0.5
    drawn = np.full((1, 12), edge)
    expected = by_torchvision("trivial", stack[0], NAMES[13 if last else 0], 0.0)
    assert torch.equal(policies.apply(stack, drawn, "trivial", 1, 0)[0], expected)
    drawn[0, 0] = (NAMES.index("Rotate") + 0.5) / 14
    expected = by_torchvision("trivial", stack[0], "Rotate", 135.0 if last else 0.0)
    assert torch.equal(policies.apply(stack, drawn, "trivial", 1, 0)[0], expected)


def test_all_operations_and_levels_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what is handed to the operations: 14 of them, 31 levels, both signs of the signed ones alike."""
    seen: list[tuple[int, float]] = []

    def note(images: Tensor, chosen: np.ndarray, strengths: np.ndarray) -> Tensor:
        seen.extend(zip(chosen.tolist(), strengths.tolist(), strict=True))
        return images

    monkeypatch.setattr(policies, "_apply_operations", note)
    policies.apply(images(1), np.random.default_rng(0).random((60_000, 12)), "trivial", 1, 0)
    counts = np.bincount([operation for operation, _ in seen], minlength=14)
    assert stats.chisquare(counts).pvalue > 0.01
    angles = np.array([angle for operation, angle in seen if NAMES[operation] == "Rotate"])
    levels = np.bincount(np.rint(np.abs(angles) / 4.5).astype(int), minlength=31)
    assert len(levels) == 31 and stats.chisquare(levels).pvalue > 0.01
    assert stats.binomtest(int((angles > 0).sum()), int((angles != 0).sum())).pvalue > 0.01
