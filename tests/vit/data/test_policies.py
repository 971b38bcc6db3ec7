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
# Cubuk et al. 2020 and Müller and Hutter 2021; shifts relative to the side.
MAX_STRENGTHS: dict[Policy, dict[str, float]] = {
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
    """Noise on a brightness gradient, which equalising and autocontrast change."""
    random = generator("policies", count, channels)
    noise = torch.randint(0, 90, (count, channels, height, width), generator=random)
    return (noise + torch.linspace(10, 160, width)).to(torch.uint8)


def numbers(operation: int = 0, level: int = 0, sign: float = 0.75) -> np.ndarray:
    """Uniforms that choose an operation (of 14), a level (of 31) and a sign (negative below a half) as the first."""
    uniforms = np.full((1, 3 * policies.MAX_OPERATIONS), 0.999)
    uniforms[0, :3] = (operation + 0.5) / 14, (level + 0.5) / 31, sign
    return uniforms


def strength(policy: Policy, name: str, level: int, height: int, width: int) -> float:
    """torchvision's magnitude of a level, in double precision rather than in its tables' fp32."""
    if name == "Posterize":
        return round(8 - level / 30 * {"rand": 4, "trivial": 6}[policy])
    if name == "Solarize":
        return (30 - level) / 30
    side = {"TranslateX": width, "TranslateY": height}.get(name, 1)
    return MAX_STRENGTHS[policy].get(name, 0.0) * side * level / 30


def by_torchvision(policy: Policy, image: Tensor, name: str, magnitude: float) -> Tensor:
    transform = POLICIES[policy]
    result: Tensor = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
    )
    return result


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_their_ranges_are_torchvisions(policy: Policy) -> None:
    """At 224 pixels, to which TrivialAugment's shift is relative; fp32 has seven digits."""
    space = POLICIES[policy]._AUGMENTATION_SPACE
    assert list(space) == NAMES and len(policies.OPERATIONS) == 14
    for operation, (name, (magnitudes, signed)) in zip(policies.OPERATIONS, space.items(), strict=True):
        table = magnitudes(31, 224, 224)
        assert operation.signed is signed, name
        if name not in ("Posterize", "Solarize"):
            assert getattr(operation, policy) == MAX_STRENGTHS[policy].get(name, 0), name
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
            uniforms = numbers(NAMES.index(name), level, sign)
            if policy == "rand":
                uniforms[0, 1] = 0.0  # the level is an argument and not sampled
            result = policies.apply(image[None], uniforms, policy, 1, level if policy == "rand" else 0)
            assert torch.equal(result[0], expected), (level, sign)
            assert result.dtype == torch.uint8 and result.shape == (1, channels, 23, 17)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Identity"])
def test_each_operation_changes_the_image(name: str) -> None:
    stack = images(1)
    assert not torch.equal(policies.apply(stack, numbers(NAMES.index(name), 25), "rand", 1, 25), stack)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stack_is_its_images_one_by_one(policy: Policy, channels: int) -> None:
    stack = images(150, channels=channels)
    uniforms = np.random.default_rng(0).random((150, 3 * policies.MAX_OPERATIONS))
    together = policies.apply(stack, uniforms, policy, 3, 13)
    for i in range(150):
        alone = policies.apply(stack[i : i + 1], uniforms[i : i + 1], policy, 3, 13)
        assert torch.equal(together[i : i + 1], alone), i


def test_each_image_of_a_stack_has_an_operation_of_its_own() -> None:
    """One image 400 times, at the same strength: fourteen results, and one more for each signed operation."""
    same = images(1).expand(400, -1, -1, -1)
    results = policies.apply(same, np.random.default_rng(0).random((400, 12)), "rand", 1, 20)
    signed = sum(operation.signed for operation in policies.OPERATIONS)
    assert len(results.flatten(1).unique(dim=0)) == 14 + signed == 23


def test_operations_are_applied_in_order() -> None:
    """Solarise, shift to the left, shear, by torchvision's functions."""
    (image,) = images(1)
    uniforms = np.full((1, 12), 0.999)
    turns = [("Solarize", 0.75), ("TranslateX", 0.25), ("ShearY", 0.75)]
    for turn, (name, sign) in enumerate(turns):
        uniforms[0, 3 * turn : 3 * turn + 3] = (NAMES.index(name) + 0.5) / 14, 0.3, sign
    expected = image
    for count, (name, sign) in enumerate(turns, 1):
        magnitude = strength("rand", name, 12, 23, 17)
        expected = by_torchvision("rand", expected, name, -magnitude if sign < 0.5 else magnitude)
        assert torch.equal(policies.apply(image[None], uniforms, "rand", count, 12)[0], expected)


def test_trivial_augment_applies_one_operation_and_ignores_the_options_of_rand_augment() -> None:
    stack, uniforms = images(20), np.random.default_rng(0).random((20, 12))
    expected = policies.apply(stack, uniforms, "trivial", 0, 0)
    assert torch.equal(expected, policies.apply(stack, uniforms, "trivial", 4, 30))
    uniforms[:, 3:] = 0.5
    assert torch.equal(expected, policies.apply(stack, uniforms, "trivial", 2, 9)), (
        "the uniforms of further operations are ignored"
    )


def test_without_a_policy_or_operations_images_are_unchanged() -> None:
    stack, uniforms = images(5), np.random.default_rng(0).random((5, 12))
    assert policies.apply(stack, uniforms, "none", 2, 9) is stack
    assert torch.equal(policies.apply(stack, uniforms, "rand", 0, 9), stack)


def test_the_stack_itself_is_not_changed() -> None:
    stack = images(40)
    before = stack.clone()
    policies.apply(stack, np.random.default_rng(0).random((40, 12)), "trivial", 1, 0)
    assert torch.equal(stack, before)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_the_extreme_uniforms_choose_the_first_and_the_last_operation_and_level(edge: float) -> None:
    """Uniforms may be 0 and are below 1: none is rounded to a fifteenth operation or a thirty-second level."""
    stack, last = images(1), edge > 0.5
    uniforms = np.full((1, 12), edge)
    expected = by_torchvision("trivial", stack[0], NAMES[13 if last else 0], 0.0)
    assert torch.equal(policies.apply(stack, uniforms, "trivial", 1, 0)[0], expected)
    uniforms[0, 0] = (NAMES.index("Rotate") + 0.5) / 14
    expected = by_torchvision("trivial", stack[0], "Rotate", 135.0 if last else 0.0)
    assert torch.equal(policies.apply(stack, uniforms, "trivial", 1, 0)[0], expected)


def test_all_operations_and_levels_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the arguments of the operations: 14 operations, 31 levels, and both signs of signed operations."""
    calls: list[tuple[int, float]] = []

    def record(images: Tensor, chosen: np.ndarray, strengths: np.ndarray) -> Tensor:
        calls.extend(zip(chosen.tolist(), strengths.tolist(), strict=True))
        return images

    monkeypatch.setattr(policies, "_apply_operations", record)
    policies.apply(images(1), np.random.default_rng(0).random((60_000, 12)), "trivial", 1, 0)
    counts = np.bincount([operation for operation, _ in calls], minlength=14)
    assert stats.chisquare(counts).pvalue > 0.01
    angles = np.array([angle for operation, angle in calls if NAMES[operation] == "Rotate"])
    levels = np.bincount(np.rint(np.abs(angles) / 4.5).astype(int), minlength=31)
    assert len(levels) == 31 and stats.chisquare(levels).pvalue > 0.01
    assert stats.binomtest(int((angles > 0).sum()), int((angles != 0).sum())).pvalue > 0.01
