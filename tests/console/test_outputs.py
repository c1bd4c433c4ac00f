"""An output is whole or not there: locally, in an object store after an upload that ends, and after one that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.s3 import Bucket
from trainer.console.errors import UserError
from trainer.console.outputs import InputPath, Output, OutputPath, local_path, scheme_of

FILES = {"dataset.json": "{}", "checksums.json": "{}", "events/part-0": "e", "zz": "z", "a/dataset.json": "inner"}


def make_directory(path: Path) -> None:
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)


class Watched:
    """File system that records the names of uploads, and fails at one of them."""

    def __init__(self, filesystem: Any, fails_at: str = "") -> None:
        self.filesystem, self.fails_at, self.uploaded = filesystem, fails_at, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.filesystem, name)

    def put_file(self, local: str, remote: str, **options: Any) -> None:
        if self.fails_at and remote.endswith(self.fails_at):
            raise OSError("the connection was reset")
        self.uploaded.append(remote.partition("/")[2])
        self.filesystem.put_file(local, remote, **options)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    def watched(filesystem: Any, fails_at: str = "") -> Watched:
        seen = Watched(filesystem, fails_at)
        plain = Output._open
        monkeypatch.setattr(Output, "_open", lambda output: (seen, plain(output)[1]))
        return seen

    return watched


@pytest.mark.parametrize("text", ["out", "runs/a:b", "2024-01-01T10:00.parquet", "./s3:/x", "/tmp/s3://x", "world:7"])
def test_a_local_path_stays_what_was_typed(text: str) -> None:
    assert scheme_of(text) is None
    assert Output.of(text).path == Path(text) and str(Output.of(text)) == text
    with Output.of(text).writing("dataset.json") as path:
        assert path == Path(text)


def test_a_file_url_is_the_path_that_it_names() -> None:
    assert Output.of("file:///data/out").path == local_path("file:///data/out") == Path("/data/out")
    with pytest.raises(UserError, match=r"not an absolute path behind file://; did you mean file:///data/out\?"):
        Output.of("file://data/out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/bucket/x", r"neither a URL nor a local path; did you mean s3://bucket/x\?"),
        ("gs:bucket/x", r"did you mean gs://bucket/x\?"),
        ("memory:x", r"did you mean memory://x\?"),
        ("S3:/bucket/x", r"did you mean S3://bucket/x\?"),
        ("memory://x", "nothing can be written there whole"),
        ("http://host/x", "nothing can be written there whole"),
        ("hdfs://host/x", "nothing can be written there whole"),
        ("simplecache::s3://bucket/x", "nothing can be written there whole"),
        ("s3://", "names no bucket; write s3://BUCKET/PATH"),
        ("nonsense://x", "nothing can be written there whole"),
    ],
)
def test_a_url_that_cannot_be_written_whole_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Output.of(text)
    with pytest.raises(click.BadParameter, match=message):
        OutputPath().convert(text, None, None)


def test_a_local_file_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    Output.of(tmp_path / "new").check()
    Output.of(tmp_path / "missing" / "dataset").check(new=True)
    with pytest.raises(UserError, match=r"cannot be written, there is no directory .*missing"):
        Output.of(tmp_path / "missing" / "file").check()
    with pytest.raises(UserError, match="it is a directory"):
        Output.of(tmp_path).check()


def test_an_output_is_no_path() -> None:
    with pytest.raises(TypeError):
        Path(Output.of("out"))  # type: ignore[arg-type]


def test_an_input_is_local_unless_urls_are_read() -> None:
    assert InputPath(urls=True).convert("s3://bucket/x", None, None) == "s3://bucket/x"
    assert InputPath(urls=True).convert("simplecache::s3://bucket/x", None, None) == "simplecache::s3://bucket/x"
    assert InputPath().convert("file:///x", None, None) == "/x"
    with pytest.raises(click.BadParameter, match="copy it to this machine first"):
        InputPath().convert("s3://bucket/x", None, None)
    with pytest.raises(click.BadParameter, match=r"did you mean s3://x\?"):
        InputPath(urls=True).convert("s3:/x", None, None)


def test_a_directory_is_uploaded_whole_and_its_manifest_last(bucket: Bucket, watch: Callable[..., Watched]) -> None:
    seen = watch(bucket.filesystem)
    with Output.of(f"{bucket.url}/data/world/").writing("dataset.json") as path:
        make_directory(path)
        assert bucket.names() == []
    assert bucket.names() == sorted(f"data/world/{name}" for name in FILES)
    assert seen.uploaded[-2:] == ["data/world/checksums.json", "data/world/dataset.json"]
    assert bucket.read("data/world/a/dataset.json") == b"inner"
    assert not path.parent.exists()


def test_a_directory_is_not_written_over_another_one(bucket: Bucket) -> None:
    bucket.filesystem.pipe_file(f"{bucket.url}/world/other", b"1")
    with (
        pytest.raises(UserError, match=f"^{bucket.url}/world: exists already; choose another URL or remove it$"),
        Output.of(f"{bucket.url}/world").writing("dataset.json"),
    ):
        raise AssertionError("the work must not begin")
    assert bucket.names() == ["world/other"]


@pytest.mark.parametrize("fails_at", ["world/checksums.json", "world/dataset.json", "events/part-0"])
def test_an_upload_that_fails_leaves_nothing_there_and_loses_nothing(
    bucket: Bucket, watch: Callable[..., Watched], fails_at: str
) -> None:
    watch(bucket.filesystem, fails_at)
    with (
        pytest.raises(UserError, match=r"world: cannot be written \(the connection was reset\); nothing is lost: /"),
        Output.of(f"{bucket.url}/world").writing("dataset.json") as path,
    ):
        make_directory(path)
    assert bucket.names() == []
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == set(FILES)


def test_work_that_fails_uploads_nothing(bucket: Bucket) -> None:
    with contextlib.suppress(RuntimeError), Output.of(f"{bucket.url}/world").writing("dataset.json") as path:
        make_directory(path)
        raise RuntimeError
    assert bucket.names() == [] and not path.parent.exists()


def test_a_file_is_replaced_with_its_companions(bucket: Bucket, watch: Callable[..., Watched]) -> None:
    seen = watch(bucket.filesystem)
    out = Output.of(f"{bucket.url}/a/rows.parquet")
    for rows, unused in (("1", "u"), ("2", None)):
        with out.writing(companions=("rows.unused.parquet",)) as file:
            file.write_text(rows)
            if unused:
                file.with_name("rows.unused.parquet").write_text(unused)
        assert bucket.names() == ["a/rows.parquet", *(["a/rows.unused.parquet"] if unused else [])]
        assert bucket.read("a/rows.parquet") == rows.encode()
    assert seen.uploaded == ["a/rows.unused.parquet", "a/rows.parquet", "a/rows.parquet"]
    assert out.beside("rows.unused.parquet") == f"{bucket.url}/a/rows.unused.parquet"


def test_a_file_whose_upload_fails_stays_what_it_was(bucket: Bucket, watch: Callable[..., Watched]) -> None:
    bucket.filesystem.pipe_file(f"{bucket.url}/rows", b"earlier")
    watch(bucket.filesystem, "/rows")
    with (
        pytest.raises(UserError, match=f"^{bucket.url}/rows: cannot be written"),
        Output.of(f"{bucket.url}/rows").writing() as file,
    ):
        file.write_text("later")
    assert bucket.read("rows") == b"earlier" and file.read_text() == "later"


@pytest.mark.parametrize("manifest", ["", "dataset.json"])
def test_a_missing_bucket_is_one_line_before_the_work(bucket: Bucket, manifest: str) -> None:
    with (
        pytest.raises(UserError, match=r"^s3://no-such-bucket/x: cannot be written \(.*bucket does not exist\)$"),
        Output.of("s3://no-such-bucket/x").writing(manifest),
    ):
        raise AssertionError("the work must not begin")


def test_missing_credentials_are_one_line_before_the_work(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with (
        pytest.raises(UserError, match=r"^s3://bucket/x: cannot be written \(NoCredentialsError: .*credentials\)$"),
        Output.of("s3://bucket/x").writing(),
    ):
        raise AssertionError("the work must not begin")


def test_the_upload_shows_its_progress(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Output.of(f"{bucket.url}/x").writing() as file:
        file.write_bytes(bytes(1 << 20))
    assert f"uploading to {bucket.url}/x: 1,048,576/1,048,576 bytes (100 %)" in caplog.text
