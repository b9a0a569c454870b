"""The gateway over real gRPC on loopback, with replicas that compute by arithmetic."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from flm.proto import flm_pb2, flm_pb2_grpc


async def collect(address: str, request: flm_pb2.GenerateRequest, timeout: float = 20) -> list[flm_pb2.GenerateFrame]:
    async with grpc.aio.insecure_channel(address) as channel:
        return [f async for f in flm_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)]


async def test_one(start_cluster) -> None:
    cluster = await start_cluster()
    frames = await collect(cluster.address, flm_pb2.GenerateRequest(prompt="hello", sampling=flm_pb2.SamplingOptions(seed=3)))
    print(frames[-1], "".join(f.text for f in frames))
    await cluster.settled()
