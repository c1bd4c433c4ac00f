"""Encoder of segments with frames, by a model of the Qwen2-VL family.

The frames of a segment stand before its text, each between the model's own marks. A segment with frames is a batch of
its own, so that its vector does not depend on other segments; segments without frames are embedded as by a model of
texts.

Frames come from other programs: a path leads to a regular file inside of ``follow.frames``, of bounded bytes and
pixels, in one of three formats. A segment with a frame that cannot be used has no vector but a reason.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modules.text_pooling import pool
from trainer.console.errors import UserError, one_line
from trainer.llm.embedding.segment_encoder import TextSegmentEncoder
from trainer.llm.embedding.text_encoder import Encoder
from trainer.runtime.host_copy import to_device
from trainer.runtime.stored_files import file_inside, read_limited

MAX_FRAME_BYTES = 1 << 24
MAX_FRAME_PIXELS = 1 << 26
FORMATS = ("JPEG", "PNG", "WEBP")
PROCESSOR = "preprocessor_config.json"


class FrameSegmentEncoder:
    """Encoder of segments with frames.

    Args:
        encoder: encoder of texts with a Qwen2-VL model, with its pooling set.
        texts: encoder of segments without frames.
        directory: directory of the model, with the settings of its image processor.
        frames: directory that paths of frames are relative to.
        tokens: maximum tokens of a segment, its frames and its text together.

    Attributes:
        dim: width of a vector.

    Raises:
        UserError: the model's image processor cannot be read.
    """

    def __init__(
        self, encoder: Encoder, texts: TextSegmentEncoder, directory: Path, frames: Path, *, tokens: int
    ) -> None:
        self._encoder, self._texts, self._frames, self._most = encoder, texts, frames, tokens
        self.dim = encoder.dim
        self._processor = _read_processor(directory)
        config = encoder.model.config
        self._marks = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)

    def encode(self, texts: Sequence[str], frames: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        """Encode segments.

        Args:
            texts: speech of each segment.
            frames: paths of the frames of each segment.

        Returns:
            Vectors ``[n, dim]`` float32, and a reason for each segment that has no vector, else an empty text.
        """
        vectors = np.zeros((len(texts), self.dim), np.float32)
        reasons = [""] * len(texts)
        plain = [row for row, names in enumerate(frames) if not names]
        if plain:
            vectors[plain] = self._texts.encode([texts[row] for row in plain], [()] * len(plain))[0]
        for row, names in enumerate(frames):
            if names:
                text = self._texts.tokens([texts[row]])[0]
                try:
                    images = self._read(names, self._most - len(text))
                except FrameError as error:
                    reasons[row] = str(error)
                    continue
                vectors[row] = self._vector(text, images)
        return vectors, reasons

    def _read(self, names: Sequence[str], most: int) -> list[np.ndarray]:
        """Return the pixels of frames that have at most so many tokens together.

        Raises:
            FrameError: a frame cannot be used, or they have more tokens, which might not fit into memory.
        """
        images, tokens = [], 0
        for name in names:
            images.append(read_frame(self._frames, name))
            try:
                patches = self._processor.get_number_of_image_patches(*images[-1].shape[1:])
            except ValueError as error:
                # Such as a picture that is much wider than high.
                raise FrameError(f"frame {name!a:.200}: {one_line(error):.200}") from None
            # Two marks stand around each frame.
            tokens += patches // self._processor.merge_size**2 + 2
            if tokens > most:
                raise FrameError(
                    f"frame {name!a:.200}: with it the segment has more than {self._most:,} tokens (embed.tokens); "
                    "send fewer or smaller frames"
                )
        return images

    @torch.inference_mode()
    def _vector(self, text: list[int], images: list[np.ndarray]) -> np.ndarray:
        """Encode a segment by its tokens and its frames ``[3, height, width]`` uint8."""
        inputs = self._processor(images=images, return_tensors="pt", input_data_format="channels_first")
        # Patches of a square of this width are one token.
        merged = self._processor.merge_size**2
        start, image, end = self._marks
        ids: list[int] = []
        for grid in inputs["image_grid_thw"].tolist():
            ids += [start, *[image] * (grid[0] * grid[1] * grid[2] // merged), end]
        ids += text
        device, model = self._encoder.device, self._encoder.model
        tokens = to_device(torch.tensor([ids]), device)
        states = model.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == image).int(),
            pixel_values=to_device(inputs["pixel_values"].to(model.dtype), device),
            image_grid_thw=to_device(inputs["image_grid_thw"], device),
            use_cache=False,
        ).last_hidden_state
        length = to_device(torch.tensor([len(ids)]), device)
        vector: np.ndarray = pool(states, length, self._encoder.pooling, self._encoder.query)[0].cpu().numpy()
        return vector


class FrameError(Exception):
    """Reason why a frame cannot be used."""


def read_frame(directory: Path, name: str) -> np.ndarray:
    """Return the pixels of a frame, ``[3, height, width]`` uint8.

    Args:
        directory: directory of the frames.
        name: relative path of the frame.

    Raises:
        FrameError: it is not a regular file inside of the directory, is too large, or is no picture.
    """
    from PIL import Image

    try:
        content = read_limited(file_inside(directory, name), MAX_FRAME_BYTES)
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_FRAME_PIXELS:
                raise FrameError(f"frame {name!a:.200}: {width} x {height} pixels; at most {MAX_FRAME_PIXELS:,}")
            pixels = np.asarray(picture.convert("RGB"))
    except FrameError:
        raise
    except Exception as error:
        # Broad, because the decoders raise many types about damaged pictures.
        raise FrameError(f"frame {name!a:.200}: {one_line(error):.200}") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_processor(directory: Path) -> Any:
    if not (directory / PROCESSOR).is_file():
        raise UserError(f"{directory}: no image processor here ({PROCESSOR} is missing); use a model that has one")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # Broad, because the checks of transformers raise many types.
        raise UserError(f"{directory / PROCESSOR}: cannot be used ({one_line(error)})") from None
