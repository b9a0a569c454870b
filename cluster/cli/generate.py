"""`flm-cluster generate`: a prompt as it is, without a chat template."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from flm.cluster.cli import gateway_options as options
from flm.cluster.cli.options import ClusterOption


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: options.Model = "",
    adapter: options.Adapter = "",
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
    ca_file: options.CaFile = "",
) -> None:
    """Continue a prompt, streaming the text."""
    from flm.cluster.cli.answer import no_show, read_answer, show_text
    from flm.cluster.client import Sampling

    target = options.gateway_target(cluster, address, api_key, ca_file)
    sampling = Sampling(max_tokens, temperature, top_p=top_p, seed=seed, stop=stop or [])
    text = options.text_argument(prompt)
    with options.gateway_client(target) as client:
        options.say_if_none_is_ready(client, model)
        began = time.perf_counter()
        with client.generate(text, sampling, model=model, adapter=adapter) as stream:
            answer = read_answer(stream, no_show if as_json else show_text, began)
    print(json.dumps(answer.to_json()) if as_json else "")
    if stats:
        print(answer.stats(), file=sys.stderr)
