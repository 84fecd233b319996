"""The OpenAPI schema, held against the server by schemathesis: whatever comes, no 5xx."""

import os
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kvjax.serving.app import create_app
from kvjax.serving.config import ServeConfig
from kvjax.serving.replies import ErrorReply
from kvjax.serving.service import Service
from tests.serving.live_server import Client

EXAMPLES = int(os.environ.get("KVJAX_SCHEMA_EXAMPLES", "12"))  # per operation


def schema() -> Any:
    return schemathesis.openapi.from_dict(create_app(Service(ServeConfig(), "tiny")).openapi())


OPERATIONS = schema()


@pytest.fixture(scope="module")
def base_url(shared: Client) -> str:
    return shared.url


@OPERATIONS.exclude(path="/v1/kv/events").parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
def test_every_operation_answers_as_its_schema_says_and_never_5xx(case, base_url):
    if isinstance(case.body, dict):  # generated, but not at leisure
        for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 4)):
            if isinstance(case.body.get(name), int) and case.body[name] > most:
                case.body[name] = most
    answer = case.call(base_url=base_url, timeout=30)
    case.validate_response(
        answer,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ],
    )
    if answer.status_code >= 400:
        ErrorReply.model_validate(answer.json())
