"""The API as its own description promises it: requests made up from /openapi.json get only answers that stand there."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from nanochat_ray.serve.api import api_of
from tests.fake_backend import FakeBackend

pytestmark = pytest.mark.slow

schema = schemathesis.openapi.from_asgi("/openapi.json", api_of(FakeBackend(context=256), allowed_hosts=["testserver"]))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@schema.parametrize()
@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_is_described(case):
    case.call_and_validate(checks=CHECKS)
