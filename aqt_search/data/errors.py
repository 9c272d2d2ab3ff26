"""The one exception of the data package."""


class DataError(ValueError):
    """A data set that cannot be used: the message names the file or value, and says what to do."""
