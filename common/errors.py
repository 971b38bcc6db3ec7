"""Exceptions with a message for the user: `UserError` for a mistake, and `Stopped` for a stop by a signal."""


class UserError(Exception):
    """A mistake that the user can correct: a bad config, data set or file.

    The text is one sentence: what was given, what was expected, and what to do. train.py, evaluate.py and predict.py
    print it without a traceback and exit with code 2.
    """


class Stopped(BaseException):
    """A signal stopped a run before its end.

    It is not an Exception, so that code that handles failures (`except Exception`) does not handle it.
    """

    def __init__(self, signals: list[str], where: str):
        """Store the message, such as "Stopped by SIGTERM after step 100 of 1000.", and the exit code.

        `signals` are the names of the signals that the ranks received. `where` is the end of the message, here "after
        step 100 of 1000".
        """
        names = list(dict.fromkeys(signals))
        super().__init__(f"Stopped by {' and '.join(names)} {where}.")
        self.code = 130 if names == ["SIGINT"] else 143  # exit codes of shells: 128 + SIGINT (2) or SIGTERM (15)
