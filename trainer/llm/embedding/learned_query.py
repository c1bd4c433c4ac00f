"""Learned query of the weighted-mean pooling: it decides how much each token counts in the vector of a text.

The query is one vector of the model's width. It is trained on pairs of a video and one of its comments while the model
is frozen: among the comments of a batch, a video's own comment shall be the closest (InfoNCE over cosines). Training
starts from zeros, which is the plain mean, and returns the query with the lowest loss on held-out pairs over all steps.
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
"""Number of (video, comment) pairs, and how many of them are held out."""
STEPS, LEARNING_RATE, TEMPERATURE = 100, 0.1, 0.1


def fit_query(encoder: Encoder, dataset: str | Path, template: Template, seed: int) -> np.ndarray:
    """Learn a query on a dataset's own videos and comments.

    Args:
        encoder: encoder of the texts; its own pooling is not used.
        dataset: path of the dataset.
        template: template with the sections ``items`` and ``comments``.
        seed: seed of the choice of pairs.

    Returns:
        The query, ``[dim]`` float32.

    Raises:
        UserError: fewer than two videos have a text and a comment.
    """
    videos, comments = draw_pairs(dataset, seed)
    sides = []
    for kind, texts in (("items", videos), ("comments", comments)):
        states, lengths = encoder.states(encoder.tokenise([template.fill(kind, text=text) for text in texts]))
        # Tensors made in inference mode cannot be part of a gradient computation; copies can.
        sides.append((states.float().clone(), lengths.clone()))
    held_out = min(HELD_OUT, len(videos) // 2)
    query = torch.zeros(encoder.dim, device=sides[0][0].device, requires_grad=True)
    optimizer = torch.optim.Adam([query], lr=LEARNING_RATE)
    # Compared on the device, since the host would wait for it in each step.
    best, lowest = query.detach().clone(), torch.full((), torch.inf, device=query.device)
    for _ in range(STEPS):
        with torch.no_grad():
            loss = _loss(query, sides, slice(0, held_out))
            best, lowest = torch.where(loss < lowest, query, best), torch.where(loss < lowest, loss, lowest)
        optimizer.zero_grad()
        _loss(query, sides, slice(held_out, None)).backward()
        optimizer.step()
    return best.cpu().numpy()


def draw_pairs(dataset: str | Path, seed: int) -> tuple[list[str], list[str]]:
    """Draw texts of videos, and the text of one comment of each; every video occurs at most once.

    Raises:
        UserError: there are fewer than two pairs.
    """
    items, comments = (read_texts(dataset, name, ["item_id", "text"]) for name in ("items", "comments"))
    rng = np.random.default_rng(seed)
    item_of = comments.column("item_id").to_numpy()
    drawn = rng.permutation(len(item_of))
    # Keep the first comment of each video in the random order.
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
        raise UserError(
            f'{dataset}: embed.pooling = "query" needs at least two videos with a text and a comment; '
            'use "last" or "mean"'
        )
    videos, texts = zip(*pairs, strict=True)
    return list(videos), list(texts)


def _loss(query: Tensor, sides: list[tuple[Tensor, Tensor]], rows: slice) -> Tensor:
    videos, comments = (
        F.normalize(pool(states[rows], lengths[rows], "query", query), dim=1) for states, lengths in sides
    )
    return F.cross_entropy(videos @ comments.T / TEMPERATURE, torch.arange(len(videos), device=query.device))
