"""The page to drop a picture on, with the server that the script starts."""

from __future__ import annotations

import concurrent.futures
import http.client
import io
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, refused
from PIL import Image

import demo
from lwm import Classifier
from lwm.reporting import serve

WAIT = 60  # seconds


@pytest.fixture(scope="module")
def sides(whole: Path) -> dict[str, Classifier]:
    paths = {"teacher": whole / "first" / "teacher_model.pth", "student": whole / "student_model.pth"}
    return {role: Classifier.load(path) for role, path in paths.items()}


@pytest.fixture(scope="module")
def port(sides) -> Iterator[int]:
    server = serve.Server(("127.0.0.1", 0), sides, 0.05)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_it_answers_for_both_networks_as_the_classifier_does(port, sides):
    pixels = picture(3, 60, 40)
    status, content = ask(port, "POST", "/answer", as_png(pixels))
    said = json.loads(content)
    assert status == 200 and said["map"].startswith("data:image/")
    for answer, (role, side) in zip(said["answers"], sides.items(), strict=True):
        (expected,) = side.predict([pixels])
        assert (answer["role"], answer["label"]) == (role, expected.label)
        assert answer["probability"] == pytest.approx(expected.probability, abs=1e-6)


def test_a_large_photograph_is_answered_and_what_is_none_is_refused_in_a_line(port):
    generator = np.random.default_rng(0)
    large = as_png(generator.integers(0, 256, (2600, 2600, 3), dtype=np.uint8))
    assert 20e6 < len(large) < serve.LARGEST
    assert ask(port, "POST", "/answer", large)[0] == 200
    for body, status, culprit in ((b"no picture\n", 400, "the picture"), (b"", 400, "the picture")):
        found, content = ask(port, "POST", "/answer", body)
        assert found == status and culprit in json.loads(content)["error"]
    assert ask(port, "POST", "/answer", b"", **{"Content-Length": str(serve.LARGEST + 1)})[0] == 413
    assert ask(port, "POST", "/answer", b"", **{"Content-Length": "\xb2"})[0] == 411


def test_a_visitor_who_leaves_is_no_fault(port, capfd):
    for _ in range(3):
        left = socket.create_connection(("127.0.0.1", port))
        left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset on close
        left.sendall(b"POST /answer HTTP/1.0\r\nContent-Length: 1000\r\n\r\nhalf")
        left.close()
    assert ask(port, "POST", "/answer", as_png(picture(1)))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/../../../../etc/passwd", "/%2e%2e/config.py", "/config.py", "//etc/passwd", "/?x"])
def test_no_file_is_served(port, path):
    for method in ("GET", "POST"):
        status, content = ask(port, method, path)
        assert status == 404 and "error" in json.loads(content)


def test_a_slow_visitor_keeps_nobody_waiting_and_a_long_picture_is_answered(port, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", None)  # they are never given up
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(serve.AT_ONCE + 1)]
    for visitor in slow:
        visitor.sendall(b"POST /answer HTTP/1.0\r\nContent-Length: 1000\r\n\r\n")
    assert ask(port, "POST", "/answer", as_png(np.zeros((2, 9000, 3), np.uint8)))[0] == 200
    assert ask(port, "POST", "/answer", b"", **{"Content-Length": "9" * 5000})[0] == 411
    for visitor in slow:
        visitor.close()


def test_a_hundred_requests_at_once_are_answered(port):
    body = as_png(picture(1))
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda _: ask(port, "POST", "/answer", body), range(100)))
    assert [status for status, _ in replies] == [200] * 100
    assert len({content for _, content in replies}) == 1


def test_a_picture_is_chosen_in_a_browser(port, browser, tmp_path):
    (tmp_path / "photo.png").write_bytes(as_png(picture(3, 60, 40)))
    (tmp_path / "letter.txt").write_text("no picture\n")
    browser.get(f"http://127.0.0.1:{port}/")
    browser.get_log("browser")
    field = browser.find_element("css selector", "input")
    said = "return document.querySelector('[role=status]').className + document.querySelector('tbody').textContent"

    def result(expected: str) -> str:
        for _ in range(10 * WAIT):
            if expected in (text := browser.execute_script(said)):
                return text
            threading.Event().wait(0.1)
        return text

    field.send_keys(str(tmp_path / "photo.png"))
    assert "student" in result("student")
    assert browser.execute_script("return document.querySelector('#map').naturalWidth") > 0
    assert browser.get_log("browser") == []
    field.send_keys(str(tmp_path / "letter.txt"))
    assert result("bad").startswith("bad")
    assert browser.execute_script("return document.querySelector('#result').hidden")


def test_the_script_opens_it_on_this_machine_alone_unless_it_is_asked_for_more(whole, monkeypatch, capsys):
    opened = []

    def open_it(self):
        opened.append(self.server_address)

    monkeypatch.setattr(serve.Server, "serve_forever", open_it)
    flags = ["--teacher", str(whole / "first" / "teacher_model.pth"), "--student", str(whole / "student_model.pth")]
    assert demo.main([*flags, "--serve", "0"]) == 0
    assert demo.main([*flags, "--serve", "0.0.0.0:0"]) == 0
    assert [host for host, _ in opened] == ["127.0.0.1", "0.0.0.0"]
    capsys.readouterr()
    assert demo.main([*flags, "--serve", "here"]) == 2
    assert "--serve" in capsys.readouterr().err.splitlines()[-1]


def test_an_address_that_is_taken_is_refused_in_a_line(port, sides):
    assert str(port) in refused(serve.serve, str(port), sides, None)
