"""The request fields of each endpoint: one table makes the parser, docs/api.md, /openapi.json and the tests.

Every field that OpenAI or vLLM define is here with one of three fates: it is honoured; it cannot change the output and is
accepted without effect; or it would change the output and is refused by name (unless its value asks for what happens anyway).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxpaged.config import MAX_LOGPROBS
from jaxpaged.engine.conversation import RESERVED_TEMPLATE_KEYS
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import MAX_STOP_CHARS, SAMPLING_FIELDS, Field, asks_for_nothing

Status = Literal["honoured", "no effect", "unsupported"]

MAX_PROMPTS = 1024
"""Most prompts in one call, and most sequences (prompts times n, best_of or beam_width)."""

MAX_MESSAGES = 4096
"""Most messages of a chat."""

MAX_LABEL_CHARS = 256
"""Longest string that only identifies somebody or something (user, model, ...)."""

MAX_TOOLS = 128
"""Most functions in ``tools``, and most calls in one message."""

MAX_TEMPLATE_KWARGS = 64
"""Most variables that a request gives to the chat template."""

MAX_TEMPLATE_KWARGS_BYTES = 32 * 1024
"""Most bytes of them, as JSON."""

MAX_IDS = 2**20
"""Most token ids in a list; what the model takes is less and is checked where the model is known."""


TOKEN_ID = {"$ref": "#/components/schemas/TokenId"}
"""Schema of an id of the running server's vocabulary."""


@dataclasses.dataclass(frozen=True)
class BodyField:
    """One field of a request body.

    Attributes:
        name: Key in the JSON object.
        meaning: One sentence for the documentation.
        type: What it takes, in words.
        schema: The same as JSON schema.
        status: Its fate, see the module's docstring.
        default: Value when absent or null.
        required: Whether the body must have it.
        spec: Type and range, where a plain field of the sampling table's kind says it all; checked by ``check``.
        neutral: Values that an unsupported field may have, because they ask for what happens anyway (null and empty ones always may, see
            ``asks_for_nothing``).
        empty_asks: Whether an empty value of an unsupported field asks for something too.
    """

    name: str
    meaning: str
    type: str = "anything"
    schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: Status = "honoured"
    default: Any = None
    required: bool = False
    spec: Field | None = None
    neutral: tuple[Any, ...] = ()
    empty_asks: bool = False

    @property
    def takes_integers(self) -> bool:
        """Whether its numbers are whole: token ids, counts."""
        return self.spec.kind in ("int", "int_list") if self.spec is not None else self.name in ("prompt", "tokens")

    def check(self, value: object) -> None:
        """Raises RequestError, naming the field, unless ``value`` fits."""
        if value is None:
            return
        if self.spec is not None:
            self.spec.check(value)
        if isinstance(value, str) and self.spec is not None and self.spec.kind == "string" and len(value) > MAX_LABEL_CHARS:
            raise RequestError(f"{self.name} must be a string of at most {MAX_LABEL_CHARS} characters", param=self.name)
        if self.status == "unsupported" and (self.empty_asks or not asks_for_nothing(value, self.neutral)):
            raise RequestError(f"{self.name} is not supported by this server", param=self.name, code="unsupported_parameter")


def honoured(spec: Field) -> BodyField:
    """Wraps a plain field that the engine or the server honours."""
    return BodyField(spec.name, spec.meaning, spec.allowed(), json_schema(spec), "honoured", spec.default, spec=spec)


def no_effect(name: str, meaning: str, spec: Field | None = None) -> BodyField:
    """Makes a field that is accepted and changes nothing."""
    schema = json_schema(spec) if spec else {}
    return BodyField(name, meaning, spec.allowed() if spec else "anything", schema, "no effect", spec=spec)


def unsupported(name: str, meaning: str, *neutral: Any) -> BodyField:
    """Makes a field that is refused unless its value is null, empty or one of ``neutral``."""
    return BodyField(name, meaning, status="unsupported", neutral=neutral)


def json_schema(spec: Field) -> dict[str, Any]:
    """Returns the JSON schema of a plain field."""
    bounds: dict[str, Any] = {}
    if spec.low is not None:
        bounds["exclusiveMinimum" if spec.low_open else "minimum"] = spec.low
    if spec.high is not None:
        bounds["maximum"] = spec.high
    number: dict[str, Any] = {"type": "integer" if spec.kind in ("int", "int_list") else "number", **bounds}
    if spec.forbidden:
        number["not"] = {"enum": list(spec.forbidden)}
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    schemas: dict[str, dict[str, Any]] = {
        "int": number,
        "float": number,
        "bool": {"type": "boolean"},
        "string": {"type": "string", "maxLength": MAX_LABEL_CHARS},
        "int_list": {"type": "array", "items": TOKEN_ID, "maxItems": spec.max_items},
        "string_list": {"anyOf": [text, {"type": "array", "items": text, "maxItems": spec.max_items}]},
        "early_stopping": {"enum": [True, False, "never"]},
        "bias_map": {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": number,
            "maxProperties": spec.max_items,
        },
    }
    schema = schemas[spec.kind]
    return schema | {"minItems": 1} if spec.name == "allowed_token_ids" else schema


def _label(name: str) -> Field:
    return Field(name, "string", "")


def _without(*names: str) -> tuple[BodyField, ...]:
    return tuple(honoured(spec) for spec in SAMPLING_FIELDS if spec.name not in names)


_TEXT_PARTS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
_FUNCTION_CALL: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_CHARS},
        "arguments": {"type": ["string", "object", "null"], "description": "A JSON object, or its text."},
    },
}


def _message(roles: list[str], content: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    name = {"type": ["string", "null"], "maxLength": MAX_LABEL_CHARS}
    properties = {"role": {"enum": roles}, "content": content, "name": name, **more}
    return {"type": "object", "required": ["role", *required], "properties": properties}


_MESSAGE_SCHEMA = {
    "oneOf": [
        _message(["developer", "system", "user"], {"anyOf": [{"type": "string"}, {**_TEXT_PARTS, "minItems": 1}]}, ["content"]),
        _message(
            ["assistant"],
            {"anyOf": [{"type": ["string", "null"]}, _TEXT_PARTS]},
            [],
            reasoning_content={"type": ["string", "null"]},
            reasoning={"type": ["string", "null"]},
            function_call={"anyOf": [{"type": "null"}, _FUNCTION_CALL]},
            tool_calls={
                "type": ["array", "null"],
                "maxItems": MAX_TOOLS,
                "items": {
                    "type": "object",
                    "required": ["function"],
                    "properties": {
                        "id": {"type": ["string", "null"], "maxLength": MAX_LABEL_CHARS},
                        "type": {"enum": ["function", None]},
                        "function": _FUNCTION_CALL,
                    },
                },
            },
        ),
        _message(
            ["tool", "function"],
            {"anyOf": [{"type": ["string", "null"]}, _TEXT_PARTS]},
            [],
            tool_call_id={"type": ["string", "null"], "maxLength": MAX_LABEL_CHARS},
        ),
    ]
}

MODEL = BodyField(
    "model",
    "A name from /v1/models.",
    f"a string of at most {MAX_LABEL_CHARS} characters",
    {"$ref": "#/components/schemas/ModelName"},
    required=True,
    spec=_label("model"),
)
OPTIONAL_MODEL = dataclasses.replace(MODEL, required=False, meaning="A name from /v1/models; the served model if absent.")
MESSAGES = BodyField(
    "messages",
    "The conversation; each message has a role (developer, system, user, assistant, tool, function) and a content: a string, or a list of "
    "text parts.",
    f"a list of 1 to {MAX_MESSAGES} messages",
    {"type": "array", "items": _MESSAGE_SCHEMA, "minItems": 1, "maxItems": MAX_MESSAGES},
    required=True,
)
_IDS_SCHEMA = {"type": "array", "items": TOKEN_ID, "minItems": 1, "maxItems": MAX_IDS}
PROMPT = BodyField(
    "prompt",
    "The text to complete, its token ids, or several of either.",
    f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} strings or lists of token ids; none of them empty",
    {
        "anyOf": [
            {"type": "string", "minLength": 1},
            _IDS_SCHEMA,
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
            {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
        ]
    },
    required=True,
)
STREAM_OPTION_NAMES = ("include_usage", "continuous_usage_stats", "include_obfuscation")
STREAM_OPTIONS = BodyField(
    "stream_options",
    "Only with stream: include_usage sends the token counts in a last chunk, continuous_usage_stats in every chunk; "
    "include_obfuscation has no effect.",
    "an object of booleans",
    {
        "type": "object",
        "properties": {name: {"type": ["boolean", "null"]} for name in STREAM_OPTION_NAMES},
    },
)
TOOLS = BodyField(
    "tools",
    "With messages: functions that the chat template shows the model.",
    f"a list of at most {MAX_TOOLS} tools of type function",
    {
        "type": "array",
        "maxItems": MAX_TOOLS,
        "items": {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_CHARS},
                        "description": {"type": ["string", "null"]},
                        "parameters": {"type": ["object", "null"]},
                    },
                },
            },
        },
    },
)
CHAT_TEMPLATE_KWARGS = BodyField(
    "chat_template_kwargs",
    "Variables for the chat template, such as enable_thinking; those that it does not name are ignored and listed in the header. Fields of "
    "the request and special tokens are no variables.",
    f"an object of at most {MAX_TEMPLATE_KWARGS} names and {MAX_TEMPLATE_KWARGS_BYTES} bytes of JSON",
    {
        "type": "object",
        "maxProperties": MAX_TEMPLATE_KWARGS,
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$", "not": {"enum": sorted(RESERVED_TEMPLATE_KEYS)}},
    },
)

_GENERATION: tuple[BodyField, ...] = (
    honoured(Field("stream", "bool", "Send the answer as server-sent events while it is generated.", default=False)),
    STREAM_OPTIONS,
    honoured(Field("return_token_ids", "bool", "Also return the token ids of prompt and output.", default=False)),
    honoured(
        Field("return_tokens_as_token_ids", "bool", "Name tokens in log-probabilities `token_id:<id>` instead of by text.", default=False)
    ),
    no_effect("user", "Who asks.", _label("user")),
    no_effect("metadata", "Labels for the caller's own use."),
    no_effect("store", "Nothing is stored."),
    no_effect("service_tier", "There is one tier."),
    no_effect("safety_identifier", "Who asks.", _label("safety_identifier")),
    no_effect("prompt_cache_key", "A hint for caches.", _label("prompt_cache_key")),
    no_effect("prompt_cache_retention", "A hint for caches."),
    no_effect("request_id", "The server names requests itself, see the header `x-request-id`.", _label("request_id")),
    no_effect("prediction", "A hint for speed."),
    unsupported("bad_words", "Words never to generate; bad_token_ids is supported."),
    unsupported("logits_processors", "Code from a request is never run."),
    unsupported("structured_outputs", "Grammar-constrained output."),
    BodyField("guided_json", "Grammar-constrained output.", status="unsupported", empty_asks=True),  # the empty schema means any JSON
    unsupported("guided_regex", "Grammar-constrained output."),
    unsupported("guided_choice", "Grammar-constrained output."),
    unsupported("guided_grammar", "Grammar-constrained output."),
    unsupported("guided_decoding_backend", "Grammar-constrained output."),
    unsupported("guided_whitespace_pattern", "Grammar-constrained output."),
    unsupported("structural_tag", "Grammar-constrained output."),
    unsupported("response_format", "Grammar-constrained output; plain text is what happens anyway.", {"type": "text"}),
    unsupported("spaces_between_special_tokens", "Spaces between special tokens in the text.", True),
    unsupported("prompt_embeds", "Embeddings instead of a prompt."),
    unsupported("cache_salt", "Partition of the prefix cache; not for clients to choose."),
    unsupported("priority", "Requests are served in the order in which they come.", 0),
    unsupported("kv_transfer_params", "Disaggregated serving."),
    unsupported("vllm_xargs", "Arguments of vLLM's plugins."),
)

CHAT_FIELDS: tuple[BodyField, ...] = (
    MODEL,
    MESSAGES,
    honoured(Field("max_completion_tokens", "int", "Most tokens to generate; wins over max_tokens.", low=0, high=2**31 - 1)),
    *_without("logprobs"),
    honoured(Field("logprobs", "bool", "Return the log-probability of each generated token.", default=False)),
    honoured(
        Field("top_logprobs", "int", "With logprobs, also those of this many most likely tokens.", default=0, low=0, high=MAX_LOGPROBS)
    ),
    honoured(Field("add_generation_prompt", "bool", "End the prompt with the start of an assistant message.", default=True)),
    honoured(Field("continue_final_message", "bool", "Continue the last message instead of starting a new one.", default=False)),
    *_GENERATION,
    unsupported("add_special_tokens", "The chat template writes the special tokens.", False),
    unsupported("echo", "Repeat the last message.", False),
    dataclasses.replace(
        TOOLS,
        meaning="Functions that the chat template shows the model. Only with tool_choice none: calls are not read from the output.",
    ),
    CHAT_TEMPLATE_KWARGS,
    unsupported("tool_choice", "Tool calls.", "none", "auto"),
    unsupported("functions", "Tool calls, in their old form."),
    unsupported("function_call", "Tool calls, in their old form.", "none", "auto"),
    no_effect("parallel_tool_calls", "Means something only with tools."),
    unsupported("modalities", "Kinds of output.", ["text"]),
    unsupported("audio", "Spoken output."),
    unsupported("web_search_options", "Web search."),
    unsupported("reasoning_effort", "Of reasoning models.", "none"),
    unsupported("verbosity", "Of models trained for it.", "medium"),
    unsupported("include_reasoning", "Of reasoning models.", True),
    unsupported("documents", "Retrieved documents."),
    unsupported("chat_template", "The model's own template is used; code from a request is never run."),
    unsupported("mm_processor_kwargs", "Images, audio and video."),
    unsupported("media_io_kwargs", "Images, audio and video."),
)
"""Fields of POST /v1/chat/completions."""

COMPLETION_FIELDS: tuple[BodyField, ...] = (
    MODEL,
    PROMPT,
    *_without(),
    honoured(Field("echo", "bool", "Repeat the prompt before the completion.", default=False)),
    honoured(Field("add_special_tokens", "bool", "Add the tokenizer's special tokens to a prompt given as text.", default=True)),
    *_GENERATION,
    unsupported("suffix", "Text after the insertion."),
)
"""Fields of POST /v1/completions."""

TOKENIZE_FIELDS: tuple[BodyField, ...] = (
    OPTIONAL_MODEL,
    dataclasses.replace(
        PROMPT,
        meaning="The text to tokenise.",
        type="a string",
        schema={"type": "string"},
        required=False,
    ),
    dataclasses.replace(MESSAGES, meaning="A conversation to tokenise instead, through the chat template.", required=False),
    honoured(Field("add_special_tokens", "bool", "With a prompt: add the tokenizer's special tokens.", default=True)),
    honoured(Field("add_generation_prompt", "bool", "With messages: end with the start of an assistant message.", default=True)),
    honoured(Field("continue_final_message", "bool", "With messages: leave the last message open.", default=False)),
    honoured(Field("return_token_strs", "bool", "Also return the tokens as text.", default=False)),
    unsupported("chat_template", "The model's own template is used; code from a request is never run."),
    unsupported("mm_processor_kwargs", "Images, audio and video."),
    TOOLS,
    CHAT_TEMPLATE_KWARGS,
)
"""Fields of POST /tokenize."""

DETOKENIZE_FIELDS: tuple[BodyField, ...] = (
    OPTIONAL_MODEL,
    BodyField(
        "tokens",
        "Token ids to turn into text.",
        f"a list of at most {MAX_IDS} integers in [0, vocabulary)",
        {"type": "array", "items": TOKEN_ID, "maxItems": MAX_IDS},
        required=True,
    ),
)
"""Fields of POST /detokenize."""

ENDPOINTS: Mapping[str, tuple[BodyField, ...]] = {
    "/v1/chat/completions": CHAT_FIELDS,
    "/v1/completions": COMPLETION_FIELDS,
    "/tokenize": TOKENIZE_FIELDS,
    "/detokenize": DETOKENIZE_FIELDS,
}
"""Every endpoint that takes a body, with its fields."""
