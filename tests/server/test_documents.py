"""docs/api.md and /openapi.json say what the server does, no more and no less."""

import subprocess
import sys
from pathlib import Path

import pytest
from server_harness import BODIES

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
    import re

    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jaxpaged/server").glob("*.py"))
    found = set(re.findall(r'code="([a-z_]+)"', code)) | set(re.findall(r'Problem\(\d+, .*?, "([a-z_]+)"', code))
    assert len(found) > 15
    assert [name for name in sorted(found) if f"`{name}`" not in page] == []


def test_the_document_has_exactly_the_routes_that_exist(shared_client, document):
    there = {
        (route.path.replace("{model:path}", "{model}"), method.lower()) for route in shared_client.app.routes for method in route.methods
    }
    told = {(path, method) for path, operations in document["paths"].items() for method in operations}
    assert told == {(path, method) for path, method in there if method != "head" and (path, method) != ("/ping", "post")}


def test_every_status_in_the_document_can_happen_and_none_is_422(document):
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


def test_references_resolve_and_schemas_are_about_honest_fields(document):
    assert set(document["components"]["schemas"]) == {"Error"}
    for path, fields in ENDPOINTS.items():
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == {field.name for field in fields if field.status != "unsupported"}
        assert schema["required"] == [field.name for field in fields if field.required]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_examples_made_from_the_document_are_accepted(shared_client, document, path):
    """Every property's bounds, as the document gives them, are bounds that the parser takes."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, rule in schema["properties"].items():
        for bound in ("minimum", "maximum"):
            if bound in rule and name not in ("max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs"):
                needs = {"use_beam_search": True} if name in ("beam_width", "length_penalty") else {}
                answer = shared_client.post(path, BODIES[path] | needs | {name: rule[bound]})
                assert answer.status_code == 200, (name, answer.text)
