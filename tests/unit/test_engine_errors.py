"""Every exception that an SDK can raise becomes one of ours, and says which."""

from collections.abc import Iterator
from typing import Any

import aiohttp
import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from ai_agent_server.errors import (
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _aiohttp_posts
from ai_agent_server.llm_engines import _server_http as server_http
from ai_agent_server.llm_engines.api.anthropic_engine import AnthropicEngine
from ai_agent_server.llm_engines.api.openai_engine import OpenAIEngine
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts
from ai_agent_server.llm_engines.local.ollama_engine import OllamaEngine

SPEC = EngineSpec(name="it", model="m", api_key="sk-secret")

TRANSPORT: dict[str, type[EngineError]] = {
    "ConnectTimeout": EngineTimeoutError,
    "PoolTimeout": EngineTimeoutError,
    "ReadTimeout": EngineTimeoutError,
    "WriteTimeout": EngineTimeoutError,
    "TimeoutException": EngineTimeoutError,
    "ConnectError": EngineUnreachableError,
    "ProxyError": EngineUnreachableError,
    "UnsupportedProtocol": EngineRequestError,
    "LocalProtocolError": EngineRequestError,
    "InvalidURL": EngineRequestError,
}
"""All others mean a cut answer."""
STATUS: dict[str, type[EngineError]] = {
    "AuthenticationError": EngineAuthError,
    "OAuthError": EngineAuthError,
    "PermissionDeniedError": EngineAuthError,
    "RateLimitError": EngineBusyError,
    "InternalServerError": EngineFailedError,
}

ANTHROPIC_STATUS: dict[int, type[EngineError]] = {
    401: EngineAuthError,
    402: EngineAuthError,
    403: EngineAuthError,
    408: EngineFailedError,
    429: EngineBusyError,
    501: EngineRequestError,
    503: EngineBusyError,
    529: EngineBusyError,
}


def family(root: type[BaseException]) -> Iterator[type[Any]]:
    """A class and everything below it."""
    yield root
    for child in root.__subclasses__():
        yield from family(child)


def transport_errors(module: Any) -> list[type[Any]]:
    """Every class that httpx or httpx2 raises from a request."""
    roots = (module.HTTPError, module.InvalidURL, module.StreamError)
    found = {error for root in roots for error in family(root)}
    return sorted((error for error in found if error.__module__.startswith(module.__name__)), key=str)


def made(error: type[Any], module: Any) -> Exception:
    """One of it."""
    request = module.Request("POST", "http://127.0.0.1/")
    if error is module.HTTPStatusError:
        return module.HTTPStatusError("x", request=request, response=module.Response(500, request=request))  # type: ignore[no-any-return]
    try:
        instance: Exception = error("said")
    except TypeError:
        instance = error()
    return instance


@pytest.mark.parametrize("error", transport_errors(httpx))
def test_every_httpx_error_becomes_ours_at_a_llama_server(error: type[Any]) -> None:
    ours = server_http.translate(made(error, httpx), engine="it", timeouts=EngineTimeouts(), connecting=False)
    assert type(ours) is TRANSPORT.get(error.__name__, EngineProtocolError)


@pytest.mark.parametrize("error", transport_errors(httpx))
async def test_every_httpx_error_that_leaks_from_the_ollama_client_becomes_ours(error: type[Any]) -> None:
    engine = OllamaEngine(SPEC, OllamaEngine.Options())
    cause = made(error, httpx)
    with pytest.raises(EngineError) as caught, engine._translated():
        raise cause
    await engine.aclose()
    assert type(caught.value) is TRANSPORT.get(error.__name__, EngineProtocolError)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ollama.RequestError("must provide a model"), EngineRequestError),
        (ollama.ResponseError("model 'x' not found", 404), EngineRequestError),
        (ollama.ResponseError("broke", 500), EngineFailedError),
        (ollama.ResponseError('{"error": "broke in the stream"}'), EngineFailedError),
        (ConnectionError("Failed to connect to Ollama"), EngineUnreachableError),
        (ValueError("no JSON"), EngineProtocolError),
        (TypeError("not a mapping"), EngineProtocolError),
        (AttributeError("'list' has no 'get'"), EngineProtocolError),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_every_error_of_the_ollama_client_becomes_ours(
    theirs: Exception, ours: type[EngineError]
) -> None:
    engine = OllamaEngine(SPEC, OllamaEngine.Options())
    with pytest.raises(ours) as caught, engine._translated():
        raise theirs
    await engine.aclose()
    assert caught.value.__cause__ is theirs


def test_the_ollama_client_has_no_error_that_we_do_not_know() -> None:
    exported = {
        value
        for value in vars(ollama).values()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert exported == {ollama.RequestError, ollama.ResponseError}


def openai_errors() -> list[type[Any]]:
    """Every class of the client's own tree, and its one ValueError."""
    found = {error for error in family(openai.OpenAIError) if error.__module__.startswith("openai")}
    return sorted({*found, openai.InvalidWebhookSignatureError}, key=str)


def openai_made(error: type[Any]) -> Exception:
    request = httpx2.Request("POST", "http://127.0.0.1/")
    body = {"message": "said", "code": "some_code", "type": "some_type"}
    if issubclass(error, openai.APIStatusError):
        status = getattr(error, "status_code", 500)
        response = httpx2.Response(status if isinstance(status, int) else 500, request=request)
        said: dict[str, Any] = {} if error is openai.OAuthError else {"message": "said"}
        return error(**said, response=response, body=body)
    if issubclass(error, openai.APIResponseValidationError):
        return error(httpx2.Response(200, request=request), body)
    if issubclass(error, openai.APIConnectionError):
        return error(request=request)
    if issubclass(error, openai.APIError):
        return error("said", request, body=body)
    # Those that want a whole completion are nothing but their class to us.
    instance: Exception = Exception.__new__(error)
    return instance


@pytest.mark.parametrize("error", openai_errors())
async def test_every_error_of_the_openai_client_becomes_ours(error: type[Any]) -> None:
    engine = OpenAIEngine(SPEC, OpenAIEngine.Options())
    theirs = openai_made(error)
    with pytest.raises(EngineError) as caught, engine._translated():
        raise theirs
    await engine.aclose()
    assert caught.value.__cause__ is theirs
    expected: type[EngineError] = EngineProtocolError
    if issubclass(error, openai.APIStatusError):
        status = theirs.status_code  # type: ignore[attr-defined]
        expected = STATUS.get(error.__name__, EngineFailedError if status >= 500 else EngineRequestError)
    elif error is openai.APITimeoutError:
        expected = EngineTimeoutError
    elif error is openai.APIError:
        expected = EngineFailedError
    assert type(caught.value) is expected


def anthropic_errors() -> list[type[Any]]:
    """Every class that the client exports; those below them differ by a code in the body alone."""
    found = {error for error in family(anthropic.AnthropicError) if vars(anthropic).get(error.__name__)}
    return sorted(found, key=str)


def anthropic_made(error: type[Any]) -> Exception:
    request = httpx2.Request("POST", "http://127.0.0.1/")
    if issubclass(error, anthropic.APIStatusError):
        status = getattr(error, "status_code", 500)
        response = httpx2.Response(status if isinstance(status, int) else 500, request=request)
        body = {"type": "error", "error": {"type": "some_error", "message": "said"}}
        return error("said", response=response, body=body)
    if issubclass(error, anthropic.APIResponseValidationError):
        return error(httpx2.Response(200, request=request), {})
    if error is anthropic.APITimeoutError:
        return anthropic.APITimeoutError(request)
    if issubclass(error, anthropic.APIConnectionError):
        return error(request=request)
    if issubclass(error, anthropic.APIError):
        return error("said", request, body={})
    instance: Exception = error("said")
    return instance


@pytest.mark.parametrize("error", anthropic_errors())
async def test_every_error_of_the_anthropic_client_becomes_ours(error: type[Any]) -> None:
    engine = AnthropicEngine(SPEC, AnthropicEngine.Options())
    theirs = anthropic_made(error)
    with pytest.raises(EngineError) as caught, engine._translated():
        raise theirs
    await engine.aclose()
    assert caught.value.__cause__ is theirs
    expected: type[EngineError] = EngineRequestError
    if issubclass(error, anthropic.APIStatusError):
        status = theirs.status_code  # type: ignore[attr-defined]
        expected = ANTHROPIC_STATUS.get(status, EngineFailedError if status >= 500 else EngineRequestError)
    elif error is anthropic.APITimeoutError:
        expected = EngineTimeoutError
    elif issubclass(error, (anthropic.APIConnectionError, anthropic.APIResponseValidationError)):
        expected = EngineProtocolError
    elif issubclass(error, anthropic.APIError):
        expected = EngineFailedError
    assert type(caught.value) is expected


@pytest.mark.parametrize("error", transport_errors(httpx2))
async def test_every_httpx2_error_below_the_anthropic_client_becomes_ours(error: type[Any]) -> None:
    engine = AnthropicEngine(SPEC, AnthropicEngine.Options())
    cause = made(error, httpx2)
    with pytest.raises(EngineError) as caught, engine._translated():
        raise anthropic.APIConnectionError(request=httpx2.Request("POST", "http://127.0.0.1/")) from cause
    await engine.aclose()
    assert type(caught.value) is TRANSPORT.get(error.__name__, EngineProtocolError)


@pytest.mark.parametrize("error", transport_errors(httpx2))
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "raw"])
async def test_every_httpx2_error_below_the_openai_client_becomes_ours(
    error: type[Any], wrapped: bool
) -> None:
    engine = OpenAIEngine(SPEC, OpenAIEngine.Options())
    cause = made(error, httpx2)
    with pytest.raises(EngineError) as caught, engine._translated():
        if wrapped:
            raise openai.APIConnectionError(request=httpx2.Request("POST", "http://127.0.0.1/")) from cause
        raise cause
    await engine.aclose()
    assert type(caught.value) is TRANSPORT.get(error.__name__, EngineProtocolError)
    if isinstance(caught.value, EngineTimeoutError):
        assert caught.value.phase == (
            "connect" if error.__name__ in {"ConnectTimeout", "PoolTimeout"} else "idle"
        )


async def test_a_connection_lost_before_an_answer_is_unreachable_and_after_it_a_cut() -> None:
    engine = OpenAIEngine(SPEC, OpenAIEngine.Options())
    with pytest.raises(EngineUnreachableError), engine._translated(connecting=True):
        raise httpx2.ReadError("reset")
    with pytest.raises(EngineProtocolError), engine._translated():
        raise httpx2.ReadError("reset")
    await engine.aclose()


def aiohttp_errors() -> list[type[Any]]:
    """Every class that aiohttp raises from a request."""
    return sorted(
        (error for error in family(aiohttp.ClientError) if error.__module__.startswith("aiohttp")), key=str
    )


def aiohttp_made(error: type[Any]) -> Exception:
    """One of it, without the parts that only its words need."""
    silent = {"__init__": lambda self: None, "__str__": lambda self: "said"}
    made: Exception = type(error.__name__, (error,), silent)()
    return made


AIOHTTP: dict[str, type[EngineError]] = {
    "ConnectionTimeoutError": EngineTimeoutError,
    "SocketTimeoutError": EngineTimeoutError,
    "ServerTimeoutError": EngineTimeoutError,
    "InvalidURL": EngineRequestError,
    "InvalidUrlClientError": EngineRequestError,
    "InvalidUrlRedirectClientError": EngineRequestError,
    "NonHttpUrlClientError": EngineRequestError,
    "NonHttpUrlRedirectClientError": EngineRequestError,
    "ClientHttpProxyError": EngineUnreachableError,
    "ServerFingerprintMismatch": EngineUnreachableError,
}
"""Beside those of a connection that could not be made; all others mean a cut answer."""


@pytest.mark.parametrize("error", aiohttp_errors())
@pytest.mark.parametrize("connecting", [False, True])
def test_every_error_of_aiohttp_becomes_ours(error: type[Any], connecting: bool) -> None:
    cause = aiohttp_made(error)
    ours = _aiohttp_posts.translate(cause, engine="it", timeouts=EngineTimeouts(), connecting=connecting)
    if issubclass(error, aiohttp.ClientConnectorError):
        wanted: type[EngineError] = EngineUnreachableError
    else:
        wanted = AIOHTTP.get(error.__name__, EngineUnreachableError if connecting else EngineProtocolError)
    assert type(ours) is wanted
