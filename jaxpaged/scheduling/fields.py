"""The one table of sampling fields: name, type, range, default and meaning.

``SamplingParams`` validates itself against it, the server's parser extends it with the fields of each endpoint, the
documentation prints it, and the tests walk along its edges. Knows nothing of models: bounds that depend on one
(vocabulary, context length) are checked where the model is known, in ``engine.admission``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from jaxpaged.config import MAX_LOGPROBS
from jaxpaged.errors import RequestError

Kind = Literal["int", "float", "bool", "string", "int_list", "string_list", "bias_map", "early_stopping"]
With = Literal["both", "samples", "beams"]

MAX_BEAM_WIDTH = 10
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_IDS = 1024
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Field:
    """One request field.

    Attributes:
        name: As in vLLM's ``SamplingParams`` and request bodies.
        kind: JSON type; ``bias_map`` is an object of token id to number, ``string_list`` also takes one string.
        meaning: One sentence for the documentation.
        default: Value when the field is absent or null.
        low, high: Inclusive bounds of a number, of each number in a list, or of a map's values; None for none.
        low_open: Whether ``low`` itself is excluded.
        max_items: Longest list or map.
        nullable: Whether null is allowed (and means the default).
        goes_with: What the field means something for: sampling, beam search, or both. Elsewhere it may only be neutral.
        neutral: Values beside the default (and empty lists and maps) that ask for nothing.
        forbidden: Numbers within the bounds that are not allowed.
    """

    name: str
    kind: Kind
    meaning: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    max_items: int | None = None
    nullable: bool = True
    goes_with: With = "both"
    neutral: tuple[Any, ...] = ()
    forbidden: tuple[int, ...] = ()

    def asks(self, value: object) -> bool:
        """Whether a value asks for anything."""
        return not asks_for_nothing(value, (self.default, *self.neutral))

    def allowed(self) -> str:
        """Says in words what the field takes, for error messages and documentation."""
        span = _span(self)
        match self.kind:
            case "int":
                return f"an integer{span}{''.join(f', not {number}' for number in self.forbidden)}"
            case "float":
                return f"a number{span}"
            case "bool":
                return "true or false"
            case "early_stopping":
                return 'true, false or "never"'
            case "string":
                return "a string"
            case "int_list":
                return f"a list of at most {self.max_items} integers{span}"
            case "string_list":
                return f"a string or a list of at most {self.max_items} non-empty strings of at most {MAX_STOP_CHARS} characters each"
            case "bias_map":
                return f"an object of at most {self.max_items} token ids to numbers{span}"

    def check(self, value: object) -> None:
        """Raises RequestError, naming field, value and what is allowed, unless ``value`` fits."""
        if value is None and self.nullable:
            return
        if not _fits(self, value):
            raise RequestError(f"{self.name} must be {self.allowed()}; got {_short(value)}", param=self.name)


SAMPLING_FIELDS: tuple[Field, ...] = (
    Field("n", "int", "How many completions to generate.", default=1, low=1, high=128),
    Field(
        "best_of",
        "int",
        "Generate this many completions, at least n, and return the n with the best mean log-probability per token.",
        low=1,
        high=128,
        goes_with="samples",
    ),
    Field("use_beam_search", "bool", "Beam search instead of sampling: the n most likely texts that it finds.", default=False),
    Field(
        "beam_width",
        "int",
        "Beams that are kept at each token, at least n; n if not given.",
        low=1,
        high=MAX_BEAM_WIDTH,
        goes_with="beams",
        neutral=(1,),
    ),
    Field(
        "length_penalty",
        "float",
        "Exponent of the length that a beam's log-probability is divided by; above 0 favours longer beams.",
        default=1.0,
        low=-10.0,
        high=10.0,
        goes_with="beams",
    ),
    Field(
        "early_stopping",
        "early_stopping",
        "true: end as soon as beam_width beams have ended; false: as soon as no better one is likely; never: no better one is possible.",
        default=False,
        goes_with="beams",
    ),
    Field(
        "max_tokens",
        "int",
        "Most tokens to generate; with 0 the prompt alone is computed, for its log-probabilities or the prefix cache.",
        default=None,
        low=0,
        high=2**31 - 1,
    ),
    Field("min_tokens", "int", "No end of sequence and no stop before this many tokens.", default=0, low=0, high=2**31 - 1),
    Field(
        "temperature",
        "float",
        "Divides the logits; 0 (and anything below 1e-5) takes the most likely token.",
        default=1.0,
        low=0.0,
        high=2.0,
        goes_with="samples",
        neutral=(0,),
    ),
    Field(
        "top_p",
        "float",
        "Keep the most likely tokens whose probabilities add up to this.",
        default=1.0,
        low=0.0,
        high=1.0,
        low_open=True,
        goes_with="samples",
    ),
    Field(
        "top_k",
        "int",
        "Keep this many most likely tokens; 0 or -1 keeps all.",
        default=0,
        low=-1,
        high=2**31 - 1,
        goes_with="samples",
        neutral=(-1,),
    ),
    Field(
        "min_p",
        "float",
        "Drop tokens less likely than this share of the most likely one.",
        default=0.0,
        low=0.0,
        high=1.0,
        goes_with="samples",
    ),
    Field(
        "repetition_penalty",
        "float",
        "Divides positive and multiplies negative logits of tokens in prompt or output.",
        default=1.0,
        low=0.0,
        high=10.0,
        low_open=True,
        goes_with="samples",
    ),
    Field(
        "presence_penalty",
        "float",
        "Subtracted from the logit of each token in the output.",
        default=0.0,
        low=-2.0,
        high=2.0,
        goes_with="samples",
    ),
    Field(
        "frequency_penalty",
        "float",
        "Subtracted once for each time the token is in the output.",
        default=0.0,
        low=-2.0,
        high=2.0,
        goes_with="samples",
    ),
    Field(
        "logit_bias",
        "bias_map",
        "Added to the logits of these token ids.",
        low=-100.0,
        high=100.0,
        max_items=MAX_TOKEN_IDS,
        goes_with="samples",
    ),
    Field("allowed_token_ids", "int_list", "Only these ids may be generated.", low=0, high=2**31 - 1, max_items=2**17, goes_with="samples"),
    Field("bad_token_ids", "int_list", "These ids are never generated.", low=0, high=2**31 - 1, max_items=2**17, goes_with="samples"),
    Field(
        "seed",
        "int",
        "Same seed, prompt and parameters give the same tokens, whatever else is in the batch.",
        low=-MAX_SEED - 1,
        high=MAX_SEED,
        goes_with="samples",
    ),
    Field("stop", "string_list", "Text that ends the output.", max_items=MAX_STOP_STRINGS, goes_with="samples"),
    Field("stop_token_ids", "int_list", "Ids that end the output.", low=0, high=2**31 - 1, max_items=MAX_TOKEN_IDS),
    Field(
        "include_stop_str_in_output",
        "bool",
        "Keep in the text what ended it: the stop string, or the stop token's text.",
        default=False,
    ),
    Field("ignore_eos", "bool", "Do not end at the model's end-of-sequence ids.", default=False),
    Field(
        "logprobs",
        "int",
        "Also return the log-probabilities of this many most likely tokens at each position; --max-logprobs (20) is the limit.",
        low=0,
        high=MAX_LOGPROBS,
        goes_with="samples",
    ),
    Field("prompt_logprobs", "int", "The same for the tokens of the prompt.", low=0, high=MAX_LOGPROBS, goes_with="samples"),
    Field("skip_special_tokens", "bool", "Leave special tokens out of the text.", default=True),
    Field("detokenize", "bool", "false: the token ids are all that is wanted, and the text stays empty.", default=True),
    Field(
        "truncate_prompt_tokens",
        "int",
        "Keep only this many last tokens of the prompt; -1: as many as leave room for the output.",
        low=-1,
        high=2**31 - 1,
        forbidden=(0,),
    ),
)

NEUTRAL_PARAMS: Mapping[str, tuple[Any, ...]] = {
    "bad_words": ((), []),
    "structured_outputs": (),
    "guided_decoding": (),
    "logits_processors": ((), []),
    "spaces_between_special_tokens": (True,),
    "flat_logprobs": (False,),
    "extra_args": ({},),
    "skip_reading_prefix_cache": (False,),
}
"""Parameters of vLLM's that ``SamplingParams`` does not have, with the values beside None that ask for what happens anyway."""


def asks_for_nothing(value: object, neutral: Sequence[object] = ()) -> bool:
    """Whether a field's value asks for what happens anyway. The one place that says so, for sampling, bodies and messages.

    Nothing is asked for by null, by an empty text, list or object, by an object of nulls, and by a value of ``neutral``. An object of
    ``neutral`` stands for all objects that have its items. True and false are no numbers here, as in JSON.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        return True
    if isinstance(value, Mapping):
        objects = [item for item in neutral if isinstance(item, Mapping) and item]
        return all(item is None for item in value.values()) or any(item.items() <= value.items() for item in objects)
    return any(isinstance(value, bool) == isinstance(item, bool) and value == item for item in neutral)


def check_sampling_fields(values: Mapping[str, object]) -> None:
    """Checks every sampling field, and the rules that tie two of them together.

    Raises:
        RequestError: Names the field, the value and what is allowed.
    """
    for field in SAMPLING_FIELDS:
        value = values.get(field.name)
        if value is None or value is not field.default:
            field.check(value)
    max_tokens, min_tokens = values.get("max_tokens"), values.get("min_tokens") or 0
    if isinstance(max_tokens, int) and isinstance(min_tokens, int) and min_tokens > max_tokens:
        raise RequestError(f"min_tokens must not exceed max_tokens ({max_tokens}); got {min_tokens}", param="min_tokens")
    if values.get("allowed_token_ids") is not None and not values["allowed_token_ids"]:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
    if values.get("stop") and values.get("detokenize") is False:
        raise RequestError("stop looks for strings in the text, so it cannot be combined with detokenize false", param="stop")
    _check_company(values)
    _check_counts(values)


def _check_company(values: Mapping[str, object]) -> None:
    """Refuses fields of sampling in a beam search, and fields of beam search elsewhere."""
    searching = bool(values.get("use_beam_search"))
    for field in SAMPLING_FIELDS:
        value = values.get(field.name)
        if field.goes_with == ("samples" if searching else "beams") and field.asks(value):
            rule = "cannot be combined with use_beam_search" if searching else "needs use_beam_search"
            raise RequestError(f"{field.name} {rule}; got {_short(value)}", param=field.name)


def _check_counts(values: Mapping[str, Any]) -> None:
    """Refuses to return more completions than are generated."""
    n = values.get("n") or 1
    for name in ("best_of", "beam_width"):
        count = values.get(name)
        if count is not None and count < n:
            raise RequestError(f"{name} must be at least n ({n}); got {count}", param=name)
    if values.get("use_beam_search") and n > MAX_BEAM_WIDTH:
        raise RequestError(f"n must be at most {MAX_BEAM_WIDTH} with use_beam_search; got {n}", param="n")


def check_neutral(values: Mapping[str, object]) -> None:
    """Refuses parameters of ``NEUTRAL_PARAMS`` that ask for something.

    Raises:
        RequestError: Names one, and its value.
    """
    for name, value in values.items():
        if value is not None and not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL_PARAMS[name]):
            message = f"{name} is not supported here; got {_short(value)}"
            raise RequestError(message, param=name, code="unsupported_parameter")


def are_ints(items: Iterable[object]) -> TypeGuard[Iterable[int]]:
    """Whether all items are integers and none a boolean; a hundred thousand of them in a few milliseconds."""
    return all(issubclass(kind, int) and kind is not bool for kind in set(map(type, items)))


def _short(value: object) -> str:
    shown = repr(value[:80] if isinstance(value, list | tuple | str) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _span(field: Field) -> str:
    if field.low is None or field.high is None:
        return ""
    return f" in {'(' if field.low_open else '['}{_shown(field.low)}, {_shown(field.high)}]"


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _fits(field: Field, value: object) -> bool:
    match field.kind:
        case "bool":
            return isinstance(value, bool)
        case "early_stopping":
            return isinstance(value, bool) or value == "never"
        case "string":
            return isinstance(value, str)
        case "int":
            return _is_int(value) and _in_range(field, value) and value not in field.forbidden
        case "float":
            return _is_number(value) and _in_range(field, value)
        case "int_list":
            return (
                _is_list(value, field)
                and are_ints(value)
                and (not value or (_in_range(field, min(value)) and _in_range(field, max(value))))
            )
        case "string_list":
            items = [value] if isinstance(value, str) else value
            return _is_list(items, field) and all(isinstance(i, str) and 0 < len(i) <= MAX_STOP_CHARS for i in items)
        case "bias_map":
            return (
                isinstance(value, Mapping)
                and (field.max_items is None or len(value) <= field.max_items)
                and all(_is_int(k) and k >= 0 and _is_number(v) and _in_range(field, v) for k, v in value.items())
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: object, field: Field) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple) and (field.max_items is None or len(value) <= field.max_items)


def _in_range(field: Field, value: Any) -> bool:
    above = field.low is None or (field.low < value if field.low_open else field.low <= value)
    return above and (field.high is None or value <= field.high)
