"""`flm-cluster generate`: a prompt as it is, without a chat template."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from flm.cluster.cli import gateway_call as options
from flm.cluster.cli.options import ClusterOption


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: options.Model = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
    cluster: ClusterOption = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
) -> None:
    """Continue a prompt, streaming the text."""
    from flm.cluster.cli.answer import no_show, read_answer, show_text
    from flm.proto import flm_pb2

    target = options.find_target(cluster, address, api_key)
    request = flm_pb2.GenerateRequest(
        model=model,
        prompt=options.text_argument(prompt),
        sampling=options.sampling(max_tokens, temperature, top_p, seed, stop or []),
    )
    with options.open_stub(target) as stub:
        frames = stub.Generate(request, metadata=target.metadata)
        answer = read_answer(frames, no_show if as_json else show_text)
    print(json.dumps(answer.to_json()) if as_json else "")
    if stats:
        print(answer.stats(), file=sys.stderr)
