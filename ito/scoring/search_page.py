"""The page of `python -m ito.search RUN --serve`: search by texts, by an uploaded picture, or by
clicking on one.

Plain HTML without scripts. The server listens on 127.0.0.1 only and answers no other host name, so
that no web page can read it through the browser. What another web page sends or links to is refused
before its body is read, and no other page may show this one. Request lines and headers above 64 kB,
more than QUERIES queries or one above QUERY characters, and bodies above UPLOAD bytes are refused.
An uploaded picture is decoded within the limits of the data's own, and is not kept.
"""

import io
import re
import signal
import socket
import sys

import torch
from PIL import Image

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.scoring.index import SHOWN, Index, Near, spread
from ito.scoring.pages import render

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        f"--serve needs starlette and uvicorn ({error.name} is not installed here): "
        "pip install 'ito_trainer[search]'"
    ) from None

EXAMPLES = 6  # of queries
QUERY = 1000  # characters: several times what a model's context holds
QUERIES = 16
UPLOAD = 20_000_000  # bytes
PARTS = 16  # of an uploaded form, that are looked at; the page's own has one
HEADERS = {  # of every answer: no scripts, nothing from elsewhere, in no other page
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def application(index: Index, near: Near | None = None, seen: bool = False) -> Starlette:
    """seen: the pictures of the split "train" were trained on.

    `/?q=TEXT` and `/?like=PICTURE` search; `q` may be repeated, or hold several texts with `|`
    or a line break between them. A picture is posted to `/` as the file of a form.
    `/picture/N` is a picture as PNG."""
    count, examples = len(index.dataset.images), examples_of(index.dataset)
    splits = index.dataset.split

    def number(text: str) -> int | None:
        """The number of a picture, or None; `int` raises at thousands of digits."""
        return int(text) if text.isdecimal() and len(text) < 20 and int(text) < count else None

    def home(request: Request) -> Response:
        given, like = request.query_params.getlist("q"), request.query_params.get("like")
        texts = [part.strip() for q in given for line in q.splitlines() for part in line.split("|")]
        texts = list(dict.fromkeys(filter(None, texts)))
        if too_long := [text for text in texts if len(text) > QUERY]:
            told = f"q must be at most {QUERY} characters, got {len(too_long[0])}"
            return PlainTextResponse(told, 414)
        if len(texts) > QUERIES:
            return PlainTextResponse(f"at most {QUERIES} texts at once, got {len(texts)}", 414)
        if like is not None:
            picture = number(like)
            if picture is None:
                return PlainTextResponse(f"like must be in [0, {count}), got {one_line(like)}", 400)
            title = f"Pictures like this one: {index.name(picture)}"
            return page([], [results("picture", title, index.embeddings[picture][None], picture)])
        found = index.encoder.encode_text(texts)
        return page(texts, [results("text", t, found[n : n + 1]) for n, t in enumerate(texts)])

    async def upload(request: Request) -> Response:
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or len(size) > 10 or "transfer-encoding" in request.headers:
            return PlainTextResponse("the request must name its length", 411)
        if int(size) > UPLOAD:
            return PlainTextResponse(f"at most {UPLOAD} bytes, got {size}", 413)
        body = await request.body()
        return await run_in_threadpool(search_upload, request.headers, body)

    def search_upload(headers, body: bytes) -> Response:
        data = uploaded_file(headers.get("content-type", ""), body)
        if not data:
            return PlainTextResponse("choose a picture's file", 400)
        try:
            found = index.encoder.encode_image(data)
        except ValueError as error:
            return PlainTextResponse(one_line(str(error).removeprefix("images[0]: ")), 400)
        return page([], [results("picture", "Pictures like the uploaded one", found)])

    def results(kind: str, title: str, query: torch.Tensor, itself: int | None = None) -> dict:
        without = None if itself is None else torch.tensor([itself])
        cosines, found = (x[0] for x in index.search(query, SHOWN, without))
        right = (near and near.right(kind, cosines)) or [None] * len(found)
        tiles = [
            (picture, index.name(picture), cosine, share, seen and splits[picture] == "train")
            for picture, cosine, share in zip(found.tolist(), cosines.tolist(), right, strict=True)
        ]
        doubt = near.doubt(kind, tiles[0][2]) if near and tiles else ""
        return {"title": title, "kind": kind, "tiles": tiles, "doubt": doubt, "picture": itself}

    def page(texts: list[str], found: list[dict]) -> HTMLResponse:
        text = " | ".join(texts)
        side = index.dataset.images.shape[-1]
        values = {"text": text, "results": found, "count": count, "side": side}
        return HTMLResponse(render("search.html", examples=examples, **values))

    def picture(request: Request) -> Response:
        asked = request.path_params["number"]
        found = number(asked)
        if found is None:
            message = f"picture must be in [0, {count}), got {one_line(asked)}"
            return PlainTextResponse(message, 404)
        buffer = io.BytesIO()
        pixels = index.dataset.images[found].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    middleware = [
        Middleware(BaseHTTPMiddleware, dispatch=guard),
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
    ]
    routes = [
        Route("/", home),
        Route("/", upload, methods=["POST"]),
        Route("/picture/{number}", picture),
    ]
    return Starlette(routes=routes, middleware=middleware)


async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuses what other web pages send, and adds HEADERS to every answer."""
    told = foreign(request)
    response = PlainTextResponse(told, 403) if told else await call_next(request)
    response.headers.update(HEADERS)
    return response


def foreign(request: Request) -> str:
    """That another web page sent the request, in words; "" if not.

    Browsers name the page's origin with every POST, and with every request whether it comes from
    another site. Other programs need not.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "same-origin")
    own = f"http://{request.headers.get('host')}"
    if origin in (None, own) and site in ("same-origin", "none"):
        return ""
    return "requests are taken from this server's own page only: type its address"


def uploaded_file(kind: str, body: bytes) -> bytes:
    """The first file of a multipart form (RFC 7578) as browsers send it; empty if there is none.

    kind: the content type. The package email takes minutes for 20 MB of tiny parts.
    """
    found = re.fullmatch(r'multipart/form-data *;.*\bboundary="?([^"; ]{1,70})"?.*', kind, re.I)
    mark = b"\r\n--" + (found[1] if found else "").encode("latin-1", "replace")
    parts = (b"\r\n" + body).split(mark, PARTS)[1:] if found else []
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        if re.search(rb"\bfilename\*?=", head[:4096]):
            return content
    return b""


def examples_of(dataset: Dataset) -> list[str]:
    """First captions, evenly spaced over what was not trained on, if there is such; short ones."""
    held = [n for n, split in enumerate(dataset.split) if split != "train"]
    items = dataset.image_item[held or slice(None)].unique().tolist()
    names = dict.fromkeys(dataset.captions[n][0] for n in items)
    short = [name for name in names if len(name) <= 40 and "|" not in name]
    return [short[n] for n in spread(len(short), EXAMPLES)] if short else []


def serve(index: Index, near: Near | None, seen: bool, port: int) -> None:
    """Serve until interrupted; exits with status 143 after SIGTERM, as usual in a shell.

    Raises OSError naming --serve if the port is not available.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # from now on connections wait for the server instead of being refused
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must be in [0, 65535]"
        raise OSError(f"--serve {port}: {reason}") from None
    print(f"http://127.0.0.1:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    server(index, near, seen).run([listener])  # on a signal it ends, and raises the signal again


def server(index: Index, near: Near | None, seen: bool = False) -> uvicorn.Server:
    # h11 limits the size of a request's headers; httptools, which uvicorn prefers, does not
    return uvicorn.Server(
        uvicorn.Config(application(index, near, seen), log_level="warning", http="h11", ws="none")
    )
