"""The server of the page: on this machine alone, for its folders alone."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..integrations.huggingface import keep_offline
from .desk import Desk, Links
from .job_list import JobList
from .roots import Roots

HOST = "127.0.0.1"


def require_gradio() -> None:
    """Whether Gradio is there.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("gradio") is None:
        raise ConfigError(
            "`rebasin ui` needs Gradio, which is not installed; pip install 'git-rebasin[ui]' brings it. All else works"
            " without it."
        )


def serve(
    desk: Desk,
    roots: Sequence[Path],
    *,
    port: int | None = None,
    at_once: int = 1,
    open_it: bool = False,
    share: bool = False,
) -> None:
    """Show the page until Ctrl-C or SIGTERM, then end the jobs that run.

    Raises:
        ConfigError: a root is no folder, Gradio is missing, or the port is taken.
    """
    require_gradio()
    folders = Roots.of(roots)
    print("Starting the page ...", flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    keep_offline()
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST)))  # Gradio asks itself
    gradio: Any = import_module("gradio")  # late: an extra
    from .page import LOOK, build

    jobs = JobList(at_once)
    links = Links(folders, jobs)
    page = build(desk, folders, jobs, links)
    password = secrets.token_urlsafe(12) if share else None
    end = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: end.set())
    try:
        try:
            _, address, public = page.launch(
                server_name=HOST,
                server_port=port,
                share=share,
                auth=("rebasin", password) if password else None,
                inbrowser=open_it,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                _frontend=False,  # else it gives up if its first answer takes three seconds, as on a busy machine
                app_kwargs=_app(links, shared=share),
                **LOOK(gradio),
            )
        except OSError as error:
            taken = f"Port {port} of {HOST}" if port else f"Every port of {HOST} from 7860 to 7959"
            raise ConfigError(f"{taken} is taken; give another one with --port.") from error
        print(
            f"The page is at {address} and uses {folders}. Ctrl-C ends it, and the jobs that run.", flush=True
        )
        if password:
            print(f"For others: {public} (user rebasin, password {password})", flush=True)
        while not end.wait(1.0):
            pass
        print("\nEnding; no input was changed and nothing is half-written.", file=sys.stderr)
    finally:
        jobs.close()
        page.close(verbose=False)


def _app(links: Links, shared: bool) -> Mapping[str, Any]:
    """What the web application has besides the page: downloads, the pages of runs, and who may ask."""
    middleware: Any = import_module("starlette.middleware")
    trusted: Any = import_module("starlette.middleware.trustedhost")
    responses: Any = import_module("starlette.responses")
    routing: Any = import_module("starlette.routing")

    def file(request: Any) -> Any:
        found = links.file(*(request.path_params[name] for name in ("key", "number", "place")))
        if found is None:
            return responses.PlainTextResponse("There is no such file.", 404)
        return responses.FileResponse(
            found,
            filename=found.name,
            media_type="application/octet-stream",
            headers={"Cache-Control": "no-store"},
        )

    def report(request: Any) -> Any:
        found = links.page(*(request.path_params[name] for name in ("key", "digest")))
        if found is None:
            return responses.PlainTextResponse("There is no such page.", 404)
        # A page that someone else has made must not act as this one.
        headers = {"Content-Security-Policy": "sandbox allow-scripts", "Cache-Control": "no-store"}
        return responses.FileResponse(found, media_type="text/html", headers=headers)

    routes = [
        routing.Route("/files/{key}/{number:int}/{place:int}", file),
        routing.Route("/reports/{key}/{digest}", report),
    ]
    # A name of someone else's that leads to this machine must not reach the page.
    guard = middleware.Middleware(trusted.TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return {"routes": routes, "middleware": [] if shared else [guard]}
