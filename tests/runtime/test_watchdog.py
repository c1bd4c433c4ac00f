"""Lines at which a rank waits for its GPU: whether in our code or in a library, such a rank waits for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.paths import ROOT
from trainer.runtime import watchdog
from trainer.runtime.background_calls import BackgroundCalls
from trainer.runtime.watchdog import main_thread_state

PACKAGES = Path(torch.__file__).parents[1]


def blocking() -> tuple[Any, threading.Lock]:
    """Return an object whose methods and truth value come only when the lock is released, and the lock.

    The methods are compiled code, so that the innermost frame is the caller's, as with a tensor on a GPU.
    """
    lock = threading.Lock()
    lock.acquire()
    names = ("item", "cpu", "tolist", "numpy", "synchronize", "readline", "__bool__", "__getitem__", "__format__")

    class Blocking:
        """A value that is not there yet."""

        def all(self) -> Any:
            return self

    for name in names:
        setattr(Blocking, name, lock.acquire)
    # Called with the index and the format, which are the arguments ``blocking`` and ``timeout`` of acquire.
    return Blocking(), lock


@pytest.mark.parametrize(
    ("line", "waits_in"),
    [
        ("return x.item()", "item() for its GPU"),
        ("return {'loss': [x.cpu() for _ in range(1)]}", "cpu() for its GPU"),
        ("return max(x.tolist(), 3)", "tolist() for its GPU"),
        ("return (\n        x\n        .numpy()\n    )", "numpy() for its GPU"),
        ("x.synchronize()", "synchronize() for its GPU"),
        ("if not x.all():\n        return 1", "bool() for its GPU"),
        ("if x.all():\n        return 1", "bool() for its GPU"),
        ("assert x.all(), 'é'; assert x", "bool() for its GPU"),
        ("return 'é', x[True]", "an index for its GPU"),
        ("return x.readline()", ""),
        ("import threading; threading.Event().wait(3600)", ""),
        ("import time; time.sleep(3600)", ""),
    ],
)
@pytest.mark.parametrize("gpu", [True, False])
def test_a_thread_at_such_a_line_waits_on_a_gpu_only(
    line: str, waits_in: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "step.py"
    file.write_text(f"def work(x):\n    {line}\n", encoding="utf-8")
    monkeypatch.setattr(watchdog, "_OWN", (str(file),))
    names: dict[str, Any] = {}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    value, lock = blocking()

    def work() -> None:
        try:
            names["work"](value)
        except Exception:
            return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert thread.ident is not None
        expected = waits_in if gpu else ""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            state = main_thread_state(0, 5, "", thread.ident, gpu=gpu)
            if "in work" in state.place and (state.collective == expected != ""):
                break
            if not expected and "in work" in state.place:
                # The line is reached; a moment later the thread stands in its call.
                time.sleep(0.05)
                state = main_thread_state(0, 5, "", thread.ident, gpu=gpu)
                break
            time.sleep(0.001)
        assert state.collective == expected
    finally:
        lock.release()


def test_a_thread_that_waits_for_background_calls_waits_in_their_collective() -> None:
    source = "def all_gather(begun, lock):\n    begun.set()\n    lock.acquire()\n"
    names: dict[str, Any] = {}
    exec(compile(source, str(PACKAGES / "torch/distributed/distributed_c10d.py"), "exec"), names)
    begun, lock = threading.Event(), threading.Lock()
    lock.acquire()
    with BackgroundCalls(threaded=True) as calls:
        calls.call(partial(names["all_gather"], begun, lock))
        thread = threading.Thread(target=calls.settle, daemon=True)
        thread.start()
        begun.wait()
        try:
            assert thread.ident is not None
            until = time.monotonic() + 60
            while not (state := main_thread_state(0, 5, "", thread.ident)).collective and time.monotonic() < until:
                time.sleep(0.001)
            assert state.collective == "all_gather"
        finally:
            lock.release()
        thread.join()


def frames_of(file: Path, text: str) -> Iterator[Any]:
    """Yield a frame at every instruction of a file whose source begins on a line with ``text``."""
    source = file.read_text()
    lines = source.splitlines()

    def within(code: CodeType) -> Iterator[Any]:
        for place, (first, *_) in enumerate(code.co_positions()):
            if first and text in lines[first - 1]:
                yield SimpleNamespace(f_code=code, f_lasti=2 * place, f_lineno=first)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from within(constant)

    return within(compile(source, str(file), "exec"))


@pytest.mark.parametrize(
    ("file", "text", "waits_in"),
    [
        (ROOT / "trainer/engine/hybrid_engine.py", "torch.isfinite(losses).all()", "bool()"),
        (ROOT / "trainer/engine/hybrid_engine.py", "float(unread.values.losses.sum())", "float()"),
        (ROOT / "trainer/engine/dense_engine.py", "steps[0].cpu().clone()", "cpu()"),
        (PACKAGES / "torchrec/distributed/dist_data.py", ".tolist()", "tolist()"),
        (PACKAGES / "torch/cuda/streams.py", "super().synchronize()", "synchronize()"),
        (PACKAGES / "deepspeed/runtime/zero/stage_1_and_2.py", ".item()", "item()"),
        # Arrays of the host: they may wait for a disk, and such a rank is at fault.
        (ROOT / "trainer/data/loading/block_reader.py", ")", ""),
        (ROOT / "trainer/checkpoint/reader.py", ")", ""),
    ],
)
def test_real_lines_that_wait_for_a_gpu(file: Path, text: str, waits_in: str) -> None:
    found = {watchdog._gpu_wait(frame) for frame in frames_of(file, text)}
    if waits_in:
        assert f"{waits_in} for its GPU" in found
    else:
        assert found == {""}


def test_the_backward_pass_waits_for_a_gpu() -> None:
    file = PACKAGES / "torch/autograd/graph.py"
    frames = [frame for frame in frames_of(file, "run_backward") if watchdog._called(frame) == "run_backward"]
    assert {watchdog._gpu_wait(frame) for frame in frames} == {"run_backward() for its GPU"}
