"""Choice of the attention of packed sequences, on described GPUs and hosts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.llm.tiny import job, write_samples
from trainer.checkpoint.run_directory import begin_run, load_finetune_run
from trainer.config.finetune import AttentionKind, FinetuneConfig
from trainer.console.errors import UserError
from trainer.llm.finetuning import attention_choice
from trainer.llm.finetuning.attention_choice import settled_attention
from trainer.llm.models.base_model import BaseModelFiles
from trainer.runtime.distributed import World


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton compile for described GPUs."""
    monkeypatch.setattr(attention_choice, "triton_compiles", lambda device: device.type == "cuda")


def settle(config: FinetuneConfig, device: str, elsewhere: str | None = None) -> AttentionKind:
    """Return the attention of a job on a described device, where another rank may have a problem."""
    world: Any = SimpleNamespace(
        rank=0,
        device=torch.device(device),
        on_first_rank=lambda work: work(),
        first_problem=lambda problem: elsewhere or problem,
    )
    return settled_attention(config, Path(config.run.directory), world).model.attention


def made(tmp_path: Path, kind: str = "auto", **changes: dict[str, Any]) -> FinetuneConfig:
    return job(tmp_path, tmp_path / "run", **{**changes, "model": {"attention": kind, **changes.get("model", {})}})


def refusal(tmp_path: Path, kind: str, device: str, **changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        settle(made(tmp_path, kind, **changes), device)
    message = str(refused.value)
    assert message.startswith(f"model.attention = '{kind}': ") and "\n" not in message
    assert message.endswith("; set model.attention to 'auto' for a new run, or to 'sdpa'")
    return message


def test_auto_is_flex_attention_on_gpus_for_packed_samples(tmp_path: Path, compiler: None) -> None:
    assert settle(made(tmp_path), "cuda") == "flex"
    config = made(tmp_path)
    alone = config.model_copy(update={"data": config.data.model_copy(update={"packing": False})})
    assert settle(config, "cpu") == settle(alone, "cuda") == "sdpa"


def test_a_gpu_without_a_compiler_keeps_the_dense_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "triton_compiles", lambda device: False)
    assert settle(made(tmp_path), "cuda") == "sdpa"
    assert "needs Triton and a C compiler" in refusal(tmp_path, "flex", "cuda")


def test_one_host_without_a_compiler_decides_for_all(
    tmp_path: Path, compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert settle(made(tmp_path), "cuda", "on b (rank 1): needs a compiler") == "sdpa"
    assert caplog.messages == [
        "model.attention = 'auto' is 'sdpa' here, since 'flex' is not possible: on b (rank 1): needs a compiler"
    ]
    with pytest.raises(UserError, match=r"^model\.attention = 'flex': on b \(rank 1\): needs a compiler; set model"):
        settle(made(tmp_path, "flex"), "cuda", "on b (rank 1): needs a compiler")


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("flex", "cpu", "works on GPUs only, and this rank uses the CPU"),
        ("flash", "cpu", "works on GPUs only"),
        ("flash", "cuda", "the package flash-attn is not installed, or cannot use this GPU"),
    ],
)
def test_an_attention_that_does_not_work_here_is_one_line(tmp_path: Path, kind: str, device: str, message: str) -> None:
    for works in ("sdpa", "eager"):
        assert settle(made(tmp_path, works), device) == works
    assert message in refusal(tmp_path, kind, device)


def test_flash_attention_needs_bfloat16_and_no_promise_of_determinism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert "zero2.json does not enable" in refusal(tmp_path, "flash", "cuda")
    half = {"deepspeed": "configs/deepspeed/llm_zero2_bf16.json"}
    assert "as train.deterministic asks" in refusal(tmp_path, "flash", "cuda", train={**half, "deterministic": True})
    assert settle(made(tmp_path, "flash", train=half), "cuda") == "flash"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dropout": 0.1}, "the model has attention_dropout = 0.1 in its config.json, and 'flex' drops"),
        ({"num_attention_heads": 8, "head_dim": None}, "needs heads of 16 values or more, and the model's have 8"),
    ],
)
def test_auto_takes_the_dense_mask_for_a_model_that_flex_attention_cannot_compute(
    base: BaseModelFiles,
    tmp_path: Path,
    compiler: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
) -> None:
    found = json.loads((base.directory / "config.json").read_text())
    model = {"path": str(base.directory)}
    assert settle(made(tmp_path, model=model), "cuda") == settle(made(tmp_path, "flex", model=model), "cuda") == "flex"
    described = SimpleNamespace(config=SimpleNamespace(**{**found, **changes}))
    monkeypatch.setattr(BaseModelFiles, "open", lambda path, tokenizer: described)
    with caplog.at_level("INFO", attention_choice.__name__):
        assert settle(made(tmp_path, model=model), "cuda") == "sdpa"
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]
    assert reason in refusal(tmp_path, "flex", "cuda", model=model)
    assert settle(made(tmp_path, "sdpa", model=model), "cuda") == "sdpa"
    assert len(caplog.messages) == 1, "a named attention needs no reason"


def test_the_small_model_may_have_narrow_heads(tmp_path: Path, compiler: None) -> None:
    assert settle(made(tmp_path, small={"heads": 8}), "cuda") == "sdpa"


def test_a_resumed_run_keeps_its_attention(tmp_path: Path, compiler: None) -> None:
    write_samples(tmp_path)

    def settled(run: str, device: str, **model: str) -> str:
        return settle(job(tmp_path, tmp_path / run, model=model), device)

    assert (settled("new", "cuda"), settled("new", "cpu")) == ("flex", "sdpa")
    with World.join("cpu") as world:
        for kind in ("sdpa", "flex"):
            (tmp_path / kind).mkdir()
            # A job that names its attention, as every job of an earlier version does.
            begin_run(tmp_path / kind, job(tmp_path, tmp_path / kind, model={"attention": kind}), world.size)
            assert load_finetune_run(tmp_path / kind).model.attention == kind
            assert settled(kind, "cuda") == kind
        with pytest.raises(UserError, match="works on GPUs only"):
            settled("flex", "cpu")
        # Another one may be named, since it changes sums by rounding only.
        assert settled("flex", "cpu", attention="sdpa") == "sdpa"
        other = settled_attention(
            job(tmp_path, tmp_path / "flex", model={"attention": "sdpa"}), tmp_path / "flex", world
        )
        begin_run(tmp_path / "flex", other, world.size)
    assert load_finetune_run(tmp_path / "flex").model.attention == "sdpa"
