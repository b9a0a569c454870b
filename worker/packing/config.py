"""Which packing a directory's weights have: the one place where quantization_config is read."""

from __future__ import annotations

from typing import Any

from flm.kernels.packings import FP8_BLOCK, unit_of
from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import Fields, read_json
from flm.worker.packing.awq import AWQ
from flm.worker.packing.chatglm import ChatGLM
from flm.worker.packing.compressed import CompressedTensors
from flm.worker.packing.fp8 import FP8
from flm.worker.packing.gptq import GPTQ
from flm.worker.packing.module import Packing
from flm.worker.packing.prepared import METHOD, Prepared
from flm.worker.tensors.tensor_source import Storage

SUPPORTED = (
    "gptq (4 and 8 bits)", "awq (gemm, 4 bits)", "fp8 (e4m3)",
    "compressed-tensors (pack-quantized, int-quantized, float-quantized)", "quantization_bit 4 or 8 (ChatGLM)",
    "wbits 4 or 8 (MOSS)",
)  # fmt: skip
SEPARATE_FILES = (
    "quantize_config.json",
    "quant_config.json",
)  # AutoGPTQ's and AutoAWQ's, where config.json is silent
_MOSS_FLOAT, _MOSS_GROUP = (
    32,
    128,
)  # its wbits for weights that are not packed; its groupsize where none is said
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized")


def read_packing(config: Fields) -> Packing | None:
    """The packing that config.json, or a separate file beside it, speaks of; None for plain float weights.

    Raises CheckpointError that names the method and what is supported."""
    found = config.section("quantization_config") or config.section("compression_config")
    if found is None and config.get("quantization_bit"):
        return ChatGLM(_bits(config, "quantization_bit", (4, 8)))
    if found is None and config.get("wbits") not in (None, _MOSS_FLOAT):
        group = _group(config, "groupsize") if config.get("groupsize") is not None else _MOSS_GROUP
        return GPTQ(_bits(config, "wbits", (4, 8)), group, 1)
    for name in SEPARATE_FILES:
        path = config.file.parent / name
        if found is None and path.is_file():
            found = read_json(path)
    return None if found is None else _packing(found)


def said_storage(packing: Packing | None, inputs: int) -> Storage | None:
    """How such a packing keeps a layer with that many inputs, as far as config.json alone says it; None where it does not."""
    match packing:
        case FP8():
            return Storage.of_groups("FP8", "fp8", FP8_BLOCK, 0, scale_bits=32 / FP8_BLOCK)
        case GPTQ(bits, group) | CompressedTensors((group, *_), bits=bits):
            pass
        case AWQ(group):
            bits = 4
        case ChatGLM(bits) | CompressedTensors(bits=bits):
            group = -1
        case _:
            return None
    unit = unit_of(group, inputs)
    return Storage.of_groups(f"int{bits}", f"int{bits}", unit, 0, scale_bits=64 / unit) if bits else None


def _packing(found: Fields) -> Packing:
    method = found.get("quant_method")
    if method is None:  # AutoGPTQ's and AutoAWQ's own files leave it out
        method = "awq" if found.get("w_bit") or found.get("zero_point") is not None else "gptq"
    if method in ("gptq", "gptqmodel"):
        return _gptq(found)
    if method == "awq":
        return _awq(found)
    if method == "fp8":
        return _fp8(found)
    if method == "compressed-tensors":
        return _compressed(found)
    if method == METHOD:
        columns = found.section("columns")
        return Prepared({name: columns.integer(name) for name in columns.raw} if columns else {})
    raise _unsupported(found, f"quantization method {method!r}")


def _gptq(found: Fields) -> GPTQ:
    form = found.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _unsupported(found, f"GPTQ's checkpoint_format {form!r}")
    return GPTQ(_bits(found, "bits", (4, 8)), _group(found, "group_size"), 1 if form == "gptq" else 0)


def _awq(found: Fields) -> AWQ:
    version = str(found.get("version") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(found, f"AWQ's version {version!r}")
    _bits(found, "bits" if found.get("bits") is not None else "w_bit", (4,))
    return AWQ(_group(found, "group_size" if found.get("group_size") is not None else "q_group_size"))


def _fp8(found: Fields) -> FP8:
    block, form = found.get("weight_block_size"), found.get("fmt") or "e4m3"
    if form != "e4m3" or block not in (None, [FP8_BLOCK, FP8_BLOCK]):
        raise _unsupported(found, f"fp8 of format {form!r} in blocks of {block}")
    return FP8()


def _compressed(found: Fields) -> Packing:
    form = found.get("format")
    if form not in _COMPRESSED:
        raise _unsupported(found, f"compressed-tensors' format {form!r}")
    if form == "float-quantized":
        return FP8()
    sizes, bits = [], 0
    groups = found.section("config_groups")
    for name in groups.raw if groups else ():
        group = groups.section(name) if groups else None
        weights = group.section("weights") if group else None
        size = weights.get("group_size") if weights else None
        sizes += [size] if type(size) is int and size > 0 else []
        said = weights.get("num_bits") if weights else None
        bits = said if said in (4, 8) and not bits else bits
    return CompressedTensors(tuple(dict.fromkeys(sizes)), bits=bits)


def _bits(fields: Fields, name: str, known: tuple[int, ...]) -> int:
    bits = fields.get(name)
    if bits not in known:
        raise _unsupported(fields, f"{name} {bits!r}")
    return int(bits)


def _group(fields: Fields, name: str) -> int:
    group: Any = fields.get(name)
    if type(group) is not int or (group <= 0 and group != -1):
        raise fields.fail(f"{name}: a number of inputs, or -1 for all, expected, found {group!r}")
    return group


def _unsupported(fields: Fields, what: str) -> CheckpointError:
    return fields.fail(f"{what} is not supported; supported: {', '.join(SUPPORTED)}")
