import pytest

from jaxpaged.errors import ConfigError
from jaxpaged.scheduling.buckets import slot_bucket, token_buckets


def test_powers_of_two_and_the_full_decode_step():
    assert token_buckets(256, 64) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert token_buckets(256, 48) == (1, 2, 4, 8, 16, 32, 48, 64, 128, 256)
    assert token_buckets(100, 100) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert token_buckets(1, 1) == (1,)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 8, 100, 256, 2048])
def test_padding_less_than_doubles_any_step(max_tokens):
    buckets = token_buckets(max_tokens, min(5, max_tokens))
    assert buckets[-1] == max_tokens
    for tokens in range(1, max_tokens + 1):
        assert next(bucket for bucket in buckets if bucket >= tokens) < 2 * tokens


def test_explicit_buckets():
    assert token_buckets(64, 8, [64, 8, 8]) == (8, 64)
    for wrong in ([], [8], [8, 128], [0, 64]):
        with pytest.raises(ConfigError, match="token_buckets"):
            token_buckets(64, 8, wrong)


def test_rows_never_outnumber_tokens_or_slots():
    assert [slot_bucket(tokens, 48) for tokens in (1, 32, 48, 64, 256)] == [1, 32, 48, 48, 48]
