"""Signatures: other implementations accept ours, and only for the right owner and message."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from standardwebhooks import WebhookVerificationError

from service.settings import Settings
from service.store.jobs import JobStore
from service.webhooks.signing import receiver_secret, signing_key
from tests.paths import ROOT
from tests.service.conftest import Command
from tests.service.webhooks.conftest import SECRET, Receiver, attempt, create_job, verified


def test_only_the_owners_secret_verifies_a_message(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings
) -> None:
    receiver = start(200)
    store.cancel(job_id := create_job(store, receiver.url, owner="alice"))
    for _ in range(2):  # the second time it is not due any more
        attempt(hooked, job_id, "cancelled")
    (message,) = receiver.got()
    assert verified(message, "alice")["data"]["id"] == job_id
    with pytest.raises(WebhookVerificationError):
        verified(message, "bob")


def test_the_command_prints_the_receivers_secret(command: Command) -> None:
    environment = {**os.environ, "LABELGRID_WEBHOOK_SECRET": SECRET}
    code, out, _ = command("webhook-secret", "alice", environment=environment)
    assert (code, out.strip()) == (0, receiver_secret(signing_key(SECRET, "alice")))
    code, _, err = command("webhook-secret", "alice", environment=os.environ)
    assert (code, err) == (1, "labelgrid: LABELGRID_WEBHOOK_SECRET is not set\n")


def test_the_snippet_in_the_documentation_verifies_messages(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings
) -> None:
    receiver = start(200)
    store.cancel(job_id := create_job(store, receiver.url))
    attempt(hooked, job_id, "cancelled")
    (message,) = receiver.got()
    page = (ROOT / "docs/api.md").read_text().partition("\n## Webhooks\n")[2]
    snippet = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    secret, body = receiver_secret(signing_key(SECRET, "")), message["body"].encode()
    names["verify"](secret, message["headers"], body)
    other, old = receiver_secret(signing_key("x", "")), {**message["headers"], "webhook-timestamp": "1700000000"}
    for arguments in (
        (other, message["headers"], body),
        (secret, message["headers"], body + b" "),
        (secret, old, body),
    ):
        with pytest.raises(ValueError, match=r"not from the service|too old"):
            names["verify"](*arguments)
