"""The one exception a user sees."""


class RegraftError(Exception):
    """Wrong use or wrong input: one line saying what is wrong, the value, and what to do next.

    The command line prints it without a traceback and exits with status 2.
    """
