"""flm.v1.Inference: what clients call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sized
from typing import TypeVar

import grpc.aio

from flm.cluster.gateway.admission import Options, admit, check_ids, check_messages, check_prompt_length
from flm.cluster.gateway.completion import Completion, Write
from flm.cluster.gateway.resume import TokenStream
from flm.cluster.gateway.served_model import LoadedModel
from flm.cluster.wire.grpc_errors import typed_errors
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import InvalidRequest, ModelNotFound

LONG_TEXT = 4096  # characters; longer ones are tokenised on another thread, not to hold up running streams
MAX_TEXT = (
    1 << 20
)  # bytes that Tokenize takes, and tokens that Detokenize takes: as many as such a text can have
T = TypeVar("T")


class Inference(flm_pb2_grpc.InferenceServicer):
    """The servicer over `models` (name → model). `replica_wait`: seconds that a request without a deadline waits
    for a ready replica, 0: none waits."""

    def __init__(self, models: Mapping[str, LoadedModel], replica_wait: float) -> None:
        self._models = models
        self._replica_wait = replica_wait

    @typed_errors
    async def Generate(self, request: flm_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        model = self._model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("prompt", "expected a prompt or prompt_ids, got neither")
        if kind == "prompt":
            prompt = request.prompt
            _check_length(model, prompt)
            prompt_ids = await _encode(model, prompt, True)
        else:
            check_prompt_length(len(request.prompt_ids.ids), model.spec.max_context)
            prompt_ids = list(request.prompt_ids.ids)
            check_ids(prompt_ids, model.tokenizer.vocab_size, "prompt_ids.ids")
            prompt = await _decode(model, prompt_ids) if request.sampling.echo else ""
        await self._complete(model, prompt, prompt_ids, request, context, chat=False)

    @typed_errors
    async def Chat(self, request: flm_pb2.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        model = self._model(request.model)
        messages = check_messages(request.messages, model.spec.max_context)
        prompt, text = await model.chats.render(messages)
        _check_length(model, text)
        prompt_ids = await _off_loop(text, prompt.encode)
        await self._complete(model, text, prompt_ids, request, context, chat=True)

    async def _complete(
        self,
        model: LoadedModel,
        prompt: str,
        prompt_ids: list[int],
        request: flm_pb2.GenerateRequest | flm_pb2.ChatRequest,
        context: grpc.aio.ServicerContext,
        *,
        chat: bool,
    ) -> None:
        most, vocab_size = model.spec.max_context, model.tokenizer.vocab_size
        options = admit(request.sampling, len(prompt_ids), most, model.sampling, vocab_size)
        options = model.with_ends(model.with_adapter(options, request.adapter), chat=chat)
        remaining = context.time_remaining()
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        echo = prompt if options.echo else ""
        completions = [
            self._completion(model, tuple(prompt_ids), options, index, deadline) for index in range(options.n)
        ]
        if len(completions) == 1:
            await completions[0].run(context.write, echo)
        else:
            await _run_all(completions, _one_at_a_time(context), echo)

    def _completion(
        self,
        model: LoadedModel,
        prompt_ids: tuple[int, ...],
        options: Options,
        index: int,
        deadline: float | None,
    ) -> Completion:
        stream = TokenStream(
            model.replicas, prompt_ids, options, index, model.spec.max_context, deadline, self._replica_wait
        )
        return Completion(model, stream, options, index, prompt_ids)

    @typed_errors
    async def Tokenize(
        self, request: flm_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.TokenizeResponse:
        model, size = self._model(request.model), len(request.text.encode())
        if size > MAX_TEXT:
            raise InvalidRequest("text", f"expected at most {MAX_TEXT} bytes, got {size}")
        return flm_pb2.TokenizeResponse(ids=await _encode(model, request.text, request.add_special_tokens))

    @typed_errors
    async def Detokenize(
        self, request: flm_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.DetokenizeResponse:
        model = self._model(request.model)
        if len(request.ids) > MAX_TEXT:
            raise InvalidRequest("ids", f"expected at most {MAX_TEXT} token ids, got {len(request.ids)}")
        check_ids(request.ids, model.tokenizer.vocab_size, "ids")
        text = await _decode(model, list(request.ids), request.skip_special_tokens)
        return flm_pb2.DetokenizeResponse(text=text)

    @typed_errors
    async def ListModels(
        self, request: flm_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ListModelsResponse:
        return flm_pb2.ListModelsResponse(models=[model.info() for model in self._models.values()])

    @typed_errors
    async def GetModelInfo(
        self, request: flm_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ModelInfo:
        return self._model(request.model).info()

    def _model(self, name: str) -> LoadedModel:
        """The named model, or the only one where no name is given."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(name, list(self._models))
        return model


async def _encode(model: LoadedModel, text: str, add_special: bool) -> list[int]:
    return await _off_loop(text, lambda: model.tokenizer.encode(text, add_special))


async def _decode(model: LoadedModel, ids: list[int], skip_special: bool = True) -> str:
    return await _off_loop(ids, lambda: model.tokenizer.decode(ids, skip_special))


async def _off_loop(given: Sized, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if len(given) > LONG_TEXT else work()


def _check_length(model: LoadedModel, text: str) -> None:
    """Refuse what cannot fit, however long its tokens are, before the work of finding them."""
    size, limit = len(text.encode()), model.tokenizer.longest_token * model.spec.max_context
    if size > limit:
        raise InvalidRequest(
            "prompt",
            f"{size} bytes cannot fit into a context of {model.spec.max_context} tokens; expected at most {limit}",
        )


async def _run_all(completions: list[Completion], write: Write, echo: str) -> None:
    """Run all; the first one to fail ends the others, and its error is raised."""
    tasks = [asyncio.create_task(completion.run(write, echo)) for completion in completions]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _one_at_a_time(context: grpc.aio.ServicerContext) -> Write:
    """gRPC takes one message at a time of a call."""
    lock = asyncio.Lock()

    async def write(frame: flm_pb2.GenerateFrame) -> None:
        async with lock:
            await context.write(frame)

    return write
