"""`flm-cluster chat`: one answer, or a conversation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli import gateway_options as options
from flm.cluster.cli.options import ClusterOption

if TYPE_CHECKING:
    from flm.cluster.cli.answer import Answer
    from flm.cluster.client import Message, Stream


def chat(
    message: Annotated[
        str, typer.Argument(help="One message; - reads standard input. Without: a conversation.")
    ] = "",
    system: Annotated[str, typer.Option(help="A system message that goes first.")] = "",
    model: options.Model = "",
    adapter: options.Adapter = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
    cluster: ClusterOption = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    ca_file: options.CaFile = "",
) -> None:
    """Talk to a model. In a conversation Ctrl-C stops an answer and Ctrl-D leaves."""
    from flm.cluster.cli.answer import no_show, show_text
    from flm.cluster.client import Sampling

    if as_json and not message:
        raise typer.BadParameter("--json needs a MESSAGE")
    target = options.gateway_target(cluster, address, api_key, ca_file)
    sampling = Sampling(max_tokens, temperature, top_p=top_p, seed=seed)
    with options.gateway_client(target) as client:

        def ask(said: list[Message]) -> Stream:
            options.say_if_none_is_ready(client, model)
            return client.chat(said, sampling, model=model, adapter=adapter)

        talk = Conversation(ask, system)
        if not message:
            _converse(talk, stats)
            return
        answer = talk.say(options.text_argument(message), no_show if as_json else show_text)
    print(json.dumps(answer.to_json()) if as_json else "")
    if stats:
        print(answer.stats(), file=sys.stderr)


class Conversation:
    """What was said so far. A message whose answer failed is taken back; one whose answer was stopped keeps what
    there was of it."""

    def __init__(self, ask: Callable[[list[Message]], Stream], system: str = "") -> None:
        self._ask = ask
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str, show: Callable[[str], None]) -> Answer:
        """Send a message and read its answer; `show` gets its text as it comes. KeyboardInterrupt stops it and
        passes on."""
        from flm.cluster.cli.answer import read_answer

        shown: list[str] = []

        def remember(piece: str) -> None:
            shown.append(piece)
            show(piece)

        said: list[Message] = [*self.messages, {"role": "user", "content": text}]
        began = time.perf_counter()
        try:
            with self._ask(said) as stream:
                answer = read_answer(stream, remember, began)
        except KeyboardInterrupt:
            if shown:
                self.messages = [*said, {"role": "assistant", "content": "".join(shown)}]
            raise
        self.messages = [*said, {"role": "assistant", "content": answer.text}]
        return answer


def _converse(talk: Conversation, stats: bool) -> None:
    """Lines in, answers out, until the end of input. An error is shown and the conversation goes on."""
    from flm.cluster.cli.answer import show_text
    from flm.worker.errors import FlmError

    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (input() then edits lines)
    while True:
        try:
            text = input("> " if terminal else "").strip()
            if text:
                answer = talk.say(text, show_text)
                print(f"\n[{answer.stats()}]" if stats else "")
        except KeyboardInterrupt:
            print("\n[stopped; Ctrl-D leaves]")
        except EOFError:
            print()
            return
        except FlmError as error:
            print(f"error: {error}", file=sys.stderr)
