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


class NoStore(InputError):
    """Nothing stands at a place, or what stands there is no store of deepfere's; the place itself did answer."""


class DamagedPixels(InputError):
    """Pixels of a slide that lie there but cannot be decoded; the rest of it can be read."""


class Damaged(DeepfereError):
    """What the work itself has made is gone or damaged; the same command again makes it anew.

    Args:
        where: The object, or the store that it is in.
        what: What is wrong with it.
    """

    def __init__(self, where: object, what: str) -> None:
        super().__init__(" ".join(f"{where}: {what}; the same command again makes it anew".split()))


class StorageError(DeepfereError):
    """A store at a URL keeps failing, or stopped answering; what lies there stays as it is."""


class SectionFailures(DeepfereError):
    """Sections of a study failed; what could be done for the others is done.

    Args:
        found: (section, stage, error) of each.
        sections: How many the study has.
        why: What could not be done for the others.

    Attributes:
        lines: One line per failure: section, stage, what, where and how to mend it.
        summary: How many failed, and what comes next.
        all_input: Whether all of them are wrong input (exit code 2), none a failure of the machine (1).
    """

    def __init__(self, found: list[tuple[str, str, DeepfereError]], sections: int, why: str = "") -> None:
        self.found = list(found)
        self.lines = [f"section {name}, {stage}: {' '.join(str(error).split())}" for name, stage, error in found]
        self.all_input = all(isinstance(error, InputError) for _, _, error in found)
        failed = len({name for name, _, _ in found})
        self.summary = f"{failed} of {sections} sections failed" + (f"; {why}" if why else "; the others are done")
        super().__init__("; ".join([self.summary, *self.lines]))
