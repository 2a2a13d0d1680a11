"""The search page, by real requests: other web pages, other names of the host, other paths, bodies
and pictures that are too much, and markup in all that it shows."""

import io
import socket
import threading
import time
import zlib
from contextlib import suppress
from urllib.parse import quote

import pytest
from PIL import Image
from support import untrained_run
from support.markup import strange

import ito
from ito.config import Config
from ito.scoring.index import Index
from ito.source import open_dataset

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    pytest.importorskip("starlette", reason="the extra `search` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `search` is not installed")
    from ito.scoring.search_page import server

    folder = tmp_path_factory.mktemp("page")
    data = untrained_run.write_data(folder / "data", captions=[EVIL])
    run = untrained_run.write_run(folder / "run", data)
    index = Index.open(run, ito.load(run), open_dataset(Config.load(run / "config.json")))
    running = server(index, None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, args=[[listener]], daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        running.should_exit = True
        thread.join(10)


def ask(port: int, request: str | bytes, body: bytes = b"") -> tuple[int, str]:
    """The status and all that is answered. A request without a Host gets the server's own."""
    request = request if isinstance(request, bytes) else request.encode()
    if b"\r\n" not in request:
        request += b" HTTP/1.1\r\nHost: 127.0.0.1:%d" % port
    if body and b"Content-Length" not in request:
        request += b"\r\nContent-Length: %d" % len(body)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(request + b"\r\nConnection: close\r\n\r\n")
        answer = b""
        with suppress(ConnectionError):  # it may be refused before it is read
            client.sendall(body)
        with suppress(ConnectionError):
            while part := client.recv(65536):
                answer += part
    return int(answer[9:12] or b"0"), answer.decode("latin-1")


def test_other_names_of_the_host_are_refused(port):
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "[::1]",
        "0.0.0.0",
        "",
    ):
        for path in ("/", "/picture/0", "/?q=red"):
            request = f"GET {path} HTTP/1.1\r\nHost: {host}"
            assert ask(port, request)[0] == 400, host
    assert ask(port, "GET / HTTP/1.0\r\nX: y")[0] == 400  # none
    assert ask(port, f"GET / HTTP/1.1\r\nHost: localhost:{port}\r\nHost: evil")[0] == 400
    assert ask(port, f"GET http://evil.example/ HTTP/1.1\r\nHost: localhost:{port}")[0] in (
        200,
        404,
    )


def test_other_web_pages_are_refused_whatever_they_ask_for(port):
    host = f" HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    for path in ("GET /", "GET /picture/0", "GET /?q=red", "POST /", "HEAD /"):
        for header in (
            "Sec-Fetch-Site: cross-site",
            "Sec-Fetch-Site: same-site",
            "Origin: http://evil.example",
            "Origin: null",
            f"Origin: http://127.0.0.1:{port + 1}",
        ):
            status, answer = ask(port, f"{path}{host}{header}")
            assert status == 403, (path, header)
            assert "access-control" not in answer.lower()
    assert ask(port, f"GET /{host}Sec-Fetch-Site: none")[0] == 200  # its address, typed
    assert ask(port, f"GET /picture/0{host}Sec-Fetch-Site: same-origin")[0] == 200


def test_every_answer_forbids_scripts_frames_and_other_pages(port):
    for path in ("/", "/picture/0", "/picture/x", "/none", "/?like=x", "/?q=red"):
        answer = ask(port, f"GET {path}")[1].lower()
        for header in (
            "content-security-policy: default-src 'none';",
            "frame-ancestors 'none'",
            "cross-origin-resource-policy: same-origin",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ):
            assert header in answer, path


def test_nothing_is_shown_raw(port):
    for path in ("/", f"/?q={quote(EVIL)}", "/?like=0", f"/?like={quote(EVIL)}", f"/{quote(EVIL)}"):
        _, answer = ask(port, f"GET {path}")
        head, _, page = answer.partition("\r\n\r\n")
        if "text/html" in head:
            assert not strange(page.encode("latin-1").decode())
        else:
            assert "text/plain" in head
            assert "\x1b" not in page


def test_paths_lead_nowhere(port):
    for path in (
        "/../../etc/passwd",
        "/picture/../../../etc/passwd",
        "/picture/..%2f..%2fetc%2fpasswd",
        "/picture//etc/passwd",
        "/picture/0/../../x",
        "/picture/-1",
        "/picture/1e3",
        "/picture/0x0",
        "/picture/%00",
        f"/picture/{'9' * 5000}",
        "/static/x",
        "/docs",
        "//evil.example/",
    ):
        status, answer = ask(port, f"GET {path}")
        assert status in (400, 404), path
        assert "root:" not in answer


def test_what_is_too_much_is_refused(port):
    host = f" HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    assert ask(port, f"GET /?q={'a' * 100_000}")[0] in (400, 414, 431)
    assert ask(port, f"GET /{host}X: {'a' * 200_000}")[0] in (0, 400, 431)
    assert ask(port, f"POST /{host}Content-Length: 99999999999999999999")[0] in (400, 411, 413)
    assert ask(port, f"POST /{host}Content-Length: -1")[0] == 400
    chunked = f"POST /{host}Transfer-Encoding: chunked\r\nContent-Length: 10"
    assert ask(port, chunked, b"ffffffff\r\n")[0] in (400, 411)  # of which the length says nothing
    assert ask(port, f"POST /{host}Transfer-Encoding: chunked\r\nContent-Length: 3")[0] in (
        400,
        411,
    )
    for method in ("PUT", "DELETE", "TRACE", "OPTIONS", "CONNECT"):
        assert ask(port, f"{method} /")[0] in (400, 405), method
    assert ask(port, f"GET /{host}Upgrade: websocket\r\nConnection: Upgrade")[0] in (200, 400)


def sent(port: int, content: bytes, head: str = 'name="picture"; filename="a"') -> tuple[int, str]:
    body = b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content
    return form(port, body + b"\r\n--x--\r\n")


def form(port: int, body: bytes, kind: str = "multipart/form-data; boundary=x") -> tuple[int, str]:
    request = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}"
    return ask(port, request, body)


def png_bomb(side: int) -> bytes:
    """A PNG of side² pixels in few bytes."""
    import struct

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * 64), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_uploads_that_are_no_pictures_or_bombs_are_refused(port):
    evil = EVIL.encode()
    for content in (
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"<!doctype html>" + evil,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
        b"%PDF-1.4",
        b"GIF89a" + b"\xff" * 20,
        evil,
        png_bomb(16_000),
        png_bomb(40_000),
    ):
        began = time.process_time()
        status, answer = sent(port, content)
        assert status == 400, content[:20]
        assert "text/plain" in answer
        assert "<" not in answer.partition("\r\n\r\n")[2]
        assert time.process_time() - began < 2
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    assert sent(port, picture.getvalue(), f'name="p"; filename="{EVIL}"')[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\n\r\n\r\n" * 1_900_000,
        b"--x\r\n" + b"a:b\r\n" * 3_900_000,
        b"--\n" * 6_600_000,
        b"--x\r\nContent-Disposition: form-data" + b"; a=b" * 3_900_000,
        b"".join(
            b"--x\r\nContent-Type: multipart/mixed; boundary=x%d\r\n\r\n--x%d\r\n" % (n, n)
            for n in range(200_000)
        ),
    ],
    ids=["parts", "headers", "lines", "parameters", "nested"],
)
def test_twenty_megabytes_of_a_form_take_no_time(port, body):
    began = time.process_time()
    assert form(port, body[:19_900_000])[0] == 400
    assert time.process_time() - began < 3


def test_forms_without_a_boundary_are_refused(port):
    for kind in ("multipart/form-data", "text/plain", "multipart/form-data; boundary=" + "a" * 999):
        assert form(port, b"--x\r\n\r\nx", kind)[0] == 400
