"""A page to drop a picture on: what teacher and student answer, and where the student looks. serve.html.jinja is it.

A picture is the body of a POST to /answer, and the reply is JSON. No file is served, and none is kept.
"""

from __future__ import annotations

import http.server
import json
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lwm.images.files import decode_whole
from lwm.reporting import plots, report
from lwm.runtime.errors import InputError, RunError, log

LARGEST = 30 * 10**6  # bytes of a picture
SHOWN = 800  # px of the longer side of a photograph with its map
AT_ONCE = 4  # pictures that are decoded; the others wait
PATIENCE = 30  # seconds without a byte after which a visitor is given up
LOOPBACK = "127.0.0.1"


class Answering(Protocol):
    """What an ``lwm.Classifier`` is here."""

    class_names: list[str]

    @property
    def unknown(self) -> list[float]: ...

    def predict(self, pictures: Sequence[str], unknown: float | None) -> Sequence[Any]: ...

    def explain(self, picture: str) -> np.ndarray: ...


def serve(address: str, sides: Mapping[str, Answering], unknown: float | None) -> None:
    """Until Ctrl-C. ``address`` is a port of this machine alone, or host:port; port 0 is any that is free.

    ``sides`` are those that answer, by name; the maps are the last one's. Raises InputError for an address that cannot
    be had.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise InputError(f"--serve is {address!r}: a port is needed, or host:port, as in --serve {LOOPBACK}:8000")
    try:
        server = Server((host or LOOPBACK, int(port)), sides, unknown)
    except (OSError, TypeError, ValueError) as error:  # the last two of a host's odd name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--serve {address}: {reason}; take another address") from error
    with server:
        log.info(f"the page is http://{server.server_name}:{server.server_port}/ (Ctrl-C ends it)")
        server.serve_forever()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sides: Mapping[str, Answering], unknown: float | None) -> None:
        self.sides, self.unknown = sides, unknown
        *_, self.shown = sides.values()  # whose maps and classes are shown
        self.room, self.network = threading.BoundedSemaphore(AT_ONCE), threading.Lock()
        template = report.environment().get_template("serve.html.jinja")
        self.page = template.render(names=self.shown.class_names, largest=LARGEST).encode()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Without the name of the host, for which the standard library asks the network."""
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who leaves is no fault."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, picture: bytes) -> dict[str, Any]:
        """What the page shows of a picture. Raises InputError for what is none."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(picture)
            file.flush()
            try:
                whole = decode_whole(file.name)
                with self.network:  # one at a time has all cores
                    answers = [self.answer_of(role, file.name) for role in self.sides]
                    heat = self.shown.explain(file.name)
            except InputError as error:
                raise InputError(str(error).replace(file.name, "the picture")) from error
        shown = Image.fromarray(plots.covered(whole, heat))
        shown.thumbnail((SHOWN, SHOWN))
        return {"answers": answers, "map": report.uri(plots.encode(np.asarray(shown)))}

    def answer_of(self, role: str, path: str) -> dict[str, Any]:
        side = self.sides[role]
        (answer,) = side.predict([path], self.unknown if side.unknown else None)
        return {"role": role, **answer._asdict()}


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: Server

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "there is nothing here; the page is /")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/answer":
            self.refuse(HTTPStatus.NOT_FOUND, "pictures go to /answer")
        elif not length.isdecimal() or len(length) > 12:
            self.refuse(HTTPStatus.LENGTH_REQUIRED, "the picture is to be the body, with its length")
        elif int(length) > LARGEST:
            self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture may have {LARGEST // 10**6} MB")
        else:
            picture = self.rfile.read(int(length))  # a slow visitor keeps nobody else waiting
            try:
                with self.server.room:
                    reply = self.server.answer(picture)
            except (InputError, RunError) as error:
                self.refuse(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self.reply(HTTPStatus.OK, json.dumps(reply).encode(), "application/json")

    def refuse(self, status: HTTPStatus, why: str) -> None:
        self.reply(status, json.dumps({"error": why}).encode(), "application/json")

    def reply(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        log.debug(format % words)
