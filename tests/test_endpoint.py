import asyncio
import json
import sys

import numpy as np
import pytest

from helpers.errors import InputError, UnavailableError
from helpers.serving import load
from helpers.serving.endpoint import (
    NO_CONNECTION,
    Endpoint,
    ModelInput,
    RequestError,
    connect,
    error_kind,
    model_inputs,
)
from helpers.serving.load import ClosedLoop, load_server


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("StatusCode.UNAVAILABLE", "the server is full", "unavailable"),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses", NO_CONNECTION),
        ("StatusCode.UNAVAILABLE", "Socket closed", NO_CONNECTION),
        ("StatusCode.UNAVAILABLE", "recvmsg:Connection reset by peer", NO_CONNECTION),
        ("StatusCode.INVALID_ARGUMENT", "unexpected shape", "invalid argument"),
        ("StatusCode.DEADLINE_EXCEEDED", "", "deadline exceeded"),
        ("400", "unexpected shape", "invalid argument"),
        ("503", "the server is full", "unavailable"),
        ("418", "a teapot", "418"),
        (None, "", NO_CONNECTION),
    ],
)
def test_errors_have_the_same_kinds_over_both_protocols(status, message, kind):
    assert error_kind(status, message) == kind


def test_the_address_is_tritons_own_unless_given():
    assert Endpoint("m").address == "localhost:8001"
    assert Endpoint("m", "http").address == "localhost:8000"
    assert Endpoint("m", "http", "there:9").address == "there:9"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(("m", "ftp"), "no protocol 'ftp'"), (("m", "http", "http://a:1"), "host and port alone")],
)
def test_an_endpoint_that_cannot_be_is_an_error(arguments, problem):
    with pytest.raises(InputError, match=problem):
        Endpoint(*arguments)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_without_tritonclient_one_sentence_says_what_to_install(monkeypatch, protocol):
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}.aio", None)
    with pytest.raises(UnavailableError, match=r"pip install '\.\[serving\]'"):
        load.find_inputs(Endpoint("m", protocol))


# --- against a small server in this process, where tritonclient is installed ---

IMAGES = np.arange(24, dtype=np.float32).reshape(4, 6)
SUMS = {"sums": IMAGES.sum(1)}


class HttpServer:
    """A server of one model, over HTTP, that answers with the sum of each image."""

    async def metadata(self, request):
        from aiohttp import web

        if request.match_info["model"] != "sums":
            return web.json_response({"error": "unknown model"}, status=404)
        inputs = [{"name": "images", "datatype": "FP32", "shape": ["-1", "6"]}]
        return web.json_response({"name": "sums", "inputs": inputs, "outputs": []})

    async def infer(self, request):
        from aiohttp import web

        body = await request.read()
        header = int(request.headers["Inference-Header-Content-Length"])
        shape = json.loads(body[:header])["inputs"][0]["shape"]
        images = np.frombuffer(body[header:], np.float32).reshape(shape)
        if request.match_info["model"] == "full":
            return web.json_response({"error": "the server is full"}, status=503)
        raw = images.sum(1).astype(np.float32).tobytes()
        output = {
            "name": "sums", "datatype": "FP32", "shape": [len(images)],
            "parameters": {"binary_data_size": len(raw)},
        }  # fmt: skip
        text = json.dumps({"model_name": "sums", "outputs": [output]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        return web.Response(body=text + raw, headers=headers)

    async def __aenter__(self) -> str:
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/v2/models/{model}", self.metadata)
        app.router.add_post("/v2/models/{model}/infer", self.infer)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)  # a port that is free
        await site.start()
        return f"127.0.0.1:{self.runner.addresses[0][1]}"

    async def __aexit__(self, *_) -> None:
        await self.runner.cleanup()


class GrpcServer:
    """The same over gRPC."""

    async def __aenter__(self) -> str:
        import grpc
        from tritonclient.grpc import service_pb2 as pb
        from tritonclient.grpc import service_pb2_grpc

        class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
            async def ModelMetadata(self, request, context):  # noqa: N802
                if request.name != "sums":
                    await context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")
                declared = pb.ModelMetadataResponse.TensorMetadata(
                    name="images", datatype="FP32", shape=[-1, 6]
                )
                return pb.ModelMetadataResponse(name="sums", inputs=[declared])

            async def ModelInfer(self, request, context):  # noqa: N802
                if request.model_name == "full":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is full")
                images = np.frombuffer(request.raw_input_contents[0], np.float32)
                sums = images.reshape(list(request.inputs[0].shape)).sum(1)
                response = pb.ModelInferResponse(model_name="sums")
                response.outputs.add(name="sums", datatype="FP32", shape=[len(sums)])
                response.raw_output_contents.append(sums.astype(np.float32).tobytes())
                return response

        self.server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def __aexit__(self, *_) -> None:
        await self.server.stop(None)


SERVERS = {"http": HttpServer, "grpc": GrpcServer}


@pytest.fixture(params=list(SERVERS))
def protocol(request) -> str:
    pytest.importorskip(f"tritonclient.{request.param}.aio", exc_type=ImportError)
    return request.param


async def against(protocol: str, model: str, work):
    async with SERVERS[protocol]() as url:
        return await work(Endpoint(model, protocol, url))


def test_a_request_is_answered(protocol):
    async def work(endpoint):
        async with connect(endpoint, [{"images": IMAGES}, {"images": IMAGES[:1]}]) as send:
            return [await send(number) for number in (0, 1, 0)]

    for answer, count in zip(asyncio.run(against(protocol, "sums", work)), (4, 1, 4), strict=True):
        assert list(answer) == ["sums"]
        assert np.array_equal(answer["sums"], SUMS["sums"][:count])


def test_a_refusal_is_an_error_with_its_kind(protocol):
    async def work(endpoint):
        async with connect(endpoint, [{"images": IMAGES}]) as send:
            with pytest.raises(RequestError, match="the server is full") as raised:
                await send(0)
            return raised.value.kind

    assert asyncio.run(against(protocol, "full", work)) == "unavailable"


def test_a_model_tells_its_inputs(protocol):
    found = asyncio.run(against(protocol, "sums", model_inputs))
    assert found == [ModelInput("images", "FP32", (-1, 6))]


def test_an_unknown_model_is_one_sentence(protocol):
    with pytest.raises(UnavailableError, match="did not describe the model other"):
        asyncio.run(against(protocol, "other", model_inputs))


def test_where_no_server_listens_there_is_no_connection(protocol):
    """Port 1 needs no server that has gone: nothing listens there."""

    async def work():
        async with connect(Endpoint("sums", protocol, "127.0.0.1:1"), [{"images": IMAGES}]) as send:
            with pytest.raises(RequestError) as raised:
                await send(0)
            return raised.value.kind

    assert asyncio.run(work()) == NO_CONNECTION
    with pytest.raises(UnavailableError, match="did not answer a single request"):
        load_server(
            Endpoint("sums", protocol, "127.0.0.1:1"), [{"images": IMAGES}], ClosedLoop(1), 0.1
        )
