"""Encode the texts of a dataset into vectors. One process runs on every rank.

    limelight embed configs/embed.toml --ranks 2
    limelight embed configs/embed_follow.toml --follow
    torchrun --nproc-per-node 2 -m trainer.embed configs/embed.toml embed.pooling=mean

The texts are split into parts, and each part is written atomically by one rank. The same command again writes the parts
that are missing, on any number of ranks, and produces the same tables. Vectors of unchanged texts are kept from an
existing table, which is replaced as a whole at the end.

With ``--follow``, one process embeds the segments of live rooms as they become known; see ``follow`` below.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from trainer.checkpoint.run_directory import run_directory
from trainer.checkpoint.tracked_metrics import mlflow_target
from trainer.config.embed import EmbeddingJob, Kind, load_embedding
from trainer.console.errors import UserError
from trainer.console.exit_status import end_on_sigterm
from trainer.console.job_arguments import EMBED_ARGUMENTS, parse_rank_arguments
from trainer.console.outputs import local_path
from trainer.console.run_log import open_log
from trainer.llm.embedding.dataset_texts import KindTexts, read_segments
from trainer.llm.embedding.open_segment_encoder import open_segment_encoder
from trainer.llm.embedding.vector_table_update import merge_parts, open_encoder, plan_update, write_missing_parts
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import until_preempted
from trainer.runtime.tracking import record_scalars
from trainer.semantic_ids.follow import Follower, StopRequest
from trainer.semantic_ids.follow_setup import follow_settings, open_codes, open_fusion, open_segments
from trainer.semantic_ids.segment_source import Clock
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings

TEXT = frozenset({"text"})
KINDS: tuple[Kind, ...] = ("items", "comments", "segments", "authors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.embed``."""
    options = parse_rank_arguments(
        "trainer.embed", "Make vectors of a dataset's texts; one process per rank.", EMBED_ARGUMENTS, arguments
    )

    def job() -> int:
        config = load_embedding(options.config, options.overrides, follow=options.follow)
        with World.join(config.embed.device) as world:
            if options.follow:
                return until_preempted(lambda: follow(config, world))
            # Not before the ranks have joined: a rank that waits for the others runs no handler.
            end_on_sigterm()
            embed(config, world)
            return 0

    return run_rank(job)


def embed(config: EmbeddingJob, world: World) -> None:
    """Write a table for each kind of text. Collective.

    Raises:
        UserError: the dataset lacks texts of a kind; model, tokenizer or adapter are missing or do not fit each other;
            the template is wrong; or no text of a kind has a finite vector.
    """
    template = Template.read(config.embed.template, dict.fromkeys(KINDS, TEXT))
    base = BaseModelFiles.open(config.model.path, config.model.tokenizer, vision=True)
    directory = local_path(config.embed.directory)
    with run_directory(directory, world, job="embed", mlflow=mlflow_target(config, directory)):
        setup = open_encoder(config, base, template, world)
        for kind in config.data.kinds:
            texts = KindTexts.read(config.data.path, kind)
            update = plan_update(config, kind, texts, setup.origin(kind))
            write_missing_parts(update, template, setup.encoder, world)
            world.barrier()
            if world.rank == 0:
                counts = merge_parts(update, setup.encoder.dim, read_segments(config.data.path, kind))
                record_scalars({f"{kind}/{name}": count for name, count in counts.items()}, 0)
            # The other ranks wait here, because planning the next kind reads the directory that rank 0 changes.
            world.barrier()


def follow(config: EmbeddingJob, world: World) -> None:
    """Embed the segments of live rooms as they become known, and store vectors and codes, until the source ends.

    Raises:
        UserError: there are several ranks; or model, source, alignment, codebook or store cannot be opened, read or
            written.
        KeyboardInterrupt, Preempted: a signal has arrived; all that was read is stored.
    """
    if world.size > 1:
        raise UserError(f"--follow is one process, and there are {world.size} ranks; start one")
    clock, stop, settings = Clock(), StopRequest(), follow_settings(config)
    directory = local_path(config.embed.directory) / "follow"
    with run_directory(directory, world, job="embed --follow", mlflow=mlflow_target(config, directory.parent)):
        open_log(directory / "logs", world.rank)
        template = Template.read(config.embed.template, dict.fromkeys(KINDS, TEXT))
        encoder, origin = open_segment_encoder(config, template, world)
        vectors = CacheSettings(encoder.dim, settings.dtype, origin)
        with (
            VectorCache(directory / "cache", vectors, settings.keep_ms) as cache,
            open_fusion(config, cache, directory, world) as fusion,
            open_codes(config.follow, fusion.cache.settings if fusion else vectors) as target,
            closing(open_segments(config, cache.position, clock)) as source,
            stop.installed(),
        ):
            Follower(directory, source, encoder, cache, target, settings, clock, stop, fusion).run()


if __name__ == "__main__":
    sys.exit(main())
