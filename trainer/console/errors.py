"""The exception for mistakes of a user, one-line texts of other exceptions, and detection of a lost rank."""

from __future__ import annotations

import errno
import os
import re
import shutil

from trainer.console.setup_advice import setup_command

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(Exception):
    """A mistake of the user, with a message of one line: what, where, and what would be accepted.

    Commands print it as ``limelight: error: <message>`` and exit with status 2; nothing else is printed. A control
    character in the message, which may come from a file's content or name, is escaped: ``\\n`` stays on the line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return a text with its control characters escaped: a terminal does nothing but show it, on one line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """Format an exception as one line for a person."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if "inline_container" in text and "unexpected pos" in text:
        # torch reports a failed write so; the operating system's reason is lost if it comes from another rank.
        return "a file could not be written whole; is the disk full, or a quota used up?"
    return f"{type(error).__name__}: {text}"


def failure_reason(error: OSError) -> str:
    """Return the system's reason of an error, such as "No space left on device", without the name of a file.

    Libraries raise OSError with a text only, and ``shutil.copytree`` one with a list of (source, copy, text).
    """
    if error.errno:
        return os.strerror(error.errno)
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        text = str(error.args[0][0][-1])
    else:
        text = str(error)
    found = re.search(r"\[Errno (\d+)\]", text)
    return os.strerror(int(found[1])) if found else " ".join(text.split())


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the operating system that only a write can have: no space, quota used up, file too large."""

_STORAGE_ERRORS = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, *DISK_FULL, errno.EIO, errno.ESTALE),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE),
    )
)
"""Errors of the operating system that are about files, even if Python does not know the name of the file."""

_FILE_LIBRARIES = frozenset(
    ("pyarrow", "safetensors", "safetensors_rust", "fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "zlib")
)
"""Packages whose exceptions are about files or storage."""


def user_message(error: BaseException) -> str | None:
    """Return one line for an error about files or storage; None for any other one, which is a defect of Limelight.

    Code that knows the file and what would be accepted raises a UserError itself. This is for the rest: a file without
    read permission, a full disk, a name that is too long, a damaged file that a library refuses.
    """
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if is_lost_peer(text):
        return None
    if _COLLECTIVE.search(text):
        return _nccl_message(text)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | BrokenPipeError | ChildProcessError):
        if error.filename is None and error.errno not in _STORAGE_ERRORS:
            return one_line(error) if _package(error) in _FILE_LIBRARIES else None
        line = one_line(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            line += "; free some space (df -h shows where), or write to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM):
            line += f"; the user {os.geteuid()} needs the permission"
        return line
    if isinstance(error, UnicodeEncodeError):
        # The error has the text, not the file: it is a path, or the terminal's.
        return (
            f"{error.object[:200]!a}: the locale's encoding {error.encoding} has no such characters; "
            "export LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not {error.encoding} text: byte 0x{error.object[error.start]:02x} at {error.start:,}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):
        return f"{str(error).partition(' from ')[2]}: {os.strerror(errno.ELOOP)}"
    if isinstance(error, RuntimeError) and "inline_container" in str(error) and "unexpected pos" in str(error):
        return one_line(error)
    return one_line(error) if _package(error) in _FILE_LIBRARIES else None


def _package(error: BaseException) -> str:
    """Return the package that defines an exception's type."""
    return type(error).__module__.partition(".")[0]


_COLLECTIVE = re.compile(r"\bgloo/|\bNCCL\b|\bDist(Backend|Network|Store)Error\b")
"""Errors of collectives and of the rendezvous store. gloo, NCCL and torch have no exception types for their causes."""

_NCCL = re.compile(r"\bNCCL\b|\bDistBackendError\b")

_OTHER_FAULT = re.compile(
    r"Duplicate GPU detected|No space left on device|shared memory segment|ncclInvalid(Usage|Argument)"
    r"|\binvalid (usage|argument)\b|unhandled cuda error|ncclUnhandledCudaError|Cuda failure|CUDA error|out of memory"
    r"|Mismatched NCCL version|EADDRINUSE|address already in use|size doesn't match expected size|op\.preamble"
)
"""Signs in an error of a collective that this rank or its machine is at fault, and not the loss of another rank."""

_LOST_PEER = re.compile(
    r"ncclRemoteError|remote process exited|closed by (remote )?peer|reset by peer|Broken pipe|Connection refused"
    r"|recv failed|got 0 bytes|communicator was aborted|[Tt]imed out|[Tt]imeout|completion from peer"
)
"""Signs in NCCL's errors that another rank has ended, hangs, or cannot be reached."""

_ADVICE = (
    (
        re.compile(r"Duplicate GPU detected"),
        "two ranks must not share a GPU: start at most one rank for each GPU that CUDA_VISIBLE_DEVICES lists",
    ),
    (
        re.compile(r"shared memory segment|/dev/shm|No space left on device"),
        "NCCL needs more room in /dev/shm: docker run --shm-size=8g, or in Kubernetes an emptyDir with "
        "medium: Memory at /dev/shm",
    ),
    (
        re.compile(r"Mismatched NCCL version"),
        f"all machines need the same versions; on each of them: {setup_command(clean=True)}",
    ),
    (re.compile(r"out of memory"), "NCCL finds no free memory on the GPU: use a smaller train.batch_size"),
)
"""Faults of the machine or of the command that started the job -> what helps."""


def is_lost_peer(message: str) -> bool:
    """True if an exception, given as ``type: message``, means that another rank ended, hangs or cannot be reached.

    Other errors of collectives, such as two ranks on one GPU, have their cause on this rank.
    """
    if _COLLECTIVE.search(message) is None or _OTHER_FAULT.search(message) is not None:
        return False
    return _NCCL.search(message) is None or _LOST_PEER.search(message) is not None


def collective_cause(message: str) -> str:
    """Return the cause in an error of a collective as one line, without source lines of libraries and their advice."""
    last_error = message.partition("Last error:")[2].strip()
    if last_error:
        return last_error.splitlines()[0].strip()
    line = " ".join(message.split())
    # gloo's message begins with its source line and ends with advice; the reason stands between.
    of_gloo = line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0]
    of_nccl = re.search(r"\.[ch]pp:\d+, (.+?)(?: \(run with|, NCCL version|$)", line)
    return of_gloo or (of_nccl[1] if of_nccl else line)


def _nccl_message(message: str) -> str | None:
    """Return one line for an error of NCCL that the user can mend; None for any other one."""
    if _NCCL.search(message) is None:
        return None
    return next((f"NCCL: {collective_cause(message)}; {help}" for sign, help in _ADVICE if sign.search(message)), None)
