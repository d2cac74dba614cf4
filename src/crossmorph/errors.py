"""The one exception a user can cause."""


class InputError(ValueError):
    """Bad input. The message says what was given, what was needed and what to do.

    The command line prints it as one line and ends with exit code 2.
    """
