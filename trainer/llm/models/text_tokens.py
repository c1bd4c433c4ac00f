"""Tokens of users' texts: the spelling of a control token, such as ``<|im_start|>``, is text like any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def text_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without control tokens.

    A tokenizer finds its added tokens (``<|endoftext|>``, ``<|im_start|>``, ``<tool_call>``) in any text. Otherwise a
    comment could end a sample or begin another turn. Prompts hold users' texts, so their templates have no control
    tokens either.

    Args:
        tokenizer: tokenizer of transformers with a backend of the library tokenizers.
        texts: any texts.

    Returns:
        The token ids of each text, never the id of an added token. No token is added, and no text is truncated.
    """
    return [encoding.ids for encoding in _without_added_tokens(tokenizer).encode_batch(texts, add_special_tokens=False)]


@lru_cache(maxsize=4)
def _without_added_tokens(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    # Not split_special_tokens=True: that still finds the added tokens that are not marked as special, and Qwen2.5 has
    # some (<tool_call>, <|fim_prefix|>).
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = []
    content["truncation"] = content["padding"] = None
    return Tokenizer.from_str(json.dumps(content))
