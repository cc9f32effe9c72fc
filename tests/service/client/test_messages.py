"""What the client sends: lists in a form are fields that are given several times."""

import httpx

from service.client.messages import generate_arguments, score_arguments


def parts(name: str, request: httpx.Request) -> list[str]:
    """Return the values of a field in a multipart form."""
    boundary = request.headers["content-type"].partition("boundary=")[2]
    read = request.read().decode().split(f"--{boundary}")
    found = [part.partition("\r\n\r\n") for part in read]
    return [value.removesuffix("\r\n") for head, _, value in found if f'name="{name}"' in head]


def test_strings_of_a_list_are_sent_as_they_are_and_other_entries_as_json() -> None:
    options = {"webhook_events": ["running", "failed"], "guidance_interval": (0.0, 0.5), "sampler": "ddim", "steps": 3}
    request = httpx.Request("POST", "http://x/score", **score_arguments([["a"]], None, options))
    assert parts("webhook_events", request) == ["running", "failed"]
    assert parts("guidance_interval", request) == ["0.0", "0.5"]
    assert (parts("sampler", request), parts("steps", request)) == (["ddim"], ["3"])
    edits = [{"remove": {"label": "a"}}, {"remove": {"label": "b"}}]
    arguments = generate_arguments(None, b"PNG", None, {"edits": edits})
    sent = parts("edits", httpx.Request("POST", "http://x/generate/png", **arguments))
    assert sent == ['{"remove": {"label": "a"}}', '{"remove": {"label": "b"}}']
