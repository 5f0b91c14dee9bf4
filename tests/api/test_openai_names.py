"""What tokens are called in logprobs: no two alike, and from the name back to the token."""

from server.api.openai_choice import TokenNames
from tests.api.fake import EOS
from tests.api.fake_link import TOKENIZER, VOCABULARY


def test_no_two_tokens_of_gpt2_have_one_name() -> None:
    names = TokenNames(VOCABULARY, TOKENIZER.special)
    every = [names[id_] for id_ in range(len(VOCABULARY))]
    assert len(set(every)) == len(every) == 50257
    assert every[EOS] == "<|endoftext|>"
    assert names.data(EOS) == b"<|endoftext|>"
    assert not any(name.startswith("token_id:") for name in every)
    for id_, name in enumerate(every):
        if name.startswith("bytes:"):
            assert bytes(int(part, 16) for part in name.split("\\x")[1:]) == VOCABULARY[id_]
        else:
            assert name.encode() == names.data(id_)


def test_odd_vocabularies_stay_unambiguous() -> None:
    vocabulary = [b"a", b"\xe2\x80", b"bytes:\\xe2\\x80", b"", b"a", b"token_id:3", b""]
    names = TokenNames(vocabulary, {6: "<|end|>"})
    assert [names[id_] for id_ in range(7)] == [
        "a",
        "bytes:\\xe2\\x80",
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in vocabulary[2]),
        "token_id:3",
        "token_id:4",
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in vocabulary[5]),
        "<|end|>",
    ]
