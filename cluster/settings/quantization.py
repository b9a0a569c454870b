"""The field `quantization` of cluster.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic import WithJsonSchema as JsonSchema

from flm.worker.errors import ConfigError
from flm.worker.tensors.precision import QUANTIZATION_PATTERN, parse_quantization


def _known(value: str) -> str:
    try:
        parse_quantization(value)
    except ConfigError as error:
        raise ValueError(error.message) from error
    return value


Quantization = Annotated[
    str, AfterValidator(_known), JsonSchema({"pattern": QUANTIZATION_PATTERN, "type": "string"})
]
