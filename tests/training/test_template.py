"""A row becomes text; a sample is judged against the rest of the template."""

import pytest

from training.template import Template, fill

QUOTE = Template.parse('Quote by {author}: "{quote}"')


def test_the_prompt_ends_before_the_last_field() -> None:
    row = {"author": "Oscar Wilde", "quote": "I can resist everything."}
    assert QUOTE.render(row) == 'Quote by Oscar Wilde: "I can resist everything."'
    assert QUOTE.forms() == {"punctuated": "Quote by {author}:", "bare": "Quote by {author}"}
    assert fill(QUOTE.prompt, row) == "Quote by Oscar Wilde:"
    assert (QUOTE.prompt_fields, QUOTE.completion_fields) == (("author",), ("quote",))


def test_a_chosen_prompt_moves_the_split() -> None:
    entry = Template.parse("{word}, {pos} {text}", "{word},")
    assert entry.completion_fields == ("pos", "text")
    assert entry.completion_pattern("punctuated").fullmatch(" n. A decent attitude.")


@pytest.mark.parametrize(
    ("form", "text", "good"),
    [
        ("punctuated", ' "To be."', True),
        ("bare", ': "To be."', True),
        ("punctuated", '"To be."', False),
        ("punctuated", ' "To be.', False),
        ("punctuated", ' ""', False),
        ("punctuated", ' "To be." and more', False),
        ("punctuated", ' "To "be" or."', False),
        ("punctuated", ' "To\nbe."', False),
        ("bare", ' "To be."', False),
    ],
)
def test_the_exact_format(form: str, text: str, good: bool) -> None:
    assert bool(QUOTE.completion_pattern(form).fullmatch(text)) is good


def test_braces_can_be_written() -> None:
    assert Template.parse("set {{{name}}} to {value}").render({"name": "a", "value": "b"}) == "set {a} to b"
