"""Refuse data of another task of this package, before a model is built."""

from typing import Any

from common.errors import UserError


def refuse_other_data(data: Any, member: str, content: str, choices: str) -> None:
    """Raise UserError if `data` lack the attribute `member`, which distinguishes the data of the task that calls this.

    Data of None are accepted: a task that only calls models, as in benchmarks, needs none. `content` completes the
    sentence "data._target_=X has no ...", and `choices` the sentence "give ..., or another model". `member` is read, so
    it must not be a property that opens files.
    """
    if data is not None and not hasattr(data, member):
        raise UserError(f"data._target_={type(data).__name__} has no {content}; give {choices}, or another model.")
