"""Write the fused author vector of each segment of a dataset with a trained alignment. One process runs per rank.

    limelight align encode runs/align data/segments --out data/fused
    torchrun --nproc-per-node 2 -m trainer.encode_authors runs/align --out data/fused

``limelight quantize configs/quantize.toml data.vectors=data/fused`` makes codes of the vectors.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.console.job_arguments import ENCODE_AUTHORS_ARGUMENTS, parse_rank_arguments
from trainer.runtime.distributed import World, run_rank
from trainer.semantic_ids.align_encode import encode_segments
from trainer.semantic_ids.align_model import TrainedAlignment

logger = logging.getLogger("trainer.encode_authors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.encode_authors``."""
    options = parse_rank_arguments(
        "trainer.encode_authors", "Encode authors; one process per rank.", ENCODE_AUTHORS_ARGUMENTS, arguments
    )

    def job() -> None:
        with World.join("auto") as world:
            model = TrainedAlignment.open(Path(options.run), options.dataset, options.vectors, world)
            encoded = encode_segments(model, Path(options.out), world)
            model.engine.close()
            if world.rank == 0:
                document = {"out": options.out, **encoded._asdict()}
                print(json.dumps(document, indent=1) if options.as_json else f"{options.out}: {encoded}")

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
