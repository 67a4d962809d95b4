"""The one error that bad data raises."""

__all__ = ["DataError"]


class DataError(ValueError):
    """A data set, archive or episode request that cannot be served.

    The message is one line that names the argument or file, what was expected and what came.
    """
