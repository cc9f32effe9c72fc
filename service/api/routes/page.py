"""GET /: the web page. Its static files call the API as any other client does. Knows no job and no model."""

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
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate each time: they see an update at once, and otherwise get a 304
}
# Some systems map these to text/plain, and browsers refuse such modules.
TYPES = {".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


class PageFiles(StaticFiles):
    """Static files with the page's headers."""

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
