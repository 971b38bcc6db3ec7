"""Data without a method `fingerprint` are recognised by their samples' costs."""

from typing import Any

import numpy as np

from common.data.costs import equal_costs
from common.data.fingerprints import digest
from common.train.data_identity import fingerprint_of


class Costs:
    """A data set of nothing but costs."""

    def __init__(self, costs: Any):
        self.costs = costs

    def cost(self, split: str) -> Any:
        return self.costs


def test_costs_have_one_digest_as_a_list_and_as_any_array() -> None:
    """Checkpoints hold the digest of a list, as data sets returned in earlier versions."""
    expected = {"costs": digest([b"".join(number.to_bytes(8, "little") for number in [3] * 100_000)])}
    for costs in ([3] * 100_000, equal_costs(3, 100_000), np.full(100_000, 3, np.uint8)):
        assert fingerprint_of(Costs(costs), "train") == expected
    assert fingerprint_of(Costs([3] * 99_999 + [2]), "train") != expected
