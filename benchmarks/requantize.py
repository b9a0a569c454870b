"""Write the Q4_0 twin of a Q4_1 GGUF: the format llama.cpp runs fastest on CPUs ("llama.cpp's best").

Q4_1 matrices are dequantised and quantised again to Q4_0; all else (Q8_0 embedding, float norms, metadata) is kept.
Usage: python benchmarks/requantize.py SOURCE.gguf TARGET.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf

DERIVED = ("GGUF.", "general.architecture")  # written by the writer itself
MOSTLY_Q4_0 = 2  # general.file_type


def requantize(source: Path, target: Path) -> None:
    """Read the GGUF at `source`, write its Q4_0 form to `target` (replaced when it is there)."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, entry in reader.fields.items():
        if name.startswith(DERIVED):
            continue
        value = MOSTLY_Q4_0 if name == "general.file_type" else entry.contents()
        element = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(name, value, entry.types[0], sub_type=element)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.Q4_1:
            kind = gguf.GGMLQuantizationType.Q4_0
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    requantize(Path(sys.argv[1]), Path(sys.argv[2]))
