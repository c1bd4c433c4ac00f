"""The learnt query: which tokens of a text count, when its vector is their weighted mean.

One vector of the model's width is learnt on pairs of a video and one of its comments, with the model as it is: among
the comments of a batch a video's own one shall be closest to it (InfoNCE over cosines). A query of zeros is the plain
mean; what is returned is the best one, by pairs that were not learnt from, of all that were met on the way from there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.text_pooling import pool
from trainer.console.errors import UserError
from trainer.data.format.text_schema import read_texts
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.prompt_templates import Template

PAIRS, HELD_OUT = 384, 128
"""Videos with a comment each, and how many of them are not learnt from."""
STEPS, LEARNING_RATE, TEMPERATURE = 100, 0.1, 0.1


def fit_query(encoder: Encoder, dataset: str | Path, template: Template, seed: int) -> np.ndarray:
    """Learn a query on a dataset's own videos and comments.

    Args:
        encoder: reads the texts; its own pooling has no part in this.
        dataset: path of it.
        template: of items and comments.
        seed: of the pairs.

    Returns:
        ``[dim]`` float32.

    Raises:
        UserError: fewer than two videos have a text and a comment.
    """
    videos, comments = draw_pairs(dataset, seed)
    sides = []
    for kind, texts in (("items", videos), ("comments", comments)):
        states, lengths = encoder.states(encoder.tokenise([template.fill(kind, text=text) for text in texts]))
        # what comes out of inference mode cannot be learnt through
        sides.append((states.float().clone(), lengths.clone()))
    held_out = min(HELD_OUT, len(videos) // 2)
    query = torch.zeros(encoder.dim, device=sides[0][0].device, requires_grad=True)
    optimizer = torch.optim.Adam([query], lr=LEARNING_RATE)
    best, lowest = query.detach().clone(), float("inf")
    for _ in range(STEPS):
        with torch.no_grad():
            loss = float(_loss(query, sides, slice(0, held_out)))
        if loss < lowest:
            best, lowest = query.detach().clone(), loss
        optimizer.zero_grad()
        _loss(query, sides, slice(held_out, None)).backward()
        optimizer.step()
    return best.cpu().numpy()


def draw_pairs(dataset: str | Path, seed: int) -> tuple[list[str], list[str]]:
    """Texts of videos, and of one comment of each; no video comes twice.

    Raises:
        UserError: there are fewer than two.
    """
    items, comments = (read_texts(dataset, name, ["item_id", "text"]) for name in ("items", "comments"))
    rng = np.random.default_rng(seed)
    item_of = comments.column("item_id").to_numpy()
    drawn = rng.permutation(len(item_of))
    drawn = drawn[np.sort(np.unique(item_of[drawn], return_index=True)[1])]
    ids = items.column("item_id").to_numpy()
    order = np.argsort(ids)
    pairs: list[tuple[str, str]] = []
    for comment in drawn.tolist():
        at = np.searchsorted(ids, item_of[comment], sorter=order)
        if at == len(ids) or ids[order[at]] != item_of[comment]:
            continue
        pair = items.column("text")[int(order[at])].as_py(), comments.column("text")[comment].as_py()
        if all(text.strip() for text in pair):
            pairs.append(pair)
        if len(pairs) == PAIRS:
            break
    if len(pairs) < 2:
        raise UserError(f'{dataset}: embed.pooling = "query" is learnt on videos with comments, and there are none')
    videos, texts = zip(*pairs, strict=True)
    return list(videos), list(texts)


def _loss(query: Tensor, sides: list[tuple[Tensor, Tensor]], rows: slice) -> Tensor:
    videos, comments = (
        F.normalize(pool(states[rows], lengths[rows], "query", query), dim=1) for states, lengths in sides
    )
    return F.cross_entropy(videos @ comments.T / TEMPERATURE, torch.arange(len(videos), device=query.device))
