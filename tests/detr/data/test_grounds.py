"""Grounds fill the picture, differ in their patterns, and take up no randomness of pictures without stuff."""

import numpy as np

from detr.data.grounds import MIN_SHARE, NAMES, draw_grounds


def draw(seed: int, size: int = 64) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Grounds over specks of the level 90."""
    return draw_grounds(np.random.default_rng(seed), size, np.full((size, size, 3), 90.0))


def test_one_or_two_grounds_of_different_classes_fill_the_picture():
    counts, classes = set(), set()
    for seed in range(60):
        canvas, masks, labels = draw(seed)
        assert canvas.shape == (64, 64, 3) and (np.sum(masks, axis=0) == 1).all()
        assert len(masks) == len(labels) == len(set(labels))
        counts.add(len(labels))
        classes |= set(labels)
        if len(masks) == 2:
            assert MIN_SHARE - 0.02 < masks[0].mean() < 1 - MIN_SHARE + 0.02
    assert counts == {1, 2} and classes == set(range(len(NAMES)))


def test_a_pattern_is_drawn_in_its_ground_alone():
    """Specks have one level here, and stripes and checks have two colours of which each takes up about a half."""
    for seed in range(30):
        canvas, masks, labels = draw(seed)
        for mask, label in zip(masks, labels, strict=True):
            colours, counts = np.unique(canvas[mask], axis=0, return_counts=True)
            if NAMES[label] == "specks":
                assert (canvas[mask] == 90).all()
            else:
                assert len(colours) in (2, 3) and sorted(counts)[-2] > 0.25 * mask.sum()
                assert np.abs(colours[0] - colours[-1]).min() > 2 * 30


def test_stripes_are_constant_along_one_direction_and_checks_are_not():
    """The spectrum of stripes has its energy on one line through the origin, that of checks on two."""
    ratios = {name: [] for name in NAMES}
    for seed in range(60):
        canvas, masks, labels = draw(seed)
        if len(masks) == 1 and NAMES[labels[0]] != "specks":
            grey = canvas[..., 0] - canvas[..., 0].mean()
            spectrum = np.abs(np.fft.fft2(grey)) ** 2
            y, x = np.meshgrid(*[np.fft.fftfreq(64)] * 2, indexing="ij")
            tensor = np.array([[np.sum(spectrum * a * b) for a in (x, y)] for b in (x, y)])
            values = np.linalg.eigvalsh(tensor)
            ratios[NAMES[labels[0]]].append(values[0] / values[1])
    assert ratios["stripes"] and ratios["checks"]
    assert max(ratios["stripes"]) < min(ratios["checks"])
