"""Adapters on disk: in peft's own format, with a record of the model that they are for; and merged into it.

Any adapter of peft can be read; one that this package wrote is refused on another model than its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.run_directory import base_path, load_finetune_run
from trainer.console.errors import UserError, one_line
from trainer.data.format.safetensors_header import read_header
from trainer.llm.models.base_model import BaseModelFiles, empty_model
from trainer.runtime.files import write_json, write_whole

RECORD = "limelight.json"
"""File beside peft's own with the fingerprint of the base model, and what else is known of the adapter."""


def save_adapter(model: Any, values: Mapping[str, Tensor], directory: Path, record: Mapping[str, Any]) -> None:
    """Write an adapter as peft does, whole or not at all; one that is there is replaced.

    Args:
        model: peft's wrapper, for its configuration; its own values are not looked at.
        values: float32 parameters by peft's names, see ``AdapterEngine.adapter``.
        directory: to write.
        record: for the file beside it; ``base`` is the fingerprint of the base model.
    """

    def write(aside: Path) -> None:
        state = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        model.save_pretrained(aside, state_dict=state, save_embedding_layers=False)
        write_json(aside / RECORD, record)

    write_whole(directory, write)


def load_adapter(base: BaseModelFiles, model: Any, directory: Path) -> Any:
    """A model with a trained adapter on it.

    Args:
        base: where the model comes from.
        model: of ``base.load()``.
        directory: of the adapter.

    Returns:
        peft's wrapper, in evaluation mode.

    Raises:
        UserError: no adapter there, or one for another base model.
    """
    from peft import PeftModel

    check_adapter(base, directory)
    try:
        return PeftModel.from_pretrained(model, str(directory)).eval()
    except Exception as error:
        # safetensors raises errors of its own type.
        raise UserError(f"{directory}: the adapter cannot be read ({one_line(error)})") from None


def check_adapter(base: BaseModelFiles, directory: Path) -> None:
    """Whether an adapter is for a model, by its record and by the shapes of its weights; none of them are loaded.

    Raises:
        UserError: there is no adapter, or it is for another model: what differs is listed.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() or not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory}: no adapter here (adapter_config.json or adapter_model.safetensors is missing)")
    if (directory / RECORD).is_file():
        made_for = json.loads((directory / RECORD).read_text())["base"]
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
        raise UserError(f"{directory}: an adapter for another base model ({one_line(error)})") from None
    try:
        there = {name: tensor.shape for name, tensor in read_header(weights).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{weights}: damaged ({one_line(error)})") from None
    differences = list_differences(there, {name: tuple(value.shape) for name, value in expected.items()})
    if differences:
        raise UserError(f"{directory}: an adapter for another base model than {base.directory}: {differences}")


def write_merged(base: BaseModelFiles, adapter: Path, out: Path) -> None:
    """Write the model with an adapter's changes in its own weights, as a directory that transformers loads by itself.

    Args:
        base: the model; its tokenizer is written as well.
        adapter: directory of the adapter.
        out: directory to make.

    Raises:
        UserError: ``out`` is there, or the adapter is for another model.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; choose another directory")
    bf16 = str(getattr(base.config, "dtype", None)) == "torch.bfloat16"
    merged = load_adapter(base, base.load(bf16=bf16), adapter).merge_and_unload()

    def write(aside: Path) -> None:
        merged.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)

    write_whole(out, write)


def merge_run(run: Path, out: Path) -> None:
    """What ``limelight export`` does: :func:`write_merged` with what a run has trained.

    Raises:
        UserError: the run has not finished, its model is gone, or ``out`` is there.
    """
    config = load_finetune_run(run)
    if not (run / "adapter").is_dir():
        raise UserError(f"{run}: has not finished; the command that began it goes on with it")
    write_merged(BaseModelFiles.open(base_path(config, run), config.model.tokenizer), run / "adapter", out)
