import csv
import json
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from common.errors import UserError
from vit.evaluation import accuracy as evaluation
from vit.evaluation.accuracy import ClassificationMetric

NAN = float("nan")


def filled(classes: int, truth: list[int], logs: torch.Tensor, ids: list | None = None, **more) -> ClassificationMetric:
    """A gathered metric of classes a, b, c ... after one batch; `more` holds a list for each key of answers."""
    metric = ClassificationMetric([chr(ord("a") + label) for label in range(classes)])
    metric.update(*batch(truth, logs, ids, **more))
    metric.gather()
    return metric


def batch(truth: list[int], logs: torch.Tensor, ids: list | None = None, **more) -> tuple[dict, list[dict]]:
    answers = [{"log_probabilities": log} | {key: more[key][i] for key in more} for i, log in enumerate(logs)]
    return {"ids": ids or list(range(len(truth))), "labels": torch.tensor(truth)}, answers


def scene(samples: int = 300, classes: int = 8) -> tuple[list[int], torch.Tensor]:
    """Random labels and log probabilities without ties, in which the truth is somewhat more probable than chance."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), truth] += 1
    return truth.tolist(), logits.log_softmax(-1)


def test_three_samples_counted_by_hand():
    """Correct with probability 1/2, wrong with 1/4 for the truth, correct with 1/2; neighbours are correct once."""
    logs = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log()
    metric = filled(3, [0, 2, 2], logs, nearest=[1, 2, 0])
    assert metric.compute() == pytest.approx({"top1": 2 / 3, "loss": math.log(16) / 3, "knn_top1": 1 / 3})
    assert metric.confusion_matrix().tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    header, a, b, c = metric.details()
    assert header == ("class", "images", "top1", "taken_for", "times")
    assert a == ("a", 1, 1.0, "", 0) and c == ("c", 2, 0.5, "b", 1)
    assert b[:2] == ("b", 0) and math.isnan(b[2]) and b[3:] == ("", 0)


def test_random_samples_agree_with_sklearn():
    truth, logs = scene()
    numbers = filled(8, truth, logs).compute()
    probabilities = logs.double().exp().numpy()
    labels = list(range(8))
    assert numbers["top1"] == pytest.approx(top_k_accuracy_score(truth, probabilities, k=1, labels=labels), abs=1e-12)
    assert numbers["top5"] == pytest.approx(top_k_accuracy_score(truth, probabilities, k=5, labels=labels), abs=1e-12)
    assert 0.2 < numbers["top1"] < numbers["top5"] < 1
    # log_loss divides by the sum of the probabilities, which float32 makes one up to 1e-7
    expected = log_loss(truth, probabilities / probabilities.sum(1, keepdims=True), labels=labels)
    assert numbers["loss"] == pytest.approx(expected, abs=1e-6)
    confusion = filled(8, truth, logs).confusion_matrix()
    assert confusion.tolist() == confusion_matrix(truth, probabilities.argmax(1)).tolist()


def test_each_class_is_described_by_its_row_of_the_confusion_matrix():
    truth, logs = scene()
    metric = filled(8, truth, logs)
    counts = metric.confusion_matrix()
    for label, (name, images, top1, taken_for, times) in enumerate(metric.details()[1:]):
        row = counts[label].tolist()
        assert (name, images) == (metric.classes[label], sum(row)) and top1 == row[label] / images
        mistakes = [-1 if column == label else count for column, count in enumerate(row)]
        assert times == max(mistakes) and taken_for == metric.classes[mistakes.index(times)]


@pytest.mark.parametrize("classes", [1, 2, 5, 6])
def test_top5_is_reported_only_when_it_can_be_wrong(classes):
    numbers = filled(classes, [0], torch.full((1, classes), 1 / classes).log()).compute()
    assert ("top5" in numbers) == (classes > 5) and "knn_top1" not in numbers


def test_classes_of_equal_probability_are_ranked_by_index():
    """Seven equal classes: 0 is predicted, the truths 0 to 4 are in the first five, 5 and 6 are not."""
    metric = filled(7, list(range(7)), torch.full((7, 7), 1 / 7).log())
    assert metric.compute() == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "loss": math.log(7)})
    assert metric.confusion_matrix()[:, 0].tolist() == [1] * 7


def test_an_answer_with_nan_is_wrong_and_has_no_class(tmp_path):
    logs = torch.tensor([[NAN] * 6, [0.0, NAN, *[-9.0] * 4], [0.0, *[-9.0] * 5]])
    metric = filled(6, [0, 0, 0], logs, nearest=[-1, 0, 0])
    numbers = metric.compute()
    assert (numbers["top1"], numbers["top5"], numbers["knn_top1"]) == (1 / 3, 1 / 3, 2 / 3)
    assert math.isnan(numbers["loss"])
    assert metric.confusion_matrix().sum() == 1 and metric.details()[1] == ("a", 3, 1 / 3, "", 0)
    metric.write(tmp_path)
    with (tmp_path / "predictions.csv").open() as file:
        assert [line["predicted"] for line in csv.DictReader(file)] == ["", "", "a"]


def test_a_truth_of_probability_zero_has_infinite_loss():
    numbers = filled(2, [1], torch.tensor([[0.0, -math.inf]])).compute()
    assert numbers == {"top1": 0, "loss": math.inf}


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_names_its_sample(label):
    with pytest.raises(UserError, match=rf"sample pictures/7\.png: its label is {label}, .* from 0 to 1"):
        filled(2, [label], torch.zeros(1, 2), ids=["pictures/7.png"])


def test_a_repeated_sample_is_an_error():
    metric = ClassificationMetric(["a", "b"])
    metric.update(*batch([0, 1], torch.zeros(2, 2), ids=[3, 4]))
    metric.update(*batch([0, 1], torch.zeros(2, 2), ids=[5, 4]))
    with pytest.raises(AssertionError, match=r"more than once: \[4\]"):
        metric.gather()


def test_a_missing_sample_is_an_error_where_the_number_of_samples_is_known():
    for expected in (1, 2):
        metric = ClassificationMetric(["a"], expected)
        metric.update(*batch([0], torch.zeros(1, 1)))
        if expected == 1:
            metric.gather()
            continue
        with pytest.raises(AssertionError, match="1 of 2 samples"):
            metric.gather()


def test_numbers_before_gather_are_an_error(tmp_path):
    metric = ClassificationMetric(["a"])
    metric.update(*batch([0], torch.zeros(1, 1)))
    for early in (metric.compute, metric.details, metric.confusion_matrix, lambda: metric.write(tmp_path)):
        with pytest.raises(AssertionError, match="gather"):
            early()


def test_neighbours_of_only_some_samples_are_an_error():
    metric = filled(2, [0, 1], torch.zeros(2, 2), nearest=[0, None])
    with pytest.raises(AssertionError, match="1 of 2 samples have a class"):
        metric.compute()


def test_predictions_and_confusion_are_written(tmp_path):
    metric = ClassificationMetric(['a "quoted", name', "größe"])
    logs = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    metric.update(*batch([0, 0], logs, ids=["b/2.png", "a/1.png"]))
    metric.gather()
    metric.write(tmp_path / "new")
    with (tmp_path / "new" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["id", "truth", "predicted", "probability", "probability_of_truth"]
    assert list(first.values()) == ["a/1.png", 'a "quoted", name', 'a "quoted", name', "0.9", "0.9"]
    assert list(second.values()) == ["b/2.png", 'a "quoted", name', "größe", "0.75", "0.25"]
    assert Image.open(tmp_path / "new" / "confusion.png").size > (100, 100)


def test_a_confusion_matrix_of_too_many_classes_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_DRAWN_CLASSES", 2)
    filled(3, [0], torch.zeros(1, 3)).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_metric_does_not_store_the_probabilities_of_all_classes():
    truth, logs = scene()
    metric = filled(8, truth, logs, nearest=truth)
    assert all(isinstance(value, int | float) for sample in metric.samples for value in sample)


def evaluate_on_ranks(rank: int, folder: str) -> None:
    """Evaluate on three ranks, then on two: rank 0 has most of the samples, rank 1 has one, rank 2 none."""
    truth, logs = scene(20)
    for world in (3, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
        metric = ClassificationMetric(list("abcdefgh"), 20)
        for sample in [[19, *range(1, 19)], [0], []][rank]:
            metric.update(*batch([truth[sample]], logs[sample : sample + 1], ids=[sample], nearest=[0]))
        metric.gather()
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps([metric.compute(), metric.details()]))
        metric.write(Path(folder, f"files{world}-{rank}"))
        metric = ClassificationMetric(list("abcdefgh"))
        metric.update(*batch([0], torch.zeros(1, 8), ids=["x"]))  # on every rank
        with pytest.raises(AssertionError, match=r"more than once: \['x'\]"):
            metric.gather()
        dist.destroy_process_group()


def test_one_two_and_three_ranks_give_the_same_numbers_and_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # so that a new process can import this file
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "sklearn.metrics"])  # to import once
    mp.start_processes(evaluate_on_ranks, (str(tmp_path),), nprocs=3, start_method="forkserver")
    truth, logs = scene(20)
    metric = filled(8, truth, logs, nearest=[0] * 20)
    expected = json.loads(json.dumps([metric.compute(), metric.details()]))
    assert 0 < expected[0]["top1"] < 1
    metric.write(tmp_path / "alone")
    for world in (2, 3):
        for rank in range(world):
            assert json.loads((tmp_path / f"{world}-{rank}.json").read_text()) == expected
            assert (tmp_path / f"files{world}-{rank}").exists() == (rank == 0)
        for file in (tmp_path / "alone").iterdir():
            assert (tmp_path / f"files{world}-0" / file.name).read_bytes() == file.read_bytes()
