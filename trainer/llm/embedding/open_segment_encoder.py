"""Opens the encoder of live segments that a job's model needs: of texts, or of texts and frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.embed import EmbeddingJob
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin
from trainer.llm.embedding.frame_encoder import PROCESSOR, FrameSegmentEncoder
from trainer.llm.embedding.segment_encoder import TextSegmentEncoder
from trainer.llm.embedding.vector_table_update import hash_of, open_encoder
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.distributed import World
from trainer.runtime.stored_files import read_limited


def open_segment_encoder(
    config: EmbeddingJob, template: Template, world: World
) -> tuple[TextSegmentEncoder | FrameSegmentEncoder, Origin]:
    """Load the model, and return an encoder of segments and the origin of its vectors.

    Raises:
        UserError: as :func:`trainer.llm.embedding.vector_table_update.open_encoder`; or there are frames, and the model
            does not take any.
    """
    follow = config.follow
    base = BaseModelFiles.open(config.model.path, config.model.tokenizer, vision=True)
    if follow.frames and not base.takes_pictures:
        raise UserError(
            f"follow.frames: frames need a model of the Qwen2-VL family, {config.model.path} is of type "
            f"{base.config.model_type!r}"
        )
    if follow.frames and not Path(follow.frames).is_dir():
        raise UserError(f"follow.frames = {follow.frames!r}: no such directory")
    setup = open_encoder(config, base, template, world)
    limits = {"rows": follow.batch, "length": config.embed.length, "tokens": config.embed.tokens}
    texts, origin = TextSegmentEncoder(setup.encoder, template, **limits), setup.origin("segments")
    if not follow.frames:
        return texts, origin
    encoder = FrameSegmentEncoder(setup.encoder, texts, base.directory, Path(follow.frames), tokens=config.embed.tokens)
    # Vectors with frames are others than those of the texts alone.
    return encoder, replace(origin, hash=hash_of(origin.hash, "frames", read_limited(base.directory / PROCESSOR)))
