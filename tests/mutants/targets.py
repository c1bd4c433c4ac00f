"""Modules of the core, the test files of each, and the bugs that change nothing."""

from __future__ import annotations

ENGINE = ("tests/engine/test_hybrid_engine.py", "tests/ranking/test_checkpoints.py", "tests/distributed/test_engine.py")
STREAM = ("tests/stream/live/test_live_stream.py", "tests/ranking/test_stream_train_loop.py")
LABELS = (
    "tests/stream/labels/test_assemblers.py",
    "tests/stream/labels/test_partition_assemblers.py",
    "tests/test_chunks.py",
)
LOADER = ("tests/data/loading/test_batch_plan.py", "tests/data/loading/test_loader.py")
SEARCH = ("tests/modules/search/test_search.py",)
SPARSE = (
    "tests/sparse/test_sharded_tables.py",
    "tests/sparse/test_dedup_exchange.py",
    "tests/engine/test_hybrid_engine.py",
    "tests/distributed/test_engine.py",
)
DYNAMIC = ("tests/sparse/test_dynamic_ids.py", "tests/distributed/test_dynamic.py")
DEVICE = ("tests/sparse/test_device_ids.py", "tests/distributed/test_dynamic.py")
TUNING = (
    "tests/llm/finetuning/test_packed_batch.py",
    "tests/llm/finetuning/test_adapter_engine.py",
    "tests/llm/finetuning/test_jobs.py",
)
STAYTIME = ("tests/comment_staytime/test_evaluation.py", "tests/comment_staytime/test_scoring.py")
CHECKPOINTS = ("tests/checkpoint/test_manifest.py", "tests/ranking/test_checkpoints.py")
ALIGN = (
    "tests/semantic_ids/test_align_features.py",
    "tests/semantic_ids/test_align_job.py",
    "tests/distributed/test_pairs.py",
)
CODES = (
    "tests/data/features/test_code_inputs.py",
    "tests/semantic_ids/test_code_files.py",
    "tests/semantic_ids/test_store_address.py",
)
CONTENT = ("tests/data/features/test_content_inputs.py", "tests/distributed/test_content.py")
FOLLOW = ("tests/semantic_ids/test_follow.py", "tests/semantic_ids/test_follow_job.py")
FORESIGHT = ("tests/semantic_ids/test_foresight.py",)
QUANTIZE = ("tests/semantic_ids/test_quantize.py",)
SEGMENTS = ("tests/semantic_ids/test_segments.py", "tests/data/features/test_segment_index.py")
SEGMENT_TASKS = ("tests/llm/instructions/test_segments.py",)
ANNOTATE = ("tests/llm/instructions/test_annotations.py", "tests/llm/instructions/test_annotate.py")

TESTS: dict[str, tuple[str, ...]] = {
    # Losses and networks.
    "modules/losses.py": ("tests/modules/test_losses.py",),
    "modules/author_fusion.py": ("tests/modules/test_author_fusion.py",),
    "modules/blocks.py": ("tests/modules/test_esu.py", "tests/modules/test_din.py"),
    "modules/codebook.py": ("tests/modules/test_codebook.py",),
    "modules/codebook_kernel.py": ("tests/modules/test_codebook.py",),
    "modules/content.py": ("tests/modules/test_content.py",),
    "modules/foresight.py": ("tests/modules/test_foresight.py",),
    "modules/alignment.py": ("tests/modules/test_alignment.py",),
    "modules/din.py": ("tests/modules/test_din.py",),
    "modules/esu.py": ("tests/modules/test_esu.py",),
    "modules/multitask.py": ("tests/modules/test_multitask.py",),
    "modules/dcn.py": ("tests/modules/test_dcn.py",),
    "modules/ranker.py": ("tests/modules/test_ranker.py",),
    "modules/embeddings.py": ("tests/modules/test_embeddings.py",),
    "modules/staytime/backbones.py": ("tests/modules/staytime/test_backbones.py",),
    "modules/staytime/base_losses.py": ("tests/modules/staytime/test_base_losses.py",),
    "modules/staytime/comment_losses.py": ("tests/modules/staytime/test_comment_losses.py",),
    "modules/staytime/networks.py": ("tests/modules/staytime/test_networks.py",),
    # Searches.
    "modules/search/search.py": SEARCH,
    "modules/search/reference.py": SEARCH,
    "modules/search/cpu_kernels.py": SEARCH,
    "benchmarks/speed/shortlists.py": ("tests/benchmarks/speed/test_search.py",),
    "trainer/data/features/search_vectors.py": ("tests/data/features/test_search_vectors.py",),
    "trainer/ranking/search_refresh.py": (
        "tests/ranking/test_search_refresh.py",
        "tests/data/features/test_search_vectors.py",
        "tests/distributed/test_search.py",
    ),
    # Assemblers and streams.
    "trainer/stream/labels/assembled_rows.py": LABELS,
    "trainer/stream/labels/batch_assembler.py": LABELS,
    "trainer/stream/labels/open_visit.py": LABELS,
    "trainer/stream/labels/policy.py": ("tests/stream/labels/test_policy.py", *LABELS),
    "trainer/stream/labels/partition_assemblers.py": LABELS,
    "trainer/stream/labels/streaming_assembler.py": LABELS,
    "trainer/stream/labels/visit_grouping.py": LABELS,
    "trainer/stream/labels/write_rows.py": LABELS,
    "trainer/stream/live/freshness.py": ("tests/stream/live/test_freshness.py", *STREAM),
    "trainer/stream/live/live_stream.py": STREAM,
    "trainer/stream/live/user_partitions.py": ("tests/stream/live/test_user_partitions.py",),
    "trainer/stream/live/visit_features.py": ("tests/stream/live/test_visit_features.py", *STREAM),
    "trainer/stream/sources/kafka_source.py": tuple(
        f"tests/stream/sources/test_kafka_{name}.py" for name in ("source", "dead_letters", "offsets", "brokers")
    ),
    "trainer/stream/sources/replay.py": ("tests/stream/sources/test_replay.py",),
    "trainer/stream/sources/source.py": ("tests/stream/sources/test_source.py", "tests/stream/sources/test_replay.py"),
    "trainer/stream/sources/time_merge.py": (
        "tests/stream/sources/test_time_merge.py",
        "tests/stream/sources/test_replay.py",
    ),
    "trainer/stream/sources/time_slices.py": (
        "tests/stream/sources/test_time_slices.py",
        "tests/stream/sources/test_replay.py",
        "tests/ranking/test_stream_train_loop.py",
        "tests/distributed/test_stream.py",
    ),
    "trainer/ranking/stream_train_loop.py": (
        "tests/ranking/test_stream_train_loop.py",
        "tests/distributed/test_stream.py",
    ),
    # Loader.
    "trainer/data/loading/batch_plan.py": LOADER,
    "trainer/data/loading/batch.py": LOADER,
    "trainer/data/loading/block_reader.py": LOADER,
    "trainer/data/loading/loader.py": LOADER,
    "trainer/data/features/history_sequences.py": ("tests/data/features/test_history_sequences.py",),
    "trainer/data/features/dense_inputs.py": (
        "tests/data/features/test_dense_inputs.py",
        "tests/data/features/test_feature_map.py",
    ),
    "trainer/data/features/id_map.py": ("tests/data/features/test_id_map.py",),
    "trainer/data/format/growing_history.py": ("tests/data/format/test_growing_history.py",),
    "trainer/data/format/history.py": ("tests/data/format/test_history.py",),
    "trainer/data/format/shards.py": ("tests/data/format/test_shards.py", "tests/data/format/test_verification.py"),
    "trainer/data/format/statistics.py": ("tests/data/format/test_statistics.py",),
    "trainer/data/format/time_selection.py": ("tests/data/format/test_time_selection.py", *LOADER),
    "trainer/data/features/author_means.py": ("tests/data/features/test_author_means.py",),
    "trainer/data/features/code_inputs.py": CODES,
    "trainer/data/features/code_sets.py": CODES,
    "trainer/data/features/content_inputs.py": CONTENT,
    "trainer/data/features/content_tables.py": (
        *CONTENT,
        "tests/ranking/test_warm_start.py",
        "tests/serving/test_export.py",
    ),
    "trainer/data/features/fitted_codes.py": CODES,
    "trainer/data/features/missing_inputs.py": ("tests/data/features/test_missing_inputs.py", *CONTENT),
    "trainer/data/features/segment_index.py": ("tests/data/features/test_segment_index.py",),
    "trainer/data/format/content_vectors.py": ("tests/data/format/test_content_vectors.py",),
    "trainer/data/format/segment_codes.py": (*CODES, "tests/semantic_ids/test_code_features.py"),
    "trainer/data/format/segments.py": SEGMENTS,
    # Engine and tables.
    "trainer/engine/batch_pipeline.py": ("tests/engine/test_batch_pipeline.py", *ENGINE),
    "trainer/engine/dense_engine.py": ENGINE,
    "trainer/engine/history_alignment.py": ("tests/distributed/test_alignment.py",),
    "trainer/engine/hybrid_engine.py": ENGINE,
    "trainer/engine/in_batch_softmax.py": ("tests/distributed/test_pairs.py",),
    "trainer/engine/step_loop.py": (*FORESIGHT, "tests/llm/finetuning/test_jobs.py"),
    "trainer/engine/lr_schedule.py": ("tests/engine/test_lr_schedule.py",),
    "trainer/engine/micro_batches.py": ("tests/engine/test_micro_batches.py",),
    "trainer/sparse/flat_exchange.py": SPARSE,
    "trainer/sparse/cpu_kernel.py": ("tests/sparse/test_cpu_kernel.py", *SPARSE),
    "trainer/sparse/row_intrinsics.py": ("tests/sparse/test_cpu_kernel.py",),
    "trainer/sparse/row_loops.py": ("tests/sparse/test_cpu_kernel.py", *SPARSE),
    "trainer/sparse/dedup_exchange.py": SPARSE,
    "trainer/sparse/exchange.py": SPARSE,
    "trainer/sparse/planner.py": ("tests/sparse/test_planner.py",),
    "trainer/sparse/sharded_tables.py": SPARSE,
    "trainer/sparse/device_ids.py": DEVICE,
    "trainer/sparse/device_kernel.py": DEVICE,
    "trainer/sparse/dynamic_exchange.py": DYNAMIC,
    "trainer/sparse/dynamic_id_kernel.py": DYNAMIC,
    "trainer/sparse/dynamic_ids.py": DYNAMIC,
    "trainer/sparse/dynamic_tables.py": DYNAMIC,
    "trainer/ranking/warm_start.py": ("tests/ranking/test_warm_start.py", "tests/distributed/test_init_from.py"),
    "trainer/ranking/row_mapping.py": ("tests/ranking/test_row_mapping.py",),
    # Checkpoints.
    "trainer/checkpoint/diff.py": ("tests/checkpoint/test_diff.py",),
    "trainer/checkpoint/manifest.py": CHECKPOINTS,
    "trainer/checkpoint/model_state.py": ("tests/checkpoint/test_model_state.py",),
    "trainer/checkpoint/model_index.py": ("tests/checkpoint/test_model_state.py", *CHECKPOINTS),
    "trainer/checkpoint/step_checkpoints.py": (*FORESIGHT, "tests/llm/finetuning/test_jobs.py"),
    "trainer/checkpoint/reader.py": ("tests/checkpoint/test_reader.py", "tests/checkpoint/test_diff.py"),
    "trainer/checkpoint/store.py": CHECKPOINTS,
    "trainer/checkpoint/writer.py": CHECKPOINTS,
    "trainer/ranking/checkpoints.py": CHECKPOINTS,
    "trainer/ranking/training_state.py": CHECKPOINTS,
    # Metrics.
    "trainer/metrics/behaviour_metrics.py": (
        "tests/metrics/test_behaviour_metrics.py",
        "tests/distributed/test_metrics_distributed.py",
    ),
    "trainer/metrics/staytime_metrics.py": ("tests/metrics/test_staytime_metrics.py",),
    "trainer/ranking/evaluation.py": ("tests/ranking/test_evaluation.py", "tests/distributed/test_jobs.py"),
    # Language model.
    "modules/pooling.py": ("tests/modules/test_esu.py", "tests/modules/test_embeddings.py"),
    "modules/text_pooling.py": ("tests/modules/test_text_pooling.py",),
    "trainer/llm/finetuning/adapter_engine.py": TUNING,
    "trainer/llm/finetuning/answer_loss.py": TUNING,
    "trainer/llm/finetuning/option_calibration.py": ("tests/llm/finetuning/test_option_calibration.py",),
    "trainer/llm/finetuning/option_evaluation.py": ("tests/llm/finetuning/test_option_evaluation.py", *TUNING),
    "trainer/llm/finetuning/packed_batch.py": TUNING,
    "trainer/llm/finetuning/packing.py": ("tests/llm/finetuning/test_packing.py",),
    "trainer/llm/finetuning/samples.py": ("tests/llm/finetuning/test_samples.py",),
    "trainer/llm/finetuning/token_files.py": ("tests/llm/finetuning/test_token_files.py",),
    "trainer/llm/embedding/learned_query.py": ("tests/llm/embedding/test_embed.py",),
    "trainer/llm/embedding/text_encoder.py": (
        "tests/llm/embedding/test_text_encoder.py",
        "tests/llm/embedding/test_embed.py",
    ),
    "trainer/llm/finetuning/train_loop.py": ("tests/llm/finetuning/test_jobs.py",),
    "trainer/llm/instructions/annotate.py": ANNOTATE,
    "trainer/llm/instructions/annotations.py": ANNOTATE,
    "trainer/llm/instructions/chat_endpoint.py": ANNOTATE,
    "trainer/llm/instructions/segment_tasks.py": SEGMENT_TASKS,
    "trainer/llm/instructions/segments.py": SEGMENT_TASKS,
    "trainer/llm/instructions/world_truth.py": SEGMENT_TASKS,
    "trainer/llm/instructions/write_segments.py": SEGMENT_TASKS,
    "trainer/llm/instructions/buckets.py": ("tests/llm/instructions/test_instructions.py",),
    "trainer/llm/instructions/tasks.py": ("tests/llm/instructions/test_instructions.py",),
    "trainer/llm/instructions/past.py": ("tests/llm/instructions/test_instructions.py",),
    "trainer/llm/models/base_model.py": ("tests/llm/models/test_base_model.py",),
    "trainer/llm/models/adapter.py": ("tests/llm/models/test_base_model.py", "tests/llm/embedding/test_embed.py"),
    # Semantic ids.
    "trainer/semantic_ids/align_content.py": ("tests/semantic_ids/test_align_content.py", *ALIGN),
    "trainer/semantic_ids/align_encode.py": ALIGN,
    "trainer/semantic_ids/align_evaluation.py": ("tests/semantic_ids/test_align_evaluation.py", *ALIGN),
    "trainer/semantic_ids/align_features.py": ALIGN,
    "trainer/semantic_ids/align_model.py": ALIGN,
    "trainer/semantic_ids/align_popularity.py": ("tests/semantic_ids/test_align_popularity.py", *ALIGN),
    "trainer/semantic_ids/code_features.py": ("tests/semantic_ids/test_code_features.py",),
    "trainer/semantic_ids/code_files.py": ("tests/semantic_ids/test_code_files.py", *QUANTIZE),
    "trainer/semantic_ids/code_matching.py": ("tests/semantic_ids/test_code_matching.py", *QUANTIZE),
    "trainer/semantic_ids/codebook_fit.py": (*QUANTIZE, "tests/semantic_ids/test_codebook_version.py"),
    "trainer/semantic_ids/codebook_report.py": ("tests/semantic_ids/test_codebook_report.py", *QUANTIZE),
    "trainer/semantic_ids/codebook_version.py": ("tests/semantic_ids/test_codebook_version.py", *QUANTIZE),
    "trainer/semantic_ids/fixed_point.py": (
        "tests/semantic_ids/test_fixed_point.py",
        "tests/semantic_ids/test_kmeans.py",
    ),
    "trainer/semantic_ids/follow.py": FOLLOW,
    "trainer/semantic_ids/follow_pace.py": ("tests/semantic_ids/test_follow_pace.py", *FOLLOW),
    "trainer/semantic_ids/follow_report.py": FOLLOW,
    "trainer/semantic_ids/foresight_baselines.py": ("tests/semantic_ids/test_foresight_baselines.py", *FORESIGHT),
    "trainer/semantic_ids/foresight_data.py": FORESIGHT,
    "trainer/semantic_ids/foresight_engine.py": FORESIGHT,
    "trainer/semantic_ids/foresight_report.py": FORESIGHT,
    "trainer/semantic_ids/foresight_rows.py": (
        "tests/semantic_ids/test_foresight_rows.py",
        "tests/semantic_ids/test_foresight_baselines.py",
        *FORESIGHT,
    ),
    "trainer/semantic_ids/foresight_training.py": FORESIGHT,
    "trainer/semantic_ids/kmeans.py": ("tests/semantic_ids/test_kmeans.py", *QUANTIZE),
    "trainer/semantic_ids/kmeans_start.py": ("tests/semantic_ids/test_kmeans.py", *QUANTIZE),
    "trainer/semantic_ids/kmeans_state.py": (*QUANTIZE, "tests/test_no_code_in_files.py"),
    "trainer/semantic_ids/retrieval.py": ("tests/semantic_ids/test_retrieval.py",),
    "trainer/semantic_ids/segment_labels.py": ("tests/semantic_ids/test_retrieval.py",),
    "trainer/semantic_ids/segments.py": SEGMENTS,
    # Staytime.
    "trainer/comment_staytime/comment_selection.py": (
        "tests/comment_staytime/test_comment_selection.py",
        *STAYTIME,
    ),
    "trainer/comment_staytime/comment_texts.py": ("tests/comment_staytime/test_comment_selection.py", *STAYTIME),
    "trainer/comment_staytime/earlier_events.py": ("tests/comment_staytime/test_earlier_events.py",),
    "trainer/comment_staytime/evaluation.py": (*STAYTIME, "tests/comment_staytime/test_watch_times.py"),
    "trainer/comment_staytime/inputs.py": (*STAYTIME, "tests/comment_staytime/test_watch_times.py"),
    "trainer/comment_staytime/model.py": (*STAYTIME, "tests/comment_staytime/test_watch_times.py"),
    "trainer/comment_staytime/scoring.py": STAYTIME,
    "trainer/comment_staytime/watch_times.py": ("tests/comment_staytime/test_watch_times.py",),
}
"""Module -> its test files; the mirrored file first."""

LEFT_OUT = (
    "tests/modules/test_esu.py::test_gradients_are_those_of_finite_differences",
    "tests/comment_staytime/test_evaluation.py::test_text_and_comments_are_worth_something",
    "tests/benchmarks/speed/test_search.py::test_a_small_run",
)
"""Tests that do not run, since they take longer than all others of their file; a bug that only they find survives."""

SLOW = {
    "modules/codebook_kernel.py": (
        "tests/modules/test_codebook.py::test_a_processor_with_short_registers_finds_the_same_codes",
    ),
}
"""Module -> names of its slow tests that run if all others pass."""

EQUAL: dict[tuple[str, str, str], str] = {
    (
        "benchmarks/speed/shortlists.py",
        "since = np.where(run >= 0, self.stop[run] if len(self.first) else 0, first)",
        "since = np.where(run > 0, self.stop[run] if len(self.first) else 0, first)",
    ): "the room for the list grows, and its content is the same",
    (
        "modules/search/search.py",
        "return np.where((rows > 0) & (rows < len(self.values)), rows, 0)",
        "return np.where((rows >= 0) & (rows < len(self.values)), rows, 0)",
    ): "row 0 becomes row 0 in both ways",
    (
        "modules/search/search.py",
        "at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(stop - ends, lengths)",
        "at = np.arange(ends[-1] if len(ends) else 1) + np.repeat(stop - ends, lengths)",
    ): "the sum of one number and of no number is no number",
    (
        "modules/staytime/base_losses.py",
        "inner = np.quantile(opened, np.linspace(0, 1, leaves)[1:-1]) if len(opened) else np.zeros(0)",
        "inner = np.quantile(opened, np.linspace(0, 1, leaves)[1:]) if len(opened) else np.zeros(0)",
    ): "the next line leaves out the largest stay",
    (
        "modules/alignment.py",
        "positive = scores.gather(2, own[None, :, None].expand(len(scores), -1, -1))[..., 0]",
        "positive = scores.gather(2, own[None, :, None].expand(len(scores), -1, 1))[..., 0]",
    ): "the last dimension has the size 1",
    ("trainer/data/format/growing_history.py", "_SPARE = 1_000", "_SPARE = 999"): "gaps are removed a little earlier",
    (
        "trainer/data/format/growing_history.py",
        "more = 2 * len(self._users) - len(self._begin)",
        "more = 1 * len(self._users) - len(self._begin)",
    ): "room for the users that are there; only the number of copies grows",
    (
        "trainer/data/format/history.py",
        'description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows,)}',
        'description = {"descr": self._dtype.str, "fortran_order": True, "shape": (self._rows,)}',
    ): "the array has one dimension",
    (
        "trainer/ranking/search_refresh.py",
        "inside = (ids >= 0) & (ids < item.rows - 1)",
        "inside = (ids >= 0) | (ids < item.rows - 1)",
    ): "an id outside of the table has row 0, which is set to zeros after all others",
    (
        "trainer/comment_staytime/model.py",
        "chosen = np.zeros((len(rows), 0), np.int64)",
        "chosen = np.zeros((len(rows), 1), np.int64)",
    ): "a network without LCU reads no input of the comments",
    (
        "trainer/data/format/history.py",
        "ends = self._entries + np.cumsum(per_run.reshape(-1)).reshape(per_run.shape)",
        "ends = self._entries + np.cumsum(per_run.reshape(-2)).reshape(per_run.shape)",
    ): "numpy takes any negative length for the unknown one",
    (
        "trainer/data/loading/loader.py",
        "DEATH_SECONDS = 1.0",
        "DEATH_SECONDS = 2.0",
    ): "the wait ends as soon as the worker's end is known; the limit only has to be long enough",
    (
        "trainer/engine/history_alignment.py",
        "present = torch.stack([lengths[keys[0].name] > 0 for keys in self.histories])",
        "present = torch.stack([lengths[keys[1].name] > 0 for keys in self.histories])",
    ): "the lookups of a history have the same entries, item and author one id for each",
    (
        "trainer/llm/finetuning/option_evaluation.py",
        "packs = epoch_packs(options.tokens.lengths, length, seed=0, epoch=0, packing=True)",
        "packs = epoch_packs(options.tokens.lengths, length, seed=0, epoch=1, packing=True)",
    ): "options are packed in another order, and each is scored by itself",
    (
        "trainer/stream/labels/write_rows.py",
        "_ROWS_AT_ONCE = 1 << 18",
        "_ROWS_AT_ONCE = 1 << 19",
    ): "rows are copied in other portions; tests/test_chunks.py compares portions of three rows",
    (
        "trainer/stream/live/live_stream.py",
        "needed_visits = sum(assembler.open_visits + assembler.waiting_events for assembler in assemblers) + len(",
        "needed_visits = sum(assembler.open_visits + assembler.waiting_events for assembler in assemblers) - len(",
    ): "finished visits are dropped earlier; they can give no more rows",
    (
        "trainer/data/features/author_means.py",
        "_mean_of_blocks(np.empty((0, width), np.float32), none, none, np.empty((0, width)), out)",
        "_mean_of_blocks(np.empty((0, width), np.float32), none, none, np.empty((1, width)), out)",
    ): "the call compiles the loop; only the types count",
    (
        "trainer/data/features/segment_index.py",
        "first[row] = stop[row] = 0",
        "first[row] = stop[row] = 1",
    ): "an empty span is empty wherever it begins",
    (
        "trainer/semantic_ids/align_evaluation.py",
        "return HeldOut(none, none, none, none, np.empty((0, 0), np.float32))",
        "return HeldOut(none, none, none, none, np.empty((1, 0), np.float32))",
    ): "where there are no pairs, no vector is read",
    (
        "trainer/semantic_ids/align_features.py",
        "values = np.zeros((len(author) + 1, len(names)), np.float32)",
        "values = np.zeros((len(author) + 2, len(names)), np.float32)",
    ): "line 0 is that of unknown authors, and no author has one after the last",
    (
        "trainer/semantic_ids/codebook_report.py",
        'unused.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)',
        'unused.legend(fontsize=8, loc="upper center", bbox_to_anchor=(1.0, -0.12), ncol=3)',
    ): "a legend stands beside its picture",
    (
        "trainer/semantic_ids/kmeans.py",
        "if self.world.max(int(found.largest > LARGEST_MAGNITUDE)):",
        "if self.world.max(int(found.largest >= LARGEST_MAGNITUDE)):",
    ): "no number of float16 or float32 is 1e15",
    (
        "trainer/semantic_ids/kmeans_start.py",
        "refused += 1",
        "refused += 2",
    ): "distances are brought up to date at another time; the draws have the same distribution",
    (
        "trainer/semantic_ids/segments.py",
        "NO_LIMIT_MS = (1 << 62) - 1",
        "NO_LIMIT_MS = (2 << 62) - 1",
    ): "no segment becomes known so late",
    (
        "trainer/semantic_ids/follow.py",
        "return AppendCounts(0, 0, 0, 0)",
        "return AppendCounts(1, 0, 0, 0)",
    ): "of these counts, the job reads that of conflicts only",
    (
        "trainer/semantic_ids/follow.py",
        "return AppendCounts(0, 0, 0, 0)",
        "return AppendCounts(0, 1, 0, 0)",
    ): "of these counts, the job reads that of conflicts only",
}
"""File, line and line with the bug -> reason why no result changes."""
