"""Vectors of segments with frames, by a tiny random model of the Qwen2-VL family."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.llm.embedding.test_embed import TEMPLATE, TOLERANCE, WORDS
from trainer.config.embed import load_embedding
from trainer.config.finetune import SmallConfig
from trainer.console.errors import UserError
from trainer.llm.embedding import frame_encoder
from trainer.llm.embedding.frame_encoder import FrameSegmentEncoder, read_frame
from trainer.llm.embedding.open_segment_encoder import open_segment_encoder
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.llm.models.small_model import write_small_model
from trainer.runtime.distributed import World

DIM = 32
START, END, PICTURE, VIDEO = 310, 311, 312, 313
PROCESSOR = {"min_pixels": 56 * 56, "max_pixels": 112 * 112, "patch_size": 14, "merge_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with two layers of text and two of vision, the tokenizer of a small model, and a processor."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = tmp_path_factory.mktemp("vision")
    small = SmallConfig(vocabulary=300, hidden=DIM, layers=1, heads=2)
    write_small_model(folder / "text", (" ".join(WORDS) for _ in range(50)), small, seed=3, length=64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    config = Qwen2VLConfig(
        text_config={
            **{"vocab_size": 320, "hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
            **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": DIM, "num_heads": 2, "mlp_ratio": 2},
        vision_start_token_id=START,
        vision_end_token_id=END,
        image_token_id=PICTURE,
        video_token_id=VIDEO,
    )
    torch.manual_seed(5)
    Qwen2VLForConditionalGeneration(config).eval().save_pretrained(folder / "vl")
    tokenizer.save_pretrained(folder / "vl")
    Qwen2VLImageProcessorPil(**PROCESSOR).save_pretrained(folder / "vl")
    return folder / "vl"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 80)), ("b.jpg", (100, 64)), ("c.webp", (56, 56))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    Image.fromarray(rng.integers(0, 255, (30, 30), np.uint8)).save(folder / "grey.png")
    return folder


def arguments(model: Path, out: Path, **changed: Any) -> list[str]:
    keys = {
        **{"data.path": "", "model.path": model, "model.adapter": "", "embed.directory": out, "follow.path": out},
        **{"embed.template": TEMPLATE, "embed.device": "cpu", "embed.length": 32, "follow.source": "lines"},
        **changed,
    }
    return ["configs/embed_follow.toml", *(f"{name}={value}" for name, value in keys.items())]


def open_encoder(model: Path, out: Path, **changed: Any) -> Any:
    options = arguments(model, out, **changed)
    config = load_embedding(options[0], options[1:], follow=True)
    template = Template.read(TEMPLATE, dict.fromkeys(("items", "comments", "segments", "authors"), frozenset({"text"})))
    with World.join("cpu") as world:
        return open_segment_encoder(config, template, world)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_is_that_of_the_frames_and_the_text(model: Path, frames: Path, tmp_path: Path, pooling: str) -> None:
    """Compare with transformers' own forward pass."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    encoder, _ = open_encoder(model, tmp_path, **{"follow.frames": frames, "embed.pooling": pooling})
    assert isinstance(encoder, FrameSegmentEncoder) and encoder.dim == DIM
    names = [["a.png"], ["a.png", "b.jpg", "grey.png"], [], ["c.webp"]]
    texts = ["red boat", "blue cat song", "quick dance", ""]
    vectors, reasons = encoder.encode(texts, names)
    assert reasons == [""] * 4
    whole = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    for text, files, vector in zip(texts, names, vectors, strict=True):
        ids, inputs = tokenizer(f"Said in a live room: {text}")["input_ids"], {}
        if files:
            pictures = [Image.open(frames / name).convert("RGB") for name in files]
            inputs = dict(processor(images=pictures, return_tensors="pt"))
            marks = []
            for _, height, width in inputs["image_grid_thw"].tolist():
                marks += [START, *[PICTURE] * (height * width // 4), END]
            ids = marks + ids
            inputs["mm_token_type_ids"] = (torch.tensor([ids]) == PICTURE).int()
        with torch.no_grad():
            states = whole(input_ids=torch.tensor([ids]), output_hidden_states=True, **inputs).hidden_states[-1][0]
        expected = states[-1] if pooling == "last" else states.mean(dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5, rtol=1e-4)


def test_a_vector_has_the_same_bits_in_every_batch_and_after_others(model: Path, frames: Path, tmp_path: Path) -> None:
    encoder, _ = open_encoder(model, tmp_path, **{"follow.frames": frames})
    texts = ["red boat", "blue cat", "quick dance", "late show", "song"]
    names: list[list[str]] = [["a.png"], [], ["b.jpg", "a.png"], [], ["a.png"]]
    together = encoder.encode(texts, names)[0]
    for at in (4, 1, 2, 0, 3):
        np.testing.assert_array_equal(encoder.encode([texts[at]], [names[at]])[0][0], together[at])
    assert not np.allclose(together[0], encoder.encode(["red boat"], [["b.jpg"]])[0][0])
    assert not np.allclose(together[0], encoder.encode(["red boat"], [[]])[0][0])


def test_the_model_embeds_texts_without_frames_too(model: Path, frames: Path, tmp_path: Path) -> None:
    plain, origin = open_encoder(model, tmp_path)
    with_frames, other = open_encoder(model, tmp_path, **{"follow.frames": frames})
    texts = ["red boat", "blue cat " * 9]
    np.testing.assert_allclose(plain.encode(texts, [(), ()])[0], with_frames.encode(texts, [(), ()])[0], **TOLERANCE)
    assert origin.hash != other.hash


def test_frames_from_elsewhere_are_checked(frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(frames / "pipe.png")
    (frames / "text.png").write_text("no picture")
    (frames / "folder.png").mkdir()
    (frames / "link.png").symlink_to("/etc/hostname")
    whole = (frames / "a.png").read_bytes()
    (frames / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture = io.BytesIO()
    Image.new("RGB", (30, 30)).save(picture, "GIF")
    (frames / "moving.png").write_bytes(picture.getvalue())
    for name, reason in [
        ("nowhere.png", "No such file"),
        ("../frames/a.png", "without '..'"),
        ("/etc/hostname", "must be a relative path"),
        ("link.png", "a link that leads out of"),
        ("pipe.png", "not a regular file but a FIFO"),
        ("folder.png", "directory"),
        ("text.png", "cannot identify image file"),
        ("moving.png", "cannot identify image file"),
        ("cut.png", "truncated"),
    ]:
        with pytest.raises(frame_encoder.FrameError) as error:
            read_frame(frames, name)
        assert reason in str(error.value) and "\n" not in str(error.value), name
    assert read_frame(frames, "grey.png").shape == (3, 30, 30)
    monkeypatch.setattr(frame_encoder, "MAX_FRAME_PIXELS", 60 * 80 - 1)
    with pytest.raises(frame_encoder.FrameError, match="80 x 60 pixels; at most 4,799"):
        read_frame(frames, "a.png")
    monkeypatch.setattr(frame_encoder, "MAX_FRAME_BYTES", 100)
    with pytest.raises(frame_encoder.FrameError, match="such a file has at most 100"):
        read_frame(frames, "a.png")


def test_a_bad_frame_is_a_reason_and_the_others_have_vectors(model: Path, frames: Path, tmp_path: Path) -> None:
    encoder, _ = open_encoder(model, tmp_path, **{"follow.frames": frames})
    vectors, reasons = encoder.encode(["red", "blue"], [["nowhere.png"], ["a.png"]])
    assert "nowhere.png" in reasons[0] and not reasons[1] and vectors[1].any() and not vectors[0].any()


def test_frames_that_the_model_cannot_take_are_a_reason_and_not_the_end(
    model: Path, frames: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (301, 1)).save(frames / "line.png")
    encoder, _ = open_encoder(model, tmp_path, **{"follow.frames": frames, "embed.tokens": 40})
    names = [["line.png"], ["a.png"] * 9, ["a.png"]]
    vectors, reasons = encoder.encode(["red", "blue", "red"], names)
    assert "absolute aspect ratio" in reasons[0] and "more than 40 tokens (embed.tokens)" in reasons[1]
    assert not reasons[2] and vectors.any(axis=1).tolist() == [False, False, True]
    # As many tokens as are accepted.
    lengths: list[int] = []
    encoder._encoder.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for number in range(1, 9):
        lengths.clear()
        reason = encoder.encode(["red"], [["a.png"] * number])[1][0]
        assert bool(reason) != bool(lengths) and all(length <= 40 for length in lengths)


def test_mistakes_are_named(model: Path, frames: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    for changed, message in [
        ({"model.path": bare, "follow.frames": frames}, "no image processor here"),
        ({"follow.frames": tmp_path / "nowhere"}, "no such directory"),
        ({"model.adapter": tmp_path}, "a model of the Qwen2-VL family takes none"),
    ]:
        with pytest.raises(UserError, match=message):
            open_encoder(model, tmp_path, **changed)
    with pytest.raises(UserError, match="the model has type 'qwen2_vl'; use one of the Qwen2 family"):
        BaseModelFiles.open(str(model))
