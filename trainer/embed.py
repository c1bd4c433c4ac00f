"""Encode the texts of a dataset into vectors. One process runs on every rank.

    limelight embed configs/embed.toml --ranks 2
    torchrun --nproc-per-node 2 -m trainer.embed configs/embed.toml embed.pooling=mean

The texts are split into parts, and each part is written atomically by one rank. The same command again writes the parts
that are missing, on any number of ranks, and produces the same tables. Vectors of unchanged texts are kept from an
existing table, which is replaced as a whole at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.checkpoint.run_directory import run_directory
from trainer.config.embed import EmbeddingJob, Kind, load_embedding
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.outputs import local_path
from trainer.llm.embedding.dataset_texts import KindTexts
from trainer.llm.embedding.vector_table_update import merge_parts, open_encoder, plan_update, write_missing_parts
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.distributed import World, run_rank

TEXT = frozenset({"text"})
KINDS: tuple[Kind, ...] = ("items", "comments", "segments", "authors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.embed``."""
    options = parse_rank_arguments(
        "trainer.embed", "Make vectors of a dataset's texts; one process per rank.", TRAIN_ARGUMENTS, arguments
    )

    def job() -> None:
        config = load_embedding(options.config, options.overrides)
        with World.join(config.embed.device) as world:
            embed(config, world)

    return run_rank(job)


def embed(config: EmbeddingJob, world: World) -> None:
    """Write a table for each kind of text. Collective.

    Raises:
        UserError: the dataset lacks texts of a kind; model, tokenizer or adapter are missing or do not fit each other;
            the template is wrong; or no text of a kind has a finite vector.
    """
    template = Template.read(config.embed.template, dict.fromkeys(KINDS, TEXT))
    base = BaseModelFiles.open(config.model.path, config.model.tokenizer)
    directory = local_path(config.embed.directory)
    with run_directory(directory, world):
        setup = open_encoder(config, base, template, world)
        for kind in config.data.kinds:
            texts = KindTexts.read(config.data.path, kind)
            update = plan_update(config, kind, texts, setup.origin(kind))
            write_missing_parts(update, template, setup.encoder, world)
            world.barrier()
            if world.rank == 0:
                merge_parts(update, setup.encoder.dim)
            # The other ranks wait here, because planning the next kind reads the directory that rank 0 changes.
            world.barrier()


if __name__ == "__main__":
    sys.exit(main())
