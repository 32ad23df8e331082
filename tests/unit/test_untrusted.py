"""Text and JSON from outside: a plain value or BadJson, never anything else."""

import json

import pytest

from igpo_megatron.untrusted import MAX_DEPTH, BadJson, clean_text, json_loads_untrusted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper"),
        ("9" * 4301, "4,301 digits"),
        ("-1e999", "beyond floating point"),
        ("NaN", "NaN is no number"),
        ("[Infinity]", "Infinity is no number"),
        (b"\xff{}", "not UTF-8"),
    ],
)
def test_what_is_no_json_says_so_in_a_few_words(text, said):
    with pytest.raises(BadJson, match=said):
        json_loads_untrusted(text)


def test_what_is_json_is_read():
    assert json_loads_untrusted("[" * MAX_DEPTH + "]" * MAX_DEPTH) == json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert json_loads_untrusted("\ufeff" + '{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, True, "😀"]}
    assert json_loads_untrusted(b'\xef\xbb\xbf{"id": ' + b"9" * 30 + b"}") == {"id": int("9" * 30)}


def test_half_a_surrogate_pair_and_a_zero_character_do_not_travel_on():
    assert json_loads_untrusted('{"a\\ud800": "x\\udc00y\\u0000"}') == {"a\ufffd": "x\ufffdy"}
    assert clean_text("x\ud800\0é") == "x\ufffdé"
    assert clean_text("\ud83d\ude00") == "😀"  # two halves that belong together
