"""From cluster.yaml's texts to the ids that a replica gets, and to the end of the answer."""

from __future__ import annotations

from fake_cluster import EOS, KEY, MAX_CONTEXT, MODEL, FakeCluster, byte_tokenizer

from flm.cluster.client.async_client import AsyncClient
from flm.cluster.client.request import Sampling
from flm.cluster.gateway.gateway import Gateway, ServedModel
from flm.cluster.prompts.prompt_choice import PromptChoice

TEXTS = ("<FLM_FIX_TOKEN_3>", "Q:", "\nA:", "<FLM_FIX_TOKEN_256>")


async def test_fastllms_texts_reach_the_replica_as_ids() -> None:
    spec = ServedModel("m", MODEL, MAX_CONTEXT, prompt=PromptChoice(texts=TEXTS))
    gateway = Gateway([spec], "127.0.0.1:0", load=lambda path: byte_tokenizer(), replica_key=KEY)
    cluster = FakeCluster(gateway, await gateway.start())
    try:
        await cluster.add()
        said = [("user", "hi"), ("assistant", "yes"), ("user", "<FLM_FIX_TOKEN_5>")]
        messages = [{"role": role, "content": content} for role, content in said]
        async with AsyncClient(cluster.address) as client:
            frames = [f async for f in client.chat(messages, Sampling(max_tokens=2, seed=1, echo=True))]
        request = cluster.seats[0].replica.accepted[0]
        assert request.prompt_ids == (3, *b"Q:hi\nA:yes", EOS, *b"Q:<FLM_FIX_TOKEN_5>\nA:")
        assert request.params.stop_token_ids == (EOS,)
        assert frames[0].text == "\x03Q:hi\nA:yes<eos>Q:<FLM_FIX_TOKEN_5>\nA:"
    finally:
        await cluster.close()
