"""The exceptions a caller may want to catch, and the exit code each one becomes on the command line.

    HraExportError                     1   (never raised itself)
    ├── FormatError                    4   a file that is not what its name says, truncated or hostile
    ├── AdapterError                   4   malformed, hostile or unfit adapter
    ├── CheckpointError                4   malformed, hostile or incomplete base checkpoint
    ├── MismatchError                  4   adapter and base are fine each, but do not fit together
    ├── NumericalError                 5   NaN, Inf, zero vectors, overflow after a cast
    ├── OutputError                    6   cannot write or read: exists, disk full, permission, lock held
    ├── DeviceError                    7   device or execution provider missing, or it fell back
    ├── UnsupportedModelError          8   understood, and not supported yet
    ├── GraphError                     4   an ONNX graph that cannot be used
    └── ConversionError                4   an adapter that a converter cannot express

Parity that fails is not an exception: it is a `ParityReport` with `ok` false, and exit code 3.
Wrong argument values raise `ValueError`, as everywhere in Python.
"""

from collections.abc import Sequence


class HraExportError(Exception):
    """Base class: a message for people, the findings behind it, and a hint.

    Args:
        message: what is wrong, with the file or tensor it is about.
        findings: one line each, all of them and not only the first.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, findings: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.findings = tuple(findings)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {finding}" for finding in self.findings)]
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class FormatError(HraExportError):
    """A file is truncated, hostile, or not of the format its name promises."""

    exit_code = 4


class AdapterError(HraExportError):
    """The adapter is malformed, hostile, or not an HRA adapter."""

    exit_code = 4


class CheckpointError(HraExportError):
    """The base checkpoint is malformed, hostile or incomplete."""

    exit_code = 4


class MismatchError(HraExportError):
    """Adapter and base do not fit together."""

    exit_code = 4


class NumericalError(HraExportError):
    """The numbers cannot be used: NaN, Inf, a zero reflection vector, overflow after a cast."""

    exit_code = 5


class OutputError(HraExportError):
    """The file system said no: output exists, disk full, permission, lock held."""

    exit_code = 6


class DeviceError(HraExportError):
    """The device or execution provider that was asked for is missing, or work fell back from it."""

    exit_code = 7


class UnsupportedModelError(HraExportError):
    """Understood, and not supported yet; the message names what."""

    exit_code = 8


class GraphError(HraExportError):
    """An ONNX graph cannot be read, or has no place for what was asked."""

    exit_code = 4


class ConversionError(HraExportError):
    """The target format cannot express this adapter, or the source cannot be read."""

    exit_code = 4
