"""The exceptions that mean "the input is wrong", shown to the user as a single line."""

_LONGEST_LINE = 500


class UserError(Exception):
    """Bad input or an impossible request; the message is one line that names the culprit and the fix.

    Names and values in it come from outside: what would break the line, or cannot be printed, is shown escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class AgreedError(UserError):
    """Raised with the same message on every rank, so that one rank's word is enough."""


class BadNodeError(AgreedError):
    """A machine is not fit for the run; without it the same command may work."""


class DamageError(UserError):
    """Bytes that were read are not those that were written, or a file that was written is not there."""


class StorageError(UserError):
    """Storage failed in a way that may pass; the same command may work later."""


class AgreedStorageError(StorageError, AgreedError):
    """A storage failure, raised with the same message on every rank."""


def one_line(error: BaseException, *, named: bool = False) -> str:
    """What an error of somebody else's code says, in one line of at most 500 characters.

    Args:
        error: The error; one that says nothing is called by its type.
        named: Whether the type stands before what it says: ``KeyError: 'norm'``.
    """
    text, kind = " ".join(str(error).split())[:_LONGEST_LINE], type(error).__name__
    return f"{kind}: {text}" if named and text else text or kind
