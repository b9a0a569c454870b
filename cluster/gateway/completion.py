"""From a stream of token ids to the frames that clients see."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from flm.cluster.gateway.admission import Options
from flm.cluster.gateway.resume import TokenStream
from flm.cluster.gateway.served_model import LoadedModel
from flm.cluster.gateway.stops import StopMatcher
from flm.cluster.gateway.text import TextStream
from flm.proto import flm_pb2
from flm.worker.vocabularies.tokenizer import IncrementalDecoder

Write = Callable[[flm_pb2.GenerateFrame], Awaitable[None]]


class Completion:
    """Stream `index` of one request. Detokeniser, stop matcher and counters live here, so they survive restarts."""

    def __init__(
        self,
        model: LoadedModel,
        stream: TokenStream,
        options: Options,
        index: int,
        prompt_ids: tuple[int, ...],
    ) -> None:
        self._model, self._stream = model, stream
        self._request_id, self._index, self._num_prompt = options.request_id, index, len(prompt_ids)
        self._text = TextStream(
            IncrementalDecoder(model.tokenizer, after=prompt_ids),
            StopMatcher(options.stops) if options.stops else None,
        )
        self._emitted = 0  # tokens
        self._sequence = 0
        self._cached = 0
        self._started = self._first = asyncio.get_running_loop().time()
        self._prefill = 0.0  # seconds, of the replica that gave the first token

    async def run(self, write: Write, echo: str = "") -> None:
        """Write all frames; the first one is `echo`, where there is any."""
        if echo:
            await write(self._frame(text=echo))
        async with aclosing(self._stream.frames()) as frames:
            async for frame in frames:
                if self._emitted == 0:
                    self._first_token(frame)
                out = self._translate(frame)
                if out.finish_reason or out.token_ids or out.text:
                    await write(out)
                if out.finish_reason:
                    return

    def _frame(self, text: str) -> flm_pb2.GenerateFrame:
        frame = flm_pb2.GenerateFrame(
            request_id=self._request_id,
            sequence=self._sequence,
            index=self._index,
            text=text,
            restarts=self._stream.restarts,
        )
        self._sequence += 1
        return frame

    def _first_token(self, frame: flm_pb2.ReplicaFrame) -> None:
        self._first = asyncio.get_running_loop().time()
        self._cached = frame.usage.cached_tokens
        self._prefill = frame.timings.prefill

    def _translate(self, frame: flm_pb2.ReplicaFrame) -> flm_pb2.GenerateFrame:
        token_ids: Sequence[int] = frame.token_ids
        text, used = self._text.push(token_ids)
        if frame.finish_reason and self._text.matched is None:
            text += self._text.finish()
        if used < len(token_ids):
            token_ids = token_ids[:used]
        self._emitted += used
        out = self._frame(text)
        out.token_ids.extend(token_ids)
        if frame.logprobs:
            self._add_logprobs(out, frame, used)
        if frame.finish_reason or self._text.matched is not None:
            self._end(out, frame)
        return out

    def _add_logprobs(self, out: flm_pb2.GenerateFrame, frame: flm_pb2.ReplicaFrame, used: int) -> None:
        token_text = self._model.token_text
        out.logprobs.extend(frame.logprobs[:used])
        for entry in out.logprobs:
            entry.text = token_text(entry.token_id)
            for top in entry.top:
                top.text = token_text(top.token_id)

    def _end(self, out: flm_pb2.GenerateFrame, frame: flm_pb2.ReplicaFrame) -> None:
        usage, timings = out.usage, out.timings
        usage.prompt_tokens, usage.cached_tokens = self._num_prompt, self._cached
        usage.completion_tokens = self._emitted
        if self._text.matched is not None:
            out.finish_reason = flm_pb2.FINISH_REASON_STOP
            out.stop_string = self._text.matched
        else:
            out.finish_reason = frame.finish_reason
            # A stop token is counted, though it is not among the stream's tokens.
            usage.completion_tokens = max(frame.usage.completion_tokens, self._emitted)
            if frame.HasField("stop_token_id"):
                out.stop_token_id = frame.stop_token_id
        if frame.finish_reason and frame.HasField("timings") and not self._stream.restarts:
            timings.CopyFrom(frame.timings)
        else:  # no replica has seen all of it, or has said so
            timings.queue = max(self._first - self._started - self._prefill, 0.0)
            timings.prefill = self._first - self._started - timings.queue
            timings.decode = asyncio.get_running_loop().time() - self._first
