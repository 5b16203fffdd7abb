"""Who does not know the cluster's token gets nothing from a rank, and is told why."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
import pytest

from rayseek.cluster.credentials import KEY, credentials, secret
from rayseek.cluster.dispatch import Dispatcher, RankAddress, RankChannel
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.request import FinishReason, Request, SamplingParams
from rayseek.cluster.tokens_pb2 import FromSource, Pair, ToSource
from rayseek.cluster.wire import FETCH, METHOD, SERVICE
from tests.conftest import EngineMaker

WANTED = Request("r", (3, 4, 5), SamplingParams(max_tokens=3))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As the processes of a cluster with Ray's authentication have it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")
    return monkeypatch


def test_the_secret_follows_the_token_and_does_not_tell_it(
    token: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = secret()
    assert "ours" not in ours and len(ours) == 64
    token.setenv("RAY_AUTH_TOKEN", "another")
    assert secret() != ours
    file = tmp_path / "token"
    file.write_text("ours\n")
    token.delenv("RAY_AUTH_TOKEN")
    token.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert secret() == ours
    file.unlink()
    with pytest.raises(RuntimeError, match="neither RAY_AUTH_TOKEN nor"):
        secret()
    token.setenv("RAY_AUTH_MODE", "disabled")
    assert secret() == "" and credentials() == ()


async def test_requests_of_strangers_are_refused(
    make_engine: EngineMaker, token: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = RankServer(make_engine())
    address = RankAddress("rank", f"127.0.0.1:{server.start('127.0.0.1')}")

    async def discover() -> list[RankAddress]:
        return [address]

    for stranger in ("theirs", ""):
        token.setenv("RAY_AUTH_MODE", "token" if stranger else "disabled")
        token.setenv("RAY_AUTH_TOKEN", stranger)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            channel = RankChannel(address)
            async with asyncio.timeout(120):
                await channel.ready.wait()
        assert not channel.alive
        assert "does not know this cluster's secret" in caplog.text
        assert not server._streams
        await channel.close()
    token.setenv("RAY_AUTH_MODE", "token")
    token.setenv("RAY_AUTH_TOKEN", "ours")
    ours = Dispatcher(discover)
    assert [d async for d in ours.generate(WANTED)][-1].finish is FinishReason.LENGTH
    await ours.close()
    await asyncio.to_thread(server.stop)


def test_neither_are_pages_given_to_them(
    make_engine: EngineMaker, token: pytest.MonkeyPatch
) -> None:
    server = RankServer(make_engine())
    port = server.start("127.0.0.1")
    for metadata in ((), ((KEY, "guess"),), ((KEY, secret()[:-1]),), ((KEY, ""),)):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            fetch = channel.stream_stream(
                f"/{SERVICE}/{FETCH}",
                request_serializer=ToSource.SerializeToString,
                response_deserializer=FromSource.FromString,
            )
            hello = iter([ToSource(pair=Pair(host="127.0.0.1", port=1))])
            with pytest.raises(grpc.RpcError) as refused:
                next(fetch(hello, metadata=metadata, timeout=120))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    server.stop()


def test_without_rays_authentication_everybody_may(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server = RankServer(make_engine())
    assert "token authentication is off" in caplog.text
    port = server.start("127.0.0.1")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        frames = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([]), timeout=120)
        assert next(frames)
    server.stop()
