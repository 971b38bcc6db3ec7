"""Benchmark our augmentation of a batch of small images against torchvision.transforms.v2.

Our code augments the whole batch at once, on the device. torchvision's transforms are applied to one image after
another, on the CPU.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from common.config.check import construct
from common.config.compose import configure
from common.machine.seeds import generator
from scripts.benchmarks.timing import MismatchError, Row, Setting
from vit.data import augmentation
from vit.data.augmentation import Augmentation


def sample_images(count: int, side: int) -> Tensor:
    """Sample float images (count, 3, side, side): smooth random colours plus noise, with a variance of about 1."""
    rng = generator("pictures", count)
    colours = F.interpolate(torch.randn(count, 3, 4, 4, generator=rng), size=side, mode="bicubic")
    return colours + 0.1 * torch.randn(colours.shape, generator=rng)


def augment(setting: Setting) -> Row:
    """Build a benchmark that times random crop, flip and RandAugment of small colour images.

    torchvision's transforms use one CPU core. Our augmentation runs on the device. If the device is the CPU, it also
    uses one core.
    """
    count, rounds = (64, 4) if setting.tiny else (256, 4)
    keys = ["crop=resized", "scale=[0.3,1.0]", "flip=0.5", "policy=rand"]
    data = configure("train", ["model=vit", "data=cifar10", *(f"data.augmentation.{key}" for key in keys)])["data"]
    options, side = construct(Augmentation, data["augmentation"]), data["image_size"]
    shade = torch.linspace(-32, 32, side)  # brighter to the right, so that a flip changes the image
    images = (sample_images(count, side) * 64 + 128 + shade).clamp(0, 255).to(torch.uint8)
    stack = images.to(setting.device)
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=options.scale, ratio=options.ratio),
            v2.RandomHorizontalFlip(options.flip),
            v2.RandAugment(options.operations, options.magnitude),
        ]
    )
    epochs = itertools.count()

    def run_ours() -> Tensor:
        epoch = next(epochs)
        uniforms = [augmentation.sample_uniforms(1, generator(epoch, number)) for number in range(count)]
        return augmentation.views(stack, torch.cat(uniforms).numpy(), options, (side, side))

    def run_torchvision() -> Tensor:
        return torch.stack([pipeline(image) for image in images]).to(setting.device)

    def check() -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            views = [torch.cat([work() for _ in range(rounds)]) for work in (run_ours, run_torchvision)]
        return _compare_distributions(*views)

    return Row(
        name=f"RandAugment, crop and flip, {count}x3x{side}x{side}, one core",
        contenders={"torchvision": run_torchvision, "ours": run_ours},
        pairs=[("ours", "torchvision")],
        check=check,
        amounts=dict.fromkeys(("ours", "torchvision"), (count, "images")),
        threads=1,
    )


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {  # (N, C, H, W), 0..255 -> (N,)
    "brightness": lambda x: x.mean((1, 2, 3)),
    "contrast": lambda x: x.std((1, 2, 3)),
    "colour": lambda x: x.std(1).mean((1, 2)),
    "detail": lambda x: x.diff(dim=3).abs().mean((1, 2, 3)),
    "right over left": lambda x: (x - x.flip(3))[..., x.shape[3] // 2 :].mean((1, 2, 3)),
    "black": lambda x: (x.amax(1) == 0).float().mean((1, 2)),
}


def _compare_distributions(ours: Tensor, theirs: Tensor) -> str:
    """Compare two sets of augmented images, uint8 (N, C, H, W), by the statistics in STATISTICS.

    A statistic maps an image to a number that the augmentation changes. Returns a text with the mean of each statistic
    in both sets. Raises MismatchError if the shapes or dtypes differ, or if the two means of a statistic differ by more
    than five standard errors. Means differ this much by chance about once in two million comparisons.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise MismatchError(
            f"views: {tuple(ours.shape)} {ours.dtype}, but torchvision's are {tuple(theirs.shape)} {theirs.dtype}."
        )
    differences = []
    for name, statistic in STATISTICS.items():
        a, b = (statistic(views.cpu().float()) for views in (ours, theirs))
        error = math.sqrt((a.var() + b.var()) / len(a))
        distance = abs(float(a.mean() - b.mean())) / error
        if not distance <= 5:  # this is also true for NaN
            raise MismatchError(
                f"{name}: {a.mean():.3g} and {b.mean():.3g} on average, {distance:.1f} standard errors apart."
            )
        differences.append(f"{name} {a.mean():.3g} and {b.mean():.3g} ({distance:.1f} standard errors apart)")
    return ", ".join(differences)
