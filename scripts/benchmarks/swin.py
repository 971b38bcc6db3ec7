"""Benchmarks of Swin-T (`model=swin_t`) against torchvision and timm.

ROWS maps the names of the benchmarks to the functions that build them. timm is timed in two modes: as it is by default,
and with PyTorch's fused attention, which timm offers for Swin as experimental.
"""

from functools import partial

from scripts.benchmarks import vit_forward, vit_train
from scripts.benchmarks.swin_peers import PEERS, classifier, config, peer
from scripts.benchmarks.timing import Row, Setting
from scripts.benchmarks.vit_input import sample_images
from vit.importing.swin import to_layout

BATCH = 8


def latency(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of one image."""
    return _forward(setting, 1)


def forward(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of `setting.batch` images (default: 128 on CUDA, otherwise 8)."""
    return _forward(setting, setting.batch_size(BATCH, 128))


def train(setting: Setting) -> Row:
    """Build a benchmark that times a training step on a batch of BATCH images.

    The loss is cross-entropy with label smoothing, and stochastic depth is off. Gradients are clipped, and the
    optimizer is AdamW.
    """
    recipe = config(tiny=setting.tiny)
    workload, model = vit_train.workload_of(recipe, BATCH, setting), classifier(recipe)
    peers = {
        name: (peer(name, model, recipe), partial(to_layout, layout=layout)) for name, (layout, _) in PEERS.items()
    }
    contenders = vit_train.training_contenders(setting, workload, model, peers)
    ratios = vit_forward.pairs(contenders, tuple(PEERS), compiled=setting.compile)
    return vit_train.training_row(setting, workload, model, contenders, ratios)


def _forward(setting: Setting, batch: int) -> Row:
    recipe = config(tiny=setting.tiny)
    model = classifier(recipe)
    images = sample_images(batch, recipe["data"]["image_size"][0])
    return vit_forward.compare(setting, model, {name: peer(name, model, recipe) for name in PEERS}, images)


ROWS = {"latency": latency, "forward": forward, "train": train}
