"""`flm-cluster chat`: one answer, or a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flm.cluster.cli import gateway_call as options
from flm.cluster.cli.options import ClusterOption

if TYPE_CHECKING:
    from flm.cluster.cli.answer import Answer
    from flm.proto import flm_pb2


def chat(
    message: Annotated[
        str, typer.Argument(help="One message; - reads standard input. Without: a conversation.")
    ] = "",
    system: Annotated[str, typer.Option(help="A system message that goes first.")] = "",
    model: options.Model = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
    cluster: ClusterOption = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
) -> None:
    """Talk to a model. In a conversation Ctrl-C stops an answer and Ctrl-D leaves."""
    from flm.cluster.cli.answer import no_show, show_text
    from flm.proto import flm_pb2

    if as_json and not message:
        raise typer.BadParameter("--json needs a MESSAGE")
    target = options.find_target(cluster, address, api_key)
    request = flm_pb2.ChatRequest(
        model=model, sampling=options.sampling(max_tokens, temperature, top_p, seed, [])
    )
    if system:
        request.messages.add(role="system", content=system)
    with options.open_stub(target) as stub:
        speaker = _Speaker(stub, target, request, no_show if as_json else show_text)
        if not message:
            _converse(speaker, stats)
            return
        answer = speaker.say(options.text_argument(message))
    print(json.dumps(answer.to_json()) if as_json else "")
    if stats:
        print(answer.stats(), file=sys.stderr)


class _Speaker:
    """A conversation so far. A message whose answer failed is taken back; one that was stopped keeps what there was."""

    def __init__(
        self, stub: Any, target: options.Target, request: flm_pb2.ChatRequest, show: Callable[[str], None]
    ) -> None:
        self._stub, self._target, self._request, self._show = stub, target, request, show
        self._shown = ""

    def say(self, text: str) -> Answer:
        """Send a message and read its answer. KeyboardInterrupt stops the answer and passes on."""
        from flm.cluster.cli.answer import read_answer

        self._shown = ""
        self._request.messages.add(role="user", content=text)
        frames = self._stub.Chat(self._request, metadata=self._target.metadata)
        try:
            answer = read_answer(frames, self._remember)
        except BaseException as error:
            frames.cancel()
            if isinstance(error, KeyboardInterrupt) and self._shown:
                self._request.messages.add(role="assistant", content=self._shown)
            else:
                del self._request.messages[-1]
            raise
        self._request.messages.add(role="assistant", content=answer.text)
        return answer

    def _remember(self, text: str) -> None:
        self._shown += text
        self._show(text)


def _converse(speaker: _Speaker, stats: bool) -> None:
    """Lines in, answers out, until the end of input. An error is shown and the conversation goes on."""
    import grpc

    from flm.cluster.grpc_errors import from_rpc_error

    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then edits lines)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
            if text:
                answer = speaker.say(text)
                print(f"\n[{answer.stats()}]" if stats else "")
        except KeyboardInterrupt:
            print("\n[stopped; Ctrl-D leaves]")
        except EOFError:
            print()
            return
        except grpc.RpcError as error:
            print(f"error: {from_rpc_error(error)}", file=sys.stderr)
