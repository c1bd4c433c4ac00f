"""Adapters on disk in peft's format, with a record of their base model; merging of an adapter into its base model.

Any adapter of peft can be read. An adapter that this package wrote is refused for any other base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.run_directory import base_path, load_finetune_run
from trainer.console.errors import UserError, one_line
from trainer.data.format.safetensors_header import read_header
from trainer.llm.models.base_model import BaseModelFiles, empty_model, refuse_code
from trainer.runtime.files import write_json, write_whole
from trainer.runtime.stored_files import read_json_object

RECORD = "limelight.json"
"""File beside peft's files with the fingerprint of the base model, sequence length and tasks."""


def save_adapter(model: Any, values: Mapping[str, Tensor], directory: Path, record: Mapping[str, Any]) -> None:
    """Write an adapter in peft's format, atomically; an existing directory is replaced.

    Args:
        model: peft's wrapper, for its configuration only; its weights are not read.
        values: float32 parameters by peft's names, see ``AdapterEngine.adapter``.
        directory: directory to write.
        record: content of the record file; ``base`` is the fingerprint of the base model.
    """

    def write(tmp_path: Path) -> None:
        state = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        model.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=False)
        write_json(tmp_path / RECORD, record)

    write_whole(directory, write)


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
    config = LoraConfig.from_pretrained(str(directory))
    config.inference_mode = False
    try:
        expected = get_peft_model_state_dict(
            get_peft_model(empty_model(base.config), config), save_embedding_layers=False
        )
    except ValueError as error:
        # peft raises this if the model has none of the adapter's target modules.
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


def write_merged(base: BaseModelFiles, adapter: Path, out: Path) -> None:
    """Merge an adapter into the weights of its base model, and write a directory that transformers loads on its own.

    Args:
        base: files of the base model; its tokenizer is written too.
        adapter: directory of the adapter.
        out: directory to create.

    Raises:
        UserError: ``out`` exists, or the adapter is for another model.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; choose another directory")
    # Keep the type of the base model's own weights.
    bf16 = str(getattr(base.config, "dtype", None)) == "torch.bfloat16"
    merged = load_adapter(base, base.load(bf16=bf16), adapter).merge_and_unload()

    def write(tmp_path: Path) -> None:
        merged.save_pretrained(tmp_path)
        base.tokenizer.save_pretrained(tmp_path)

    write_whole(out, write)


def merge_run(run: Path, out: Path) -> None:
    """Merge the adapter of a finished fine-tuning run into its base model: the work of ``limelight export RUN OUT``.

    Raises:
        UserError: the run has not finished, its base model is missing, or ``out`` exists.
    """
    config = load_finetune_run(run)
    if not (run / "adapter").is_dir():
        raise UserError(f"{run}: this run has not finished; run its limelight finetune command again to resume it")
    write_merged(BaseModelFiles.open(base_path(config, run), config.model.tokenizer), run / "adapter", out)
