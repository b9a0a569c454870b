"""The Python client of a gateway.

    from flm.cluster.client import Client, Sampling

    with Client("127.0.0.1:50051") as client:
        for text in client.chat("Why is the sky blue?", Sampling(max_tokens=64)).texts():
            print(text, end="", flush=True)

`AsyncClient` is the same with `async with`, `async for` and `await`. Every failure is an `FlmError`:
`InvalidRequest` with the field, `Overloaded` and `Unavailable` with `retry_after` seconds, and so on.
"""

from flm.cluster.client.async_client import AsyncClient, AsyncStream
from flm.cluster.client.request import Message, Sampling
from flm.cluster.client.sync_client import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Client", "Message", "Sampling", "Stream"]
