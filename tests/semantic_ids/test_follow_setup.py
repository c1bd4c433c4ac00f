"""Codebook and store of a following job are checked before any segment is embedded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.semantic_ids.segment_world import make_version
from trainer.config.embed import FollowConfig
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids.follow_setup import open_codes
from trainer.semantic_ids.vector_cache_parts import CacheSettings


def test_a_codebook_with_more_tuples_than_numbers_is_refused_at_the_start(tmp_path: Path) -> None:
    vectors = CacheSettings(2, "float32", Origin(model="small", hash="abc"))
    for sizes, accepted in (((2048, 1024, 1024), True), ((2048, 1024, 1025), False)):
        version, store = make_version(tmp_path / f"{sizes[2]}", *sizes, dim=2), tmp_path / f"{sizes[2]}.sqlite"
        config = FollowConfig(codebook=str(version.path), store=str(store))
        if accepted:
            with open_codes(config, vectors) as target:
                assert target is not None
        else:
            with pytest.raises(UserError, match="has 2,149,580,800 tuples of codes"), open_codes(config, vectors):
                pass
        assert store.exists() == accepted
