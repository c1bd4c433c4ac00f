"""Checkpoints of one rank: schedule, retention, resumption, and refusal of damaged or foreign ones.

Several ranks are tested in tests/distributed/test_resume.py, faults in tests/faults.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.embeddings import Lookup, Table
from tests.distributed.small_model import (
    BEHAVIOURS,
    LOOKUPS,
    SmallRanker,
    batches_of,
    single_engine,
    tables,
)
from trainer.checkpoint import writer
from trainer.checkpoint.manifest import MANIFEST, DatasetEntry, list_checkpoints, read_manifest, write_manifest
from trainer.config.ranker import parse_config
from trainer.console.errors import UserError
from trainer.engine.hybrid_engine import HybridEngine, TableOptimizer
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World

NAMES = ("click", "like", "follow")


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


def identity(fingerprint: str = "f", kind: str = "ple", resume: bool = False, **settings: Any) -> Identity:
    config = parse_config({"data": {"path": "d"}, "checkpoint": settings, "resume": {"allow_new_data": resume}}, "test")
    return Identity(config, kind, NAMES, DatasetEntry(path="d", fingerprint=fingerprint))


def trained(engine: HybridEngine, steps: int) -> TrainingState:
    """Train ``steps`` steps on the first batches of a stream, and return the state."""
    state = TrainingState.at_start(NAMES)
    for result in engine.steps(batch for batch, _ in zip(batches_of(0, 1), range(steps), strict=False)):
        batch = result.batch
        state.progressive.update(batch.user_id, torch.sigmoid(result.logits), batch.label, batch.mask)
        state.advance(result)
    state.rows_total = 1000
    return state


def saved_steps(directory: Path) -> list[int]:
    return [read_manifest(path).step for path in list_checkpoints(directory)]


def test_what_is_saved_is_restored(world: World, tmp_path: Path) -> None:
    engine = single_engine(world)
    state = trained(engine, 5)
    state.metric_history.append({"step": 5, "loss": 0.5})
    torch.manual_seed(77)
    drawn = torch.get_rng_state()
    saving = Checkpoints(tmp_path / "checkpoints", identity(), world)
    assert saving.restore(engine, TrainingState.at_start(NAMES)) is None
    torch.set_rng_state(drawn)
    saving.save(engine, state)
    # The save runs in the background: training continues, and must not change the written values.
    expected = torch.rand(4)
    trained(engine, 3)
    saving.close()

    other, loaded = single_engine(world), TrainingState.at_start(NAMES)
    restoring = Checkpoints(tmp_path / "checkpoints", identity(), world)
    assert restoring.restore(other, loaded) == {0: tuple(state.position[0])}
    assert torch.equal(torch.rand(4), expected)
    assert (loaded.step, loaded.rows_done, loaded.metric_history, loaded.finished) == (
        5,
        state.rows_done,
        state.metric_history,
        False,
    )
    assert loaded.progressive.compute() == state.progressive.compute()
    assert loaded.window.entry(5, {}, {})["loss"] == state.window.entry(5, {}, {})["loss"]
    again = single_engine(world)
    trained(again, 5)
    left, right = (dict(checkpoint_tensors(each)) for each in (other, again))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def checkpoint_tensors(engine: HybridEngine) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, shard.clone()) for name, shard, *_ in engine._tables.shards())
    for name, parts in engine._dense.state()["dense"].items():
        yield from ((f"{name}/{key}", tensor.clone()) for key, tensor in parts.items())


def test_the_newest_and_every_nth_are_kept(world: World, tmp_path: Path) -> None:
    engine = single_engine(world)
    checkpoints = Checkpoints(tmp_path, identity(keep=2, keep_every=3), world)
    state = TrainingState.at_start(NAMES)
    for step in range(1, 9):
        state.step = 10 * step
        checkpoints.save(engine, state, wait=step % 2 == 0)
    checkpoints.wait()
    assert saved_steps(tmp_path) == [30, 60, 70, 80]
    # A resumed run continues to count its saves.
    more = Checkpoints(tmp_path, identity(keep=1, keep_every=3), world)
    more.restore(engine, state)
    assert state.step == 80
    state.step = 90
    more.save(engine, state, wait=True)
    state.step = 100
    more.save(engine, state, wait=True)
    assert saved_steps(tmp_path) == [30, 60, 90, 100]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_when_a_checkpoint_is_due(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("trainer.ranking.checkpoints.time.monotonic", lambda: now[0])
    by_steps = Checkpoints(tmp_path, identity(every_steps=4, every_minutes=0), world)
    assert [step for step in range(1, 13) if by_steps.is_due(step)] == [4, 8, 12]
    by_time = Checkpoints(tmp_path, identity(every_minutes=2), world)
    asked = []
    for step in range(1, 13):
        now[0] += 50
        if by_time.is_due(step):
            asked.append(step)
    assert asked == [3, 6, 9, 12]
    assert not any(Checkpoints(tmp_path, identity(every_minutes=0), world).is_due(step) for step in range(100))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "zeroed": bytes(len(content))}[how])


@pytest.mark.parametrize("how", ["missing", "truncated", "zeroed"])
def test_a_damaged_file_takes_training_back_to_the_checkpoint_before(
    world: World, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = single_engine(world)
    state = TrainingState.at_start(NAMES)
    saving = Checkpoints(tmp_path, identity(keep=9), world)
    for step in (1, 2):
        state.step = step
        saving.save(engine, state, wait=True)
    newest = tmp_path / "step-00000002"
    whole = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert {path.name for path in whole} == {".metadata", "__0_0.distcp", "rank-00000.pt", "job.json", MANIFEST}
    for file, content in whole.items():
        damage(file, how)
        loaded = TrainingState.at_start(NAMES)
        Checkpoints(tmp_path, identity(), world).restore(engine, loaded)
        assert loaded.step == 1, file
        lines = [line for line in capsys.readouterr().out.splitlines() if "damaged, trying the checkpoint" in line]
        assert len(lines) == 1 and file.name in lines[0]
        file.write_bytes(content)
    # Training from the checkpoint before reaches the step of the damaged one again, and replaces it.
    damage(newest / "job.json", how)
    again = Checkpoints(tmp_path, identity(), world)
    again.restore(engine, loaded)
    loaded.step = 2
    again.save(engine, loaded, wait=True)
    assert saved_steps(tmp_path) == [1, 2]
    Checkpoints(tmp_path, identity(), world).restore(engine, loaded)
    assert loaded.step == 2
    for step in (1, 2):
        damage(tmp_path / f"step-{step:08d}" / "model" / ".metadata", how)
    with pytest.raises(UserError, match="none of 2 checkpoints is complete; remove them to train from the start"):
        Checkpoints(tmp_path, identity(), world).restore(engine, loaded)


def test_a_checkpoint_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    engine, state = single_engine(world), TrainingState.at_start(NAMES)
    Checkpoints(tmp_path, identity(), world).save(engine, state, wait=True)
    larger = [Table(t.name, t.rows + (t.name == "room"), t.dim) for t in tables("auto")]
    renamed = [Table("lobby" if t.name == "room" else t.name, t.rows, t.dim) for t in tables("auto")]
    lookups = [Lookup(each.name, "lobby" if each.table == "room" else each.table, each.length) for each in LOOKUPS]
    wider = SmallRanker()
    wider.extra = torch.nn.Linear(BEHAVIOURS, 2)  # type: ignore[assignment]
    for other, expected, message in (
        (single_engine(world, tables=larger), identity(), "another model: table room 17 x 16 there, 18 x 16 here"),
        (
            single_engine(world, tables=renamed, lookups=lookups),
            identity(),
            "room 17 x 16 only there; table lobby 17 x 16 only here",
        ),
        (single_engine(world, ranker=wider), identity(), "extra.bias 2 only here; extra.weight 2 x 3 only here"),
        (
            single_engine(world, table_optimizer=TableOptimizer("sgd", 0.1)),
            identity(),
            "table_optimizer rowwise_adagrad there",
        ),
        (single_engine(world), identity(kind="cgc"), "kind ple there, cgc here"),
        (single_engine(world), identity(fingerprint="g"), "resume.allow_new_data=true accepts it"),
    ):
        with pytest.raises(UserError) as refused:
            Checkpoints(tmp_path, expected, world).restore(other, state)
        assert message in str(refused.value) and "\n" not in str(refused.value)
    assert Checkpoints(tmp_path, identity("g", resume=True), world).restore(single_engine(world), state) == {}
    directory = tmp_path / "step-00000000"
    write_manifest(directory, read_manifest(directory).model_copy(update={"schema_version": 2}))
    with pytest.raises(UserError, match="written by a newer version"):
        Checkpoints(tmp_path, identity(), world).restore(engine, state)


def test_a_failure_in_the_background_ends_training_with_its_reason(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, state = single_engine(world), TrainingState.at_start(NAMES)
    checkpoints = Checkpoints(tmp_path, identity(), world)
    state.step = 1
    checkpoints.save(engine, state, wait=True)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    for name in ("write_state", "write_manifest", "write_json", "file_entry"):
        with monkeypatch.context() as patched:
            patched.setattr(writer, name, full)
            failing = Checkpoints(tmp_path, identity(), world)
            state.step = 2
            failing.save(engine, state)
            with pytest.raises(UserError, match="No space left on device") as refused:
                failing.wait()
            assert "\n" not in str(refused.value)
            with pytest.raises(UserError, match="No space left on device"):
                failing.save(engine, state)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], f"{name}: nothing is left behind"


def test_a_save_waits_for_the_one_before(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, state = single_engine(world), TrainingState.at_start(NAMES)
    checkpoints = Checkpoints(tmp_path, identity(keep=5), world)
    write, hold, running = writer.write_state, threading.Event(), []

    def slow(*arguments: Any) -> None:
        running.append(threading.active_count())
        hold.wait(600)
        write(*arguments)

    monkeypatch.setattr(writer, "write_state", slow)
    state.step = 1
    checkpoints.save(engine, state)
    assert saved_steps(tmp_path) == [], "it is still being written"
    threading.Timer(0.2, hold.set).start()
    state.step = 2
    checkpoints.save(engine, state)
    assert saved_steps(tmp_path)[:1] == [1], "the second has waited for the first"
    checkpoints.wait()
    assert saved_steps(tmp_path) == [1, 2] and len(checkpoints.stalls) == 2


def test_a_checkpoint_is_never_gone_while_another_takes_its_place(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, state = single_engine(world), TrainingState.at_start(NAMES)
    saving = Checkpoints(tmp_path, identity(keep=1), world)
    state.rows_done = 1
    saving.save(engine, state, wait=True)
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    state.rows_done = 2
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        patched.setattr(writer.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            saving.save(engine, state, wait=True)
    assert list_checkpoints(tmp_path) == [], "its place is empty at this moment"
    again = TrainingState.at_start(NAMES)
    Checkpoints(tmp_path, identity(keep=1), world).restore(engine, again)
    assert again.rows_done == 1


def test_what_a_killed_run_left_is_cleared_away(world: World, tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.partial-abcd" / "model").mkdir(parents=True)
    (tmp_path / ".step-00000001.old-abcd").mkdir()
    (tmp_path / "notes").mkdir()
    Checkpoints(tmp_path, identity(), world)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", identity(), world)
