"""schemathesis holds the server against its own document: valid bodies are taken, invalid ones refused, answers are as described."""

import schemathesis
from hypothesis import HealthCheck, settings
from server_fakes import VOCAB, FakeAsyncEngine, byte_tokenizer, replace_info
from server_harness import InlinePool

from jaxpaged.config import ServerConfig
from jaxpaged.scheduling.fields import SAMPLING_FIELDS
from jaxpaged.server.app import create_app

# A template that shows every part of a message, so that none is refused for the model's sake.
SHOWS_ALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.name or '' }}{{ m.reasoning_content or '' }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.function_call %}{{ m.function_call.name }}{{ m.function_call.arguments | tojson }}{% endif %}<|im_end|>{% endfor %}"
)


def make_app():
    engine = FakeAsyncEngine(max_model_len=2**16)  # no body that is made here is too long for it
    replace_info(engine, tokenizer=byte_tokenizer(SHOWS_ALL))
    return create_app(engine, ServerConfig(), InlinePool())


schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())
OF_SAMPLES = {field.name: field for field in SAMPLING_FIELDS if field.goes_with == "samples"}
OF_BEAMS = {field.name: field for field in SAMPLING_FIELDS if field.goes_with == "beams"}


def keep_the_rules_in_words(body):
    """Makes a body that fits the schema fit the rules that the document says in words too, and ask for the model that there is."""
    searching = body.get("use_beam_search") is True
    n = body["n"] = min(body.get("n") or 1, 3)
    body["max_tokens"] = body["max_completion_tokens"] = 8
    body["model"] = "echo"
    for name, field in (OF_SAMPLES if searching else OF_BEAMS).items():
        if field.asks(body.get(name)):
            body.pop(name, None)
    if searching:
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    for name in ("best_of", "beam_width"):
        if (body.get(name) or n) < n or (name == "best_of" and body.get("stream")):
            body.pop(name, None)
    if (body.get("min_tokens") or 0) > 8 or body.get("allowed_token_ids"):
        body["min_tokens"] = 0
    if body.get("detokenize") is False:
        body.pop("stop", None)
    if body.get("allowed_token_ids"):
        body.pop("bad_token_ids", None)
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(key) % VOCAB): value for key, value in body["logit_bias"].items()}


@schema.parametrize()
@settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_document_is_true(case):
    """With all checks of schemathesis, at the edges of every field and at random."""
    if case.path.startswith("/v1/") and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        keep_the_rules_in_words(case.body)
    case.call_and_validate()
