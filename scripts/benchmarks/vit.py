"""Benchmarks of ViT against torchvision, timm and transformers, which all use PyTorch's fused attention.

ROWS maps the names of the benchmarks to the functions that build them. Each scaling in SCALINGS repeats one benchmark
for several values of a property, such as the image side.
"""

from scripts.benchmarks import vit_forward, vit_input, vit_train
from scripts.benchmarks.scaling import Scaling, precision
from scripts.benchmarks.timing import Row, Setting

ROWS = {
    "latency": vit_forward.latency,
    "forward": vit_forward.forward,
    "train": vit_train.train,
    "throughput": vit_train.throughput,
    "augment": vit_input.augment,
}


def _by_side(side: int, setting: Setting) -> Row:
    return _forward(setting, batch=setting.batch_size(1, 32), side=side)


def _by_batch(batch: int, setting: Setting) -> Row:
    return _forward(setting, batch=batch)


def _forward(setting: Setting, *, batch: int, side: int | None = None) -> Row:
    """Build a benchmark that times a forward pass of our model and of timm's, the fastest of the three libraries."""
    precisions = (precision(setting.device),)
    return vit_forward.row(setting, batch=batch, side=side, peers=("timm",), precisions=precisions)


SCALINGS = {
    "side": Scaling(name="image side in pixels", build=_by_side, values=(112, 160, 224, 320, 448), tiny=(32, 48)),
    "batch": Scaling(
        name="images at once", build=_by_batch, values=(1, 2, 4, 8, 16), tiny=(1, 2), cuda=(1, 8, 32, 128, 512)
    ),
}
