"""Check a job file and the data that it names without training, by the functions that the jobs themselves call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.config.align import AlignConfig
from trainer.config.embed import EmbeddingJob
from trainer.config.finetune import FinetuneConfig
from trainer.config.foresight import ForesightConfig
from trainer.config.load import read_job
from trainer.config.paths import check_outputs
from trainer.config.quantize import QuantizeJob
from trainer.config.ranker import JobConfig
from trainer.config.staytime import StaytimeConfig
from trainer.config.toml import count_mistakes, list_mistakes, validate
from trainer.console.errors import UserError

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset
    from trainer.data.format.time_selection import Selection
    from trainer.llm.models.base_model import BaseModelFiles

T = TypeVar("T")
Job = AlignConfig | EmbeddingJob | FinetuneConfig | ForesightConfig | JobConfig | QuantizeJob | StaytimeConfig

_MODELS: dict[str, type[Job]] = {
    "train": JobConfig,
    "finetune": FinetuneConfig,
    "embed": EmbeddingJob,
    "staytime": StaytimeConfig,
    "quantize": QuantizeJob,
    "align": AlignConfig,
    "foresight": ForesightConfig,
}


@dataclass
class JobCheck:
    """The result of a check.

    Attributes:
        file: the job file.
        kind: command that it is for.
        checked: parts without a problem.
        problems: a line for each.
    """

    file: str
    kind: str
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def run(self, part: str, check: Callable[[], T]) -> T | None:
        """Do one check and record the part or its problem. Returns the result of the check; None after a problem."""
        try:
            result = check()
        except UserError as error:
            self.problems.append(str(error))
            return None
        self.checked.append(part)
        return result


def job_model(kind: str) -> type[Job]:
    """Return the config object of a command's job file."""
    return _MODELS[kind]


def check_job(file: str, overrides: Sequence[str], kind: str | None, ranks: int) -> JobCheck:
    """Check a job file, and with valid keys also its data.

    Args:
        file: the job file.
        overrides: ``section.key=value``, as typed.
        kind: command that the file is for; None finds it by the sections.
        ranks: processes that are to run the job.

    Raises:
        UserError: the file cannot be read, or its kind cannot be told.
    """
    raw = read_job(file, overrides)
    found = JobCheck(file, kind or kind_of(raw, file))
    model = _MODELS[found.kind]
    found.problems += [f"{file}: {mistake}" for mistake in list_mistakes(model, raw)]
    if not found.problems:
        found.checked.append("keys and values")
        job = validate(model, raw, file)
        found.run("outputs", partial(check_outputs, job))
        if isinstance(job, JobConfig):
            _check_ranker(job, ranks, found)
        elif isinstance(job, FinetuneConfig):
            _check_finetune(job, ranks, found)
        elif isinstance(job, EmbeddingJob):
            _check_embed(job, found)
        elif isinstance(job, QuantizeJob):
            _check_quantize(job, found)
        elif isinstance(job, AlignConfig):
            _check_align(job, ranks, found)
        elif isinstance(job, ForesightConfig):
            _check_foresight(job, ranks, found)
        else:
            _check_staytime(job, found)
    return found


def kind_of(raw: dict[str, Any], file: str) -> str:
    """Return the command whose sections a file has, and where several have them, the one with the fewest mistakes."""

    misfits = {
        kind: (sum(section not in model.model_fields for section in raw), count_mistakes(model, raw))
        for kind, model in _MODELS.items()
    }
    equal = [kind for kind, count in misfits.items() if count == min(misfits.values())]
    if len(equal) > 1:
        raise UserError(f"{file}: could be a job of limelight {' or '.join(equal)}; say which by --kind")
    return equal[0]


def _check_ranker(job: JobConfig, ranks: int, found: JobCheck) -> None:
    from trainer.data.format.dataset import Dataset

    data = found.run(f"dataset {job.data.path}", lambda: Dataset.open(job.data.path, job.data.on_corrupt))
    if data is not None:
        # These load torch; a missing dataset is answered without it.
        from trainer.ranking.setup import check_settings, require_training_rows, split_in_time
        from trainer.semantic_ids.store_address import open_existing_store

        split = found.run("times", lambda: split_in_time(job, data.spec))
        if split is not None:
            found.run("rows of training", lambda: require_training_rows(job, _count_rows(data, split.fitting)))
        settings = found.run(
            "behaviours, features and ranks", lambda: check_settings(job, data.spec, ranks, open_existing_store)
        )
        if settings is not None:
            found.run("DeepSpeed settings", lambda: _check_deepspeed(settings, job.train.deepspeed))
    if job.init_from.run:
        from trainer.ranking.warm_start import check_source

        found.run(f"tables of {job.init_from.run}", lambda: check_source(job))


def _count_rows(data: Dataset, selection: Selection) -> int:
    from trainer.data.loading.batch_plan import ReadPlan

    return ReadPlan(data.store, range(data.spec.partitions), selection, batch_size=1, seed=0).rows_total


def _check_finetune(job: FinetuneConfig, ranks: int, found: JobCheck) -> None:
    from trainer.llm.finetuning.option_evaluation import CalibrationOptions, Options
    from trainer.llm.finetuning.prepare import check_length, deepspeed_settings
    from trainer.llm.finetuning.samples import ReadCounts, read_samples

    settings = found.run("batch size and ranks", lambda: deepspeed_settings(job, ranks))
    if settings is not None:
        found.run("DeepSpeed settings", lambda: _check_deepspeed(settings, job.train.deepspeed))

    def count(paths: Sequence[str]) -> int:
        return sum(1 for _ in read_samples(paths, ReadCounts()))

    found.run("data.train", lambda: count(job.data.train))
    found.run("data.general", lambda: count(job.data.general))
    held_out = found.run("data.evaluate", lambda: list(read_samples(job.data.evaluate, ReadCounts())))
    tuning = found.run("data.tune", lambda: list(read_samples(job.data.tune, ReadCounts())))
    if not job.model.path:
        return
    base = _check_base(job.model.path, job.model.tokenizer, found)
    if base is not None:
        found.run("data.length", lambda: check_length(job, base))
        if held_out:
            found.run("options to evaluate", lambda: Options.of(held_out, base.tokenizer, job.data.length))
        if tuning and held_out:
            length = job.data.length
            found.run("options to tune on", lambda: CalibrationOptions.of(tuning, held_out, base.tokenizer, length))


def _check_embed(job: EmbeddingJob, found: JobCheck) -> None:
    from trainer.embed import KINDS, TEXT
    from trainer.llm.embedding.dataset_texts import KindTexts
    from trainer.llm.models.adapter import check_adapter
    from trainer.llm.models.prompt_templates import Template

    found.run(f"template {job.embed.template}", lambda: Template.read(job.embed.template, dict.fromkeys(KINDS, TEXT)))
    for kind in job.data.kinds:
        found.run(f"texts of {kind}", partial(KindTexts.read, job.data.path, kind))
    base = _check_base(job.model.path, job.model.tokenizer, found)
    if base is not None and job.model.adapter:
        found.run(f"adapter {job.model.adapter}", lambda: check_adapter(base, Path(job.model.adapter)))


def _check_staytime(job: StaytimeConfig, found: JobCheck) -> None:
    from trainer.comment_staytime.inputs import load_staytime

    data = found.run(
        f"dataset {job.data.path} with times and features",
        lambda: load_staytime(job.data, job.input, job.lcu, job.run.seed, job.watch),
    )
    if data is not None:
        found.checked.append(f"{len(data.training):,} training and {len(data.held_out):,} held-out visits")


def _check_quantize(job: QuantizeJob, found: JobCheck) -> None:
    from trainer.semantic_ids.segments import SegmentVectors, require_segments

    segments = found.run("segments and their vectors", lambda: SegmentVectors.open(job.data.path, job.data.vectors))
    if segments is not None:
        ranges = found.run("times", lambda: segments.ranges(job.data))
        if ranges is not None:
            found.run("segments of the fit", lambda: require_segments(segments, ranges[0], job.codebook.levels))


def _check_align(job: AlignConfig, ranks: int, found: JobCheck) -> None:
    from trainer.data.format.dataset import Dataset
    from trainer.ranking.setup import require_training_rows, split_in_time
    from trainer.semantic_ids.align_evaluation import Rooms
    from trainer.semantic_ids.align_model import check_alignment, open_segments

    data = found.run(f"dataset {job.data.path}", lambda: Dataset.open(job.data.path, job.data.on_corrupt))
    if data is not None:
        split = found.run("times", lambda: split_in_time(job, data.spec))
        if split is not None:
            found.run("rows of training", lambda: require_training_rows(job, _count_rows(data, split.fitting)))
        settings = found.run("positives, features and ranks", lambda: check_alignment(job, data.spec, ranks))
        if settings is not None:
            found.run("DeepSpeed settings", lambda: _check_deepspeed(settings, job.train.deepspeed))
        if job.data.eval_from:
            found.run("rooms on air", lambda: Rooms.read(job.data.path))
        found.run("segments and their vectors", lambda: open_segments(job, data))


def _check_foresight(job: ForesightConfig, ranks: int, found: JobCheck) -> None:
    from trainer.semantic_ids.foresight_data import ForesightData
    from trainer.semantic_ids.foresight_follow_data import FollowData
    from trainer.semantic_ids.foresight_training import deepspeed_settings

    settings = found.run("batch size and ranks", lambda: deepspeed_settings(job, ranks))
    if settings is not None:
        found.run("DeepSpeed settings", lambda: _check_deepspeed(settings, job.train.deepspeed))
    data = found.run("codes, codebook, times and rows of training", lambda: ForesightData.open(job))
    if data is not None and job.follow is not None:
        found.run("segments to follow", lambda: FollowData.open(job))


def _check_deepspeed(settings: Mapping[str, Any], file: str) -> None:
    """Let DeepSpeed check settings as at the start of a job.

    Raises:
        UserError: DeepSpeed refuses a setting.
    """
    from trainer.engine.dense_engine import check_settings, import_deepspeed

    parts, rows = settings["gradient_accumulation_steps"], settings["train_micro_batch_size_per_gpu"]
    # This process is the only rank, and DeepSpeed compares the batch sizes with the number of ranks.
    check_settings(import_deepspeed(), {**settings, "train_batch_size": parts * rows}, file)


def _check_base(path: str, tokenizer: str, found: JobCheck) -> BaseModelFiles | None:
    """Check a language model in a directory. Nothing is downloaded: one on the hub is reported as not checked."""
    from trainer.llm.models.base_model import BaseModelFiles, is_hub_id

    if is_hub_id(path):
        found.checked.append(f"not {path}, which the job takes from the hub")
        return None
    return found.run(f"model {path}", lambda: BaseModelFiles.open(path, tokenizer))
