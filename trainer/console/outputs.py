"""The one rule for what a command writes: to a local path, or whole to an object store, or not at all.

An output is parsed into an :class:`Output`. It is no path: a command gets one from :meth:`Output.writing` only, and so
no URL can be mistaken for a directory of that name. A result for a URL is made in a temporary directory (``TMPDIR``)
and uploaded when it is complete, the file without which no reader opens it last.

Parameters of commands are of the types :class:`OutputPath`, :class:`LocalOutputPath` and :class:`InputPath`; keys of
job files have the marks of ``trainer/config/paths.py``. ``tests/launch/test_outputs.py`` proves that no parameter and
no key is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.console.errors import UserError, one_line

if TYPE_CHECKING:
    from trainer.console.progress import Progress

OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"))
"""Protocols whose objects appear only when their last byte has arrived."""

_LOCAL = ("file", "local")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(:?)(/{0,2})")
_SCHEMES = OBJECT_STORES | {*_LOCAL, "adl", "ftp", "hdfs", "hf", "http", "https", "memory", "sftp", "ssh", "webhdfs"}
"""Protocols that are recognised without a slash behind them, as in ``memory:x``."""


@dataclass(frozen=True)
class Output:
    """Place that a result is written to; :meth:`of` makes it.

    Attributes:
        text: the place as it was typed.
        path: the local path; None for a URL of an object store.
    """

    text: str
    path: Path | None

    @staticmethod
    def of(text: str | Path) -> Output:
        """Return the output that a path or URL means.

        Raises:
            UserError: nothing can be written there whole, or it is a URL with a mistake.
        """
        scheme = scheme_of(text)
        if scheme is None or scheme in _LOCAL:
            return Output(str(text), local_path(text))
        if scheme not in OBJECT_STORES or "::" in str(text):
            raise UserError(
                f"{text}: nothing can be written there whole or not at all; write to a local path and copy it, or to "
                "an object store (s3://, gs://, az://)"
            )
        if not str(text).partition("://")[2].strip("/"):
            raise UserError(f"{text}: names no bucket; write {scheme}://BUCKET/PATH")
        return Output(str(text), None)

    def __str__(self) -> str:
        return self.text

    def beside(self, name: str) -> str:
        """Return the path or URL of another file in the same directory."""
        if self.path is not None:
            return str(self.path.with_name(name))
        return f"{self.text.rstrip('/').rpartition('/')[0]}/{name}"

    def check(self, *, new: bool = False) -> None:
        """Check that the output can be written, so that a mistake is found before long work.

        An empty object is written beside the result and removed: only this shows the permissions. Of a local file, the
        directory is checked.

        Args:
            new: the output is a directory that must not exist.

        Raises:
            UserError: credentials, bucket, directory, permission or the package for the protocol are missing, or the
                output exists.
        """
        if self.path is not None:
            if not new:
                _check_local_file(self.path)
            return
        filesystem, inside = self._open()
        probe = f"{inside}.limelight-{os.urandom(4).hex()}"
        with self._errors():
            filesystem.invalidate_cache()
            filesystem.pipe_file(probe, b"")
            # A store that forbids to remove objects can be written all the same.
            with suppress(PermissionError):
                filesystem.rm_file(probe)
            if new and filesystem.exists(inside):
                raise UserError(f"{self.text}: exists already; choose another URL or remove it")

    @contextmanager
    def writing(self, manifest: str = "", *, companions: Sequence[str] = (), quiet: bool = False) -> Iterator[Path]:
        """Yield the local path at which the block makes the result, and upload it after the block.

        A local output is its own path, at which the block makes the result whole itself. An upload that fails removes
        what it has uploaded, and keeps the local files.

        Args:
            manifest: file without which no reader opens the directory, uploaded last; empty if the result is a file.
                A directory must not exist at the URL, a file is replaced.
            companions: names of further files that the block may make beside a file. Those that it does not make are
                removed at the URL, as they belong to an earlier result.
            quiet: show no progress of the upload.

        Raises:
            UserError: the output cannot be written; the line names the URL.
        """
        if self.path is not None:
            yield self.path
            return
        self.check(new=bool(manifest))
        folder = Path(tempfile.mkdtemp(prefix="limelight-upload-"))
        kept = False
        try:
            path = folder / self.text.rstrip("/").rpartition("/")[2]
            yield path
            if manifest:
                files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.name)
                # Stable: the checksums of all files come after the files.
                files.sort(key=lambda file: (file == path / manifest, file == path / "checksums.json"))
            else:
                files = [*(file for name in companions if (file := path.with_name(name)).exists()), path]
            try:
                self._upload(path, files, [name for name in companions if not path.with_name(name).exists()], quiet)
            except UserError as error:
                kept = True
                raise UserError(f"{error}; nothing is lost: {path} has the whole result") from None
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, path: Path, files: Sequence[Path], removed: Sequence[str], quiet: bool) -> None:
        """Upload files of ``path``, or beside it, in their order; after an error none of them is left."""
        from trainer.console.progress import Progress

        filesystem, inside = self._open()
        sizes = [file.stat().st_size for file in files]
        done: list[str] = []
        with self._errors(), Progress(f"uploading to {self.text}", sum(sizes), "bytes", quiet=quiet) as progress:
            try:
                for file, size in zip(files, sizes, strict=True):
                    done.append(f"{inside}/{file.relative_to(path)}" if path.is_dir() else _beside(inside, file.name))
                    end = progress.done + size
                    filesystem.put_file(str(file), done[-1], callback=_progress_callback(progress, end))
                    progress.advance(end - progress.done)
                for name in removed:
                    if filesystem.exists(_beside(inside, name)):
                        filesystem.rm_file(_beside(inside, name))
            except BaseException:
                # A directory was not there before; of a file the store still has the earlier content.
                for uploaded in done if path.is_dir() else ():
                    with suppress(Exception):
                        filesystem.rm_file(uploaded)
                raise

    def _open(self) -> tuple[Any, str]:
        """Return the fsspec file system of the URL, and the path in it."""
        import fsspec

        try:
            filesystem, inside = fsspec.core.url_to_fs(self.text.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.text}: cannot be opened ({error})") from None
        return filesystem, inside

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an error of the store into one line that names the URL."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Broad, because the client of each store has exceptions of its own.
            reason = str(error).strip().rstrip(".") if isinstance(error, OSError) else one_line(error)
            raise UserError(f"{self.text}: cannot be written ({reason or type(error).__name__})") from None


def scheme_of(text: str | Path) -> str | None:
    """Return the protocol of a URL, in lower case; None for a local path.

    Raises:
        UserError: it begins like a URL but is not one, such as ``s3:/bucket/x``.
    """
    found = _SCHEME.match(str(text))
    if found is None or not (found[2] or found[3] or found[1].lower() in _SCHEMES):
        return None
    if found[2]:
        # A chain of fsspec, such as simplecache::s3://bucket/x.
        return found[1].lower()
    if found[3] != "//":
        meant = f"{found[1]}://{str(text)[found.end() :].lstrip(':/')}"
        raise UserError(f"{text}: neither a URL nor a local path; did you mean {meant}? (a local path: ./{text})")
    return found[1].lower()


def local_path(text: str | Path, what: str = "the output", instead: str = "write it to a local path") -> Path:
    """Return the local path that a user means; ``file:///x`` is the path ``/x``.

    Args:
        text: path or URL.
        what: is written or read there, for the message.
        instead: advice for a URL.

    Raises:
        UserError: it is a URL of another protocol, or a URL with a mistake.
    """
    scheme = scheme_of(text)
    if scheme is None:
        return Path(text)
    if scheme not in _LOCAL:
        raise UserError(f"{text}: {what} must be on a local or shared file system; {instead}")
    path = str(text).partition("://")[2]
    if not path.startswith("/"):
        raise UserError(f"{text}: not an absolute path behind {scheme}://; did you mean {scheme}:///{path}?")
    return Path(path)


def local_argument(text: str) -> Path:
    """Type of argparse for a path that is written: a local one."""
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class OutputPath(click.Path):
    """Type of a parameter that names an output; its value is an :class:`Output`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what was typed."""
        if isinstance(value, Output):
            return value
        try:
            return Output.of(str(super().convert(value, param, ctx)))
        except UserError as error:
            self.fail(str(error), param, ctx)


class LocalOutputPath(click.Path):
    """Type of a parameter that names a place to write files one by one; its value is a local path as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what was typed."""
        try:
            return str(local_path(str(super().convert(value, param, ctx))))
        except UserError as error:
            self.fail(str(error), param, ctx)


class InputPath(click.Path):
    """Type of a parameter that names something to read; its value is a string.

    Args:
        urls: URLs are accepted; otherwise only local paths.
    """

    def __init__(self, *, urls: bool = False) -> None:
        super().__init__()
        self.urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what was typed."""
        text = str(super().convert(value, param, ctx))
        try:
            if scheme_of(text) is None or self.urls:
                return text
            return str(local_path(text, "what is read here", "copy it to this machine first"))
        except UserError as error:
            self.fail(str(error), param, ctx)


def _progress_callback(progress: Progress, end: int) -> Any:
    """Return a callback of fsspec that advances a progress, to ``end`` at most."""
    from fsspec.callbacks import Callback

    class Advance(Callback):
        def relative_update(self, inc: int = 1) -> None:
            progress.advance(min(inc, end - progress.done))

    return Advance()


def _check_local_file(path: Path) -> None:
    """Check that a file can be written, or replaced, at a local path."""
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, it is a directory; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written, the user {os.geteuid()} may not write in {path.parent}")


def _beside(inside: str, name: str) -> str:
    return f"{inside.rpartition('/')[0]}/{name}"
