"""The server does what its OpenAPI document says, for requests that schemathesis makes up."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.unit.fake_engine import fake_app

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)
HOST = {"host": "localhost"}
schema = schemathesis.openapi.from_asgi("/openapi.json", fake_app(), headers=HOST)


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_answers_conform_to_the_document(case: schemathesis.Case):
    case.call_and_validate(checks=CHECKS, headers=HOST)
