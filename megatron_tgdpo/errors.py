"""The exceptions that mean "the input is wrong", shown to the user as a single line."""


class UserError(Exception):
    """Bad input or an impossible request; the message is one line that names the culprit and the fix."""


class AgreedError(UserError):
    """Raised with the same message on every rank, so that one rank's word is enough."""


class BadNodeError(AgreedError):
    """A machine is not fit for the run; without it the same command may work."""


class StorageError(AgreedError):
    """Storage failed in a way that may pass; the same command may work later."""
