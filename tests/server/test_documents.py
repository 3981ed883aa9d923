"""docs/api.md and /openapi.json say what the server does, no more and no less."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest
from server_fakes import VOCAB
from server_harness import BODIES

from jaxpaged.config import ServerConfig
from jaxpaged.server.fields import ENDPOINTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def document(shared_client):
    return shared_client.request("GET", "/openapi.json").json()


def test_the_pages_are_up_to_date():
    run = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert "api.md" not in run.stdout, run.stdout
    assert run.stdout, run.stderr


def test_the_page_names_every_field_and_every_route(shared_client):
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for fields in ENDPOINTS.values():
        assert all(f"`{field.name}`" in page for field in fields if fields is not ENDPOINTS["/tokenize"])
    for route in shared_client.app.routes:
        assert route.path.replace("{model:path}", "{model}") in page


def test_the_page_names_every_error_code(shared_client):
    """Codes are string literals in the package; each must be in the table of errors."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jaxpaged/server").glob("*.py"))
    found = set(re.findall(r'code="([a-z_]+)"', code)) | set(re.findall(r'Problem\(\d+, .*?, "([a-z_]+)"', code))
    assert len(found) > 15
    assert [name for name in sorted(found) if f"`{name}`" not in page] == []


def test_the_document_has_exactly_the_routes_that_exist(shared_client, document):
    there = {
        (route.path.replace("{model:path}", "{model}"), method.lower()) for route in shared_client.app.routes for method in route.methods
    }
    assert {(path, method) for path, operations in document["paths"].items() for method in operations} == there


def test_every_problem_has_its_shape_and_none_is_422(document):
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                assert "x-request-id" in response["headers"]
                if status >= "400" and method != "head":
                    kind = "NotReady" if path in ("/health", "/readyz", "/ping") and status == "503" else "Error"
                    assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{kind}"}


def test_references_resolve_and_schemas_are_about_every_field(document):
    text = json.dumps(document)
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) == set(document["components"]["schemas"])
    for path, fields in ENDPOINTS.items():
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for branch in schema.get("oneOf", [schema]):
            assert set(branch["properties"]) == {field.name for field in fields}
            assert [name for name in branch["required"] if name not in ("prompt", "messages")] == [
                field.name for field in fields if field.required and field.name not in ("prompt", "messages")
            ]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_documents_own_example_is_accepted(shared_client, document, path):
    operation = document["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    example = body["example"] if "example" in body else json.loads(operation["description"].partition("For example: ")[2])
    assert shared_client.post(path, example).status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
def test_defaults_are_values_that_the_schema_takes(document, path):
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for branch in schema.get("oneOf", [schema]):
        for name, rule in branch["properties"].items():
            if "default" in rule:
                jsonschema_rs.validate({**rule, "components": document["components"]}, rule["default"]), name


def test_the_document_names_the_bounds_of_the_running_server(make_client):
    client = make_client()
    schemas = client.request("GET", "/openapi.json").json()["components"]["schemas"]
    assert schemas["TokenId"]["maximum"] == VOCAB - 1
    assert "echo" in schemas["ModelName"]["description"]
    client.engine.info = None
    schemas = client.request("GET", "/openapi.json").json()["components"]["schemas"]
    assert schemas["TokenId"]["maximum"] == 2**31 - 1


STATUSES_OF_KEYS = {"/v1/models": True, "/health": False, "/livez": False, "/ping": False, "/metrics": True}


def test_keys_are_described_where_they_are_needed(make_client):
    client = make_client(config=ServerConfig(api_key=("secret-key",)))
    document = client.request("GET", "/openapi.json", headers={"authorization": "Bearer secret-key"}).json()
    assert document["security"] == [{"key": []}]
    for path, needs in STATUSES_OF_KEYS.items():
        operation = document["paths"][path]["get"]
        assert ("401" in operation["responses"], operation.get("security") == []) == (needs, not needs)
        assert (client.request("GET", path).status_code == 401) == needs


@pytest.mark.parametrize("path", ENDPOINTS)
def test_examples_made_from_the_document_are_accepted(shared_client, document, path):
    """Every property's bounds, as the document gives them, are bounds that the parser takes."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, rule in schema.get("oneOf", [schema])[0]["properties"].items():
        for bound in ("minimum", "maximum"):
            if bound in rule and name not in ("max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs"):
                needs = {"use_beam_search": True} if name in ("beam_width", "length_penalty") else {}
                answer = shared_client.post(path, BODIES[path] | needs | {name: rule[bound]})
                assert answer.status_code == 200, (name, answer.text)
