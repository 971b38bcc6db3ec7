"""The exceptions that a user is meant to read: a mistake, and a stop that was asked for."""


class UserError(Exception):
    """A mistake that the user can mend: bad config, data or file.

    Its text is one sentence with what was given, what was expected and what to do.
    The doors print it without a traceback and leave with exit code 2.
    """


class Stopped(BaseException):
    """A run ended early because a signal asked it to. No Exception, so that nothing takes it for a failed run."""

    def __init__(self, signals: list[str], where: str):
        """`signals` are the names of those that came, to any rank; `where` ends a sentence on the place in the run."""
        names = list(dict.fromkeys(signals))
        super().__init__(f"Stopped by {' and '.join(names)} {where}.")
        self.code = 130 if names == ["SIGINT"] else 143  # as shells say 128 + number
