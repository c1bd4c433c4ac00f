"""``limelight config check``: every kind of job files, good and bad, without a start of the job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.config_check import check_job
from tests.llm.tiny import write_base, write_samples
from tests.paths import ROOT
from tests.semantic_ids.segment_world import assigned, make_version, write_world
from trainer.data.simulator.write_dataset import simulate

CONFIGS = ROOT / "configs"
KINDS = {
    "align": "align",
    "cross": "train",
    "embed": "embed",
    "embed_follow": "embed",
    "finetune_small": "finetune",
    "foresight": "foresight",
    "full": "train",
    "kuairand": "train",
    "larm": "train",
    "moment": "train",
    "qwen2_7b_lora": "finetune",
    "qwen2_7b_lora_141gb": "finetune",
    "qwen2_7b_lora_80gb": "finetune",
    "recipe": "train",
    "simulated": "train",
    "quantize": "quantize",
    "staytime": "staytime",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small world (3 days from 2024-03-04, 2 partitions), samples and a tiny language model."""
    directory = tmp_path_factory.mktemp("config_check")
    simulate(directory / "world", users=60, days=3, partitions=2, seed=5, texts=True)
    write_samples(directory)
    write_base(directory / "base")
    write_world(directory / "segments")
    simulate(directory / "vectors", users=40, days=3, partitions=2, seed=5, segment_noise=0.8)
    assigned(make_version(directory / "codebook", 8), directory / "segments")
    return directory


def job_of(kind: str, data: Path, *overrides: str) -> list[str]:
    """A good job of a kind: its file and overrides, which come before others."""
    world, templates = f"data.path={data / 'world'}", CONFIGS / "templates"
    deepspeed = CONFIGS / "deepspeed"
    settings = {
        "train": ["simulated.toml", world, "data.eval_from=2024-03-06", f"train.deepspeed={deepspeed / 'zero1.json'}"],
        "finetune": [
            *("finetune_small.toml", "data.length=64", "data.general=[]", "data.general_share=0"),
            *(f"data.train=['{data / 'train.jsonl'}']", f"data.evaluate=['{data / 'eval.jsonl'}']"),
            *(f"train.deepspeed={deepspeed / 'zero2.json'}", f"model.path={data / 'base'}"),
        ],
        "embed": [
            *("embed.toml", world, f"model.path={data / 'base'}", "model.adapter=''"),
            f"embed.template={templates / 'embed.txt'}",
        ],
        "staytime": ["staytime.toml", world, "data.eval_from=2024-03-06"],
        "quantize": [
            *("quantize.toml", f"data.path={data / 'segments'}", "data.fit_until=2024-03-04T00:15"),
            "codebook.levels=[8, 4]",
        ],
        "align": [
            *("align.toml", f"data.path={data / 'vectors'}", "data.eval_from=2024-03-06"),
            f"train.deepspeed={deepspeed / 'zero1.json'}",
        ],
        "foresight": [
            *("foresight.toml", f"data.path={data / 'segments'}", f"data.codes={data / 'segments/codes.parquet'}"),
            *(f"data.codebook={data / 'codebook'}", "data.train_until=2024-03-04T00:15"),
            f"train.deepspeed={deepspeed / 'zero1.json'}",
        ],
    }[kind]
    return [str(CONFIGS / settings[0]), *settings[1:], *overrides]


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_file_is_found_by_its_sections(name: str) -> None:
    assert set(KINDS) == {file.stem for file in CONFIGS.glob("*.toml")}
    # A key that no job has keeps the data from being looked at.
    found = check_job(str(CONFIGS / f"{name}.toml"), ["run.nonsense=1"], None, 1)
    assert found.kind == KINDS[name]
    (problem,) = found.problems
    assert "unknown key run" in problem


@pytest.mark.parametrize(
    ("kind", "checked"),
    [
        ("train", ["world", "times", "rows of training", "behaviours, features and ranks", "DeepSpeed settings"]),
        (
            "finetune",
            [
                "batch size and ranks",
                "DeepSpeed settings",
                "data.train",
                "data.evaluate",
                "base",
                "data.length",
                "options",
            ],
        ),
        (
            "embed",
            ["embed.txt", "texts of items", "texts of comments", "texts of segments", "texts of authors", "base"],
        ),
        ("staytime", ["world", "training and", "held-out visits"]),
        ("quantize", ["segments and their vectors", "times", "segments of the fit"]),
        (
            "align",
            [
                *("dataset", "times", "rows of training", "positives, features and ranks", "DeepSpeed settings"),
                *("rooms on air", "segments and their vectors"),
            ],
        ),
        (
            "foresight",
            [
                *("batch size and ranks", "DeepSpeed settings", "codes, codebook, times and rows of training"),
                "segments to follow",
            ],
        ),
    ],
)
def test_a_good_job(kind: str, checked: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", *job_of(kind, data), "--ranks", "1"]) == 0
    printed = capsys.readouterr()
    line = printed.out.splitlines()[-1]
    assert line.startswith("ok: ") and f"is a job of limelight {kind}; checked: keys and values, " in line
    assert all(part in line for part in checked), line
    assert not printed.err

    assert main(["config", "check", *job_of(kind, data), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["kind"] == kind and not document["problems"]
    assert line.endswith(", ".join(document["checked"]))


@pytest.mark.parametrize(
    ("kind", "overrides", "problems"),
    [
        ("train", ["train.epoch=2", "model.knd=din"], ["did you mean train.epochs?", "did you mean model.kind?"]),
        ("train", ["train.epochs=0", "run.seed=-1"], ["train.epochs = 0", "run.seed = -1"]),
        ("train", ["data.path=nowhere"], ["nowhere: "]),
        ("train", ["data.eval_from=tomorrow"], ["data.eval_from = 'tomorrow'"]),
        ("train", ["data.eval_from=2030-01-01"], ["data.eval_from = '2030-01-01' is after"]),
        ("train", ["data.eval_from=2020-01-01"], ["no training rows"]),
        (
            "train",
            ["data.eval_until=2024-03-01", "data.behaviours=['clik']"],
            ["data.eval_until = '2024-03-01' is not after", "data.behaviours: "],
        ),
        ("train", ["features.exclude=['user']"], ["'user_id'"]),
        ("train", ["train.weights.x=2.0"], ["train.weights: "]),
        ("train", ["train.deepspeed=none.json"], ["train.deepspeed = 'none.json'"]),
        ("train", ["init_from.run=nowhere", "init_from.tables=['item']"], ["nowhere: no checkpoint"]),
        ("finetune", ["lora.rnk=3", "data.lenth=9"], ["did you mean lora.rank?", "did you mean data.length?"]),
        (
            "finetune",
            ["data.train=['a.jsonl']", "data.evaluate=['b.jsonl']"],
            ["a.jsonl: ", "b.jsonl: "],
        ),
        ("finetune", ["data.length=128"], ["data.length = 128"]),
        ("finetune", ["model.path=none"], ["model.path = 'none'"]),
        ("embed", ["embed.poling='last'"], ["did you mean embed.pooling?"]),
        (
            "embed",
            ["embed.template=none.txt", "model.path=./none"],
            ["none.txt: ", "model.path = './none'"],
        ),
        ("embed", ["model.adapter=none"], ["none: no adapter"]),
        ("staytime", ["base.loss=wr"], ["base.loss = 'wr'"]),
        ("staytime", ["data.eval_from=2030-01-01"], ["held-out range"]),
        ("staytime", ["input.exclude=['shoe_size']"], ["input.exclude: "]),
        ("quantize", ["codebook.levels=[8, 0]", "data.fit_til=x"], ["levels", "did you mean data.fit_until?"]),
        ("quantize", ["data.path=nowhere"], ["nowhere: no dataset here"]),
        ("quantize", ["data.vectors=nowhere"], ["nowhere: no embedding table here"]),
        ("quantize", ["data.fit_until=soon"], ["data.fit_until = 'soon'"]),
        ("quantize", ["data.eval_until=2024-03-04"], ["data.eval_until = '2024-03-04' must be later"]),
        ("align", ["towers.dims=3", "towers.temperature=0"], ["did you mean towers.dim?", "towers.temperature = 0"]),
        ("align", ["data.positives=['clik']"], ["data.positives: the dataset has no behaviour 'clik'"]),
        ("align", ["data.vectors=nowhere"], ["nowhere: no embedding table here"]),
        ("align", ["features.history.live.search='top'"], ["features.history.live.search = 'top': a search by the"]),
        (
            "quantize",
            ["codebook.levels=[500]"],
            ["290 segments became known in the range of the fit, and a level has 500"],
        ),
        ("foresight", ["model.tabel=x", "data.target=now"], ["did you mean model.table?", "data.target = 'now'"]),
        ("foresight", ["data.codes=none.parquet"], ["none.parquet: no such file"]),
        ("foresight", ["data.codebook=none", "train.deepspeed=none.json"], ["none: no codebook", "'none.json'"]),
        ("foresight", ["follow.since=2034-01-01", "follow.tick_seconds=60"], ["no segment of a known author became"]),
        ("foresight", ["data.train_until=2024-03-04"], ["no segment in the range of training"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_a_bad_job_has_one_line_for_each_problem(
    kind: str, overrides: list[str], problems: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", *job_of(kind, data, *overrides)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(problems), lines
    assert all(line.startswith("limelight: error: ") for line in lines)
    assert all(any(problem in line for line in lines) for problem in problems), lines
    assert main(["config", "check", *job_of(kind, data, *overrides), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert [f"limelight: error: {problem}" for problem in document["problems"]] == lines and not document["ok"]


@pytest.mark.parametrize("kind", ["train", "finetune", "foresight"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage = 7: use "),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com = True: Extra inputs"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "perhaps"}}, "enabled = 'perhaps'"),
        ({"zero_optimization": {"stage": 2}, "optimiser": {}}, "'optimiser' is not supported"),
        ([], "a JSON object is expected"),
    ],
)
def test_a_problem_of_deepspeed_settings_names_their_file(
    kind: str, settings: object, told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(settings))
    assert main(["config", "check", *job_of(kind, data, f"train.deepspeed={file}"), "--ranks", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"limelight: error: {file}: ") and told in line


def test_ranks_that_do_not_fit(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", *job_of("train", data, "train.batch_size=6"), "--ranks=3"]) == 2
    assert "3 ranks" in capsys.readouterr().err
    assert main(["config", "check", *job_of("finetune", data, "train.batch_size=7"), "--ranks=2"]) == 2
    assert "train.batch_size = 7" in capsys.readouterr().err


def test_a_file_of_two_kinds_needs_the_kind(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.toml"
    file.write_text(f'[data]\npath = "{data / "world"}"\neval_from = "2024-03-06"\n')
    assert main(["config", "check", str(file)]) == 2
    assert "could be a job of limelight train or staytime or align; say which by --kind" in capsys.readouterr().err
    assert main(["config", "check", str(file), "--kind", "staytime", "lcu.enabled=false"]) == 0
    assert "is a job of limelight staytime" in capsys.readouterr().out


def test_a_model_of_the_hub_is_not_downloaded(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", *job_of("finetune", data, "model.path=Qwen/Qwen2-7B")]) == 0
    assert "not Qwen/Qwen2-7B, which the job takes from the hub" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "told"), [(None, "no such job file"), ("[data", "not valid TOML")])
def test_a_file_that_cannot_be_read(
    text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "job.toml").write_text(text)
    assert main(["config", "check", str(tmp_path / "job.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
