"""A trained predictor of Foresight: read from its run in one process, with the range of time that it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modules.foresight import ForesightPredictor, ForesightSize
from trainer.checkpoint.manifest import FORESIGHT, JOB, check_files, model_hash
from trainer.checkpoint.reader import Checkpoint
from trainer.checkpoint.run_directory import load_foresight_run
from trainer.config.foresight import ForesightConfig
from trainer.config.iso_time import time_text
from trainer.config.load import parse_time
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.runtime.checksums import verify_checksums
from trainer.runtime.stored_files import read_json_object
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.foresight_data import open_version
from trainer.semantic_ids.segments import NO_LIMIT_MS


def predictor_size(config: ForesightConfig, codes: int) -> ForesightSize:
    """Return the sizes of a job's predictor for a number of codes."""
    model = config.model
    return ForesightSize(
        codes=codes, runs=config.data.runs, copy=model.copy_runs, **model.model_dump(exclude={"copy_runs"})
    )


@dataclass(frozen=True)
class TrainedPredictor:
    """A trained predictor.

    Attributes:
        directory: directory of its run.
        config: its job.
        version: codebook version of its codes.
        checkpoint: directory of the checkpoint.
        hash: hash of the model in it.
        seen_until_ms: the targets of its training became known before this time; ``NO_LIMIT_MS`` without an end.
        timezone: IANA name of the time zone of its dataset.
    """

    directory: Path
    config: ForesightConfig
    version: CodebookVersion
    checkpoint: Path
    hash: str
    seen_until_ms: int
    timezone: str

    @staticmethod
    def open(directory: Path) -> TrainedPredictor:
        """Open a finished run.

        Raises:
            UserError: there is no run of Foresight, it has not finished, it or its codebook is damaged, or the codebook
                is another one than that of the training.
        """
        config = load_foresight_run(directory)
        verify_checksums(directory, ("config.json", "deepspeed.json"))
        if not (directory / "metrics.json").exists():
            raise UserError(f"{directory}: this run has not finished; the command that started it continues it")
        found = Checkpoint.open(directory)
        if found.manifest.kind != FORESIGHT:
            raise UserError(f"{found.directory}: no checkpoint of a predictor")
        if problems := check_files(found.directory, found.manifest):
            raise UserError(
                f"{found.directory}: damaged ({problems[0]}); `limelight checkpoint verify` lists all damaged files"
            )
        version = open_version(config.data.codebook)
        then = read_json_object(found.directory / JOB).get("codebook")
        if then != version.name:
            raise UserError(
                f"{directory}: trained on codes of the codebook version {then!a:.120}, and {version.path} is "
                f"{version.name} now; restore that version"
            )
        timezone = DatasetSpec.load(config.data.path).timezone
        key, text = _end(config)
        seen = parse_time(text, timezone, key) if text else NO_LIMIT_MS
        return TrainedPredictor(
            directory, config, version, found.directory, model_hash(found.directory), seen, timezone
        )

    def predictor(self) -> ForesightPredictor:
        """Return the predictor with the values of the checkpoint, for inference.

        Raises:
            UserError: the checkpoint is damaged, or of a predictor of another size.
        """
        model = Checkpoint.open(self.checkpoint).model
        state = {name: slots["parameter"].read() for name, slots in model.dense.items() if "parameter" in slots}
        size, centroids = predictor_size(self.config, self.version.levels[0]), self.version.codebook.levels[0]
        predictor = ForesightPredictor(size, centroids)
        wanted = {name: tuple(value.shape) for name, value in predictor.state_dict().items()}
        # A checkpoint also has the buffers that follow from the sizes alone.
        state |= {name: buffer.read() for name, buffer in model.buffers.items() if name in wanted}
        if wanted != {name: tuple(value.shape) for name, value in state.items()}:
            raise UserError(f"{self.checkpoint}: has a predictor of another size than config.json says")
        predictor.load_state_dict(state)
        return predictor.eval()

    def check_from(self, option: str, from_ms: int) -> None:
        """Check that the predictor has not seen the segments from a time on.

        Raises:
            UserError: it has.
        """
        if self.seen_until_ms == NO_LIMIT_MS:
            raise UserError(
                f"{self.directory}: trained on all segments ({_end(self.config)[0]} is empty), so every forecast would "
                "be of a predictor that has seen what comes; train one up to a time"
            )
        if from_ms < self.seen_until_ms:
            raise UserError(
                f"{option} is before {time_text(self.seen_until_ms, self.timezone)}, up to which the predictor of "
                f"{self.directory} has seen what comes; begin then or later"
            )


def _end(config: ForesightConfig) -> tuple[str, str]:
    """Return key and value of the end of a job's range of training."""
    if config.follow is not None:
        return "follow.until", config.follow.until
    return "data.train_until", config.data.train_until
