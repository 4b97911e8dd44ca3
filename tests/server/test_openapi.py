"""The API keeps what its own description promises: requests are generated from the OpenAPI document (schemathesis)."""

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import served

from laserrec.server.app import make_app

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def described(model_folder, tmp_path_factory):
    with served(model_folder, tmp_path_factory.mktemp("state"), hosts=["*"], queue_seconds=60) as client:
        yield schemathesis.openapi.from_asgi("/openapi.json", client.app)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_as_described(described, mode):
    """Without schemathesis' own pytest plugin, which lags behind pytest."""
    tried = set()
    for found in described.get_all_operations():
        operation = found.ok()

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case):
            tried.add(case.operation.label)
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # it knows no item

        with contextlib.suppress(Unsatisfiable):  # where everything is right, or nothing
            holds()
    assert len(tried) >= (4 if mode is schemathesis.GenerationMode.NEGATIVE else 11)  # few can be asked for wrongly


def test_the_token_is_part_of_the_description(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        for token in (None, "secret"):
            client.app = make_app(client.service, token)
            found = client("GET", "/openapi.json").json()
            assert found["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
            paths = found["paths"]
            asked = {path for path in paths if any("security" in call for call in paths[path].values())}
            there = {path for path in paths if path.startswith(("/v1/", "/metrics"))}
            assert asked == (set() if token is None else there) and len(there) >= 7


def test_the_description_page_loads_nothing_from_elsewhere(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        page = client("GET", "/docs")
        assert page.status_code == 200 and "http:" not in page.text and "https:" not in page.text
        for kind in ("swagger-ui-bundle.js", "swagger-ui.css"):
            assert client("GET", f"/static-offline-docs/{kind}").status_code == 200
        assert client("GET", "/redoc").status_code == 404
