"""Tests of instruction samples: no future in a prompt, uninformative letters, and templates that a user edits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cli.main import main
from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.data.format.text_schema import SCHEMAS, read_texts
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.instructions.buckets import bucket_of, fit_edges, ranges
from trainer.llm.instructions.past import UserTimeline
from trainer.llm.instructions.tasks import LETTERS, TASKS
from trainer.llm.instructions.write import InstructionPlan, write_instructions
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.checksums import CHECKSUMS

TEMPLATES = ROOT / "configs/templates"
DAY_MS = 86_400_000
START_MS = 1_709_481_600_000
BORDER_MS = START_MS + 2 * DAY_MS
PLAN = InstructionPlan("2024-03-06", samples=500, evaluate_samples=250, templates=str(TEMPLATES), seed=3)

Record = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "dataset"
    simulate(out, 400, 3, 2, 4, texts=True)
    return out


@pytest.fixture(scope="module")
def written(world: Path) -> tuple[Path, dict[str, Any]]:
    out = world.parent / "instructions"
    return out, write_instructions(world, out, PLAN)


@pytest.fixture(scope="module")
def records(written: tuple[Path, dict[str, Any]]) -> dict[str, list[Record]]:
    return {split: read(written[0], split) for split in ("train", "evaluate")}


@pytest.fixture(scope="module")
def visits(world: Path) -> dict[int, Record]:
    return {visit["visit_id"]: visit for visit in read_texts(world, "visits").to_pylist()}


@pytest.fixture(scope="module")
def comments(world: Path) -> dict[int, Record]:
    return {comment["comment_id"]: comment for comment in read_texts(world, "comments").to_pylist()}


def read(out: Path, split: str) -> list[Record]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def change_visits(world: Path, copy: Path, columns: dict[str, pa.Array]) -> None:
    """Copy a world with some columns of its visits replaced; values are in order of time."""
    shutil.copytree(world, copy)
    (copy / CHECKSUMS).unlink()
    table = read_texts(copy, "visits")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), SCHEMAS["visits"].field(name), values)
    pq.write_table(table, copy / "texts/visits.parquet")


def option(record: Record, answer: str) -> str:
    """Return the text of the option that an answer means."""
    if record["task"] == "user_comment":
        return answer.removeprefix("- ")
    # from the end, because lines of the history end with letters, too
    line = next(line for line in reversed(record["prompt"].splitlines()) if line.endswith(f" ({answer})"))
    return line.removesuffix(f" ({answer})")


def test_a_sample_has_what_finetuning_reads(records: dict[str, list[Record]]) -> None:
    for split in records.values():
        assert {record["task"] for record in split} == set(TASKS)
        for record in split:
            assert record["answer"] in record["options"]
            assert len(record["popularity"]) == len(record["options"]) == len(set(record["options"])) > 1
            if record["task"] == "user_comment":
                assert all(option.startswith("- ") for option in record["options"])
                assert record["prompt"].endswith(":\n")
            else:
                assert record["options"] == list(LETTERS[: len(record["options"])])
                assert record["prompt"].endswith("Answer: ")


def test_splits_are_apart_in_time_and_top_comments_in_videos(
    records: dict[str, list[Record]], visits: dict[int, Record]
) -> None:
    for record in records["train"]:
        visit = visits[record["visit_id"]]
        assert visit["request_ms"] + visit["staytime_ms"] < BORDER_MS
    assert all(visits[record["visit_id"]]["request_ms"] >= BORDER_MS for record in records["evaluate"])
    videos = {
        split: [visits[record["visit_id"]]["item_id"] for record in some if record["task"] == "top_comment"]
        for split, some in records.items()
    }
    assert videos["evaluate"] and not set(videos["train"]) & set(videos["evaluate"])
    assert {split: max(Counter(some).values()) for split, some in videos.items()} == {"train": 12, "evaluate": 1}


def test_edges_are_quantiles_of_the_training_days_alone(
    world: Path, written: tuple[Path, dict[str, Any]], visits: dict[int, Record], tmp_path: Path
) -> None:
    known = [visit for visit in visits.values() if visit["staytime_ms"] > 0]
    trained = [one["staytime_ms"] / 1000 for one in known if one["request_ms"] + one["staytime_ms"] < BORDER_MS]
    np.testing.assert_allclose(written[1]["edges_s"], np.quantile(trained, [0.25, 0.5, 0.75]), atol=0.051)
    assert max(abs(share - 0.25) for share in written[1]["range_shares"]) < 0.02
    table = read_texts(world, "visits")
    request, stay = (table.column(name).to_numpy() for name in ("request_ms", "staytime_ms"))
    later = np.where((stay > 0) & (request >= BORDER_MS), 10 * stay, stay)
    change_visits(world, tmp_path / "later", {"staytime_ms": pa.array(later)})
    changed = write_instructions(tmp_path / "later", tmp_path / "out", PLAN)
    assert changed["edges_s"] == written[1]["edges_s"]
    assert read(tmp_path / "out", "train") == read(written[0], "train")
    assert read(tmp_path / "out", "evaluate") != read(written[0], "evaluate")


def test_answers_are_right(
    records: dict[str, list[Record]],
    written: tuple[Path, dict[str, Any]],
    visits: dict[int, Record],
    comments: dict[int, Record],
) -> None:
    for record in records["train"] + records["evaluate"]:
        visit = visits[record["visit_id"]]
        if record["task"] == "staytime":
            bucket = np.searchsorted(written[1]["edges_s"], visit["staytime_ms"] / 1000, side="right")
            assert record["answer"] == LETTERS[bucket]
            assert option(record, record["answer"]) == written[1]["ranges"][record["answer"]]
            continue
        text = {comments[one]["text"]: one for one in visit["shown"]}
        if len(text) < len(visit["shown"]):
            continue
        chosen = [text[option(record, one)] for one in record["options"]]
        answer = chosen[record["options"].index(record["answer"])]
        likes = dict(zip(visit["shown"], visit["shown_likes"], strict=True))
        if record["task"] == "top_comment":
            assert all(likes[answer] > likes[one] for one in chosen if one != answer)
            age_ms = [visit["request_ms"] - comments[one]["time_ms"] for one in chosen]
            np.testing.assert_allclose(record["popularity"], np.array(age_ms) / 3_600_000, atol=1e-3)
        else:
            assert [one in visit["interacted"] for one in chosen] == [one == answer for one in chosen]
            assert record["popularity"] == [likes[one] for one in chosen]


def test_history_was_known_at_the_request(
    records: dict[str, list[Record]], visits: dict[int, Record], comments: dict[int, Record]
) -> None:
    for record in [record for record in records["evaluate"] if record["task"] == "user_comment"][:200]:
        visit = visits[record["visit_id"]]
        earlier = sorted(
            (one["request_ms"] + one["staytime_ms"], one["visit_id"])
            for one in visits.values()
            if one["user_id"] == visit["user_id"]
            and one["staytime_ms"] > 0
            and one["request_ms"] + one["staytime_ms"] < visit["request_ms"]
        )
        texts = [comments[one]["text"] for _, before in earlier for one in visits[before]["interacted"]]
        expected = [f"- {text}" for text in texts[-PLAN.history :]] or ["- nothing"]
        assert [line for line in record["prompt"].splitlines() if line.startswith("- ")] == expected


def test_the_future_of_a_visit_changes_no_prompt(
    world: Path, written: tuple[Path, dict[str, Any]], records: dict[str, list[Record]], tmp_path: Path
) -> None:
    """Test that other stays after noon of the first evaluation day do not change the prompts before noon."""
    table = read_texts(world, "visits")
    request, stay = (table.column(name).to_numpy() for name in ("request_ms", "staytime_ms"))
    noon = BORDER_MS + DAY_MS // 2
    change_visits(world, tmp_path / "later", {"staytime_ms": pa.array(np.where(request + stay > noon, 7 * stay, stay))})
    write_instructions(tmp_path / "later", tmp_path / "out", PLAN)
    again = {(record["task"], record["visit_id"]): record for record in read(tmp_path / "out", "evaluate")}
    compared = 0
    for record in records["evaluate"]:
        if record["time_ms"] <= noon:
            assert again[record["task"], record["visit_id"]]["prompt"] == record["prompt"]
            compared += 1
    assert compared > 50


def test_samples_to_tune_on_lie_between_the_others_and_change_none_of_evaluation(
    world: Path, records: dict[str, list[Record]], visits: dict[int, Record], tmp_path: Path
) -> None:
    plan = InstructionPlan(**{**PLAN.__dict__, "tune_from": "2024-03-05"})
    manifest = write_instructions(world, tmp_path / "out", plan)
    train, tune, evaluate = (read(tmp_path / "out", split) for split in ("train", "tune", "evaluate"))
    assert manifest["samples"]["tune"] == dict(Counter(record["task"] for record in tune))
    for record in tune:
        visit = visits[record["visit_id"]]
        assert BORDER_MS - DAY_MS <= visit["request_ms"] < visit["request_ms"] + visit["staytime_ms"] < BORDER_MS
    for record in train:
        visit = visits[record["visit_id"]]
        assert visit["request_ms"] + visit["staytime_ms"] < BORDER_MS - DAY_MS
    videos = [
        {visits[record["visit_id"]]["item_id"] for record in some if record["task"] == "top_comment"}
        for some in (train, tune, evaluate)
    ]
    assert all(videos) and sum(map(len, videos)) == len(set.union(*videos))
    # Ranges of the staytime are fitted on fewer days, and top comments are of other videos; this task has neither.
    alike = [
        [record for record in some if record["task"] == "user_comment"] for some in (evaluate, records["evaluate"])
    ]
    assert alike[0] == alike[1] and len(alike[0]) > 20
    with pytest.raises(UserError, match=r"--tune-from 2024-03-07 must be before --evaluate-from 2024-03-06"):
        write_instructions(world, tmp_path / "no", InstructionPlan(**{**PLAN.__dict__, "tune_from": "2024-03-07"}))
    with pytest.raises(UserError, match=r"no visits to tune on; --tune-from 2024-03-06 and --evaluate-from 2024-03-06"):
        write_instructions(world, tmp_path / "no", InstructionPlan(**{**PLAN.__dict__, "tune_from": "2024-03-06"}))


def test_a_bare_prompt_is_that_of_a_user_without_a_history(records: dict[str, list[Record]]) -> None:
    """Only samples that are not trained on have one, and only where the answer is a text."""
    assert not any("bare_prompt" in record for record in records["train"])
    some = [record for record in records["evaluate"] if record["task"] == "user_comment"]
    assert all("bare_prompt" not in record for record in records["evaluate"] if record["task"] != "user_comment")
    header = "Comments that this user liked or answered, oldest first:\n"
    for record in some:
        _, rest = record["prompt"].split("Now the user reads", 1)
        assert record["bare_prompt"] == f"{header}- nothing\nNow the user reads{rest}"
    assert sum(record["bare_prompt"] != record["prompt"] for record in some) > len(some) / 4


def test_the_position_of_an_option_gives_no_information(records: dict[str, list[Record]]) -> None:
    for task in ("top_comment", "user_comment"):
        full = [record for record in records["train"] if record["task"] == task and len(record["options"]) == 4]
        counts = Counter(record["options"].index(record["answer"]) for record in full)
        assert len(full) > 300
        # 4.5 standard deviations of a fair draw
        assert all(abs(counts[place] - len(full) / 4) < 4.5 * np.sqrt(len(full) * 3 / 16) for place in range(4)), counts


def test_general_samples_are_what_users_liked_before(
    written: tuple[Path, dict[str, Any]], visits: dict[int, Record], comments: dict[int, Record]
) -> None:
    liked: dict[int, list[str]] = {}
    for one in sorted(visits.values(), key=lambda one: (one["request_ms"] + one["staytime_ms"], one["visit_id"])):
        if one["staytime_ms"] > 0 and one["request_ms"] + one["staytime_ms"] < BORDER_MS:
            liked.setdefault(one["user_id"], []).extend(comments[comment]["text"] for comment in one["interacted"])
    expected = [
        "\n".join(f"- {text}" for text in texts[first : first + 20])
        for _, texts in sorted(liked.items())
        for first in range(0, len(texts) - 2, 5)
    ]
    general = read(written[0], "general")
    assert [record["answer"] for record in general] == expected
    assert len(expected) == written[1]["samples"]["general"]["liked"] > 30
    (prompt,) = {record["prompt"] for record in general}
    of_task = next(one for one in read(written[0], "train") if one["task"] == "user_comment")
    assert of_task["prompt"].startswith(prompt), "a list is learnt as it stands in the task"


def test_the_same_plan_gives_the_same_samples_and_a_smaller_one_the_first_of_them(
    world: Path, records: dict[str, list[Record]], tmp_path: Path
) -> None:
    fewer = InstructionPlan(**{**PLAN.__dict__, "samples": 100, "evaluate_samples": 50, "most": {"staytime": 30}})
    write_instructions(world, tmp_path / "out", fewer)
    for split, most in (("train", 100), ("evaluate", 50)):
        for task in TASKS:
            count = 30 if (split, task) == ("train", "staytime") else most
            expected = [record for record in read(tmp_path / "out", split) if record["task"] == task]
            assert expected == [record for record in records[split] if record["task"] == task][:count]


def test_an_edited_template_is_used_and_recorded(
    world: Path, written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    file = tmp_path / "templates/top_comment.txt"
    file.write_text(file.read_text().replace("Which one do people like most?", "Which is {{best}}?"))
    plan = InstructionPlan(
        **{**PLAN.__dict__, "samples": 20, "evaluate_samples": 20, "templates": str(tmp_path / "templates")}
    )
    manifest = write_instructions(world, tmp_path / "out", plan)
    prompts = [record["prompt"] for record in read(tmp_path / "out", "train") if record["task"] == "top_comment"]
    assert prompts and all("Which is {best}?" in prompt for prompt in prompts)
    hashes = {task: (manifest["templates"][task]["hash"], written[1]["templates"][task]["hash"]) for task in TASKS}
    assert {task for task, (new, old) in hashes.items() if new != old} == {"top_comment"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[option]", "[options]"), r"unknown section \[options\]; known are comment, history, none, option, prompt"),
        (("{range}", "{rang}"), r"section \[option\]: unknown \{rang\}; known are letter, range"),
        (("{range}", "{range"), r"section \[option\]: .*write \{\{ and \}\} for braces"),
        (("[none]\n- nothing", ""), r"section \[none\] is missing"),
        (("- nothing", ""), r"section \[none\] is empty"),
        (("[none]", "[prompt]"), r"section \[prompt\] is defined twice"),
    ],
)
def test_a_bad_template_is_named(world: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    file = tmp_path / "templates/staytime.txt"
    file.write_text(file.read_text().replace(*change))
    plan = InstructionPlan("2024-03-06", templates=str(tmp_path / "templates"))
    with pytest.raises(UserError, match=rf"staytime\.txt: {message}"):
        write_instructions(world, tmp_path / "out", plan)


def test_other_mistakes_are_named_and_leave_no_files(world: Path, tmp_path: Path) -> None:
    for plan, message in [
        (InstructionPlan("2024-04-01", templates=str(TEMPLATES)), "no visits to evaluate on; .* must leave visits"),
        (InstructionPlan("2024-03-01", templates=str(TEMPLATES)), "no visits to train on"),
        (InstructionPlan("soon", templates=str(TEMPLATES)), "--evaluate-from"),
        (InstructionPlan("2024-03-06", templates=str(tmp_path)), "no such template"),
        (
            InstructionPlan("2024-03-06", candidates=1, templates=str(TEMPLATES)),
            "--candidates is 1; it must be 2 or more",
        ),
        (InstructionPlan("2024-03-06", buckets=27, templates=str(TEMPLATES)), "--buckets is 27; it must be 26 or less"),
        (
            InstructionPlan("2024-03-06", most={"stay": 3}, templates=str(TEMPLATES)),
            "--most stay=3: write TASK=N; tasks are",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            write_instructions(world, tmp_path / "out", plan)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="exists already"):
        write_instructions(world, tmp_path, PLAN)


def test_videos_and_comments_without_text_are_left_out(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / CHECKSUMS).unlink()
    for name in ("items", "comments"):
        table = read_texts(world, name)
        texts = np.array(table.column("text").to_pylist(), object)
        texts[::2] = "  "
        table = table.set_column(table.column_names.index("text"), "text", pa.array(texts, pa.string()))
        pq.write_table(table, tmp_path / f"world/texts/{name}.parquet")
    plan = InstructionPlan(**{**PLAN.__dict__, "samples": 200, "evaluate_samples": 100})
    manifest = write_instructions(tmp_path / "world", tmp_path / "out", plan)
    assert all(manifest["visits_without_sample"][task] > 0 for task in TASKS)
    for record in read(tmp_path / "out", "train"):
        assert all(option(record, one).strip() for one in record["options"])


def test_long_texts_are_cut_and_counted(world: Path, tmp_path: Path) -> None:
    manifest = write_instructions(
        world,
        tmp_path / "out",
        InstructionPlan(**{**PLAN.__dict__, "characters": 12, "samples": 100, "evaluate_samples": 50}),
    )
    assert manifest["texts_cut"] > 100
    for record in read(tmp_path / "out", "train"):
        if record["task"] == "top_comment":
            assert all(len(option(record, one)) <= 12 for one in record["options"])


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "instructions", str(world), str(tmp_path / "out"), "--evaluate-from", "2024-03-06"]
    sizes = ["--samples", "5", "--most", "staytime=3", "--evaluate-samples", "4"]
    assert main([*command, *sizes, "--templates", str(TEMPLATES)]) == 0
    assert f"{tmp_path}/out/train.jsonl: 3 staytime, 5 top_comment, 5 user_comment" in capsys.readouterr().out
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    command[3] = str(tmp_path / "again")
    assert main([*command, *sizes, "--templates", str(TEMPLATES), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["train"]["staytime"] == 3


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(2, 6))
def test_ranges_cover_all_staytimes(staytimes: list[int], buckets: int) -> None:
    values = np.array(staytimes)
    try:
        edges = fit_edges(values, buckets)
    except UserError as error:
        assert "too similar" in str(error)
        return
    assert len(ranges(edges)) == buckets == len(edges) + 1
    bucket = bucket_of(values, edges)
    for value, place in zip(values / 1000, bucket, strict=True):
        assert (place == 0 or value >= edges[place - 1]) and (place == buckets - 1 or value < edges[place])


@pytest.mark.parametrize(
    ("staytimes", "edges"),
    [
        ([1000, 2000, 3000, 4000, 5000], "2.3, 3.7"),
        ([1000, 1000, 1000, 1000, 5000], None),
        ([1000, 1000, 5000, 5000, 5000], "2.3, 5.0"),
        ([40, 40, 40, 3000, 5000], None),
    ],
    ids=["different", "two edges in one place", "two values", "an edge at zero"],
)
def test_edges_rise_from_zero_or_are_refused(staytimes: list[int], edges: str | None) -> None:
    if edges is not None:
        assert fit_edges(np.array(staytimes), 3) == tuple(map(float, edges.split(", ")))
        return
    with pytest.raises(UserError, match="staytimes are too similar for 3 ranges"):
        fit_edges(np.array(staytimes), 3)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=25),
    st.integers(-1, 4),
    st.integers(-1, 22),
    st.integers(0, 4),
)
def test_the_past_is_that_of_a_plain_search(entries: list[tuple[int, int]], user: int, before: int, most: int) -> None:
    users, known = (np.array([entry[column] for entry in entries], np.int64) for column in (0, 1))
    past = UserTimeline(users, known, np.arange(len(entries)))
    expected = [place for place in np.argsort(known, kind="stable") if users[place] == user and known[place] < before]
    assert past.latest(user, before, most).tolist() == (expected[-most:] if most else [])


def test_a_template_keeps_its_comment_and_braces(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("what it is for\n\n[a]\nfirst {x}\n second\n\n[b]\n{{}}\n")
    template = Template.read(file, {"a": frozenset({"x"}), "b": frozenset()})
    assert template.fill("a", x="{y}") == "first {y}\n second" and template.fill("b") == "{}"
