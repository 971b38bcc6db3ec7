"""The exceptions whose text a user reads: for a user's mistake, and for a stop by a signal."""


class UserError(Exception):
    """A mistake that the user can correct: a bad config, data set or file.

    The text is one sentence: what was given, what was expected, and what to do. train.py, evaluate.py and predict.py
    print it without a traceback and exit with code 2.
    """


class Stopped(BaseException):
    """A signal stopped a run early. Not an Exception, so that no handler mistakes it for a failure."""

    def __init__(self, signals: list[str], where: str):
        """`signals` are the names of the signals that any rank received; `where` ends the sentence "Stopped by ..."."""
        names = list(dict.fromkeys(signals))
        super().__init__(f"Stopped by {' and '.join(names)} {where}.")
        self.code = 130 if names == ["SIGINT"] else 143  # 128 + the signal's number, as in shells
