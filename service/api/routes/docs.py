"""GET /docs: Swagger UI, served without files from other hosts. Knows no other route."""

import base64
import hashlib
import re
from importlib.resources import files as files_of

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

files = StaticFiles(directory=str(files_of("fastapi_offline") / "static"))  # only Swagger UI's files are used
router = APIRouter(include_in_schema=False)

# Swagger UI needs inline styles. The page's one inline script is allowed by its hash.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/docs")
def read_docs(request: Request) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=request.app.title,
        swagger_js_url="static/docs/swagger-ui-bundle.js",
        swagger_css_url="static/docs/swagger-ui.css",
        swagger_favicon_url="static/icon.svg",
    )
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    page.headers["Content-Security-Policy"] = CONTENT_POLICY.format(hashes=hashes)
    return page
