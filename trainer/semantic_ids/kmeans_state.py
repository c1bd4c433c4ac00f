"""State of a fit between two passes, in one file that is whole or not there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.console.errors import UserError, one_line
from trainer.runtime.files import whole_file
from trainer.runtime.stored_files import load_arrays

VERSION = 1

Passes = tuple[tuple[float, int, int], ...]
"""Distortion, codes without vectors and revived codes of each pass of a level."""


@dataclass(frozen=True)
class FitState:
    """State of a fit.

    Attributes:
        levels: centroids of the levels that are done.
        scales: mean length of residuals before these levels and the one that is fitted.
        history: passes of these levels.
        centroids: of the level that is fitted, ``[k, d] float32``; None between levels.
        seen: weight of the vectors that have moved each of them, ``[k] int64``; used with mini-batches.
    """

    levels: tuple[Tensor, ...]
    scales: tuple[float, ...]
    history: tuple[Passes, ...]
    centroids: Tensor | None
    seen: Tensor | None


def write_state(file: Path, hash_: str, state: FitState) -> None:
    """Write the state of a fit.

    Args:
        file: to write; its directory exists.
        hash_: hash of the fit's vectors and settings.
        state: to write.

    Raises:
        UserError: it cannot be written.
    """
    arrays: dict[str, Any] = {f"level{place}": level.numpy() for place, level in enumerate(state.levels)}
    if state.centroids is not None and state.seen is not None:
        arrays |= {"centroids": state.centroids.numpy(), "seen": state.seen.numpy()}
    about = {"version": VERSION, "hash": hash_, "scales": state.scales, "history": state.history}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with whole_file(file) as tmp_path, tmp_path.open("wb") as opened:
        np.savez(opened, **arrays)


def read_state(file: Path, hash_: str) -> FitState | None:
    """Read the state of a fit; None if there is none.

    Raises:
        UserError: the file is damaged, or belongs to other vectors or settings.
    """
    advice = "remove it to begin again"
    try:
        arrays = load_arrays(file)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    try:
        about = json.loads(arrays.pop("about").tobytes())
        found, version = about["hash"], about["version"]
        history = tuple(tuple((float(d), int(e), int(r)) for d, e, r in level) for level in about["history"])
        scales = tuple(float(scale) for scale in about["scales"])
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        levels = tuple(tensors[f"level{place}"] for place in range(sum(name.startswith("level") for name in tensors)))
        state = FitState(levels, scales, history, tensors.get("centroids"), tensors.get("seen"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({one_line(error):.120}); {advice}") from None
    if version != VERSION or found != hash_:
        raise UserError(f"{file}: the state of a fit of other vectors or other settings; {advice}, or name another one")
    return state
