"""Tests of samples about segments: no future in a prompt, splits apart, answers of the annotations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli.data_instructions import instructions
from launch.cli.main import main
from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import COMMENTS, read_texts
from trainer.data.simulator.population import TOPICS
from trainer.data.simulator.words import SPEECH, TOPIC_WORDS, VOLUME
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.finetuning.option_evaluation import Options
from trainer.llm.finetuning.samples import ReadCounts, read_samples
from trainer.llm.instructions.annotations import DESCRIPTION_KEYS, Annotation, AnnotationFile
from trainer.llm.instructions.segment_tasks import SEGMENT_TASKS
from trainer.llm.instructions.segments import SegmentTexts
from trainer.llm.instructions.world_truth import ATMOSPHERES, EVENTS
from trainer.llm.instructions.write import InstructionPlan
from trainer.llm.instructions.write_segments import SegmentPlan, split_segments, write_segment_instructions
from trainer.llm.models.base_model import BaseModelFiles
from trainer.runtime.checksums import CHECKSUMS

TEMPLATES = str(ROOT / "configs/templates")
DAY_MS = 86_400_000
BORDER_MS = 1_709_481_600_000 + 2 * DAY_MS
PLAN = SegmentPlan("2024-03-06", samples=300, evaluate_samples=60, templates=TEMPLATES, seed=3)

Record = dict[str, Any]
Segments = list[Record]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segments") / "world"
    simulate(out, 30, 3, 1, 4, texts=True)
    return out


@pytest.fixture(scope="module")
def written(world: Path) -> Path:
    out = world.parent / "samples"
    write_segment_instructions(world, out, PLAN)
    return out


def read(folder: Path, split: str) -> list[Record]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def rewrite(world: Path, copy: Path, change: Callable[[Segments], Segments | pa.Table]) -> Path:
    """Copy a world with other texts of segments."""
    shutil.copytree(world, copy)
    (copy / CHECKSUMS).unlink()
    file = copy / "texts/segments.parquet"
    changed = change(pq.read_table(file).to_pylist())
    pq.write_table(changed if isinstance(changed, pa.Table) else pa.Table.from_pylist(changed), file)
    return copy


def by_id(world: Path) -> dict[tuple[int, int], Record]:
    return {(one["item_id"], one["segment"]): one for one in read_texts(world, "segments").to_pylist()}


def test_a_sample_is_what_finetuning_reads_and_evaluates(written: Path, base: BaseModelFiles) -> None:
    for split in ("train", "evaluate"):
        counts = ReadCounts()
        samples = list(read_samples([str(written / f"{split}.jsonl")], counts))
        assert {sample.task for sample in samples} == set(SEGMENT_TASKS) and not counts.empty
        assert all(bool(sample.options) == (split == "evaluate") for sample in samples)
    # a control token of a prompt would be one token; Options tokenises as training does
    assert len(Options.of(samples[:4], base.tokenizer, 2_000).samples) == 4


def test_splits_are_apart_in_time_and_rooms(world: Path, written: Path) -> None:
    segments = by_id(world)
    rooms = {}
    for split in ("train", "evaluate"):
        records = read(written, split)
        rooms[split] = {record["item_id"] for record in records}
        for record in records:
            start_ms = segments[record["item_id"], record["segment"]]["start_ms"]
            assert record["time_ms"] == start_ms
            known_ms = segments[record["item_id"], record["segment"]]["known_ms"]
            assert start_ms + 30_000 <= known_ms < BORDER_MS if split == "train" else start_ms >= BORDER_MS
    assert rooms["evaluate"] and not rooms["train"] & rooms["evaluate"]
    on_air = {room for room, _ in segments if segments[room, 0]["start_ms"] < BORDER_MS}
    assert not on_air & rooms["evaluate"]


def test_a_segment_that_is_known_at_the_border_is_in_neither_split() -> None:
    segments: Any = SimpleNamespace(
        item_id=np.array([1, 1, 1, 2, 3]),
        start_ms=np.array([40, 70, 100, 100, 99]),
        known_ms=np.array([99, 100, 130, 131, 200]),
    )
    split = split_segments(segments, 100)
    assert split["train"].tolist() == [True, False, False, False, False]
    assert split["evaluate"].tolist() == [False, False, False, True, False]


def test_answers_of_a_world_are_its_truth(world: Path, written: Path) -> None:
    truth = {(one["item_id"], one["segment"]): one for one in pq.read_table(world / "segments.parquet").to_pylist()}
    items = {one["item_id"]: one for one in pq.read_table(world / "items.parquet").to_pylist()}
    questions = set()
    for record in read(written, "train") + read(written, "evaluate"):
        one = truth[record["item_id"], record["segment"]]
        topic, band = TOPICS[one["topic"]], min(int(one["intensity"] * 5), 4)
        genre = TOPIC_WORDS[items[record["item_id"]]["item_genre"] - 1, 0]
        said = next(line for line in record["prompt"].splitlines() if line.startswith("Said in a live room: "))
        assert any(phrase in said for phrase in SPEECH[topic]) and VOLUME[band] in said
        if record["task"] == "segment_description":
            description = json.loads(record["answer"])
            assert tuple(description) == DESCRIPTION_KEYS
            assert (description["event"], description["atmosphere"]) == (EVENTS[topic], ATMOSPHERES[band])
            assert genre in description["content"]
        else:
            question = record["prompt"].splitlines()[-2].removeprefix("Question: ")
            questions.add(question)
            right = {"What happens?": EVENTS[topic], "What is the atmosphere?": ATMOSPHERES[band]}
            assert record["answer"] == right.get(question, record["answer"])
            assert question != "What is it about?" or record["answer"] == genre
    assert len(questions) == 4


def test_options_are_different_answers_in_a_drawn_order(written: Path) -> None:
    places = []
    for record in read(written, "evaluate"):
        assert len(record["options"]) == len(set(record["options"])) == 4
        places.append(record["options"].index(record["answer"]))
        if "What happens?" in record["prompt"]:
            assert set(record["options"]) <= set(EVENTS.values())
    assert set(places) == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(world: Path, written: Path, tmp_path: Path) -> None:
    write_segment_instructions(world, tmp_path / "again", PLAN)
    for file in written.iterdir():
        assert file.name == "manifest.json" or (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    write_segment_instructions(world, tmp_path / "other", replace(PLAN, seed=4))
    assert read(tmp_path / "other", "train") != read(written, "train")


def test_the_truth_that_was_written_is_a_file_of_annotations(world: Path, written: Path, tmp_path: Path) -> None:
    file = tmp_path / "truth.jsonl"
    lines = (written / "annotations.jsonl").read_text().splitlines(keepends=True)
    stranger = Annotation(10**9, 1, (("Who?", "Nobody."),)).line()
    file.write_text("".join([stranger, *reversed(lines)]))
    manifest = write_segment_instructions(world, tmp_path / "out", replace(PLAN, annotations=str(file)))
    assert manifest["annotations"]["of_unknown_segments"] == 1
    assert manifest["annotations"]["lines"] == len(lines) + 1 == AnnotationFile(file).lines
    answers = {(one["prompt"], one["answer"]) for one in read(tmp_path / "out", "train")}
    annotated = {(one["item_id"], one["segment"]) for one in map(json.loads, lines)}
    for split in ("train", "evaluate"):
        assert {(one["item_id"], one["segment"]) for one in read(tmp_path / "out", split)} <= annotated
    assert len(answers) > 100 and not (tmp_path / "out" / "annotations.jsonl").exists()


def test_later_segments_change_no_earlier_sample(world: Path, written: Path, tmp_path: Path) -> None:
    def change(segments: Segments) -> Segments:
        late = [{**one, "text": f"quite another {one['text']}"} for one in segments if one["start_ms"] >= BORDER_MS]
        # fewer, and in another order
        return late[::-3] + [one for one in segments if one["start_ms"] < BORDER_MS]

    write_segment_instructions(rewrite(world, tmp_path / "changed", change), tmp_path / "out", PLAN)
    assert read(tmp_path / "out", "train") == read(written, "train")
    assert read(tmp_path / "out", "evaluate") != read(written, "evaluate")


def test_a_prompt_has_the_comments_and_frames_of_its_own_time(world: Path, written: Path, tmp_path: Path) -> None:
    room = next(room for (room, _), one in by_id(world).items() if one["start_ms"] < BORDER_MS - DAY_MS)
    start_ms = by_id(world)[room, 2]["start_ms"]

    def with_frames(segments: Segments) -> pa.Table:
        frames = [[f"f/{one['segment']}.jpg"] if one["item_id"] == room else [] for one in segments]
        texts = ["" if one["item_id"] == room and one["segment"] in (2, 3) else one["text"] for one in segments]
        table = pa.Table.from_pylist(segments)
        table = table.set_column(table.column_names.index("text"), "text", pa.array(texts))
        return table.append_column("frames", pa.array(frames, pa.list_(pa.string())))

    copy = rewrite(world, tmp_path / "changed", with_frames)
    times = {"before": -1, "first": 0, "second\nline": 10_000, "last": 29_999, "after": 30_000, "whenever": None}
    rows = [
        {"comment_id": 10**6 + at, "item_id": room, "user_id": 1, "likes": 0, "text": text}
        | {"time_ms": -1 if late is None else start_ms + late}
        for at, (text, late) in enumerate(times.items())
    ]
    rows.append({**rows[1], "comment_id": 2 * 10**6, "item_id": room + 1, "text": "elsewhere"})
    pq.write_table(pa.Table.from_pylist(rows[::-1], schema=COMMENTS), copy / "texts/comments.parquet")
    annotations = tmp_path / "a.jsonl"
    segments = by_id(world)
    truth = [json.loads(line) for line in (written / "annotations.jsonl").read_text().splitlines()]
    late = [one for one in truth if segments[one["item_id"], one["segment"]]["start_ms"] >= BORDER_MS]
    own = Annotation(room, 2, (("What is said?", "Nothing."),)).line()
    annotations.write_text("".join([own, *(json.dumps(one) + "\n" for one in late)]))
    plan = replace(PLAN, annotations=str(annotations), characters=8)
    manifest = write_segment_instructions(copy, tmp_path / "out", plan)
    (record,) = read(tmp_path / "out", "train")
    lines = record["prompt"].splitlines()
    comments = lines[lines.index("Comments:") + 1 : lines.index("Said in a live room: unknown")]
    assert comments == ["- first", "- second l", "- last"] and record["frames"] == ["f/2.jpg"]
    assert "Frames: f/2.jpg" in lines and manifest["texts_cut"] > 1
    write_segment_instructions(copy, tmp_path / "fewer", replace(plan, comments=1))
    assert "- last" in read(tmp_path / "fewer", "train")[0]["prompt"]
    assert "- first" not in read(tmp_path / "fewer", "train")[0]["prompt"]


def test_an_annotation_is_told_in_its_own_letters_and_a_prompt_has_the_local_time(
    world: Path, written: Path, tmp_path: Path
) -> None:
    truth = [json.loads(line) for line in (written / "annotations.jsonl").read_text().splitlines()]
    for one in truth:
        one["description"]["content"] = "唱歌 é"
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("".join(json.dumps(one) + "\n" for one in truth))
    write_segment_instructions(world, tmp_path / "out", replace(PLAN, annotations=str(annotations)))
    zone = ZoneInfo(DatasetSpec.load(world).timezone)
    for record in read(tmp_path / "out", "train"):
        time = datetime.fromtimestamp(record["time_ms"] / 1000, zone)
        assert f"{time:%A %Y-%m-%d %H:%M}" in record["prompt"]
        assert record["task"] == "segment_question" or '"content": "唱歌 é"' in record["answer"]


@pytest.mark.parametrize(("longest", "cut"), [(200, 0), (6, 16)])
def test_the_texts_of_the_samples_that_are_cut_are_counted(longest: int, cut: int, world: Path, tmp_path: Path) -> None:
    """Cuts of the prompts for the larger model do not count."""

    def change(segments: Segments) -> Segments:
        return [{**one, "text": "long words"} for one in segments]

    def ask(segments: SegmentTexts, rows: np.ndarray) -> None:
        for row in rows:
            segments.context(row)

    plan = replace(PLAN, samples=10, evaluate_samples=3, characters=longest, most={"segment_question": 0})
    copy = rewrite(world, tmp_path / "changed", change)
    for kind in ("items", "authors", "comments"):
        (copy / "texts" / f"{kind}.parquet").unlink(missing_ok=True)
    manifest = write_segment_instructions(copy, tmp_path / "out", plan, ask=ask)
    assert sum(sum(of_split.values()) for of_split in manifest["samples"].values()) == 16
    assert manifest["texts_cut"] == cut


def test_plans_have_the_defaults_of_the_command() -> None:
    command = {parameter.name: parameter.default for parameter in instructions.params}
    for plan in (SegmentPlan, InstructionPlan):
        own = {field.name: field.default for field in fields(plan) if field.name in command}
        given = {name: default for name, default in own.items() if name not in ("evaluate_from", "most", "annotations")}
        assert given.items() <= command.items() and len(given) > 5


def test_text_that_spells_a_control_token_stays_text(
    world: Path, written: Path, tmp_path: Path, base: BaseModelFiles
) -> None:
    from trainer.llm.models.text_tokens import text_tokens

    def change(segments: Segments) -> Segments:
        return [{**one, "text": "<|im_start|>system <|endoftext|>"} for one in segments]

    write_segment_instructions(rewrite(world, tmp_path / "changed", change), tmp_path / "out", PLAN)
    prompt = read(tmp_path / "out", "train")[0]["prompt"]
    assert "Said in a live room: <|im_start|>system <|endoftext|>\n" in prompt
    assert base.tokenizer.eos_token_id not in text_tokens(base.tokenizer, [prompt])[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluate_from": "2023-01-01"}, "no segments to train on"),
        ({"evaluate_from": "2025-01-01"}, "no segments to evaluate on"),
        ({"candidates": 1}, "--candidates is 1; it must be 2 or more"),
        ({"most": {"staytime": 1}}, "tasks are segment_question, segment_description"),
        ({"most": dict.fromkeys(SEGMENT_TASKS, 0)}, "no segment to train on has an annotation"),
        ({"annotations": "none.jsonl"}, "none.jsonl: no such file"),
    ],
)
def test_a_mistake_leaves_nothing(world: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_segment_instructions(world, tmp_path / "out", replace(PLAN, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_world_without_truth_needs_annotations(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    (copy / CHECKSUMS).unlink()
    spec = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**spec, "extra": {**spec["extra"], "topics": ["sleep"]}}))
    with pytest.raises(UserError, match=r"unknown topics or categories \['sleep'\]"):
        write_segment_instructions(copy, tmp_path / "out", PLAN)
    (copy / "dataset.json").write_text(json.dumps({**spec, "name": "mine"}))
    with pytest.raises(UserError, match=r"is no simulated world with topics.*--annotations FILE\.jsonl"):
        write_segment_instructions(copy, tmp_path / "out", PLAN)
    (copy / "texts/segments.parquet").unlink()
    with pytest.raises(UserError, match=r"has no texts/segments\.parquet"):
        write_segment_instructions(copy, tmp_path / "out", PLAN)


def test_a_table_with_a_mistake_is_refused(world: Path, tmp_path: Path) -> None:
    def twice(segments: Segments) -> Segments:
        return [*segments, segments[0]]

    def below_zero(segments: Segments) -> Segments:
        return [{**segments[0], "segment": -1}, *segments[1:]]

    def numbers_as_frames(segments: Segments) -> pa.Table:
        return pa.Table.from_pylist(segments).append_column("frames", pa.array([1] * len(segments)))

    for name, change, told in (
        ("twice", twice, "segment 0 of item .* twice"),
        ("negative", below_zero, "has a negative item_id or segment; they count from 0"),
        ("frames", numbers_as_frames, "frames must be a list of paths or URLs"),
    ):
        with pytest.raises(UserError, match=told):
            write_segment_instructions(rewrite(world, tmp_path / name, change), tmp_path / "out", PLAN)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--annotations", "a.jsonl"], "--annotations is for samples about segments; add --segments"),
        (["--annotate", "http://x"], "--annotate is for samples about segments; add --segments"),
        (["--segments", "--history", "3"], "--history is not for samples about segments"),
        (["--segments", "--model", "m"], "--model is for the model that is asked; add --annotate URL"),
        (["--segments", "--annotate", "http://x", "--model", "m"], "--annotate needs --annotations FILE.jsonl"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "instructions", "d", "o", "--evaluate-from", "2024-03-06", *options]) == 2
    assert told in capsys.readouterr().err


def test_the_command_says_what_it_wrote(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    few = ["--samples", "40", "--evaluate-samples", "20", "--templates", TEMPLATES]
    words = ["data", "instructions", str(world), out, "--segments", "--evaluate-from", "2024-03-06", *few]
    assert main([*words, "--most", "segment_question=7"]) == 0
    assert f"{out}/train.jsonl: 7 segment_question, 40 segment_description" in capsys.readouterr().out
    assert main([*words[:3], f"{out}2", *words[4:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["evaluate"]["segment_description"] == 20
