"""The model that needs no download: a small Qwen2 with random weights, and a tokenizer of the texts at hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trainer.config.finetune import SmallConfig
from trainer.console.errors import UserError
from trainer.llm.models.base_model import quiet_libraries

END = "<|endoftext|>"
"""The end of a text, as Qwen2's tokenizer has it."""


def write_small_model(directory: Path, texts: Iterable[str], settings: SmallConfig, *, seed: int, length: int) -> None:
    """Make a model and write it as transformers does, whole or not at all.

    Args:
        directory: to make; nothing is done if it is there.
        texts: to train the tokenizer on (byte-level BPE, as Qwen2's), so that none of them has an unknown token.
        settings: sizes.
        seed: of the weights.
        length: most tokens of a text.

    Raises:
        UserError: sizes that do not fit each other.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if directory.exists():
        return
    quiet_libraries()
    if settings.hidden % (2 * settings.heads):
        raise UserError(
            f"small.hidden = {settings.hidden} cannot be cut into {settings.heads} heads of an even width; "
            f"use a multiple of {2 * settings.heads}"
        )
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=settings.vocabulary, min_frequency=2, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2 if settings.heads % 2 == 0 else settings.heads,
        max_position_embeddings=length,
        # Layers pass on what they get at its size. The default, 0.02, is for widths of thousands: in a narrow model
        # attention is all even at first, and stays so for long.
        initializer_range=settings.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    _begin_alike(model)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(directory)


@torch.no_grad()
def _begin_alike(model: Any) -> None:
    """Let tokens look at their like, and predict it, from the beginning: queries start as keys, the head as embeddings.

    After Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023). Attention that starts at random
    takes long to find anything.
    """
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        attention = layer.self_attn
        key = attention.k_proj.weight.view(-1, attention.head_dim, attention.k_proj.in_features)
        attention.q_proj.weight.copy_(
            key.repeat_interleave(attention.num_key_value_groups, 0).view_as(attention.q_proj.weight)
        )
