"""Benchmark of word2vec (`model=word2vec`) against gensim: training on the documentation of Python's standard library.

ROWS maps the names of the benchmarks to the functions that build them. Both programs get the same words in the same
sentences, use one thread, and train all epochs; gensim's time includes its vocabulary. They draw other random numbers,
so their vectors are compared by neighbours: two tables overlap by the share of each word's 10 nearest neighbours that
they have in common. gensim's own table from another seed says how large this share can be.
"""

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from gensim.models import Word2Vec as Gensim
from torch import Tensor

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.data.batching import Order, steps
from common.train import optim
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.step import Stepper
from common.types import SPLITS
from scripts.benchmarks.timing import MismatchError, Row, Setting
from seq2seq.data import docstrings
from seq2seq.data.word_pairs import WordPairs
from seq2seq.evaluation.word_vectors import nearest, unit_vectors

NEIGHBOURS = 10
MIN_RELATIVE_OVERLAP = 0.9  # of gensim's own overlap with another seed
TINY_DOCUMENTS = 40
CPU = torch.device("cpu")


def skip_gram(setting: Setting) -> Row:
    """Build a benchmark that times the training of skip-gram with negative sampling."""
    return _row(setting, "skip-gram", "model=word2vec")


def cbow(setting: Setting) -> Row:
    """Build a benchmark that times the training of CBOW with negative sampling."""
    return _row(setting, "CBOW", "model=word2vec_cbow")


ROWS = {"skip-gram": skip_gram, "cbow": cbow}


def _row(setting: Setting, name: str, key: str) -> Row:
    """Build a benchmark; with `setting.tiny`, it trains for one epoch on a few documents."""
    keys = [key, "trainer.device=cpu"]
    if setting.tiny:
        path = setting.scratch / "documents.txt"
        path.write_text("\n".join(docstrings.docstrings("train")[:TINY_DOCUMENTS]), encoding="utf-8")
        keys += [*(f"data.{split}={path}" for split in SPLITS), "data.passage=500", "trainer.epochs=1"]
    config = configure("train", keys)
    data: WordPairs = build(config["data"])
    texts = {seed: shuffled_sentences(data, seed) for seed in (1, 2)}
    words = sum(map(len, texts[1]))
    run_ours = partial(train_ours, config, data)

    def run_theirs(seed: int) -> Tensor:
        return train_gensim(config, data, texts[seed], seed)

    def check() -> str:
        theirs = run_theirs(1)
        possible, overlap = (share_of_neighbours(table, theirs) for table in (run_theirs(2), run_ours()))
        text = f"overlap of neighbours with gensim's {overlap:.3f}, of gensim's with another seed {possible:.3f}"
        if not setting.tiny and overlap < MIN_RELATIVE_OVERLAP * possible:
            raise MismatchError(f"{text}: less than {MIN_RELATIVE_OVERLAP} of it")
        return text

    epochs = config["trainer"]["epochs"]
    return Row(
        name=f"word2vec, {name}, {epochs} epochs of {words:,} words",
        contenders={"gensim": partial(run_theirs, 1), "ours": run_ours},
        pairs=[("ours", "gensim")],
        check=check,
        amounts=dict.fromkeys(("gensim", "ours"), (epochs * words, "words")),
        threads=1,
    )


def train_ours(config: dict[str, Any], data: WordPairs) -> Tensor:
    """Train as the trainer does, without evaluation; returns the vectors (V, C)."""
    torch.manual_seed(config["seed"])
    task: Any = build(config["task"], data=data)
    model: Any = build_model(config["model"], task)
    options, schedule = (
        construct(kind, config[key]) for kind, key in ((OptimizerOptions, "optimizer"), (ScheduleOptions, "schedule"))
    )
    stepper = Stepper(task, model, optim.build(model, options), CPU, "fp32", None)
    order = Order(data.cost("train"), data.batch_size, config["seed"])
    total = order.steps(config["trainer"]["epochs"])
    batches = steps(
        data, order, start=0, stop=total, micro_batch=None, equal=True, rank=0, world=1, workers=0, pin=False
    )
    for number, (_, batch) in enumerate(batches):
        factor = optim.rate_factor(schedule, number, total)
        optim.set_rate(stepper.optimizer, factor)
        task.set_rate(options.lr * factor)
        stepper(batch, number)
    vectors: Tensor = model.vectors().detach()
    return vectors


def train_gensim(config: dict[str, Any], data: WordPairs, sentences: list[list[str]], seed: int) -> Tensor:
    """Train gensim's model with the config's options; returns its vectors in the order of our vocabulary (V, C)."""
    loss = config["task"]["loss"]
    model = Gensim(
        sentences,
        vector_size=config["model"]["width"],
        window=data.window,
        min_count=data.options.min_count,
        sg=int(loss["architecture"] == "skip_gram"),
        negative=loss["negatives"],
        ns_exponent=loss["exponent"],
        sample=data.subsample,
        alpha=config["optimizer"]["lr"],
        min_alpha=config["optimizer"]["lr"] * config["schedule"]["final"],
        epochs=config["trainer"]["epochs"],
        workers=1,
        seed=seed,
    )
    return torch.from_numpy(np.stack([model.wv[word] for word in data.vocabulary.words]))


def share_of_neighbours(first: Tensor, second: Tensor) -> float:
    """The share of each word's nearest neighbours that two tables (V, C) have in common, averaged over all words."""
    tables = []
    for vectors in (first, second):
        units = unit_vectors(vectors.float())
        tables.append(nearest(units, units, [[i] for i in range(len(units))], NEIGHBOURS)[1].tolist())
    shared = [len({*one} & {*other}) for one, other in zip(*tables, strict=True)]
    return sum(shared) / (NEIGHBOURS * len(shared))


def shuffled_sentences(data: WordPairs, seed: int) -> list[list[str]]:
    """The words of each sentence of train that are in the vocabulary, with its passages in a random order.

    Our training shuffles them, too. In the order of the modules, which later modules dominate, two seeds would agree
    more.
    """
    words, sentences = data.vocabulary.words, []
    for number in random.Random(seed).sample(range(data.count("train")), data.count("train")):
        rows = data.indices("train", number)
        sentences += [[words[i] for i in rows[row]] for row in range(len(rows))]
    return sentences
