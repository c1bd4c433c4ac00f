"""Adapters on disk and merged; error messages for models, tokenizers and adapters that do not fit each other."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llm.tiny import LENGTH, LORA, SMALL, adapted, samples, write_base
from trainer.config.finetune import LoraConfig, SmallConfig
from trainer.console.errors import UserError
from trainer.llm.models.adapter import RECORD, check_adapter, load_adapter, save_adapter, write_merged
from trainer.llm.models.base_model import BaseModelFiles, add_adapter
from trainer.llm.models.small_model import write_small_model


def trained_values(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def logits_of(model: Any, base: BaseModelFiles) -> torch.Tensor:
    ids = torch.tensor([base.tokenizer(samples(1)[0].prompt)["input_ids"]])
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.fixture
def copy(base: BaseModelFiles, tmp_path: Path) -> Path:
    """Copy of the base model that a test may damage."""
    shutil.copytree(base.directory, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("whole", [(), ("lm_head", "embed_tokens")], ids=["lora", "whole modules"])
def test_an_adapter_is_peft_s_own_and_merges(base: BaseModelFiles, tmp_path: Path, whole: tuple[str, ...]) -> None:
    lora = LORA.model_copy(update={"modules_to_save": whole})
    model = adapted(base, lora=lora)
    with torch.no_grad():
        for value in trained_values(model).values():
            value.add_(0.01 * torch.randn_like(value))
    expected = logits_of(model, base)
    save_adapter(model, trained_values(model), tmp_path / "adapter", {"base": base.fingerprint})

    plain = AutoModelForCausalLM.from_pretrained(base.directory)
    untuned = logits_of(plain, base)
    assert (untuned - expected).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded, base), expected, atol=1e-5, rtol=0)
    ours = load_adapter(base, base.load(bf16=False), tmp_path / "adapter")
    assert torch.equal(logits_of(ours, base), logits_of(loaded, base))

    write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits_of(merged, base), expected, atol=1e-5, rtol=0)
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words("river fire")["input_ids"] == base.tokenizer("river fire")["input_ids"]
    with pytest.raises(UserError, match="already exists; choose another directory"):
        write_merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_has_a_card_with_nothing_left_to_fill_in(base: BaseModelFiles, tmp_path: Path) -> None:
    model = adapted(base)
    sections = {"Data": "150 samples", "Training": "160 steps"}
    save_adapter(model, trained_values(model), tmp_path / "adapter", {"base": base.fingerprint}, sections)
    text = (tmp_path / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": str(base.directory),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "limelight"],
    }
    for told in (str(base.directory), base.fingerprint, "rank 4", "q_proj", "## Data\n\n150 samples", "160 steps"):
        assert told in body
    assert "More Information Needed" not in text and "<!--" not in text
    assert "README.md" in json.loads((tmp_path / "adapter" / "checksums.json").read_text())["files"]


def test_weights_have_the_modes_of_other_files(base: BaseModelFiles, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_base(tmp_path / "base")
        model = adapted(base)
        save_adapter(model, trained_values(model), tmp_path / "adapter", {"base": base.fingerprint})
        write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    finally:
        os.umask(previous)
    for directory in ("base", "adapter", "merged"):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == 0o750
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / directory).iterdir()}
        assert any(name.endswith(".safetensors") for name in modes) and set(modes.values()) == {0o640}, modes


@pytest.fixture(scope="module")
def tied(base: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> BaseModelFiles:
    """Base model whose output head is its embedding matrix."""
    path = tmp_path_factory.mktemp("tied") / "base"
    model = base.load(bf16=False)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return BaseModelFiles.open(str(path))


def save_changed(base: BaseModelFiles, lora: LoraConfig, directory: Path) -> torch.Tensor:
    """Save an adapter whose trained values are all changed; return its logits."""
    model = adapted(base, lora=lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in trained_values(model).values():
            value.add_(0.03 * torch.randn_like(value))
    save_adapter(model, trained_values(model), directory, {"base": base.fingerprint})
    return logits_of(model, base)


@pytest.mark.parametrize(
    ("targets", "whole", "stays_tied"),
    [
        (("q_proj",), (), True),
        (("lm_head",), (), False),
        (("embed_tokens",), (), False),
        (("lm_head", "embed_tokens", "q_proj"), (), False),
        (("lm_head",), ("embed_tokens",), False),
        (("embed_tokens",), ("lm_head",), False),
        (("q_proj",), ("lm_head",), False),
    ],
)
def test_tied_embeddings_are_untied_by_a_merge_that_changes_one_of_them(
    tied: BaseModelFiles, tmp_path: Path, targets: tuple[str, ...], whole: tuple[str, ...], stays_tied: bool
) -> None:
    lora = LORA.model_copy(update={"targets": targets, "modules_to_save": whole})
    expected = save_changed(tied, lora, tmp_path / "adapter")
    assert (logits_of(tied.load(bf16=False), tied) - expected).abs().max() > 0.1
    write_merged(tied, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, tied), expected, atol=1e-4, rtol=0)
    assert merged.config.tie_word_embeddings is stays_tied


def test_a_bfloat16_model_merges_within_its_rounding(tied: BaseModelFiles, tmp_path: Path) -> None:
    tied.load(bf16=True).save_pretrained(tmp_path / "base")
    tied.tokenizer.save_pretrained(tmp_path / "base")
    half = BaseModelFiles.open(str(tmp_path / "base"))
    save_changed(half, LORA.model_copy(update={"targets": ("lm_head", "q_proj")}), tmp_path / "adapter")
    write_merged(half, tmp_path / "adapter", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_merged_model_with_other_logits_is_not_written(
    tied: BaseModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    tied.load(bf16=bf16).save_pretrained(tmp_path / "base")
    tied.tokenizer.save_pretrained(tmp_path / "base")
    base = BaseModelFiles.open(str(tmp_path / "base"))
    save_changed(base, LORA.model_copy(update={"targets": ("embed_tokens",)}), tmp_path / "adapter")
    # The defect that the comparison was written for: the head stays tied, and gets the update of the embeddings.
    monkeypatch.setattr("trainer.llm.models.adapter._untie", lambda model: None)
    with pytest.raises(UserError, match="not written: the merged model computes other logits than base model plus"):
        write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_for_another_model_is_refused(base: BaseModelFiles, tmp_path: Path) -> None:
    model = adapted(base)
    save_adapter(model, trained_values(model), tmp_path / "adapter", {"base": base.fingerprint})
    check_adapter(base, tmp_path / "adapter")
    # Same shapes, other weights: only the record can detect this.
    twin = write_base(tmp_path / "twin", seed=2)
    with pytest.raises(UserError, match=f"for another base model .of fingerprint {base.fingerprint}"):
        check_adapter(twin, tmp_path / "adapter")
    # An adapter of another package has no record: the shapes are compared.
    (tmp_path / "adapter" / RECORD).unlink()
    check_adapter(twin, tmp_path / "adapter")
    wide = SmallConfig(vocabulary=300, hidden=96, layers=2, heads=4)
    write_small_model(tmp_path / "wide", ["river stone"], wide, seed=1, length=LENGTH)
    with pytest.raises(UserError, match=r"for another base model than .*4 x 64 there, 4 x 96 here"):
        check_adapter(BaseModelFiles.open(str(tmp_path / "wide")), tmp_path / "adapter")
    with pytest.raises(UserError, match="no adapter here"):
        check_adapter(base, base.directory)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged"):
        check_adapter(base, tmp_path / "adapter")


def test_the_small_model_depends_on_the_seed_alone(base: BaseModelFiles, tmp_path: Path) -> None:
    texts = [sample.prompt + sample.answer for sample in samples(200)]
    torch.manual_seed(99)
    write_small_model(tmp_path / "again", texts, SMALL, seed=1, length=LENGTH)
    assert BaseModelFiles.open(str(tmp_path / "again")).fingerprint == base.fingerprint
    assert write_base(tmp_path / "other", seed=2).fingerprint != base.fingerprint
    # The byte-level tokenizer keeps every character of any language.
    text = "naïve 直播 🎁\n"
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text
    with pytest.raises(UserError, match=r"small.hidden = 60 .* use a multiple of 8"):
        write_small_model(tmp_path / "odd", texts, SmallConfig(hidden=60), seed=1, length=LENGTH)


def test_tokens_of_the_small_model_look_at_their_like_at_first(base: BaseModelFiles) -> None:
    model = base.load(bf16=False)
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight)
    states = torch.randn(50, SMALL.hidden, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        query, key = layer.self_attn.q_proj(states), layer.self_attn.k_proj(states)
        heads, width = SMALL.heads, layer.self_attn.head_dim
        query, key = query.view(50, heads, width), key.view(50, -1, width).repeat_interleave(2, 1)
        # without positions, every token's query fits its own key best, in every head
        fits = torch.einsum("qhw,khw->hqk", query, key)
        assert (fits.argmax(-1) == torch.arange(50)).float().mean() > 0.9


def test_a_tokenizer_that_is_missing_or_of_another_model_is_told(
    base: BaseModelFiles, copy: Path, tmp_path: Path
) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer here"):
        BaseModelFiles.open(str(copy))
    assert BaseModelFiles.open(str(copy), str(base.directory)).fingerprint == base.fingerprint

    many = [f"{word}{number}" for word in ("ab", "cd", "ef") for number in range(400)]
    write_small_model(tmp_path / "large", many * 2, SmallConfig(vocabulary=600), seed=1, length=LENGTH)
    with pytest.raises(
        UserError, match=r"tokenizer of another model: it has 600 entries, the model has embeddings for"
    ):
        BaseModelFiles.open(str(base.directory), str(tmp_path / "large"))
    edit(copy / "config.json", eos_token_id=5)
    with pytest.raises(UserError, match="its end-of-text token is 0, the model's is 5"):
        BaseModelFiles.open(str(copy), str(base.directory))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        BaseModelFiles.open(str(copy))


def test_a_directory_without_a_usable_model_is_told(base: BaseModelFiles, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory, and not a hub id such as"):
        BaseModelFiles.open(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no transformers model here"):
        BaseModelFiles.open(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="'no_proj' in this model; it has"):
        add_adapter(base.load(bf16=False), LoraConfig(targets=("no_proj",)), "base")
    edit(copy / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(UserError, match=r"weights are missing, the first is model.layers.2"):
        BaseModelFiles.open(str(copy)).load(bf16=False)
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        BaseModelFiles.open(str(copy)).load(bf16=False)
    edit(copy / "config.json", model_type="llama")
    with pytest.raises(UserError, match="type 'llama'; use one of the Qwen2 family"):
        BaseModelFiles.open(str(copy))


def test_a_hub_id_without_a_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.path = 'nobody/nothing': .* it cannot be downloaded from the hub"):
        BaseModelFiles.open("nobody/nothing")


def refused(copy: Path) -> str:
    with pytest.raises(UserError) as error:
        BaseModelFiles.open(str(copy))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_are_cut_short_are_refused_before_they_are_loaded(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content + b"0", content[:100], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        assert refused(copy).startswith(f"{file}: damaged or cut short (")


def test_an_index_is_compared_with_its_shards(copy: Path) -> None:
    file = copy / "model.safetensors"
    names = list(load_file(file))
    file.rename(copy / "model-00001-of-00001.safetensors")
    index = copy / "model.safetensors.index.json"

    def write(**shards: str) -> None:
        index.write_text(
            json.dumps(
                {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors") | shards}
            )
        )

    write()
    BaseModelFiles.open(str(copy)).load(bf16=False)
    write(**{names[0]: "model-00002-of-00002.safetensors"})
    assert "model-00002-of-00002.safetensors: no such file, but model.safetensors.index.json names it" in refused(copy)
    write(other="model-00001-of-00001.safetensors")
    assert "has no weight 'other'" in refused(copy)
    for weights in ([], None, {"a": ["b"]}, {"a": "\0.safetensors"}, "x"):
        index.write_text(json.dumps({"weight_map": weights}))
        assert refused(copy).startswith(f"{index}: names a weight file")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
        "model.safetensors",
    ],
)
def test_files_of_a_model_are_regular_and_bounded(copy: Path, name: str) -> None:
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert refused(copy) == f"{path}: not a regular file but a FIFO"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refused(copy) == f"{path}: not a regular file but a device"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert refused(copy).startswith(f"{path}: ")
    path.unlink()
    path.symlink_to(path)
    assert refused(copy).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "changes",
    [{"r": "x"}, {"r": None}, {"target_modules": 3}, {"lora_alpha": {}}, {"nonsense": 1}, {"rank_pattern": [1]}],
    ids=str,
)
def test_a_damaged_adapter_is_one_line(base: BaseModelFiles, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = adapted(base)
    save_adapter(model, trained_values(model), tmp_path / "adapter", {"base": base.fingerprint})
    edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    if "nonsense" in changes:
        # peft leaves keys out that it does not know.
        check_adapter(base, tmp_path / "adapter")
        return
    with pytest.raises(UserError, match="adapter") as error:
        check_adapter(base, tmp_path / "adapter")
    assert "\n" not in str(error.value)
