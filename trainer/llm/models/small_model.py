"""A base model that needs no download: a small Qwen2 with random weights, and a tokenizer trained on given texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trainer.config.finetune import SmallConfig
from trainer.console.errors import UserError
from trainer.llm.models.base_model import quiet_libraries
from trainer.runtime.files import write_whole

END = "<|endoftext|>"
"""End-of-text token, the same as in Qwen2's tokenizer."""


def small_shape(settings: SmallConfig, vocabulary: int, length: int) -> dict[str, Any]:
    """Return the sizes of the small model, in the keys of transformers' ``Qwen2Config``."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": 4 * settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads // 2 if settings.heads % 2 == 0 else settings.heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
    }


def write_small_model(directory: Path, texts: Iterable[str], settings: SmallConfig, *, seed: int, length: int) -> None:
    """Create a small model and write it in the format of transformers, atomically.

    Args:
        directory: directory to create; nothing is done if it exists.
        texts: texts to train the tokenizer on (byte-level BPE as in Qwen2, so no text has unknown tokens).
        settings: sizes of the model.
        seed: seed of the weights.
        length: maximum tokens of a text.

    Raises:
        UserError: hidden size and number of heads do not fit each other.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if directory.exists():
        return
    quiet_libraries()
    if settings.hidden % (2 * settings.heads):
        raise UserError(
            f"small.hidden = {settings.hidden} cannot be split into {settings.heads} heads of even width; "
            f"use a multiple of {2 * settings.heads}"
        )
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=settings.vocabulary, min_frequency=2, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END, model_max_length=length
    )
    config = Qwen2Config(
        **small_shape(settings, len(tokenizer), length),
        # With this range a layer keeps the scale of its input. The default, 0.02, is meant for hidden sizes in the
        # thousands: in a narrow model it makes attention almost uniform, and training takes long to change that.
        initializer_range=settings.hidden**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The weights depend on the seed only, and the caller's random state stays unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    _initialise_mimetic(model)

    def write(tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        # Of these files transformers makes Qwen2's own tokenizer, which cuts texts otherwise (each digit is a token).
        # This is the one that trains the model, so it is the one to keep: tokenizer.json alone has the same tokens.
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False).save_pretrained(
            tmp_path
        )

    write_whole(directory, write)


@torch.no_grad()
def _initialise_mimetic(model: Any) -> None:
    """Set query weights equal to key weights, and the output head equal to the embeddings.

    A token then attends to tokens like itself and predicts them from the start. After Trockman and Kolter, "Mimetic
    Initialization of Self-Attention Layers" (2023); with random attention, training takes long to learn this.
    """
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        attention = layer.self_attn
        key = attention.k_proj.weight.view(-1, attention.head_dim, attention.k_proj.in_features)
        attention.q_proj.weight.copy_(
            key.repeat_interleave(attention.num_key_value_groups, 0).view_as(attention.q_proj.weight)
        )
