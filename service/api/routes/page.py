"""The pages for browsers: GET / and, from Swagger UI, GET /docs. Neither needs files from other hosts.

Their files call the API as any other client does. Knows no job and no model.
"""

import mimetypes
from importlib.resources import files as files_of
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parents[1] / "static"

# Only what this service serves, and pictures that the page creates itself: previews are data: URLs, and pictures
# fetched with a key are blob: URLs.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI needs inline styles, and pictures of its own.
DOCS_POLICY = CONTENT_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
# Some systems map .js to text/plain, and browsers refuse such modules.
mimetypes.add_type("text/javascript", ".js")
mimetypes.add_type("image/svg+xml", ".svg")


class PageFiles(StaticFiles):
    """Static files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        response.headers["Cache-Control"] = "no-cache"  # browsers ask each time, and get a 304 without an update
        return response


files = PageFiles(directory=FOLDER)
docs_files = PageFiles(directory=str(files_of("fastapi_offline") / "static"))  # only Swagger UI's files are used
router = APIRouter(include_in_schema=False)


@router.get("/")
async def read_page(request: Request) -> Response:
    return await files.get_response("index.html", request.scope)


@router.get("/docs")
async def read_docs(request: Request) -> Response:
    response = await files.get_response("docs.html", request.scope)
    response.headers["Content-Security-Policy"] = DOCS_POLICY
    return response
