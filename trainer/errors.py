"""The one exception for mistakes a user can make."""


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, and what would be accepted.

    Commands print it as ``limelight: error: <message>`` and exit with status 2; nothing else is printed.
    """
