"""One class per way to fail.

Every failure that a user can cause is one of these. The message is one line: what happened, where (``path :: key``), what was
expected and found, and what to do. `exit_code` is the process's exit status for it (docs/errors.md lists them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_merge_cli.report import InterpolateReport, MergeReport, SweepReport

_REASON_LENGTH = 300


class LoraMergeError(Exception):
    """Base of every expected failure.

    Args:
        what: What happened, as a clause without a full stop.
        where: The file, or ``file :: key``, that it happened at.
        expected: What a good input would have held.
        found: What this one holds.
        hint: What the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._line())

    def _line(self) -> str:
        line = self.what if self.where is None else f"{self.what}: {self.where}"
        details = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if details:
            line += f" ({', '.join(details)})"
        if self.hint:
            line += f"; {self.hint}"
        return " ".join(line.split())


class UsageError(LoraMergeError):
    """A flag's value, or a combination of flags, makes no sense. Subclassed by nobody."""

    exit_code = 2


class InputError(LoraMergeError):
    """An input is missing, unreadable, corrupt or of unknown format. Subclassed per cause."""

    exit_code = 3


class InputNotFound(InputError):
    """The path that was given does not exist."""


class UnknownFormat(InputError):
    """The path exists, and no reader knows what it is."""


class CorruptCheckpoint(InputError):
    """A checkpoint that cannot be read in full: a file or a chunk is missing, truncated or damaged."""


class NonFiniteInput(InputError):
    """NaN or Inf in a factor, or in a kernel under one."""


class Refused(LoraMergeError):
    """The inputs are readable and the merge would be wrong or pointless. Subclassed per cause."""

    exit_code = 4


class UnmatchedAdapter(Refused):
    """A key that looks like an adapter's and that no site claims, or a factor without its partner or kernel."""


class ShapeMismatch(Refused):
    """Factors whose shapes do not fit the kernel under the site's equation."""


class UnknownScale(Refused):
    """A site's scale needs an alpha that nothing states."""


class WrongBase(Refused):
    """A frozen leaf of the fine-tune does not equal the given base."""


class NothingToMerge(Refused):
    """No adapters at all, or every delta is zero."""


class AlreadyMerged(NothingToMerge):
    """No adapters are left, and the provenance file says why."""


class UnsafeOutput(Refused):
    """The output is an input, or lies inside one, or replacing it would remove more than a checkpoint."""


class Unrepresentable(Refused):
    """A finite result is not finite in the dtype that it would be stored in."""


class ConflictingAdapters(Refused):
    """Several adapters that cannot be merged into one checkpoint together."""


class UnsupportedCheckpoint(Refused):
    """A checkpoint, or a part of one, that is understood and not supported."""


class VerificationFailed(LoraMergeError):
    """A result was verified before it was published, and a check failed: nothing appeared at the output."""

    exit_code = 1
    report: MergeReport | InterpolateReport
    """The report with all checks."""


class SomeFailed(LoraMergeError):
    """Of several outputs some could not be made; the others are there."""

    exit_code = 7
    report: SweepReport
    """What became of each."""


class OutputExists(LoraMergeError):
    """Something is at the output path, and nobody said that it may go."""

    exit_code = 5


class ResourceError(LoraMergeError):
    """The machine said no: disk, memory or permission. Subclassed per cause."""

    exit_code = 6


class DiskFull(ResourceError):
    """Not enough free disk, found before the start or while writing."""


class NotPermitted(ResourceError):
    """The operating system denied access to a file or folder."""


def storage_refusal(where: object, error: Exception) -> ResourceError:
    """The refusal that an error of the operating system stands for, or one of a library on top of it.

    Only the text tells what went wrong where TensorStore, or `shutil` over several files, reports it.
    """
    reason = (getattr(error, "strerror", None) or str(error)).split(" [", maxsplit=1)[0][:_REASON_LENGTH]
    lowered = str(error).lower()
    if any(words in lowered for words in ("no space", "quota", "file too large")):
        return DiskFull("the disk is full", where=where, found=reason, hint="free some space, or write elsewhere")
    if isinstance(error, PermissionError) or any(w in lowered for w in ("read-only", "denied", "permission")):
        return NotPermitted("access is denied", where=where, found=reason)
    return ResourceError("the operating system refuses", where=where, found=reason)


class Terminated(BaseException):
    """SIGTERM arrived. Not an `Exception`: nothing but clean-up may act on it."""

    exit_code = 143
