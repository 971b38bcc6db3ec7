"""Benchmarks of DETR-R50 (`model=detr_r50`) against transformers, and of its input pipeline against one with PIL.

ROWS maps the names of the benchmarks to the functions that build them. Each scaling in SCALINGS repeats one benchmark
for several values of a property, such as the number of queries.
"""

from scripts.benchmarks import detr_forward, detr_pipeline, detr_train
from scripts.benchmarks.scaling import Scaling, precision
from scripts.benchmarks.timing import Row, Setting

ROWS = {
    "latency": detr_forward.latency,
    "forward": detr_forward.forward,
    "step": detr_train.step,
    "matching": detr_train.matching,
    "pipeline": detr_pipeline.pipeline,
}


def _by_side(side: int, setting: Setting) -> Row:
    return _forward(setting, batch=setting.batch_size(1, 8), side=side)


def _by_batch(batch: int, setting: Setting) -> Row:
    return _forward(setting, batch=batch)


def _by_queries(queries: int, setting: Setting) -> Row:
    return _forward(setting, batch=setting.batch_size(1, 8), queries=queries)


def _matching_by_objects(objects: int, setting: Setting) -> Row:
    return detr_train.matching_row(setting, objects=objects, queries=100)


def _matching_by_queries(queries: int, setting: Setting) -> Row:
    return detr_train.matching_row(setting, objects=20, queries=queries)


def _forward(setting: Setting, *, batch: int, side: int | None = None, queries: int = 100) -> Row:
    side, dtype = side or (96 if setting.tiny else 512), precision(setting.device)
    names = (f"transformers {dtype}", f"ours {dtype}")
    return detr_forward.row(setting, batch=batch, names=names, size=(side, side), queries=queries)


SCALINGS = {
    "side": Scaling(name="image side in pixels", build=_by_side, values=(256, 384, 512, 800, 1066), tiny=(64, 96)),
    "batch": Scaling(name="images at once", build=_by_batch, values=(1, 2, 4, 8), tiny=(1, 2), cuda=(1, 4, 16, 64)),
    "queries": Scaling(name="queries", build=_by_queries, values=(100, 300, 900), tiny=(10, 20)),
    "matching-objects": Scaling(
        name="objects an image, matching and loss", build=_matching_by_objects, values=(0, 5, 20, 80), tiny=(0, 5, 20)
    ),
    "matching-queries": Scaling(
        name="queries, matching and loss", build=_matching_by_queries, values=(100, 300, 900), tiny=(50, 100)
    ),
}
