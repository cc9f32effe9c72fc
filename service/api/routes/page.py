"""The page at /: static files, which ask the API as any other client does. Knows no job and no model."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parents[1] / "static"

# Nothing but what this service serves, and pictures as the page itself makes them: previews are data: URLs, and
# pictures that were fetched with a key are blob: URLs.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, and asked after each time: an update is seen at once, and costs a 304 else
}
# Some systems' own tables call modules text/plain, and browsers refuse those.
TYPES = {".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


class PageFiles(StaticFiles):
    """The files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        if path.endswith(tuple(TYPES)) and "content-type" in response.headers:
            response.headers["content-type"] = TYPES[Path(path).suffix]
        return response


files = PageFiles(directory=FOLDER)
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def read_page(request: Request) -> Response:
    return await files.get_response("index.html", request.scope)
