"""The one exception type that means "the input is wrong", shown to the user as a single line."""


class UserError(Exception):
    """Bad input or an impossible request; the message is one line that names the culprit and the fix."""
