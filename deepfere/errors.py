"""Errors that deepfere raises on purpose."""

from __future__ import annotations

import errno


class DeepfereError(Exception):
    """Base class of every error that deepfere raises on purpose."""


class InputError(DeepfereError):
    """The user's input is wrong: one line that says what, where and how to mend it (exit code 2).

    Args:
        what: What is wrong, in the user's terms, with the offending value.
        where: The file, flag or key it was found in.
        remedy: What to do about it, as an imperative.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        head = f"{where}: {what}" if where is not None else what
        text = f"{head}; {remedy}" if remedy else head
        super().__init__(" ".join(text.split()))


def system_text(error: OSError) -> str:
    """What the system says of a failed call, in one line: about which file, and what to do about a full disk."""
    text = f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
    return f"{text}; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else text


class IdentityError(InputError):
    """A result or work folder made from other inputs or settings stands at the wanted path."""
