"""The message of a user's mistake is one line, and errors of collectives say whether another rank is lost."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.console.errors import UserError, collective_cause, failure_reason, is_lost_peer, user_message


@given(st.text())
def test_a_message_is_one_line_without_control_characters(text: str) -> None:
    error = UserError(f"{text}: no such file")
    assert len(str(error).splitlines()) <= 1
    assert "\x1b" not in str(error) and str(error).endswith(": no such file")
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "ranks send it to each other"


def test_the_reason_of_an_error_has_no_file_name(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    copied = shutil.Error([("a", "b", str(full)), ("c", "d", "other")])
    assert {failure_reason(error) for error in (full, copied)} == {"No space left on device"}
    assert failure_reason(OSError("a library's\nown text")) == "a library's own text"
    with pytest.raises(shutil.Error) as raised:
        (tmp_path / "from").mkdir()
        (tmp_path / "from" / "link").symlink_to("nowhere")
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert failure_reason(raised.value) == "No such file or directory"


def test_plain_messages_stay_as_they_are() -> None:
    assert str(UserError("données/x: \\n is no number, “7” is")) == "données/x: \\n is no number, “7” is"
    assert str(UserError("a\nb\tc\u2028")) == "a\\nb\\tc\\u2028"


class Reported(NamedTuple):
    """An error as a library raised it: in the threads of the named repositories, or in torch's own sources.

    Attributes:
        text: exception as ``type: message``.
        lost: True if it means that another rank is lost.
        cause: text that stands in its cause.
        advice: text that stands in the line for the user; empty if it is no mistake of the user.
    """

    text: str
    lost: bool
    cause: str
    advice: str = ""


NCCL = "DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
REPORTED = {
    "DEIMv2 155": Reported(
        f"{NCCL}NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n{USAGE}"
        "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device ac000",
        False,
        "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device ac000",
        "at most one rank for each GPU",
    ),
    "nccl 525": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:1691, unhandled system error (run with NCCL_DEBUG=INFO for details), "
        f"NCCL version 2.19.3\n{SYSTEM}\nLast error:\nError while creating shared memory segment "
        "/dev/shm/nccl-WU88OE (size 9637888), error: No space left on device (28)",
        False,
        "/dev/shm/nccl-WU88OE (size 9637888), error: No space left on device",
        "--shm-size",
    ),
    "nccl 1410": Reported(
        f"{NCCL}NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'",
        False,
        "Cuda failure 1 'invalid argument'",
    ),
    "Open-Sora-Plan 386": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:1333, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
        "2.18.6\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
        False,
        "Cuda failure 'out of memory'",
        "smaller train.batch_size",
    ),
    "without a last error": Reported(
        "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1287, invalid usage "
        "(run with NCCL_DEBUG=WARN for details), NCCL version 2.17.1",
        False,
        "invalid usage",
    ),
    "an NCCL error of an unknown kind": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:3763, internal error - please report this issue to the NCCL developers, "
        "NCCL version 2.29.7\nncclInternalError: Internal check failed.\nLast error:\nCould not find a path",
        False,
        "Could not find a path",
    ),
    "nccl 2076": Reported(
        f"{NCCL}NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.21.5\n{REMOTE}\n"
        "Last error:\nsocketProgressOpt: Call to recv from 172.0.0.1<33759> failed : Connection reset by peer",
        True,
        "Connection reset by peer",
    ),
    "nccl 934": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:1347, remote process exited or there was a network error, NCCL version 2.18.5\n"
        f"{REMOTE}",
        True,
        "remote process exited or there was a network error",
    ),
    "nccl 1514": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\nncclInternalError: Internal check "
        "failed.\nLast error:\nNet : Connection closed by remote peer user<50260>",
        True,
        "Connection closed by remote peer",
    ),
    "nccl 1928": Reported(
        f"{NCCL}ProcessGroupNCCL.cpp:3763, remote process exited or there was a network error, NCCL version 2.28.8\n"
        f"{REMOTE}\nLast error:\nNET/OFI Request 0x7f14cc5b60c0 completed with error. RC: 113. Error: 2 "
        "(UNDELIVERABLE). Completed length: 0",
        True,
        "UNDELIVERABLE",
    ),
    "stanford_alpaca 207": Reported(
        "RuntimeError: NCCL error: remote process exited or there was a network error, NCCL version 2.14.3 "
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely. Last "
        "error: NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129",
        True,
        "Got completion from peer",
    ),
    "mmdetection 12392": Reported(
        "RuntimeError: NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog "
        "caught collective operation timeout: WorkNCCL(SeqNum=2511984, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for "
        "1809553 milliseconds before timing out.",
        True,
        "Watchdog caught collective operation timeout",
    ),
    "pytorch 153586": Reported(
        "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
        "or crash?",
        True,
        "got 0 bytes",
    ),
    "a store that waits": Reported("DistStoreError: wait timeout after 1800000ms, keys: /0/1", True, "wait timeout"),
    "a store without a port": Reported(
        "DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, "
        "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        False,
        "address already in use",
    ),
    "gloo, a closed connection": Reported(
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:17064. This may indicate a remote failure.",
        True,
        "Connection closed by peer [127.0.0.1]:17064",
    ),
    "gloo, another size": Reported(
        "RuntimeError: [enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:457] op.preamble.length "
        "<= op.nbytes. 8 vs 4",
        False,
        "op.preamble.length <= op.nbytes",
    ),
    "no collective": Reported("ValueError: the loss is negative", False, "the loss is negative"),
}


@pytest.mark.parametrize("thread", REPORTED)
def test_errors_of_collectives_that_mean_a_lost_rank_and_their_causes(thread: str) -> None:
    reported = REPORTED[thread]
    kind, _, message = reported.text.partition(": ")
    error = type(kind, (RuntimeError,), {})(message)
    assert is_lost_peer(reported.text) is reported.lost
    assert reported.cause in collective_cause(message) and "\n" not in collective_cause(message)
    line = user_message(error)
    assert (line is not None) == bool(reported.advice)
    if line is not None:
        assert line.startswith("NCCL: ") and reported.cause in line and reported.advice in line and "\n" not in line
