"""Fit a codebook of a dataset's segments, and write it as a version. One process runs on every rank.

    limelight quantize configs/quantize.toml --ranks 2
    limelight quantize refresh configs/quantize.toml --from data/codebooks/first codebook.directory=data/codebooks/next
    torchrun --nproc-per-node 2 -m trainer.quantize configs/quantize.toml codebook.seed=2

The centroids have the same bits on any number of ranks. The same command again continues a fit that was killed after
its last pass. With ``--from`` the fit starts from the centroids of an old version, and its codes are numbered so that
as many segments as possible keep theirs.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.run_directory import run_directory
from trainer.checkpoint.tracked_metrics import mlflow_target, numbers
from trainer.config.paths import absolute_paths
from trainer.config.quantize import QuantizeJob, load_quantize
from trainer.console.exit_status import end_on_sigterm
from trainer.console.job_arguments import QUANTIZE_ARGUMENTS, parse_rank_arguments
from trainer.console.outputs import local_path
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.tracking import record_scalars
from trainer.semantic_ids import codebook_fit
from trainer.semantic_ids.code_matching import KeptShares
from trainer.semantic_ids.codebook_fit import FitData
from trainer.semantic_ids.codebook_version import CodebookVersion, write_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.quantize``."""
    options = parse_rank_arguments(
        "trainer.quantize", "Fit a codebook of segments; one process per rank.", QUANTIZE_ARGUMENTS, arguments
    )

    def job() -> None:
        config = absolute_paths(load_quantize(options.config, options.overrides))
        with World.join(config.codebook.device) as world:
            # Not before the ranks have joined: a rank that waits for the others runs no handler.
            end_on_sigterm()
            quantize(config, world, options.old, options.compare_cold)

    return run_rank(job)


def quantize(config: QuantizeJob, world: World, old_path: str | None, compare_cold: bool) -> None:
    """Write a codebook version. Collective.

    Args:
        config: the job.
        world: its ranks.
        old_path: version to refresh; None fits a new codebook.
        compare_cold: also fit from the job's own start, and report how many segments would keep their code then.

    Raises:
        UserError: segments or vectors are missing, damaged, or not those of the old version; there are fewer distinct
            vectors than codes; or the version exists or cannot be written.
    """
    directory = local_path(config.codebook.directory)
    old = CodebookVersion.open(old_path) if old_path else None
    data = FitData.open(config, world)
    if old is not None:
        old.check_vectors(data.segments.table.path, data.segments.table.dim, data.segments.table.origin)
    done = world.on_first_rank(lambda: codebook_fit.finished_version(directory, config, data, old) is not None)
    if not done:
        work = directory.with_name(f"{directory.name}.fit")
        with run_directory(work, world, job="quantize", mlflow=mlflow_target(config, directory)):
            _fit_and_write(config, world, data, old, work, compare_cold)
            if world.rank == 0:
                shutil.rmtree(work)
    if world.rank == 0:
        codebook_fit.log_version(CodebookVersion.open(directory), done)


def _fit_and_write(
    config: QuantizeJob, world: World, data: FitData, old: CodebookVersion | None, work: Path, compare_cold: bool
) -> None:
    kept: dict[str, KeptShares] = {}
    codebook = codebook_fit.fit_codebook(config, data, world, work / "state.npz", old.codebook if old else None)
    if old is not None:
        codebook, shares = codebook_fit.match_with_old(codebook, old, data, world)
        kept |= {f"warm, {name}": share for name, share in shares.items()}
        if compare_cold:
            cold = codebook_fit.fit_codebook(config, data, world, work / "cold.npz", None)
            shares = codebook_fit.match_with_old(cold, old, data, world)[1]
            kept |= {f"{config.codebook.start}, {name}": share for name, share in shares.items()}
    report = codebook_fit.held_out_report(codebook, data, world)
    if world.rank > 0:
        return
    if old is not None:
        report = {**(report or {}), "refresh": codebook_fit.refresh_document(old, data, kept)}
    write_version(
        local_path(config.codebook.directory),
        codebook,
        origin=data.segments.table.origin,
        vectors=data.fitted,
        settings=codebook_fit.fit_settings(config.codebook),
        matched_from=old.name if old else "",
        report=report,
    )
    levels = enumerate((report or {}).get("levels", ()), 1)
    record_scalars({name: value for level, found in levels for name, value in numbers(found, f"held_out/{level}")}, 0)


if __name__ == "__main__":
    sys.exit(main())
