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
from ito.scoring.charts import escaped
from ito.scoring.index import Index, Near

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        f"--serve needs starlette and uvicorn ({error.name} is not installed here): "
        "pip install 'ito_trainer[search]'"
    ) from None

SHOWN = 24
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
STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto;
       padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.2rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.2rem 0 0; overflow-wrap: anywhere; }
form { display: flex; gap: .5rem; margin-bottom: .5rem; }
input { flex: 1; min-width: 0; font: inherit; padding: .5rem .7rem; border: 1px solid #888;
        border-radius: 6px; }
button { font: inherit; padding: .5rem 1rem; border: 0; border-radius: 6px; background: #2463a8;
         color: #fff; }
p { color: #555; display: flex; gap: .6rem; align-items: center; }
p img { width: 40px; height: 40px; border-radius: 4px; }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: .8rem; }
.found a { color: inherit; text-decoration: none; text-align: center; font-size: .8rem; }
.found img { width: 100%; aspect-ratio: 1; box-sizing: border-box; border: 1px solid #ddd;
             border-radius: 6px; }
.found span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.found small { color: #666; }
"""


def application(index: Index, near: Near | None = None) -> Starlette:
    """`/?q=TEXT` and `/?like=PICTURE` search; `q` may be repeated, or hold several texts with `|`
    or a line break between them. A picture is posted to `/` as the file of a form.
    `/picture/N` is a picture as PNG."""
    count = len(index.dataset.images)

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
            about = f'<img src="/picture/{picture}" alt="">Pictures like this one: '
            about += escaped(index.name(picture))
            return page([], f"<p>{about}</p>" + tiles(index, index.embeddings[picture][None]))
        if not texts:
            return page([], f"<p>{count} pictures. Type what you look for.</p>")
        found = index.encoder.encode_text(texts)
        shown = [(one_line(t), found[n : n + 1]) for n, t in enumerate(texts)]
        return page(texts, "".join(results("text", title, emb) for title, emb in shown))

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
        return page([], results("picture", "Pictures like the uploaded one", found))

    def results(kind: str, title: str, query: torch.Tensor) -> str:
        best = index.search(query, 1)[0].item()
        doubt = near.doubt(kind, best) if near else ""
        about = doubt[:1].upper() + doubt[1:] or f"The closest of {count} pictures."
        return f"<h2>{escaped(title)}</h2><p>{about}</p>" + tiles(index, query)

    def page(texts: list[str], body: str) -> HTMLResponse:
        text = escaped(" | ".join(texts))
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{text or 'ito.search'}</title><style>{STYLE}</style>"
            "<h1>Search pictures by words, or by a picture</h1>"
            f'<form action="/"><input name="q" value="{text}" placeholder="a red flag | a car" '
            f'aria-label="what to look for; | between several texts" autofocus>'
            "<button>Search</button></form>"
            '<form action="/" method="post" enctype="multipart/form-data">'
            '<input type="file" name="picture" accept="image/*" required aria-label="a picture">'
            f"<button>Search by picture</button></form>{body}</html>"
        )

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

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    routes = [
        Route("/", home),
        Route("/", upload, methods=["POST"]),
        Route("/picture/{number}", picture),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard), hosts])


class Guard:
    """Refuses what other web pages send, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *own]}
            await send(message)

        told = foreign(Request(scope)) if scope["type"] == "http" else ""
        app = PlainTextResponse(told, 403) if told else self.app
        await app(scope, receive, guarded)


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


def tiles(index: Index, query: torch.Tensor) -> str:
    scores, found = index.search(query, SHOWN)
    parts = []
    for score, picture in zip(scores[0].tolist(), found[0].tolist(), strict=True):
        name = escaped(index.name(picture))
        parts.append(
            f'<a href="/?like={picture}" title="{name}"><img src="/picture/{picture}" alt="{name}">'
            f"<span>{name}</span><small>{score:.3f}</small></a>"
        )
    return f'<div class="found">{"".join(parts)}</div>'


def serve(index: Index, near: Near | None, port: int) -> None:
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
    server(index, near).run([listener])  # on a signal it ends, and raises the signal again


def server(index: Index, near: Near | None) -> uvicorn.Server:
    # h11 limits the size of a request's headers; httptools, which uvicorn prefers, does not
    return uvicorn.Server(
        uvicorn.Config(application(index, near), log_level="warning", http="h11", ws="none")
    )
