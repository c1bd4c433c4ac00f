"""The fine-tuning job as a user starts it: by each launcher, stopped and resumed, merged; error messages."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launch.cli.main import main
from launch.machine import free_port
from tests.distributed.launches import DEEPSPEED, LIMELIGHT, ROOT, TORCHRUN, end, start
from tests.llm.tiny import samples, write_samples
from tests.paths import files_of_their_owner_alone
from trainer.checkpoint.manifest import list_checkpoints
from trainer.checkpoint.run_directory import begin_run, choose_directory
from trainer.config.finetune import FinetuneConfig, load_finetune
from trainer.console.errors import UserError
from trainer.console.exit_status import PREEMPTED_STATUS, USER_ERROR_STATUS
from trainer.llm.finetuning.prepare import all_samples, deepspeed_settings, draw, prepare_base
from trainer.llm.finetuning.samples import ReadCounts, Sample
from trainer.llm.models.base_model import BaseModelFiles
from trainer.runtime.distributed import World

JOB = f"{ROOT}/configs/finetune_small.toml"
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no"),
)


def overrides(data: Path, directory: Path, *more: str) -> list[str]:
    return [
        *(f'data.train=["{data / "train.jsonl"}"]', f'data.evaluate=["{data / "eval.jsonl"}"]', "data.length=64"),
        *("data.general=[]", "data.general_share=0"),
        *("small.hidden=64", "small.vocabulary=300", "lora.rank=4", "train.batch_size=8", "train.epochs=3"),
        *(f"train.deepspeed={ROOT}/configs/deepspeed/zero2.json", "train.device=cpu", "train.log_every=1"),
        *(f"run.directory={directory}", *more),
    ]


def metrics(directory: Path) -> dict[str, Any]:
    """Read the metrics of a run, without the values that depend on the clock."""
    document: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    for name in ("tokens_per_second", "checkpoint_stalls_seconds"):
        del document["training"][name]
    return document


@pytest.mark.slow
def test_every_launcher_trains_the_same_adapter_under_deepspeed(tmp_path: Path) -> None:
    write_samples(tmp_path)
    launchers = {
        "limelight": (*LIMELIGHT, "finetune", JOB, "--ranks", "2"),
        "torchrun": (*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "trainer.finetune", JOB),
        "deepspeed": (
            *DEEPSPEED,
            "--num_accelerators=2",
            f"--master_port={free_port()}",
            "--module",
            "trainer.finetune",
            JOB,
        ),
        "accelerate": (
            *ACCELERATE,
            "--num_processes=2",
            f"--main_process_port={free_port()}",
            "-m",
            "trainer.finetune",
            JOB,
        ),
    }
    for name, command in launchers.items():
        end([start(*command, *overrides(tmp_path, tmp_path / name))])
        document = metrics(tmp_path / name)
        assert document == metrics(tmp_path / "limelight"), name
        assert document["engine"] == {
            "class": "DeepSpeedEngine",
            "optimizer": "DeepSpeedZeroOptimizer",
            "zero_stage": 2,
        }
        started = json.loads((tmp_path / name / "environment.json").read_text())["starts"][0]
        assert started["ranks"] == 2
        adapters = [(tmp_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in (name, "limelight")]
        assert adapters[0] == adapters[1], name


@pytest.mark.slow
def test_a_job_is_stopped_gone_on_with_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    command = (*LIMELIGHT, "finetune", JOB, "--ranks", "2")
    end([start(*command, *overrides(tmp_path, through, "train.epochs=40"))])

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow-skinny, of the extra mlflow")
    client, store = mlflow.MlflowClient((tmp_path / "store").as_uri()), f"run.mlflow={tmp_path / 'store'}"
    process = start(*command, *overrides(tmp_path, stopped, "train.epochs=40", "checkpoint.every_steps=3", store))
    until = time.monotonic() + 600
    while not list_checkpoints(stopped / "checkpoints") and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = end([process], expect=PREEMPTED_STATUS)[0]
    assert "the same command resumes from here" in printed
    assert not (stopped / "metrics.json").exists()
    run = json.loads((stopped / "mlflow.json").read_text())["run_id"]
    assert client.get_run(run).info.status == "KILLED"
    printed = end([start(*command, *overrides(tmp_path, stopped, "train.epochs=40", store))])[0]
    assert "resuming from" in printed
    found = client.get_run(run)
    assert found.info.status == "FINISHED" and "evaluation/fire/model/accuracy" in found.data.metrics
    assert {"loss", "learning_rate", "tokens_per_second"} <= set(found.data.metrics)
    assert metrics(stopped) == metrics(through), "the same number of ranks resumes bit for bit"

    card = (stopped / "adapter" / "README.md").read_text()
    for told in ("150 samples", str(tmp_path / "train.jsonl"), "160 optimizer steps", "fire (150)", "majority"):
        assert told in card, told
    assert "the small one" in card and "More Information Needed" not in card

    end([start(*LIMELIGHT, "export", str(stopped), str(tmp_path / "merged"))])
    assert files_of_their_owner_alone(stopped) == files_of_their_owner_alone(tmp_path / "merged") == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = BaseModelFiles.open(str(tmp_path / "merged"))
    sample = samples(1, seed=3)[0]
    ids = torch.tensor([base.tokenizer(sample.prompt)["input_ids"]])
    answers = [base.tokenizer(option)["input_ids"][0] for option in sample.options]
    logits = merged(input_ids=ids).logits[0, -1, answers]
    assert sample.options[int(logits.argmax())] == sample.answer


@pytest.mark.slow
def test_a_job_under_zero_3_comes_to_the_same(tmp_path: Path) -> None:
    write_samples(tmp_path)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    command = (*LIMELIGHT, "finetune", JOB, "--ranks", "2")
    for name, more in (("two", []), ("three", [f"train.deepspeed={tmp_path / 'zero3.json'}"])):
        end([start(*command, *overrides(tmp_path, tmp_path / name, *more))])
    two, three = metrics(tmp_path / "two"), metrics(tmp_path / "three")
    assert (two["engine"]["zero_stage"], three["engine"]["zero_stage"]) == (2, 3)
    torch.testing.assert_close(two["training"]["loss"], three["training"]["loss"], atol=1e-5, rtol=0)
    assert two["evaluation"]["fire"]["untuned"] == pytest.approx(three["evaluation"]["fire"]["untuned"], abs=1e-5)
    adapters = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("two", "three")]
    torch.testing.assert_close(adapters[0], adapters[1], atol=1e-4, rtol=0)


def small_job(tmp_path: Path, *more: str) -> FinetuneConfig:
    return load_finetune(JOB, overrides(tmp_path, tmp_path / "run", *more))


def test_a_run_of_another_job_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    begin_run(tmp_path / "run", small_job(tmp_path), 1)
    begin_run(tmp_path / "run", small_job(tmp_path, "train.log_every=7", "checkpoint.keep=1"), 2)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [1, 2]
    with pytest.raises(UserError, match=r"other settings \(lora.rank = 4 then, 8 now\)"):
        begin_run(tmp_path / "run", small_job(tmp_path, "lora.rank=8"), 1)
    bf16 = f"train.deepspeed={ROOT}/configs/deepspeed/llm_zero2_bf16.json"
    with pytest.raises(UserError, match=r"deepspeed bf16.enabled = unset then, true now"):
        begin_run(tmp_path / "run", small_job(tmp_path, bf16), 1)
    with pytest.raises(UserError, match=r"resume.enabled = false"):
        begin_run(tmp_path / "run", small_job(tmp_path, "resume.enabled=false"), 1)

    named = small_job(tmp_path, "run.directory=")
    run = tmp_path / "runs" / "finetune-small-20240101-000000"
    run.mkdir(parents=True)
    begin_run(run, named, 1)
    monkeypatch.chdir(tmp_path)
    assert choose_directory(named).resolve() == run
    (run / "metrics.json").write_text("{}")
    assert choose_directory(named).resolve() != run


def test_general_samples_are_drawn_to_their_share(tmp_path: Path) -> None:
    write_samples(tmp_path)
    config = small_job(tmp_path, f'data.general=["{tmp_path / "eval.jsonl"}"]', "data.general_share=0.1")
    taken = list(all_samples(config, ReadCounts()))
    assert len(taken) == 150 + 17
    assert taken == list(all_samples(config, ReadCounts()))
    with pytest.raises(UserError, match="`general` and `general_share` must be set together"):
        small_job(tmp_path, "data.general_share=0.1")
    numbered = [Sample(str(number), "a", "t") for number in range(20)]
    drawn = [int(sample.prompt) for seed in range(400) for sample in draw(numbered, 5, seed)]
    # 100 expected of each; 6 standard deviations are 52.
    assert all(48 < drawn.count(number) < 152 for number in range(20))
    assert all(len({sample.prompt for sample in draw(numbered, 5, seed)}) == 5 for seed in range(20))


def test_mistakes_are_told_before_a_rank_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in [
        (["finetune", "nowhere.toml"], "no such job file"),
        (["finetune", JOB, "lora.rnk=3"], "did you mean lora.rank"),
        (["export", str(tmp_path), str(tmp_path / "out")], "no checkpoint and no run with checkpoints here"),
    ]:
        assert main(arguments) == USER_ERROR_STATUS
        printed = capsys.readouterr().err
        assert expected in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_does_not_fit_is_told(tmp_path: Path) -> None:
    write_samples(tmp_path)
    with World.join("cpu") as world:
        accumulated = tmp_path / "two.json"
        accumulated.write_text('{"gradient_accumulation_steps": 2}')
        with pytest.raises(UserError, match="gradient_accumulation_steps = 2 does not divide the 7 rows"):
            deepspeed_settings(small_job(tmp_path, "train.batch_size=7", f"train.deepspeed={accumulated}"), 1)
        base = prepare_base(small_job(tmp_path), tmp_path, world)
        assert base.config.max_position_embeddings == 64
        with pytest.raises(UserError, match=r"data.length = 128: the model takes 64 tokens at most"):
            prepare_base(small_job(tmp_path, "data.length=128", f"model.path={base.directory}"), tmp_path, world)
