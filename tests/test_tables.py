"""Tables as their readers see them."""

import pytest

from asymgqa_peft.tables import format_value, markdown_table, text_table

ROWS = [{"model": "base", "perplexity": 8.61234, "bytes": 1024}, {"model": "a longer name", "bytes": 7}]


def test_markdown_has_a_column_per_key_of_the_first_row():
    assert markdown_table(ROWS).splitlines() == [
        "| model | perplexity | bytes |",
        "| ----- | ---------- | ----- |",
        "| base | 8.612 | 1,024 |",
        "| a longer name | - | 7 |",
    ]


def test_aligned_markdown_and_text_line_up():
    assert markdown_table(ROWS, aligned=True).splitlines() == [
        "| model         | perplexity | bytes |",
        "| ------------- | ---------- | ----- |",
        "| base          |      8.612 | 1,024 |",
        "| a longer name |          - |     7 |",
    ]
    assert text_table(ROWS).splitlines() == [
        "model          perplexity  bytes",
        "base                8.612  1,024",
        "a longer name           -      7",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "True"), ("as it is", "as it is"), (1234567, "1,234,567"), (0.000123456, "0.0001235")]
    + [(1234.5678, "1,235"), (123456.7, "123,457"), (-98765.4, "-98,765")],
)
def test_values_are_short_and_never_powers_of_ten(value, text):
    assert format_value(value) == text


def test_a_name_shorter_than_the_rule_is_still_a_table():
    """Markdown wants three dashes under every column's name."""
    assert markdown_table([{"": "x"}]).splitlines() == ["|  |", "| --- |", "| x |"]
