"""The local launcher: what ranks are told, whose failure is reported, how signals travel."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from launch.local import rank_environment, rendezvous_socket
from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.console.exit_status import BROKEN_PIPE_STATUS

TIMEOUTS = 60.0

LAUNCHER = """
import sys
from launch import local
local.TERMINATE_SECONDS = 0.5
sys.exit(local.start_ranks("job", sys.argv[2:], int(sys.argv[1])))
"""

JOB = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
rank = int(os.environ["RANK"])
def ready():
    (here / f"pid{rank}.part").write_text(str(os.getpid()))
    (here / f"pid{rank}.part").rename(here / f"pid{rank}")
def wait():
    ready()
    time.sleep(600)
def recorded(error):
    # An exception as torch leaves it where the launcher looks for it.
    pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": {"message": error}}))
    print("Traceback (most recent call last):"); print(*["  deep"] * 50, sep="\\n"); print(error)
    sys.exit(1)
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer"
"""

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """``launch(body, ranks)`` starts the launcher in a process of its own, on ranks that run ``body``."""

    def start(body: str, ranks: int = 2, launcher: str = LAUNCHER, **environment: str) -> subprocess.Popen[str]:
        (tmp_path / "job.py").write_text(JOB + body)
        settings = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MASTER_PORT")}
        return subprocess.Popen(
            [sys.executable, "-c", launcher, str(ranks), str(tmp_path)],
            env={**settings, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``; a machine under load may take its time."""
    deadline = time.monotonic() + TIMEOUTS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ready_pids(directory: Path, ranks: int) -> list[int]:
    until(lambda: all((directory / f"pid{rank}").exists() for rank in range(ranks)))
    return [int((directory / f"pid{rank}").read_text()) for rank in range(ranks)]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_ranks_are_told_who_and_where_they_are(launch: Launch, tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    body = (
        f"(here / f'told{{rank}}').write_text(json.dumps([os.environ[name] for name in {names}]))\nprint(sys.argv[2:])"
    )
    process = launch(body, 3)
    stdout, _ = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 0
    assert stdout == "[]\n", "rank 0 alone writes to the terminal"
    told = [json.loads((tmp_path / f"told{rank}").read_text()) for rank in range(3)]
    assert [entry[:4] for entry in told] == [[str(rank), str(rank), "3", "3"] for rank in range(3)]
    assert {entry[4] for entry in told} == {"127.0.0.1"} and len({entry[5] for entry in told}) == 1


def test_cores_are_shared_unless_threads_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "available_cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [rank_environment(0, ranks, 1)["OMP_NUM_THREADS"] for ranks in (1, 2, 4, 20)] == ["9", "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "5"


def test_idle_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert rank_environment(0, 2, 1)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert rank_environment(0, 2, 1)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_failing_rank_ends_the_others_and_has_the_last_word(launch: Launch, tmp_path: Path) -> None:
    body = """
if rank == 1:
    print("on stdout"); print("the reason", file=sys.stderr); sys.exit(7)
wait()
"""
    process = launch(body, 3)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 7
    lines = stderr.splitlines()
    assert lines[-3:] == ["limelight: rank 1 exited with status 7; its last lines:", "on stdout", "the reason"]
    assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid?"))


def test_a_rank_that_lost_one_which_was_preempted_is_no_failure(launch: Launch) -> None:
    process = launch("if rank == 1: sys.exit(75)\ntime.sleep(0.2); recorded(LOST)")
    process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 75


def test_a_rank_that_its_watchdog_found_stopped_is_not_waited_for(launch: Launch, tmp_path: Path) -> None:
    body = """
if rank == 1:
    ready(); os.kill(os.getpid(), signal.SIGSTOP)
while not (here / "pid1").exists(): time.sleep(0.01)
print("rank 1 does not answer"); sys.exit(70)
"""
    process = launch(body, 3, launcher=LAUNCHER.replace("0.5", "600"))
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 70
    assert "exited with status 70" in stderr and "SIGKILL" not in stderr
    assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid?"))


@pytest.mark.parametrize("late", [False, True], ids=["ends soon", "ends when asked to"])
def test_the_loss_of_a_peer_is_not_taken_for_the_cause(late: bool, launch: Launch) -> None:
    """Rank 1 has the mistake and takes its time to end; the others meet a closed connection, or abort."""
    body = f"""
if rank == 0: time.sleep(0.2); recorded(LOST)
if rank == 2: os.kill(os.getpid(), signal.SIGABRT)
signal.signal(signal.SIGTERM, lambda number, frame: recorded("KeyError: 12"))
time.sleep({600 if late else 0.5})
recorded("KeyError: 12")
"""
    process = launch(body, 3)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 1
    last = ["limelight: rank 1 exited with status 1; its last lines:", "Traceback (most recent call last):"]
    assert stderr.splitlines()[-53:] == [*last, *["  deep"] * 50, "KeyError: 12"], "all of the traceback is shown"


@pytest.mark.parametrize("lost", [0, 1])
def test_ranks_that_are_ended_on_their_way_out_are_told_by_their_exceptions(lost: int, launch: Launch) -> None:
    """All have left their exception and are still taking leave when the launcher ends them."""
    body = f"""
sys.exit = lambda status: wait()
if rank == 2: os.kill(os.getpid(), signal.SIGABRT)
recorded(LOST if rank == {lost} else "KeyError: 12")
"""
    _, stderr = launch(body, 3).communicate(timeout=TIMEOUTS)
    cause = 1 - lost
    assert [line for line in stderr.splitlines() if line.startswith("limelight")] == [
        f"limelight: rank {cause} exited with status 1" + ("; its last lines:" if cause else "")
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_log_of_a_failed_rank_is_named(rank: int, launch: Launch, tmp_path: Path) -> None:
    body = f"""
if rank == {rank}:
    pathlib.Path(os.environ["LIMELIGHT_LOG_NOTE"]).write_text("runs/a/logs/rank-00000.log")
    os.kill(os.getpid(), signal.SIGSEGV)
wait()
"""
    _, stderr = launch(body).communicate(timeout=TIMEOUTS)
    named = f"limelight: rank {rank} was ended by SIGSEGV; its log is runs/a/logs/rank-00000.log"
    assert stderr.splitlines()[-1] == named


@pytest.mark.parametrize("first", [0, 1])
def test_a_user_error_is_told_rather_than_its_consequences(first: int, launch: Launch) -> None:
    """Both orders: a peer may notice the loss before the rank with the mistake has ended."""
    body = f"""
if rank == {first}:
    print("Connection closed by peer", file=sys.stderr); sys.exit(1)
time.sleep(0.3)
print("a warning", file=sys.stderr)
print("limelight: error: id 12 is beyond table item", file=sys.stderr); sys.exit(2)
"""
    process = launch(body)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 2
    assert stderr.splitlines()[-1] == "limelight: error: id 12 is beyond table item"


def test_the_same_user_error_on_all_ranks_is_told_once(launch: Launch) -> None:
    process = launch('print("limelight: error: no dataset", file=sys.stderr); sys.exit(2)', 3)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stderr) == (2, "limelight: error: no dataset\n")


def test_a_closed_pipe_ends_the_ranks_without_a_word(launch: Launch) -> None:
    process = launch(f"sys.exit({BROKEN_PIPE_STATUS}) if rank == 0 else recorded(LOST)")
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stderr) == (BROKEN_PIPE_STATUS, "")


def test_a_killed_rank_is_named_with_its_signal(launch: Launch) -> None:
    body = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.2)\nsys.exit(1)"
    process = launch(body)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 128 + signal.SIGKILL
    assert stderr.splitlines()[-1] == "limelight: rank 1 was ended by SIGKILL (out of memory?)"


def test_only_the_last_lines_are_shown(launch: Launch) -> None:
    body = "if rank == 1:\n    print(*range(1000), sep='\\n')\n    sys.exit(3)\nwait()"
    _, stderr = launch(body).communicate(timeout=TIMEOUTS)
    assert stderr.splitlines()[-local.LAST_LINES :] == [str(number) for number in range(1000 - local.LAST_LINES, 1000)]
    assert "969" not in stderr.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once(number: signal.Signals, launch: Launch, tmp_path: Path) -> None:
    body = f"""
def note(number, frame):
    with open(here / f"noted{{rank}}", "a") as file: file.write(f"{{number}}\\n")
    sys.exit(5)
signal.signal({int(number)}, note)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [{int(number)}])
wait()
"""
    process = launch(body)
    ready_pids(tmp_path, 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    if number == signal.SIGINT:
        assert (process.returncode, stderr) == (130, ""), "ctrl-C needs no explanation"
    else:
        assert process.returncode == 5 and "exited with status 5" in stderr, "saving the state has failed, say"
    assert [(tmp_path / f"noted{rank}").read_text() for rank in range(2)] == [f"{int(number)}\n"] * 2


def test_ranks_that_stop_in_good_order_on_a_signal_are_a_success(launch: Launch, tmp_path: Path) -> None:
    process = launch("signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))\nwait()")
    ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 0


def test_ranks_that_a_signal_ends_are_not_explained(launch: Launch, tmp_path: Path) -> None:
    process = launch("wait()")
    ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("hung", [False, True])
def test_a_saved_state_has_a_status_of_its_own(hung: bool, launch: Launch, tmp_path: Path) -> None:
    """Also if a rank hangs after all have saved: it is ended."""
    body = f"""
def save(number, frame):
    if {hung} and rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
wait()
"""
    process = launch(body)
    pids = ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stderr) == (75, "")
    until(lambda: all(gone(pid) for pid in pids))


def test_a_rank_that_fails_while_others_save_is_told(launch: Launch, tmp_path: Path) -> None:
    body = """
def save(number, frame):
    if rank == 1: print("No space left on device"); sys.exit(1)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
wait()
"""
    process = launch(body)
    ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 1 and stderr.endswith("No space left on device\n")


def test_a_second_signal_ends_ranks_that_do_not_listen(launch: Launch, tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, lambda number, frame: (here / f"heard{rank}").touch())
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
ready()
while True: time.sleep(1)
"""
    process = launch(body)
    pids = ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / f"heard{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 130
    until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.parametrize("deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN); wait()", "ready(); stop()"])
def test_ranks_that_ignore_the_end_are_ended(deaf: str, launch: Launch, tmp_path: Path) -> None:
    body = f"""
def stop(): os.kill(os.getpid(), signal.SIGSTOP)
if rank == 1:
    while not (here / "pid0").exists(): time.sleep(0.01)
    sys.exit(4)
{deaf}
"""
    process = launch(body)
    (pid,) = ready_pids(tmp_path, 1)
    process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 4
    until(lambda: gone(pid))


def test_ranks_do_not_outlive_a_killed_launcher(launch: Launch, tmp_path: Path) -> None:
    process = launch("wait()")
    pids = ready_pids(tmp_path, 2)
    process.kill()
    process.communicate(timeout=TIMEOUTS)
    until(lambda: all(gone(pid) for pid in pids))


def test_a_given_port_is_used_and_one_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: in use by another process; unset it"):
            rendezvous_socket()
    with rendezvous_socket() as opened:
        assert opened.getsockname() == ("127.0.0.1", port)


@pytest.mark.parametrize("given", ["0", "65536", "ssh", "-1", ""])
def test_a_port_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", given)
    with pytest.raises(UserError, match="not a port; use 1 to 65535"):
        rendezvous_socket()


def test_the_store_is_served_on_a_socket_that_is_never_closed_before_the_job_ends(
    launch: Launch, tmp_path: Path
) -> None:
    """Another process asks for the rendezvous port before the first rank serves the store: it cannot have it."""
    body = """
import socket
from datetime import timedelta
from trainer.runtime.rendezvous import launcher_store
if rank == 0:
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            thief.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            thief.listen()
        except OSError as error:
            (here / "thief").write_text(error.strerror)
store = launcher_store(rank, 2, timedelta(seconds=60))
store.set(str(rank), "here")
store.wait([str(1 - rank)])
store.set(f"{rank} ends", "")
if rank == 0:
    store.wait(["1 ends"])
"""
    process = launch(body)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 0, stderr
    assert (tmp_path / "thief").read_text() == "Address already in use"


def test_the_first_rank_alone_holds_the_socket_of_the_store(launch: Launch, tmp_path: Path) -> None:
    """The port is closed when that rank ends, so that the others do not wait for an answer."""
    body = """
import socket
def holds_the_socket():
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with found:
            if found.family == socket.AF_INET and found.getsockname()[1] == int(os.environ["MASTER_PORT"]):
                return True
    return False
(here / f"holds{rank}").write_text(str(holds_the_socket()))
"""
    process = launch(body, 3)
    _, stderr = process.communicate(timeout=TIMEOUTS)
    assert process.returncode == 0, stderr
    assert [(tmp_path / f"holds{rank}").read_text() for rank in range(3)] == ["True", "False", "False"]


def test_ctrl_c_while_a_rank_imports_torch_is_answered_without_a_traceback(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "slow_library.py").write_text(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(600)\n"
    )
    process = launch("import slow_library", 2)
    stdout, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stdout, stderr) == (130, "", "")


def test_ctrl_c_is_an_interrupt_for_a_rank_that_has_begun(launch: Launch, tmp_path: Path) -> None:
    body = """
from trainer.console.exit_status import exit_status
def work():
    try:
        wait()
    finally:
        (here / f"removed{rank}").touch()
sys.exit(exit_status(work))
"""
    process = launch(body)
    ready_pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=TIMEOUTS)
    assert (process.returncode, stdout, stderr) == (130, "", "")
    assert all((tmp_path / f"removed{rank}").exists() for rank in range(2))
