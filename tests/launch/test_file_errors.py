"""Files of a user that cannot be read, decoded or written: one line with the file, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.evaluate
import trainer.explain
import trainer.finetune
import trainer.rank
import trainer.score
from launch.cli.main import main
from tests.nursery import Ended, Nursery
from tests.paths import ROOT
from tests.semantic_ids.segment_world import assigned, make_version, write_world
from trainer.config.load import load_deepspeed
from trainer.config.toml import read_toml
from trainer.console.errors import UserError, user_message
from trainer.console.exit_status import INTERRUPTED_STATUS, TERMINATED_STATUS, exit_status
from trainer.data.format.schema import DatasetSpec
from trainer.data.importers.table_files import read_batches
from trainer.serving.scoring import read_candidates

NOBODY = 65534


def as_nobody(work: Callable[[], str]) -> str:
    """Result of a function in a child process without root's rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.write(writer, work().encode())
        except BaseException as error:
            os.write(writer, f"died: {error!r}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def command(*arguments: object) -> str:
    """Exit status and stderr of a command, run in this process, with the rank that it would start."""
    run = {
        "score": trainer.score.main,
        "evaluate": trainer.evaluate.main,
        "explain": trainer.explain.main,
        "rank": trainer.rank.main,
        "tune": trainer.finetune.main,
    }.get(str(arguments[0]))
    words = [str(argument) for argument in arguments]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words) if run is None else run(words[1:])
        except BaseException as error:
            return f"traceback of {error!r}"
        finally:
            # A job that saves its state on SIGTERM has set a handler of its own.
            signal.signal(signal.SIGTERM, on_sigterm)
    return f"{status} {err.getvalue()}"


def assert_one_line(told: str, *expected: str) -> None:
    assert told.startswith("2 limelight: error: ") and told.count("\n") == 1 and told.endswith("\n"), told
    for text in expected:
        assert text in told, told


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user can enter."""
    for folder in (tmp_path, *tmp_path.parents[: len(tmp_path.parents) - 2]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    yield tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "world"
    assert command("data", "simulate", path, "--users", "20", "--days", "2", "--partitions", "2").startswith("0")
    return path


def write_text(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("job.toml", ["train", "{}/job.toml"]),
        ("job.toml", ["config", "check", "{}/job.toml"]),
        ("job.toml", ["finetune", "{}/job.toml"]),
        ("dataset.json", ["data", "describe", "{}"]),
        ("config.json", ["evaluate", "{}"]),
        ("config.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("config.json", ["explain", "{}", "--user", "1", "--candidate", "2"]),
        ("config.json", ["export", "{}", "out"]),
        ("checkpoints/step-1/manifest.json", ["checkpoint", "show", "{}"]),
        ("checkpoints/step-1/manifest.json", ["checkpoint", "verify", "{}"]),
        ("export.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("codebook.json", ["quantize", "report", "{}"]),
        ("map.toml", ["data", "import", "events", "{}", "{}/out", "--mapping", "{}/map.toml"]),
    ],
)
def test_a_file_without_permission(public: Path, file: str, arguments: list[str]) -> None:
    path = write_text(public / "it" / file)
    (public / "results").mkdir()
    (public / "results").chmod(0o777)
    hidden = path if "checkpoints" not in file else public / "it" / "checkpoints"
    hidden.chmod(0)
    try:
        told = as_nobody(lambda: command(*(word.format(public / "it") for word in arguments)))
    finally:
        hidden.chmod(0o755)
    assert_one_line(told, hidden.name)
    assert "Permission denied" in told or "is not readable" in told, told


@pytest.mark.parametrize("name", ["l" * 256, "loop", "loop/inner"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{}"],
        ["data", "describe", "{}"],
        ["data", "simulate", "{}", "--users", "5"],
        ["evaluate", "{}"],
        ["score", "{}", "c.parquet", "out.parquet"],
        ["export", "{}", "out"],
        ["checkpoint", "show", "{}"],
        ["data", "import", "kuairand", "{}", "out"],
        ["data", "instructions", "{}", "out", "--evaluate-from", "2024-03-02"],
        ["quantize", "report", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_long_name_and_a_loop_of_links(tmp_path: Path, name: str, arguments: list[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_one_line(command(*(word.format(tmp_path / name) for word in arguments)), name[:100])


DAMAGED = [b"null", b"[]", b"1e999", b"7", b'"text"', b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{}", b'{"a": 1e999}']


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:8].decode(errors="replace"))
@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("dataset.json", ["data", "describe", "{}"]),
        ("config.json", ["evaluate", "{}"]),
        ("config.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("config.json", ["export", "{}", "{}/out"]),
        ("export.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("codebook.json", ["quantize", "report", "{}"]),
    ],
)
def test_damaged_json(tmp_path: Path, file: str, arguments: list[str], content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    assert_one_line(command(*(word.format(tmp_path) for word in arguments)), str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"partitions": float("1e400")},
        {"partitions": "2"},
        {"partitions": 0},
        {"rows": -1},
        {"span_ms": [0]},
        {"span_ms": None},
        {"behaviours": 3},
        {"behaviours": [3]},
        {"applies": []},
        {"ids": {"user": 3}},
        {"side": [[]]},
        {"extra": []},
        {"timezone": None},
    ],
    ids=str,
)
def test_a_dataset_description_with_other_types(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    content = json.loads((world / "dataset.json").read_text()) | changes
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert_one_line(command("data", "describe", tmp_path), "dataset.json")


def test_an_empty_array(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "copy")
    for name in ("offsets", "item_id", "user_id"):
        file = tmp_path / "copy" / "history" / f"{name}.npy"
        kept = file.read_bytes()
        file.write_bytes(b"")
        assert_one_line(command("data", "describe", tmp_path / "copy"), "histor")
        file.write_bytes(kept)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space"),
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device; free"),
        (PermissionError(13, "Permission denied", "job.toml"), "job.toml: Permission denied; the user"),
        (RuntimeError("Symlink loop from '/a'"), "'/a': Too many levels of symbolic links"),
        (RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 0 vs 1"), "is the disk full"),
        (pa.ArrowInvalid("Unexpected end of stream\nmore"), "ArrowInvalid: Unexpected end of stream more"),
        (UnicodeEncodeError("ascii", "/täg", 2, 3, "ordinal not in range"), "PYTHONUTF8=1"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), "not utf-8 text: byte 0xff at 1"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    assert exit_status(fail) == 2
    told = capsys.readouterr().err
    assert told.startswith("limelight: error: ") and told.count("\n") == 1 and expected in told, told


@pytest.mark.parametrize(
    "error", [KeyError("a"), RuntimeError("shape"), ConnectionResetError("peer"), TypeError("x"), ValueError("y")]
)
def test_a_defect_of_ours_keeps_its_traceback(error: Exception) -> None:
    assert user_message(error) is None

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_status(fail)


@pytest.mark.parametrize("text", ["a = " + "[" * 3000, "a = " + "{a=" * 3000, "[" * 3000, "a" + ".a" * 3000 + " = 1"])
def test_a_deeply_nested_job_file(tmp_path: Path, text: str) -> None:
    file = write_text(tmp_path / "job.toml", text)
    assert_one_line(command("train", file), "job.toml")
    assert_one_line(command("config", "check", file), "job.toml")
    with contextlib.suppress(UserError):
        read_toml(file, "job file")
    file.write_text("")
    assert_one_line(command("train", file, f"run.name={text.removeprefix('a = ')}"))


def test_a_deeply_nested_deepspeed_file(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"\xff", b"null"):
        (tmp_path / "deepspeed.json").write_bytes(content)
        with pytest.raises(UserError, match=r"deepspeed\.json"):
            load_deepspeed(str(tmp_path / "deepspeed.json"))


def test_text_files_are_utf8_in_any_locale(tmp_path: Path) -> None:
    folder = tmp_path / "täglich"
    write_text(folder / "job.toml", '[run]\nname = "täglich"\n')
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    for arguments in (
        ["config", "check", folder / "job.toml"],
        ["data", "simulate", folder / "welt", "--users", "5", "--days", "1"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli.main", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=600,
            check=False,
        )
        told = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode in (0, 1, 2) and "Traceback" not in told, told


@pytest.mark.parametrize("ending", ["\r", "\n\r", "\r\r\n"])
@pytest.mark.parametrize("multiline", [False, True])
def test_bare_carriage_returns_in_csv(tmp_path: Path, ending: str, multiline: bool) -> None:
    file = write_text(tmp_path / "log.csv", "")
    file.write_bytes(ending.join(["a,b", "1,2", "3,4", ""]).encode())
    try:
        batches = list(read_batches(file, {"a": pa.int64(), "b": pa.int64()}, multiline=multiline))
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error) and "\r" not in str(error)
    else:
        assert pa.Table.from_batches(batches).to_pydict() == {"a": [1, 3], "b": [2, 4]}


def test_a_corrupt_parquet_page_names_the_input(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pq.write_table(pa.table({"a": np.arange(50_000)}), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    for first in (4, 30, 2000):
        damaged = bytearray(content)
        damaged[first : first + 600] = b"\xff" * 600
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"log\.parquet: damaged after row"):
            list(read_batches(file, {"a": pa.int64()}))


def test_candidates_with_other_types(world: Path, tmp_path: Path) -> None:
    spec, file = DatasetSpec.load(world), tmp_path / "candidates.parquet"
    good: dict[str, Any] = {"user_id": [1, 2], "item_id": [1, 2], "author_id": [1, 2]} | {
        "request_ms": [1_700_000_000_000] * 2
    }
    features = [feature.name for feature in (*spec.side, *spec.dense) if feature.of == "context"]
    assert features
    for name in (*good, *features):
        for values in (
            [Decimal("1.00"), Decimal("2.00")],
            [Decimal("1.50"), Decimal("2.25")],
            [[1], [2]],
            [b"1", b"2"],
        ):
            pq.write_table(pa.table(good | {name: values}), file)
            try:
                columns = read_candidates(file, spec)
            except UserError as error:
                assert name in str(error) and "\n" not in str(error)
            else:
                assert columns[name].dtype.kind in "if"
    pq.write_table(pa.table(good | {"corrupt": [1, 2]}), file)
    file.write_bytes(file.read_bytes().replace(b"corrupt", b"\xff\xfe\xff\xfe\xff\xfe\xff"))
    with pytest.raises(UserError, match=r"candidates\.parquet: not a readable Parquet file"):
        read_candidates(file, spec)


def test_loops_compile_without_a_place_for_the_cache(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (public / "loops.py").write_text(
        "from trainer.runtime.compiled import compiled\n@compiled(nogil=True)\ndef twice(x):\n    return 2 * x\n"
    )
    for variable in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    namespace = runpy.run_path(str(public / "loops.py"))
    assert namespace["twice"](3) == 6

    def without_a_place() -> str:
        loops = runpy.run_path(str(public / "loops.py"))
        return f"{loops['twice'](3)} {type(loops['twice']._cache).__name__}"

    assert as_nobody(without_a_place) == "6 NullCache"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TERMINATED_STATUS), (signal.SIGINT, INTERRUPTED_STATUS)]
)
def test_a_signal_ends_a_command_and_its_unfinished_files(tmp_path: Path, number: int, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", "data", "simulate", tmp_path / "w", "--users", "20000"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 600
    while not any(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    told = process.communicate(timeout=600)[0]
    assert process.returncode == status, told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_the_description_that_is_read_is_the_one_that_was_written(world: Path) -> None:
    spec = DatasetSpec.load(world)
    assert json.loads(spec.to_json()) == json.loads((world / "dataset.json").read_text())


STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"
STEP = "batch/checkpoints/step-00000007"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, an export and their data; paths in them are relative to this directory."""
    directory = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(directory, filter="data")
    write_text(directory / "batch/metrics.json", '{"model": "cgc", "behaviours": {}}')
    (directory / "job.toml").write_text((directory / "batch.toml").read_text())
    write_world(directory / "segments")
    assigned(make_version(directory / "codebook", 4, 3, report={"segments": 1}), directory / "segments")
    (directory / "quantize.toml").write_text(
        '[data]\npath = "segments"\n[codebook]\ndirectory = "book"\nlevels = [8, 4]\ndevice = "cpu"\n'
    )
    return directory


@pytest.fixture
def stored_copy(stored: Path, tmp_path: Path) -> Path:
    """Copy of the stored runs that a test may write to."""
    shutil.copytree(stored, tmp_path / "stored")
    (tmp_path / "stored/batch/metrics.json").unlink()
    return tmp_path / "stored"


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        # A path of a socket has at most 107 bytes.
        opened.bind(path.name)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.mkdir()


def as_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


OPENED = [
    ("job.toml", "config check job.toml"),
    ("job.toml", "rank job.toml"),
    ("zero1.json", "rank job.toml"),
    ("world/dataset.json", "rank job.toml"),
    ("batch/config.json", "rank job.toml"),
    ("batch/deepspeed.json", "rank job.toml"),
    ("batch/environment.json", "rank job.toml"),
    ("batch/metrics.json", "rank job.toml"),
    ("batch/features/features.json", "rank job.toml"),
    ("batch/lock", "rank job.toml"),
    ("batch/config.json", "evaluate batch"),
    ("batch/deepspeed.json", "evaluate batch"),
    ("batch/features/features.json", "explain batch --user 1 --candidate 700"),
    (f"{STEP}/manifest.json", "checkpoint show batch"),
    (f"{STEP}/manifest.json", f"export {STEP} out"),
    ("candidates.parquet", "score export candidates.parquet out.parquet"),
    ("export/config.json", "score export candidates.parquet out.parquet"),
    ("export/features/features.json", "score export candidates.parquet out.parquet"),
    ("export/model.safetensors", "score export candidates.parquet out.parquet"),
    ("codebook/codebook.json", "quantize report codebook"),
    ("codebook/checksums.json", "quantize report codebook"),
    ("codebook/report.json", "quantize report codebook"),
    ("codebook/centroids-1.npy", "quantize assign codebook segments out.parquet"),
    ("segments/segments.parquet", "quantize assign codebook segments out.parquet"),
    (
        "segments/codes.parquet",
        "retrieve authors segments --author 100 --as-of 2024-03-05 --codes segments/codes.parquet",
    ),
    ("segments/embeddings/segments/manifest.json", "quantize assign codebook segments out.parquet"),
]
"""File with a fixed name -> a command that opens it."""


@pytest.mark.parametrize(("name", "line"), OPENED)
def test_a_file_that_is_no_regular_file_is_refused_before_it_is_read(
    stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored)
    path, kept = Path(name), Path("kept")
    if path.exists():
        path.rename(kept)
    try:
        for make in (as_fifo, as_socket, as_device, as_folder, as_sparse):
            if make is as_sparse and path.suffix not in (".json", ".toml"):
                continue
            if make is as_folder and path.suffix == ".parquet":
                continue
            monkeypatch.chdir(stored / path.parent)
            make(stored / path)
            monkeypatch.chdir(stored)
            try:
                assert_one_line(command(*line.split()), path.name)
            finally:
                path.rmdir() if make is as_folder else path.unlink()
    finally:
        if kept.exists():
            kept.rename(path)


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, line in OPENED if name.endswith(".json")])
def test_damaged_json_of_a_run_is_one_line(stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    path = Path(name)
    before = path.read_bytes()
    try:
        for content in DAMAGED:
            if name == "zero1.json" and content == b"{}":
                # An empty object has all of DeepSpeed's defaults.
                continue
            path.write_bytes(content)
            assert_one_line(command(*line.split()))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(("name", "line"), OPENED)
def test_an_error_of_the_lowest_call_is_one_line(
    stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user who runs the tests may have all rights, so that the system's call fails instead of the permission."""
    monkeypatch.chdir(stored)
    opened = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *arguments, **options)

    Path(name).touch()
    monkeypatch.setattr(os, "open", refuse)
    assert_one_line(command(*line.split()), Path(name).name, "Permission denied")


def run_on_disk(nursery: Nursery, directory: Path, line: str, kilobytes: int, *, full: bool) -> Ended:
    """Run a command beside the stored runs; its ``disk/`` is a file system of that size, which may be full already."""
    disk = directory / "disk"
    disk.mkdir(exist_ok=True)
    nursery.mount(disk, kilobytes << 10)
    seen = nursery.path(disk)
    if full:
        with contextlib.suppress(OSError), (seen / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
    return nursery.run("launch.cli.main", line.split(), directory=directory)


def assert_nothing_is_half_written(folder: Path) -> None:
    """Assert that files are whole under their names; a lock and a log may be empty."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), f"{path} was left"
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
        assert path.suffix not in (".parquet", ".safetensors", ".npz"), path


WRITERS = [
    "train batch.toml run.directory=disk/run",
    "staytime staytime.toml run.directory=disk/run",
    "score export candidates.parquet disk/scores.parquet",
    "export batch disk/exported",
    "data simulate disk/world --users 30 --days 2",
    "stream assemble world --policy full disk/rows.parquet",
    "quantize quantize.toml codebook.directory=disk/book",
    "quantize assign codebook segments disk/codes.parquet",
]


@pytest.mark.parametrize("line", WRITERS)
def test_a_disk_that_is_full_before_the_work_starts(stored_copy: Path, nursery: Nursery, line: str) -> None:
    if not nursery.can_mount:
        pytest.skip("a small file system needs a mount namespace, which this machine does not allow")
    ended = run_on_disk(nursery, stored_copy, line, 64, full=True)
    assert ended.status == 2, ended
    assert "Traceback" not in ended.stderr, ended.stderr
    errors = [text for text in ended.stderr.splitlines() if text.startswith("limelight: error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "disk/" in errors[0], ended.stderr
    assert_nothing_is_half_written(nursery.path(stored_copy / "disk"))


@pytest.mark.parametrize(
    ("line", "kilobytes"),
    [
        ("train batch.toml run.directory=disk/run", 16),
        ("train batch.toml run.directory=disk/run", 40),
        ("staytime staytime.toml run.directory=disk/run", 16),
        ("staytime staytime.toml run.directory=disk/run", 40),
        ("export batch disk/exported", 40),
        ("quantize quantize.toml codebook.directory=disk/book", 12),
        *(
            pytest.param(line, size, marks=pytest.mark.slow)
            for line in WRITERS
            for size in (4, 8, 12, 20, 24, 28, 32, 36, 44, 52, 60, 80, 120)
        ),
    ],
)
def test_a_disk_that_is_full_during_the_first_writes(
    stored_copy: Path, nursery: Nursery, line: str, kilobytes: int
) -> None:
    if not nursery.can_mount:
        pytest.skip("a small file system needs a mount namespace, which this machine does not allow")
    ended = run_on_disk(nursery, stored_copy, line, kilobytes, full=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    # A small codebook has 20 kB with the state of its fit.
    enough = kilobytes > (0 if "parquet" in line else 20 if line.startswith("quantize") else 60)
    assert ended.status == 2 or (enough and ended.status == 0), ended
    if ended.status:
        errors = [text for text in ended.stderr.splitlines() if text.startswith("limelight: error: ")]
        assert len(errors) == 1 and "disk/" in errors[0], ended.stderr
        assert "No space left on device" in errors[0] or "is the disk full" in errors[0], ended.stderr
        if not line.startswith(("train", "staytime", "quantize quantize.toml")):
            # A run keeps what it had written whole, to be resumed; a result is there or not.
            assert not list(nursery.path(stored_copy / "disk").iterdir())
