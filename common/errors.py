"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: bad config, data or file.

    Its text is one sentence with what was given, what was expected and what to do.
    The doors print it without a traceback and leave with exit code 2.
    """
