"""The rows of word2vec: both programs learn from the same words, and vectors that agree too little are not timed."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("gensim")

from scripts.benchmarks import word2vec
from scripts.benchmarks.timing import MismatchError, Setting, measure


def setting(tmp_path: Path, *, tiny: bool = True) -> Setting:
    return Setting(device=torch.device("cpu"), tiny=tiny, compile=False, images=None, scratch=tmp_path)


@pytest.mark.parametrize("name", word2vec.ROWS)
def test_every_row_runs_on_the_same_words(name: str, tmp_path: Path) -> None:
    row = word2vec.ROWS[name](setting(tmp_path))
    measurement = measure(row, rounds=1, warm_up=0, device=torch.device("cpu"))
    assert "overlap of neighbours with gensim's" in measurement["agreement"]
    assert [(ratio["one"], ratio["other"]) for ratio in measurement["ratios"]] == [("ours", "gensim")]
    ours, theirs = (row.contenders[contender]() for contender in ("ours", "gensim"))
    assert ours.shape == theirs.shape and ours.isfinite().all()  # type: ignore[attr-defined]


def test_the_share_of_neighbours_is_counted() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(60, 8)
    assert word2vec.share_of_neighbours(vectors, 3 * vectors) == 1
    assert word2vec.share_of_neighbours(vectors, torch.randn(60, 8)) < 0.4, "10 of 59 by chance"


@pytest.mark.slow
@pytest.mark.parametrize("name", word2vec.ROWS)
def test_neighbours_agree_with_gensims_as_its_own_seeds_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 0.9 of the overlap of two seeds of gensim; tables of another seed's first epoch agree less."""
    row = word2vec.ROWS[name](setting(tmp_path, tiny=False))
    assert "overlap of neighbours" in row.check()
    monkeypatch.setattr(word2vec, "train_ours", lambda config, data: torch.randn(len(data.vocabulary), 100))
    with pytest.raises(MismatchError, match=r"less than 0\.9 of it"):
        word2vec.ROWS[name](setting(tmp_path, tiny=False)).check()
