"""Text from tokens: byte-exact, never half a character, never a part of a stop string."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from server.api.text import TextAssembler, TokenPiece
from server.engine.types import FinishReason, SequenceOutput
from server.model.config import ModelError
from server.model.source import DEMO_MODEL
from server.tokenizer import Detokenizer, Tokenizer

EOS = 50256
TOKENIZER = Tokenizer(DEMO_MODEL)
VOCABULARY = TOKENIZER.vocabulary(50257)
ORACLE = GPT2TokenizerFast.from_pretrained(DEMO_MODEL)
TEXTS = st.text(min_size=1, max_size=40)


def assemble(
    ids: Sequence[int], stop: Sequence[str] = (), *, per_output: int = 1, offset: int | None = None
) -> tuple[TextAssembler, list[TokenPiece]]:
    """Feed ids as the engine would hand them out; `offset` is where it found a stop string."""
    text = TextAssembler(VOCABULARY, TOKENIZER.special, [s.encode() for s in stop])
    pieces: list[TokenPiece] = []
    for start in range(0, len(ids), per_output):
        last = start + per_output >= len(ids)
        reason = (FinishReason.LENGTH if offset is None else FinishReason.STOP) if last else None
        output = SequenceOutput("r", tuple(ids[start : start + per_output]), (), reason, offset if last else None)
        pieces += text.push(output)
    return text, pieces


@given(TEXTS)
def test_encoding_is_that_of_transformers(text: str) -> None:
    assert TOKENIZER.encode(text) == ORACLE(text)["input_ids"]


@given(TEXTS, st.integers(1, 50))
def test_pieces_join_to_the_text_however_the_tokens_arrive(text: str, per_output: int) -> None:
    ids = TOKENIZER.encode(text.replace("<|endoftext|>", ""))
    if not ids:
        return
    result, pieces = assemble(ids, per_output=per_output)
    assert result.text == "".join(piece.text for piece in pieces) == text.replace("<|endoftext|>", "")
    assert [piece.index for piece in pieces] == list(range(1, len(ids) + 1))
    assert "\ufffd" not in result.text or "\ufffd" in text, "half a character was given out"


@given(st.lists(st.integers(0, 50256), min_size=1, max_size=30))
def test_any_tokens_give_the_text_that_transformers_decodes(ids: list[int]) -> None:
    kept = [id_ for id_ in ids if id_ != EOS]
    text, pieces = assemble([*kept, EOS])
    assert text.text == ORACLE.decode(kept, clean_up_tokenization_spaces=False)
    assert pieces[-1].special
    assert pieces[-1].text == "<|endoftext|>"
    assert "".join(piece.text for piece in pieces[:-1]) == text.text


@given(TEXTS, st.data(), st.integers(1, 50))
def test_a_stop_string_is_cut_exactly(text: str, data: st.DataObject, per_output: int) -> None:
    text = text.replace("<|endoftext|>", "") or "a"
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin : data.draw(st.integers(begin + 1, len(text)))]
    ids, output, offset = TOKENIZER.encode(text), b"", -1
    taken: list[int] = []
    while offset < 0:  # as the scheduler does: after each token, look for the stop string
        taken.append(ids[len(taken)])
        output += VOCABULARY[taken[-1]]
        offset = output.find(stop.encode())
    result, pieces = assemble(taken, ["\u0000never", stop], per_output=per_output, offset=offset)
    assert result.text == text[: text.index(stop)]
    assert "".join(piece.text for piece in pieces) == result.text


def test_a_beginning_of_a_stop_string_that_comes_to_nothing_is_given_out() -> None:
    detokenizer = Detokenizer([b"a", b"bc", b"d"], [b"abcx"])
    assert [detokenizer.push(i) for i in (0, 1, 2)] == ["", "", "abcd"]
    assert detokenizer.push(0) == ""
    assert detokenizer.finish() == "a"


def test_what_is_held_back_at_eos_goes_to_a_token_that_clients_show() -> None:
    ids = TOKENIZER.encode("so st")
    _, pieces = assemble([*ids, EOS], ["stop"])
    assert "".join(piece.text for piece in pieces if not piece.special) == "so st"


@pytest.mark.parametrize("per_output", [1, 2, 3])
def test_a_stop_string_across_a_special_token_is_cut_however_the_tokens_arrive(per_output: int) -> None:
    (a,), (b,) = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    text, pieces = assemble([a, EOS, b], ["ab"], per_output=per_output, offset=0)
    assert text.text == "".join(piece.text for piece in pieces if not piece.special) == ""
    text, pieces = assemble([a, EOS, a, EOS], ["ab"], per_output=per_output)
    assert text.text == "".join(piece.text for piece in pieces if not piece.special) == "aa"
    assert [piece.index for piece in pieces] == [1, 2, 3, 4], "in order, nothing lost"


@given(st.text("ab\u00e9\U0001f600", min_size=1, max_size=8), st.data())
def test_special_tokens_in_the_middle_change_nothing_about_the_text(text: str, data: st.DataObject) -> None:
    ids = [id_ for char in text for id_ in TOKENIZER.encode(char)]
    for _ in range(data.draw(st.integers(1, 4))):
        ids.insert(data.draw(st.integers(0, len(ids))), EOS)
    one_by_one, pieces = assemble(ids, ["ab\u00e9x"])
    at_once, same = assemble(ids, ["ab\u00e9x"], per_output=len(ids))
    assert one_by_one.text == at_once.text == text
    assert "".join(piece.text for piece in pieces if not piece.special) == text
    assert [piece.index for piece in pieces] == [piece.index for piece in same] == list(range(1, len(ids) + 1))


def test_vocab_and_merges_are_read_where_there_is_no_tokenizer_json(tmp_path) -> None:
    model = json.loads((DEMO_MODEL / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    other = Tokenizer(tmp_path)
    for text in ("Hello, world! \u00e9t\u00e9", "  two  spaces\n"):
        assert other.encode(text) == TOKENIZER.encode(text)
    assert other.vocabulary(50257) == VOCABULARY


def test_a_missing_tokenizer_is_an_error_that_says_so(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
