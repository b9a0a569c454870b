"""Parts of a quantised weight that do not belong together are refused when the checkpoint is opened, not while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from packed_layers import LAYERS, open_layer

from flm.kernels.stored import StoredMatrix
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import SafetensorsFile
from flm.worker.files.safetensors_writer import SafetensorsWriter
from flm.worker.packing.prepared import METHOD, write_weight

NAMES = (
    "gptq desc_act",
    "awq",
    "chatglm int4",
    "compressed asym",
    "compressed order",
    "int-quantized asym",
    "fp8 block",
)


PREPARED = ["m.weight", "m.weight_scale", "m.weight_offset", "m.weight_gather"]


def prepared(tmp_path: Path) -> tuple[packers.Layer, dict[str, Any]]:
    """What `flm-cluster convert` writes of a weight whose inputs are gathered."""
    layer, config = LAYERS["gptq desc_act"]
    n, k = layer[1].shape
    matrix = open_layer(tmp_path, layer, config).matrix("m.weight", Span(0, n), Span(0, k))
    with SafetensorsWriter(tmp_path / "prepared.safetensors", PREPARED) as writer:
        columns = write_weight(writer, "m.weight", StoredMatrix.of(matrix))
    written = SafetensorsFile(tmp_path / "prepared.safetensors")
    tensors = {name.removeprefix("m."): written.read(name) for name in written.tensors}
    assert columns == k
    return (tensors, layer[1]), {
        "quantization_config": {"quant_method": METHOD, "columns": {"m.weight": columns}}
    }


def damaged(values: Any) -> Iterator[Any]:
    yield values[:-1]
    yield values[:0]
    yield values.reshape(-1)
    yield values[None]
    yield np.ascontiguousarray(values.T)
    yield np.ascontiguousarray(values[..., :-1])
    yield values.astype(np.float32)
    if values.dtype.kind in "iu":
        yield np.full_like(values, np.iinfo(values.dtype).max)


@pytest.mark.parametrize("name", [*NAMES, "prepared"])
def test_parts_that_do_not_belong_together_are_refused_at_once(tmp_path: Path, name: str) -> None:
    (parts, meant), config = prepared(tmp_path) if name == "prepared" else LAYERS[name]
    (n, k), refused = meant.shape, 0
    for part, values in parts.items():
        for other in damaged(values):
            try:
                source = open_layer(tmp_path, (parts | {part: other}, meant), config)
                whole = "m.weight" in source.names() and source.shape("m.weight") == (n, k)
                source.storage("m.weight")
            except CheckpointError:
                refused += 1
                continue
            if whole:
                assert source.matrix("m.weight", Span(0, n), Span(0, k)).dequantize().shape == (n, k)
    assert refused > 5
