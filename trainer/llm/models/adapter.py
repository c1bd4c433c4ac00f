"""Adapters on disk in peft's format, with a record of their base model; merging of an adapter into its base model.

Any adapter of peft can be read. An adapter that this package wrote is refused for any other base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.run_directory import base_path, load_finetune_run
from trainer.console.errors import UserError, one_line
from trainer.data.format.safetensors_header import read_header
from trainer.llm.models.base_model import BaseModelFiles, empty_model, refuse_code
from trainer.runtime.checksums import verify_checksums, write_checksums
from trainer.runtime.files import write_json, write_whole
from trainer.runtime.stored_files import read_json_object

RECORD = "limelight.json"
"""File beside peft's files with the fingerprint of the base model, sequence length and tasks."""

MERGE_TOLERANCE = 1e-3
"""Largest difference of a merged model's logits in float32, as a share of their root mean square: rounding only."""

MERGE_TOLERANCE_BF16 = 0.05
"""The same in bfloat16, which rounds each merged weight and each state to 8 bits."""

_COMPARED = (4, 64)
"""Number of samples whose logits are compared after a merge, and tokens of each."""


def save_adapter(
    model: Any,
    values: Mapping[str, Tensor],
    directory: Path,
    record: Mapping[str, Any],
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in peft's format with a model card, atomically; an existing directory is replaced.

    Args:
        model: peft's wrapper, for its configuration only; its weights are not read.
        values: float32 parameters by peft's names, see ``AdapterEngine.adapter``.
        directory: directory to write.
        record: content of the record file; ``base`` is the fingerprint of the base model.
        sections: heading -> Markdown text, further sections of the card.
    """

    def write(tmp_path: Path) -> None:
        state = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        model.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=False)
        # peft writes a form with nothing filled in.
        card = _model_card(model.peft_config["default"], record, sections or {})
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
        write_json(tmp_path / RECORD, record)
        write_checksums(tmp_path)

    write_whole(directory, write)


def _model_card(lora: Any, record: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    """Return the model card of an adapter: what it adapts, its shape, how to load it, and further sections."""
    base = str(lora.base_model_name_or_path)
    whole = f" {', '.join(sorted(lora.modules_to_save))} are trained in full." if lora.modules_to_save else ""
    parts = {
        "Base model": f"`{base}`, with the fingerprint {record['base']}. Limelight refuses any other base model; peft "
        "does not compare them.",
        "Shape": f"LoRA of rank {lora.r} with alpha {lora.lora_alpha:g} and dropout {lora.lora_dropout:g} on "
        f"{', '.join(sorted(lora.target_modules))}.{whole}",
        **sections,
        "Use": "With peft:\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\nmodel = "
        'AutoPeftModelForCausalLM.from_pretrained("DIRECTORY_OF_THIS_FILE")\n```\n\n`limelight export RUN OUT` writes '
        "the base model with the adapter merged into its weights, which transformers loads by itself.",
    }
    # JSON strings are YAML strings too, whatever the path has in it.
    front = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "pipeline_tag: text-generation"]
    front += ["tags:", "- lora", "- limelight", "---", "", "# A LoRA adapter trained by Limelight", ""]
    return "\n".join(front) + "\n" + "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def load_adapter(base: BaseModelFiles, model: Any, directory: Path) -> Any:
    """Load a trained adapter onto a model.

    Args:
        base: files of the model.
        model: model from ``base.load()``.
        directory: directory of the adapter.

    Returns:
        peft's wrapper, in evaluation mode.

    Raises:
        UserError: there is no adapter, or it is for another base model.
    """
    from peft import PeftModel

    check_adapter(base, directory)
    verify_checksums(directory, ("adapter_config.json", "adapter_model.safetensors", RECORD))
    try:
        return PeftModel.from_pretrained(model, str(directory)).eval()
    except Exception as error:
        # Broad, because safetensors raises error types of its own.
        raise UserError(f"{directory}: the adapter cannot be read ({one_line(error)})") from None


def check_adapter(base: BaseModelFiles, directory: Path) -> None:
    """Check that an adapter belongs to a base model, by its record and the shapes of its weights; no weight is loaded.

    Raises:
        UserError: there is no adapter, or it is for another model; the message lists the differences.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() or not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory}: no adapter here (adapter_config.json or adapter_model.safetensors is missing)")
    refuse_code(directory)
    _check_kind(directory / "adapter_config.json")
    if (directory / RECORD).is_file():
        made_for = read_json_object(directory / RECORD).get("base")
        if made_for != base.fingerprint:
            raise UserError(
                f"{directory}: an adapter for another base model (of fingerprint {made_for}; "
                f"{base.directory} has {base.fingerprint})"
            )
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except Exception as error:
        # Broad, because peft gives the values of the file to its classes as they are.
        raise UserError(
            f"{directory / 'adapter_config.json'}: not a LoRA adapter of peft ({one_line(error)})"
        ) from None
    config.inference_mode = False
    try:
        expected = get_peft_model_state_dict(
            get_peft_model(empty_model(base.config), config), save_embedding_layers=False
        )
    except Exception as error:
        # peft raises ValueError if the model has none of the target modules, and many types for values of other types.
        raise UserError(f"{directory}: an adapter for another base model ({one_line(error)})") from None
    try:
        there = {name: tensor.shape for name, tensor in read_header(weights).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{weights}: damaged ({one_line(error)})") from None
    differences = list_differences(there, {name: tuple(value.shape) for name, value in expected.items()})
    if differences:
        raise UserError(f"{directory}: an adapter for another base model than {base.directory}: {differences}")


def _check_kind(file: Path) -> None:
    """Check that a configuration of peft describes a plain LoRA adapter: other kinds load further models or modules.

    Raises:
        UserError: it does not.
    """
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!a:.60}; only LORA adapters can be read")
    if config.get("megatron_config"):
        raise UserError(f"{file}: megatron_config is set, for which peft imports a module by name; it must be null")


def write_merged(base: BaseModelFiles, adapter: Path, out: Path, samples: Sequence[Sequence[int]] = ()) -> None:
    """Merge an adapter into the weights of its base model, and write a directory that transformers loads on its own.

    The written model is loaded again and its logits are compared with those of base model plus adapter, before the
    directory gets its name. If the base model's output head is tied to its embeddings and the adapter changes only one
    of the two, the merged model has both matrices.

    Args:
        base: files of the base model; its tokenizer is written too.
        adapter: directory of the adapter.
        out: directory to create.
        samples: token ids to compare logits on, besides random ones.

    Raises:
        UserError: ``out`` exists, the adapter is for another model, or the merged model has other logits.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; choose another directory")
    # Keep the type of the base model's own weights.
    bf16 = str(getattr(base.config, "dtype", None)) == "torch.bfloat16"
    adapted = load_adapter(base, base.load(bf16=bf16), adapter)
    compared = [list(sample) for sample in samples if len(sample)] + _random_samples(base.config.vocab_size)
    expected = _logits(adapted, compared)
    _untie(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    _tie_equal(merged, tied=base.config.tie_word_embeddings)

    def write(tmp_path: Path) -> None:
        merged.save_pretrained(tmp_path)
        base.tokenizer.save_pretrained(tmp_path)
        write_checksums(tmp_path)
        written = BaseModelFiles.open(str(tmp_path)).load(bf16=bf16)
        tolerance = MERGE_TOLERANCE_BF16 if bf16 else MERGE_TOLERANCE
        difference = _relative_difference(_logits(written, compared), expected)
        # A negated comparison, so that NaN is an error too.
        if not difference <= tolerance:
            raise UserError(
                f"{out}: not written: the merged model computes other logits than base model plus adapter (they "
                f"differ by {difference:.2g} of their size, {tolerance:g} is allowed); use {adapter} with its base "
                "model instead"
            )

    write_whole(out, write)


def merge_run(run: Path, out: Path) -> None:
    """Merge the adapter of a finished fine-tuning run into its base model: the work of ``limelight export RUN OUT``.

    Raises:
        UserError: the run has not finished, its base model is missing, ``out`` exists, or the merged model differs.
    """
    config = load_finetune_run(run)
    if not (run / "adapter").is_dir():
        raise UserError(f"{run}: this run has not finished; run its limelight finetune command again to resume it")
    base = BaseModelFiles.open(base_path(config, run), config.model.tokenizer)
    write_merged(base, run / "adapter", out, _training_samples(run / "tokens" / "ids.int32"))


def _training_samples(path: Path) -> list[list[int]]:
    """Return tokens from the beginning of a run's training samples; none if the user has removed the file."""
    if not path.is_file():
        return []
    number, length = _COMPARED
    ids = np.fromfile(path, np.int32, number * length)
    return [part.tolist() for part in np.split(ids, range(length, len(ids), length))]


def _random_samples(vocabulary: int) -> list[list[int]]:
    """Draw token ids from the whole vocabulary, the same in every call."""
    drawn: list[list[int]] = np.random.default_rng(0).integers(0, vocabulary, _COMPARED).tolist()
    return drawn


@torch.inference_mode()
def _logits(model: Any, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """Compute the logits of each sample ``[1, tokens, vocabulary]`` float32, less their mean, which has no effect."""
    found = [model.eval()(input_ids=torch.tensor([sample])).logits.float() for sample in samples]
    return [logits - logits.mean(-1, keepdim=True) for logits in found]


def _relative_difference(logits: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest root mean square difference of a sample, as a share of the expected root mean square."""
    pairs = zip(logits, expected, strict=True)
    return max(float((one - other).square().mean().sqrt() / other.square().mean().sqrt()) for one, other in pairs)


def _untie(model: Any) -> None:
    """Give a model, which may hold peft's layers, an output head of its own if it shares that of the embeddings.

    Merging adds the update of one of the two to the shared matrix, and so to the other one too.
    """
    head, embeddings = (
        layer.base_layer if hasattr(layer, "base_layer") else layer
        for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tie_equal(model: Any, *, tied: bool) -> None:
    """Tie output head and embeddings again if the base model had them tied and they are still equal."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    equal = tied and torch.equal(head.weight, embeddings.weight)
    model.config.tie_word_embeddings = equal
    if equal:
        head.weight = embeddings.weight
