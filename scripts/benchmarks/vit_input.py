"""The augmentation of small images on the device against torchvision.transforms.v2, image by image."""

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
from scripts.benchmarks.timing import Disagreement, Row, Setting
from vit.data import augmentation
from vit.data.augmentation import Augmentation


def pictures(count: int, side: int) -> Tensor:
    """Smooth colours and some noise, about normalised: (count, 3, side, side); no two images alike."""
    draw = generator("pictures", count)
    colours = F.interpolate(torch.randn(count, 3, 4, 4, generator=draw), size=side, mode="bicubic")
    return colours + 0.1 * torch.randn(colours.shape, generator=draw)


def augment(setting: Setting) -> Row:
    """Random resized crop, flip and RandAugment on a stack of small colour images, on one core; ours on the device."""
    count, rounds = (64, 4) if setting.tiny else (256, 4)
    keys = ["crop=resized", "scale=[0.3,1.0]", "flip=0.5", "policy=rand"]
    data = configure("train", ["model=vit", "data=cifar10", *(f"data.augmentation.{key}" for key in keys)])["data"]
    options, side = construct(Augmentation, data["augmentation"]), data["image_size"]
    shade = torch.linspace(-32, 32, side)  # brighter to the right, so that a flip is seen
    images = (pictures(count, side) * 64 + 128 + shade).clamp(0, 255).to(torch.uint8)
    stack = images.to(setting.device)
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=options.scale, ratio=options.ratio),
            v2.RandomHorizontalFlip(options.flip),
            v2.RandAugment(options.operations, options.magnitude),
        ]
    )
    epochs = itertools.count()

    def our() -> Tensor:
        epoch = next(epochs)
        drawn = [augmentation.sample_uniforms(1, generator(epoch, number)) for number in range(count)]
        return augmentation.views(stack, torch.cat(drawn).numpy(), options, (side, side))

    def their() -> Tensor:
        return torch.stack([pipeline(image) for image in images]).to(setting.device)

    def check() -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            views = [torch.cat([work() for _ in range(rounds)]) for work in (our, their)]
        return _same_distribution(*views)

    return Row(
        name=f"RandAugment, crop and flip, {count}x3x{side}x{side}, one core",
        contenders={"torchvision": their, "ours": our},
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


def _same_distribution(views: Tensor, others: Tensor) -> str:
    """Compare two sets of random views, uint8 (N, C, H, W), by what the operations move.

    Each view gives one number of a kind, and the means of both sets may differ by five of their standard errors, which
    by chance alone they would once in two million times.
    """
    if views.shape != others.shape or views.dtype != others.dtype:
        raise Disagreement(f"views: {tuple(views.shape)} {views.dtype} and {tuple(others.shape)} {others.dtype}.")
    said = []
    for what, measure in STATISTICS.items():
        one, other = (measure(images.cpu().float()) for images in (views, others))
        error = math.sqrt((one.var() + other.var()) / len(one))
        apart = abs(float(one.mean() - other.mean())) / error
        if not apart <= 5:  # NaN, too
            raise Disagreement(
                f"{what}: {one.mean():.3g} and {other.mean():.3g} on average, {apart:.1f} standard errors apart."
            )
        said.append(f"{what} {one.mean():.3g} and {other.mean():.3g} ({apart:.1f} standard errors apart)")
    return ", ".join(said)
