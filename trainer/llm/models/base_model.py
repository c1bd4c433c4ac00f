"""Qwen2-family base models: model and tokenizer files, which are checked before any weight is read; LoRA adapters."""

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
from trainer.data.format.safetensors_header import TensorEntry, read_header
from trainer.runtime.checksums import CHECKSUMS, verify_checksums
from trainer.runtime.stored_files import MAX_JSON_BYTES, open_regular, read_json_object

_OPENED = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Suffixes of the files that transformers opens."""

VISION_TYPE = "qwen2_vl"
"""Type of the models of texts and pictures."""

_ENDS_BYTES = 1 << 20
"""Number of bytes at the beginning and at the end of a weight file that are part of the fingerprint."""


@dataclass(frozen=True)
class BaseModelFiles:
    """Files of a base model: its weights are loaded by :meth:`load` only.

    Attributes:
        directory: directory of configuration, weights and, by default, tokenizer.
        config: transformers configuration.
        tokenizer: transformers tokenizer.
        fingerprint: hash of configuration and weights, see :func:`fingerprint_of`.
    """

    directory: Path
    config: Any
    tokenizer: Any
    fingerprint: str

    @property
    def takes_pictures(self) -> bool:
        """True for a model of the Qwen2-VL family."""
        return bool(self.config.model_type == VISION_TYPE)

    @staticmethod
    def open(path: str, tokenizer: str = "", *, vision: bool = False) -> BaseModelFiles:
        """Find a model and check that its tokenizer fits; no weights are loaded.

        Args:
            path: a directory, or a hub id, which is downloaded if it is not in the local cache.
            tokenizer: directory or hub id of another tokenizer; empty for the model's own.
            vision: accept a model of the Qwen2-VL family, too.

        Raises:
            UserError: no model is found or it is of another family; or no tokenizer is found or it belongs to another
                model.
        """
        quiet_libraries()
        directory = find_directory(path, "model.path")
        tokens = find_directory(tokenizer, "model.tokenizer") if tokenizer else directory
        for files in dict.fromkeys((directory, tokens)):
            refuse_code(files)
        config = _read_config(directory, ("qwen2", VISION_TYPE) if vision else ("qwen2",))
        loaded = _read_tokenizer(tokens)
        _check_tokenizer(loaded, config.get_text_config(), tokenizer or path)
        check_weights(directory)
        return BaseModelFiles(directory, config, loaded, fingerprint_of(directory))

    def load(self, *, bf16: bool, attention: str = "sdpa") -> Any:
        """Load the model with its weights, in bfloat16 or float32, in evaluation mode, on the CPU.

        Raises:
            UserError: the weights cannot be read, or some are missing.
        """
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        # Models of other programs have no checksums, and need no line about it.
        if (self.directory / CHECKSUMS).exists():
            verify_checksums(self.directory)
        try:
            kind = AutoModelForImageTextToText if self.takes_pictures else AutoModelForCausalLM
            model, found = kind.from_pretrained(
                self.directory,
                config=self.config,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except Exception as error:
            # Broad, because safetensors raises error types of its own.
            raise UserError(f"{self.directory}: the weights cannot be read ({one_line(error)})") from None
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{self.directory}: {len(missing)} weights are missing, the first is {missing[0]}")
        return model.eval()


def quiet_libraries() -> None:
    """Keep progress bars of transformers and warnings between libraries out of a job's output."""
    from transformers.utils import logging

    # peft imports DeepSpeed, which logs the accelerator that it detects unless the variable is set.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
    # peft warns if the model's name differs; check_adapter compares fingerprint and shapes instead.
    warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
    # write_merged unties embeddings and output head itself, and compares the merged model with the adapter's.
    warnings.filterwarnings("ignore", r"Model (has|with) `tie_word_embeddings=True` and")
    warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied after merging")


def find_directory(path: str, key: str) -> Path:
    """Return the directory of a model; a hub id is downloaded if it is not in the local cache.

    Args:
        path: directory or hub id.
        key: key of the job file, for error messages.

    Raises:
        UserError: there is no such directory, and the hub does not provide the model.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise UserError(f"{key} = {path!r}: no such directory, and not a hub id such as Qwen/Qwen2-7B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        # Broad, because the hub's client raises many types: no network, no such model, no permission.
        raise UserError(
            f"{key} = {path!r}: no such directory, and it cannot be downloaded from the hub ({one_line(error)})"
        ) from None


def refuse_code(directory: Path) -> None:
    """Check that a model or adapter asks for no Python code of its own, and names no weight file elsewhere.

    Raises:
        UserError: a configuration file has ``auto_map`` or is damaged, or an index names a file of another directory.
    """
    for file in sorted(directory.glob("*config.json")):
        if "auto_map" in _read_object(file):
            raise UserError(
                f"{file}: the model asks for Python code of its own (auto_map), which is never run; use a model whose "
                "classes are part of transformers, or remove auto_map"
            )
    for file in sorted(directory.glob("*.index.json")):
        weights = _read_object(file).get("weight_map")
        # Values may be lists, which have no hash.
        for name in weights.values() if isinstance(weights, dict) else [weights]:
            # A file of the hub's cache is a link to another folder, so only the name is checked.
            if not isinstance(name, str) or "/" in name or "\0" in name or not name.endswith(".safetensors"):
                raise UserError(f"{file}: names a weight file {name!a:.120}; it must be NAME.safetensors beside it")
    # transformers opens these itself, and reads all but the weights whole.
    for file in sorted((*directory.iterdir(), *directory.glob("*/*.jinja"))):
        if file.suffix in _OPENED:
            _check_regular(file, None if file.suffix == ".safetensors" else MAX_JSON_BYTES)


def _check_regular(file: Path, limit: int | None) -> None:
    """Check that a file is regular and has at most ``limit`` bytes.

    Raises:
        UserError: it is not, or cannot be opened.
    """
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except IsADirectoryError:
        raise UserError(f"{file}: not a regular file but a directory") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if limit is not None and size > limit:
        raise UserError(f"{file}: has {size:,} bytes; such a file has at most {limit:,}")


def check_weights(directory: Path) -> None:
    """Check that the weight files of a model are whole, by their headers, and have what the index says.

    Whether values are right cannot be checked: models of other programs have no checksums.

    Raises:
        UserError: a file is cut short or damaged, or a weight of the index is missing.
    """
    found = {file.name: _read_header(file) for file in sorted(directory.glob("*.safetensors"))}
    for index in sorted(directory.glob("*.safetensors.index.json")):
        for weight, name in _read_object(index)["weight_map"].items():
            if name not in found:
                raise UserError(f"{directory / name}: no such file, but {index.name} names it; download it again")
            if weight not in found[name]:
                raise UserError(f"{directory / name}: has no weight {weight!a:.120}, which {index.name} names")


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        return read_header(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged or cut short ({one_line(error)}); download or write it again") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def is_hub_id(path: str) -> bool:
    """True if a path has the form of a hub id, ``owner/name``, and no directory has that name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()


def fingerprint_of(directory: Path) -> str:
    """Return a hash of a model's configuration and of size, beginning and end of each of its weight files."""
    digest = hashlib.sha256()
    config = read_json_object(directory / "config.json")
    # transformers writes these two keys about itself; they do not change the model.
    stable = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    # Only the ends of the files, because reading all weights of a large model takes long.
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def add_adapter(model: Any, lora: LoraConfig, base: str) -> Any:
    """Add a LoRA adapter to a model and freeze all other weights.

    Args:
        model: model from :meth:`BaseModelFiles.load`.
        lora: shape of the adapter; initial values are drawn from torch's random generator.
        base: name of the base model, which is written into the saved adapter.

    Returns:
        peft's wrapper of the model.

    Raises:
        UserError: the model has no layer of a requested name.
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
    """Build a model on the meta device, without memory for its weights, to count and check parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        # The attention is named, because the configuration may ask for an implementation that would be downloaded.
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="sdpa")


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Embedding)


def _read_config(directory: Path, types: tuple[str, ...]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Broad, because the checks of transformers raise many types.
        raise UserError(f"{directory}: no transformers model here ({one_line(error)})") from None
    if config.model_type not in types:
        raise UserError(f"{directory}: the model has type {config.model_type!r}; use one of the Qwen2 family")
    if config.get_text_config().use_sliding_window:
        raise UserError(
            f"{directory}: the model uses sliding-window attention, which packed sequences do not support; set "
            "use_sliding_window to false in its config.json"
        )
    return config


def _read_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{directory}: no tokenizer here (tokenizer.json is missing); set model.tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Broad, because the libraries raise the errors of their parsers.
        raise UserError(f"{directory}: the tokenizer cannot be read ({one_line(error)})") from None


def _check_tokenizer(tokenizer: Any, config: Any, path: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: its tokenizer has no end-of-text token, which every answer needs; use a tokenizer that has one"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer of another model: it has {len(tokenizer):,} entries, the model has embeddings for "
            f"{config.vocab_size:,}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"{path}: the tokenizer of another model: its end-of-text token is {tokenizer.eos_token_id}, "
            f"the model's is {ends[0]}"
        )
