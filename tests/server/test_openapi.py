"""The API keeps what its own description promises: requests are generated from the OpenAPI document (schemathesis)."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from serving import served

from laserrec.server.app import make_app

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def described(model_folder, tmp_path_factory):
    with served(model_folder, tmp_path_factory.mktemp("state"), queue_seconds=60) as client:
        yield schemathesis.openapi.from_asgi("/openapi.json", client.app)


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case):
    case.call_and_validate(headers={"Host": "localhost"})


def test_the_token_is_part_of_the_description(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        for token in (None, "secret"):
            client.app = make_app(client.service, token)
            found = client("GET", "/openapi.json").json()
            assert found["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
            asked = {path for path, calls in found["paths"].items() if any("security" in call for call in calls.values())}
            there = {path for path in found["paths"] if path.startswith(("/v1/", "/metrics"))}
            assert asked == (set() if token is None else there) and len(there) >= 7


def test_the_description_page_loads_nothing_from_elsewhere(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        page = client("GET", "/docs")
        assert page.status_code == 200 and "http:" not in page.text and "https:" not in page.text
        for kind in ("swagger-ui-bundle.js", "swagger-ui.css"):
            assert client("GET", f"/static-offline-docs/{kind}").status_code == 200
        assert client("GET", "/redoc").status_code == 404
