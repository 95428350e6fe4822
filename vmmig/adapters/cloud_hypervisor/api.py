"""Cloud Hypervisor's API: HTTP/1.1 over a unix socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any

from vmmig import sockets
from vmmig.adapters.cloud_hypervisor.receiving import url_of
from vmmig.errors import MigratableError

_ROOT = "/api/v1/"
_ANSWER_BYTES = 64 << 20
_SAID_CHARS = 2000


class ApiError(MigratableError):
    """Cloud Hypervisor refused a request, or could not be asked.

    Attributes:
        status: The HTTP status of its answer; None where there was none.

    >>> ApiError("unix:/run/api.sock: vm.pause: VM is not booted (500)", status=500).status
    500
    """

    def __init__(self, cause: object, *, status: int | None = None) -> None:
        super().__init__(cause)
        self.status = status


class Api:
    """Who asks at the socket; each request has a connection of its own.

    Args:
        socket_path: What Cloud Hypervisor was given as ``--api-socket``.
        timeout_s: How long to wait for the socket to be there, and then for an answer.

    >>> Api("/nobody/is/here", timeout_s=0).get("vmm.ping")
    Traceback (most recent call last):
    vmmig.adapters.cloud_hypervisor.api.ApiError: 'unix:/nobody/is/here': vmm.ping: nobody \
listened there within 0 s ...
    """

    def __init__(self, socket_path: str | os.PathLike[str], *, timeout_s: float = 60.0) -> None:
        self.url = url_of(socket_path)
        self.timeout_s = timeout_s

    def get(self, name: str) -> Any:
        """What Cloud Hypervisor answers to ``GET /api/v1/{name}``, as `put`."""
        return self._ask("GET", name, None, self.timeout_s)

    def put(self, name: str, body: object = None, *, timeout_s: float | None = None) -> Any:
        """What Cloud Hypervisor answers to ``PUT /api/v1/{name}``: a JSON value; None for none.

        Args:
            name: ``vm.pause``, for instance.
            body: A JSON value; None for none.
            timeout_s: How long to wait for the answer, where it is not the usual time.

        Raises:
            ApiError: It refused, and its words; or it could not be asked.
        """
        return self._ask("PUT", name, body, self.timeout_s if timeout_s is None else timeout_s)

    def _ask(self, method: str, name: str, body: object, timeout_s: float) -> Any:
        connection = _Connection(self.url, self.timeout_s, timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            # What Cloud Hypervisor's own client says, and nothing else: its server is a small one.
            connection.putrequest(method, _ROOT + name, skip_accept_encoding=True)
            connection.putheader("Accept", "*/*")
            if data is not None:
                connection.putheader("Content-Type", "application/json")
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            response = connection.getresponse()
            answer = response.read(_ANSWER_BYTES + 1)
            if len(answer) <= _ANSWER_BYTES and response.length:
                raise http.client.IncompleteRead(answer, response.length)
        except (MigratableError, OSError, ValueError, http.client.HTTPException) as error:
            raise ApiError(f"{self.url!r}: {name}: {_why(error, timeout_s)}") from error
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            said = words(answer) or response.reason
            raise ApiError(
                f"{self.url!r}: {name}: {said} ({response.status})", status=response.status
            )
        if len(answer) > _ANSWER_BYTES:
            raise ApiError(f"{self.url!r}: {name}: it answers with too much")
        if not answer.strip():
            return None
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{self.url!r}: {name}: its answer is no JSON: {error}") from error


class _Connection(http.client.HTTPConnection):
    """Over a unix socket; ``Host`` is what every client of it says."""

    def __init__(self, url: str, connect_s: float, timeout_s: float) -> None:
        super().__init__("localhost")
        self._url = url
        self._connect_s = connect_s
        self._answer_s = timeout_s

    def connect(self) -> None:
        self.sock: socket.socket = sockets.connect(self._url, timeout_s=self._connect_s)
        self.sock.settimeout(max(self._answer_s, 0.001))


def words(answer: bytes) -> str:
    """What the body of an error says: a JSON list of texts, from the outermost cause to the root.

    Older versions say it as plain text.

    >>> words(b'["Error from API","The VM could not be paused"]'), words(b" no VM\\n")
    ('Error from API: The VM could not be paused', 'no VM')
    """
    text = answer[: 4 * _SAID_CHARS].decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        text = ": ".join(each for each in value if each)
    elif isinstance(value, str):
        text = value
    text = " ".join(text.split())
    return text if len(text) <= _SAID_CHARS else f"{text[:_SAID_CHARS]}..."


def _why(error: Exception, timeout_s: float) -> str:
    if isinstance(error, BlockingIOError | TimeoutError):
        return f"no answer came within {timeout_s:g} s; what was asked may still be done"
    if isinstance(error, http.client.HTTPException | ConnectionResetError | BrokenPipeError):
        return f"it ended the connection without an answer, or its answer is no HTTP ({error!r})"
    return str(error.cause if isinstance(error, MigratableError) else error) or repr(error)
