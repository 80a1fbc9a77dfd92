"""Every error that this package raises on purpose.

    SmcError
    ├── UsageError        USAGE              exit  2   a call or option that makes no sense
    ├── BadInput          BAD_INPUT          exit 65   input data that cannot be used
    │   ├── BadCheckpoint BAD_CHECKPOINT     exit 65
    │   └── BadImage      BAD_IMAGE          exit 65
    ├── InputMissing      INPUT_MISSING      exit 66   input that is absent or cannot be read
    ├── NoTarget          NO_TARGET          exit 69   no GPU, driver or backend that could do the work
    ├── BackendFailed     BACKEND_FAILED     exit 70   an engine or exporter failed
    ├── CannotWrite       CANNOT_WRITE       exit 73   the output cannot be created
    ├── DiskError         DISK_ERROR         exit 74   a write or read failed midway
    ├── Busy              BUSY               exit 75   try again later
    │   └── OutOfMemory   OUT_OF_MEMORY      exit 75
    ├── BundleDamaged     BUNDLE_DAMAGED     exit 76   the bundle is not what its manifest says
    ├── BundleMismatch    BUNDLE_MISMATCH    exit 77   the bundle is for another machine or version
    └── AccuracyFailed    ACCURACY_FAILED    exit 78   outputs differ from the float32 reference by more than is allowed

The codes and exit statuses are stable. The message says what was expected and what was found, `fix` what to do about it.
"""

from __future__ import annotations


class SmcError(Exception):
    """Base of the tree. `code` is stable and machine-readable; `fix` is one line of advice, or empty."""

    code = "INTERNAL"
    exit_status = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


class UsageError(SmcError):
    code, exit_status = "USAGE", 2


class BadInput(SmcError):
    code, exit_status = "BAD_INPUT", 65


class BadCheckpoint(BadInput):
    code = "BAD_CHECKPOINT"


class BadImage(BadInput):
    code = "BAD_IMAGE"


class InputMissing(SmcError):
    code, exit_status = "INPUT_MISSING", 66


class NoTarget(SmcError):
    code, exit_status = "NO_TARGET", 69


class BackendFailed(SmcError):
    code, exit_status = "BACKEND_FAILED", 70


class CannotWrite(SmcError):
    code, exit_status = "CANNOT_WRITE", 73


class DiskError(SmcError):
    code, exit_status = "DISK_ERROR", 74


class Busy(SmcError):
    code, exit_status = "BUSY", 75


class OutOfMemory(Busy):
    code = "OUT_OF_MEMORY"


class BundleDamaged(SmcError):
    code, exit_status = "BUNDLE_DAMAGED", 76


class BundleMismatch(SmcError):
    code, exit_status = "BUNDLE_MISMATCH", 77


class AccuracyFailed(SmcError):
    code, exit_status = "ACCURACY_FAILED", 78
