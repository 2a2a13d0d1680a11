"""The page of `python -m ito.search RUN --serve`: search by text, or by clicking on a picture.

Plain HTML without scripts. The server listens on 127.0.0.1 only and answers no other host name, so
that no web page can read it through the browser. It reads no request body. Request lines and
headers above 64 kB, and queries above QUERY characters, are refused.
"""

import html
import io
import signal
import socket
import sys

import torch
from PIL import Image

from ito.cli import one_line
from ito.scoring.index import Index

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        f"--serve needs starlette and uvicorn ({error.name} is not installed here): "
        "pip install 'ito_kernels[search]'"
    ) from None

SHOWN = 24
QUERY = 1000  # characters: several times what a model's context holds
STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto;
       padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.2rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
form { display: flex; gap: .5rem; }
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


def application(index: Index) -> Starlette:
    """`/?q=TEXT` and `/?like=PICTURE` search; `/picture/N` is a picture as PNG."""
    count = len(index.dataset.images)

    def number(text: str) -> int | None:
        """The number of a picture, or None; `int` raises at thousands of digits."""
        return int(text) if text.isdecimal() and len(text) < 20 and int(text) < count else None

    def home(request: Request) -> Response:
        text, like = request.query_params.get("q", "").strip(), request.query_params.get("like")
        about, results = f"{count} pictures. Type what you look for.", ""
        if len(text) > QUERY:
            return PlainTextResponse(f"q must be at most {QUERY} characters, got {len(text)}", 414)
        if like is not None:
            picture = number(like)
            if picture is None:
                return PlainTextResponse(f"like must be in [0, {count}), got {one_line(like)}", 400)
            results = tiles(index, index.embeddings[picture][None])
            about = f'<img src="/picture/{picture}" alt="">Pictures like this one: '
            about += html.escape(index.name(picture))
        elif text:
            results = tiles(index, index.encoder.encode_text(text))
            about = f"The closest of {count} pictures. Click one for its like."
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(text or 'ito.search')}</title><style>{STYLE}</style>"
            "<h1>Search pictures by words</h1>"
            f'<form><input name="q" value="{html.escape(text)}" placeholder="a red flag" '
            f'maxlength="{QUERY}" aria-label="what to look for" autofocus>'
            "<button>Search</button></form>"
            f'<p>{about}</p><div class="found">{results}</div></html>'
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
    routes = [Route("/", home), Route("/picture/{number}", picture)]
    return Starlette(routes=routes, middleware=[hosts])


def tiles(index: Index, query: torch.Tensor) -> str:
    scores, found = index.search(query, SHOWN)
    parts = []
    for score, picture in zip(scores[0].tolist(), found[0].tolist(), strict=True):
        name = html.escape(index.name(picture))
        parts.append(
            f'<a href="/?like={picture}" title="{name}"><img src="/picture/{picture}" alt="{name}">'
            f"<span>{name}</span><small>{score:.3f}</small></a>"
        )
    return "".join(parts)


def serve(index: Index, port: int) -> None:
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
    # h11 limits the size of a request's headers; httptools, which uvicorn prefers, does not
    config = uvicorn.Config(application(index), log_level="warning", http="h11")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    uvicorn.Server(config).run([listener])  # on a signal it ends, and raises the signal again
