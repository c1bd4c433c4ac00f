"""A Qwen2-family model and its tokenizer from a directory, checked before any weight is read; and its LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config.finetune import LoraConfig
from trainer.console.errors import UserError, one_line

_ENDS_BYTES = 1 << 20
"""Of a file of weights, so much of its beginning and its end is part of the fingerprint."""


@dataclass(frozen=True)
class BaseModelFiles:
    """A model that adapters are for.

    Attributes:
        directory: of its configuration, its weights and, unless told otherwise, its tokenizer.
        config: of transformers.
        tokenizer: of transformers.
        fingerprint: of configuration and weights.
    """

    directory: Path
    config: Any
    tokenizer: Any
    fingerprint: str

    @staticmethod
    def open(path: str, tokenizer: str = "") -> BaseModelFiles:
        """Find a model and check that it and its tokenizer fit; no weights are loaded.

        Args:
            path: a directory, or a hub id, which is downloaded unless it has been before.
            tokenizer: the same of another tokenizer; empty for the model's own.

        Raises:
            UserError: no model there or of another family; no tokenizer, or one of another model.
        """
        quiet_libraries()
        directory = find_directory(path, "model.path")
        config = _read_config(directory)
        words = _read_tokenizer(find_directory(tokenizer, "model.tokenizer") if tokenizer else directory)
        _check_tokenizer(words, config, tokenizer or path)
        return BaseModelFiles(directory, config, words, fingerprint_of(directory))

    def load(self, *, bf16: bool, attention: str = "sdpa") -> Any:
        """The model with its weights, in bfloat16 or float32, in evaluation mode, on the CPU.

        Raises:
            UserError: the weights cannot be read, or do not fill the model.
        """
        from transformers import AutoModelForCausalLM

        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.directory,
                config=self.config,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:
            # safetensors raises errors of its own type.
            raise UserError(f"{self.directory}: the weights cannot be read ({one_line(error)})") from None
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{self.directory}: {len(missing)} weights are missing, the first is {missing[0]}")
        return model.eval()


def quiet_libraries() -> None:
    """Keep the bars of transformers, and what libraries tell each other, out of what a job says."""
    from transformers.utils import logging

    # peft imports DeepSpeed, which would say which device it has found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
    # peft compares names; that an adapter is for its model is checked by fingerprint and shapes.
    warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")


def find_directory(path: str, key: str) -> Path:
    """The directory of a model; that of a hub id is downloaded, unless it has been before.

    Raises:
        UserError: neither is there; ``key`` of the job file is named.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise UserError(f"{key} = {path!r}: no such directory, and not a hub id such as Qwen/Qwen2-7B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        # Whatever the hub's client meets: no network, no such model, no permission.
        raise UserError(
            f"{key} = {path!r}: no such directory, and not to be had from the hub ({one_line(error)})"
        ) from None


def is_hub_id(path: str) -> bool:
    """True if a path has the form of a hub id, ``owner/name``, and no directory has that name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()


def fingerprint_of(directory: Path) -> str:
    """A hash of a model: of its configuration, and of size, beginning and end of every file of weights."""
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text())
    # What transformers notes of itself when it writes a model.
    stable = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def add_adapter(model: Any, lora: LoraConfig, base: str) -> Any:
    """Put a LoRA adapter onto a model; everything else is frozen.

    Args:
        model: of :meth:`BaseModelFiles.load`.
        lora: its shape; initial values are drawn from torch's generator.
        base: name of the model, which the saved adapter gives.

    Returns:
        peft's wrapper of it.

    Raises:
        UserError: there is no layer of a name that is asked for.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key, wanted in (("lora.targets", lora.targets), ("lora.modules_to_save", lora.modules_to_save)):
        for name in wanted:
            if name not in names:
                layers = sorted({name.rpartition(".")[2] for name, of in model.named_modules() if _is_linear(of)})
                raise UserError(f"{key}: no layer {name!r} in this model; it has {', '.join(layers)}")
    config = PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        modules_to_save=list(lora.modules_to_save) or None,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def empty_model(config: Any) -> Any:
    """A model without memory for its weights, on the meta device, to count and to check with."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Embedding)


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # Its checks raise errors of their own types.
        raise UserError(f"{directory}: no model of transformers here ({one_line(error)})") from None
    if config.model_type != "qwen2":
        raise UserError(f"{directory}: a model of type {config.model_type!r}; use one of the Qwen2 family")
    if config.use_sliding_window:
        raise UserError(f"{directory}: has sliding-window attention, which packed sequences cannot keep; switch it off")
    return config


def _read_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{directory}: no tokenizer here (tokenizer.json is missing); name one in model.tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # The libraries raise whatever their parser met.
        raise UserError(f"{directory}: the tokenizer cannot be read ({one_line(error)})") from None


def _check_tokenizer(tokenizer: Any, config: Any, path: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token, which ends every answer")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{path}: a tokenizer of another model: it has {len(tokenizer):,} entries, "
            f"the model embeds {config.vocab_size:,}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"{path}: a tokenizer of another model: its end of text is {tokenizer.eos_token_id}, the model's {ends[0]}"
        )
