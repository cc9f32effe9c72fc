"""schemathesis tests the API by its OpenAPI document alone: each operation, and along the links between them.

The service under test has an API key and a worker. This file adds what the document cannot say: which names exist in
storage, and which options exclude each other. `make fuzz` runs longer.
"""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.engine import events, from_schema
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.schemas import BaseSchema

from service.api.access.api_keys import hash_of, new_key
from service.contract.recipe import example as recipe_example
from service.contract.schemas import JobFields
from service.settings import Settings
from service.store import workers
from shared.checkpoint import read_info
from shared.options import LIMITS, MAX_SEED
from shared.registry import promote, resolve
from tests.conftest import api_server, application, running
from tests.service.api.answers import png_with
from tests.service.api.uploads.zips import GOOD, LISTS, zipped
from tests.shared.test_vocabulary import any_json
from tests.toy_checkpoint import publish_toy_denoiser

KEY = new_key()
MODEL = "base"  # its name in the document's examples
LABELS = ["red cube", "blue sphere", "gray cylinder"]
PROMPTS = ["red cube and blue sphere", "gray cylinder"]
WEBHOOK = "https://pictures.example/hook"
STEPS, PICTURES, REPEATS = 4, 4, 2  # limits on what requests ask for, to keep them short
QUICK = {
    "seed": 1,
    "generation": {"max-examples": 3},
    "phases": {"coverage": {"enabled": False}, "stateful": {"max-steps": 4}},
}
LONG = {"generation": {"max-examples": 150}}
CHECKS = {
    "use_after_free": {"enabled": False},  # a cancelled job stays readable, with its pictures
    "allow_header_conformance": {"enabled": False},  # FastAPI names the methods of one of the address's routes
    # schemathesis's own, and 410: a job that an earlier request deleted
    "positive_data_acceptance": {
        "expected-statuses": ["2xx", "3xx", "401", "403", "404", "409", "410", "429", "5xx"],
    },
}


@pytest.fixture(scope="module")
def keyed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with an API key and one promoted model that knows positions."""
    folder = Path(shutil.copytree(settings.storage, tmp_path_factory.mktemp("fuzz") / "storage"))
    publish_toy_denoiser(folder, MODEL, 3, positions=True)
    promote(folder, MODEL)
    return settings.model_copy(
        update={"storage": folder, "api_keys": f"me:{hash_of(KEY)}", "rate_limit": "none", "webhook_secret": "x" * 32}
    )


@pytest.fixture
def address(keyed: Settings, connection: Redis) -> Iterator[str]:
    """The address of a service with a worker."""
    workers.announce(connection, "w", {}, lease_s=3600)
    with api_server(keyed) as server, running(connection, keyed):
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def with_names(document: dict[str, Any], digest: str) -> dict[str, Any]:
    """Return the document with names that exist: model and digest, labels, the pictures' size, a webhook."""
    document = json.loads(json.dumps(document))
    names = {
        "model": [MODEL],
        "webhook": [WEBHOOK],
        "prompt": PROMPTS,
        "size": ["16x16", "auto"],
        "digest": [digest],
    }
    schemas = document["components"]["schemas"]
    for form in ("PngForm", "ScoreForm"):  # schemathesis knows files in a form by OpenAPI 3.0's words only
        for name in schemas[form]["properties"].keys() & {"file", "pictures"}:
            schemas[form]["properties"][name] = {"type": "string", "format": "binary"}
    schemas["ScoreForm"]["properties"]["file"]["enum"] = [json.dumps(LISTS)]
    content = document["paths"]["/generate/png"]["post"]["requestBody"]["content"]["multipart/form-data"]
    content["encoding"] = {"file": {"contentType": "image/png"}}
    del schemas["PngForm"]["examples"]
    del schemas["PngForm"]["properties"]["edits"]  # schemathesis would send the whole form as their JSON
    for schema in ("ImagesRequest", "MadeWith", "Recipe", "GenerateRequest", "PngForm", "ScoreForm"):
        properties = schemas[schema]["properties"]
        for name in names.keys() & properties.keys():
            if "$ref" in properties[name]:
                continue
            null = [None] if {"type": "null"} in properties[name].get("anyOf", []) else []
            properties[name] = {"enum": names[name] + null}
        for lists in properties.keys() & {"labels"}:
            properties[lists]["items"] = schemas["GenerateRequest"]["properties"]["labels"]["items"]
            properties[lists]["items"]["items"] = {"enum": LABELS}
    labels = document["paths"]["/labels"]["get"]["parameters"]
    labels[0]["schema"] = {"enum": [MODEL]}
    return document


def with_digest(value: Any, digest: str) -> Any:
    """Replace the digest of the document's example."""
    return json.loads(json.dumps(value).replace(recipe_example()["model"]["digest"], digest))


keys = itertools.count()
changed = set[str]()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change a valid request so that it can succeed, and quickly."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if "Idempotency-Key" in case.headers:  # one key stands for one request
        case.headers["Idempotency-Key"] = f"key {next(keys)}"
    body = case.body
    if not isinstance(body, dict):
        return
    changed.add(case.id)
    if "file" in body:  # a form leaves out what is null in JSON
        for name in [name for name, value in body.items() if value is None]:
            del body[name]
    if not case.path.endswith("/edit"):  # which needs edits; its refusals do not count
        body.pop("edits", None)  # of objects that the pictures lack
    _make_possible(body)
    recipe = body.get("recipe")
    if recipe:
        _make_possible(recipe)
        options = recipe.setdefault("options", {})
        options.pop("edits", None)
        _make_possible(options)
        if options.get("kept"):  # one attempt a picture
            options["kept"] = [options["kept"][0]] * len(recipe["labels"])
        else:
            options.pop("kept", None)
    if body.get("webhook") is None:
        body.pop("webhook_events", None)
    if "pictures" in body:
        for name in body.keys() - {"file", "columns", *JobFields.model_fields}:
            del body[name]
        body["pictures"] = zipped(GOOD)
    if body.get("stream"):
        body |= {"n": 1, "response_format": None}


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Return whether a failure counts. schemathesis takes every form that `before_call` changed for an invalid one, and
    "0" for a valid Last-Event-ID, although the pattern excludes it. No document says which objects a picture has for an
    edit. FastAPI takes a form's empty field for one that is not there, and a Prefer that is not understood is ignored
    (RFC 7240).
    """
    if isinstance(failure, RejectedPositiveData):
        return not (case.headers.get("Last-Event-ID") == "0" or case.path.endswith("/edit"))
    if not isinstance(failure, AcceptedNegativeData):
        return True
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    has_empty_field = is_form and "" in case.body.values()
    return not (case.id in changed or has_empty_field or "`prefer` in header" in str(failure))


def _make_possible(body: dict[str, Any]) -> None:
    for name, most in (
        ("steps", STEPS),
        ("repeats", REPEATS),
        ("seed", MAX_SEED - LIMITS.max_repeats),
        ("first", 2**31 - PICTURES),
    ):
        if body.get(name) is not None:
            body[name] = min(body[name], most)
    if body.get("deadline_s") is not None:
        body["deadline_s"] = 3600
    if body.get("trajectory") is not None:
        body["trajectory"] = min(body["trajectory"], (body.get("steps") or 1) + 1)
    if body.get("until") is None or "file" in body:  # a score refuses it
        for name in ("until", "attempts", "kept"):
            body.pop(name, None)
    else:
        body["attempts"] = max([body.get("attempts") or 1, *(body.get("kept") or ())])
    if body.get("guidance_interval"):
        body["guidance_interval"].sort()
    if body.get("eta"):
        body["sampler"] = "ddim"
    for lists in body.keys() & {"labels"}:
        del body[lists][PICTURES:]
    if body.get("layouts") is not None:
        given = [*body["layouts"], *[None] * PICTURES]
        body["layouts"] = [
            layout if layout is not None and len(layout) == len(labels) else None
            for layout, labels in zip(given, body.get("labels", []), strict=False)
        ]


def findings(schema: BaseSchema) -> Iterator[str]:
    """Yield each finding of schemathesis with the request that shows it."""
    for event in from_schema(schema).execute():
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):
            yield f"{event.label}: {event.value!r}"
        if isinstance(event, events.ScenarioFinished):
            for case_id, checks in event.recorder.checks.items():
                answer = event.recorder.interactions[case_id].response
                for check in checks:
                    if check.failure_info is not None:
                        shown = answer.content[:1000] if answer else None
                        info = check.failure_info
                        yield f"{event.phase.value}, {check.name}: {info.failure}\n{info.code_sample}\n{shown!r}\n"


@pytest.mark.hypothesis
@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a long list of edits
def test_schemathesis_finds_nothing(address: str, keyed: Settings) -> None:
    long = hypothesis_settings.get_current_profile_name() == "long"
    digest = read_info(resolve(keyed.storage, MODEL, "denoiser")).digest
    config = SchemathesisConfig.from_dict(
        {
            "base-url": address,
            "headers": {"Authorization": f"Bearer {KEY}"},
            "request-timeout": 250,  # the machine may be busy
            "checks": CHECKS,
            **(LONG if long else QUICK),
        }
    )
    schemathesis.openapi.media_type("image/png", st.just(png_with(json.dumps(with_digest(recipe_example(), digest)))))

    document = with_digest(with_names(application(keyed).openapi(), digest), digest)
    found = list(findings(schemathesis.openapi.from_dict(document, config=config)))
    assert not found, "\n".join(found)


bodies = (
    st.binary(max_size=100)
    | st.text('[]{}",:0 eEnull', max_size=30).map(str.encode)
    | st.dictionaries(st.sampled_from(["labels", "prompt", "recipe", "layouts", "seed"]), any_json).map(
        lambda body: json.dumps(body).encode()
    )
)
TYPES = (
    "application/json",
    "multipart/form-data; boundary=a",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)
ODD_TYPES = ("application/json; charset=utf-16", "text/plain", "", "multipart/form-data; boundary=", "a" * 100)
types = st.sampled_from([*TYPES, *ODD_TYPES])
FORM = b'--a\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n[["red cube"]]\r\n--a--\r\n'
forms = st.lists(st.tuples(st.integers(0, len(FORM) - 1), st.binary(max_size=2)), max_size=4).map(
    lambda changes: functools.reduce(
        lambda form, change: form[: change[0]] + change[1] + form[change[0] + 1 :], changes, FORM
    )
)


# Starlette leaves the file of a truncated form to the garbage collector.
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")
@given(
    st.sampled_from(["/generate", "/generate/png", "/score", "/v1/images/generations"]),
    bodies | forms,
    types,
)
@example("/v1/images/generations", b"[" * 100_000, "application/json")
@example("/generate", b"[" * 100_000, "application/json")
@example("/v1/images/generations", b'{"seed": ' + b"9" * 5000 + b"}", "application/json")
@example("/generate", b'{"labels": [["\\ud800"]], "guidance": NaN, "seed": 1e999}', "application/json")
@example("/score", FORM, "multipart/form-data; boundary=a")
def test_no_body_is_an_error_of_the_service(session_client: httpx.Client, path: str, body: bytes, type: str) -> None:
    """The client checks that every answer is documented; without a worker a valid request is 503."""
    answer = session_client.post(path, content=body, headers={"content-type": type})
    assert answer.status_code in (400, 413, 422, 503)


@given(
    st.sampled_from(["prefer", "accept", "idempotency-key", "x-request-id", "authorization"]),
    st.binary(max_size=40),
)
@example("accept", "image/png;q=\u0663".encode("latin-1", "ignore"))
def test_no_header_is_an_error_of_the_service(session_client: httpx.Client, name: str, value: bytes) -> None:
    value = re.sub(rb"[\x00-\x1f\x7f]", b"", value).strip()
    answer = session_client.post("/generate", json={"labels": []}, headers={name.encode(): value})
    assert answer.status_code in (400, 422)
