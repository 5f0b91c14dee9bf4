"""Names that are like another."""

from adapters.references import nearest


def test_the_most_like_come_first_whatever_their_case() -> None:
    names = ["aurelius", "Wilde", "quotes", "wild-west"]
    assert nearest("wlde", names)[0] == "Wilde"
    assert nearest("WILDE", names)[:2] == ["Wilde", "wild-west"]


def test_any_three_where_none_is_like_it() -> None:
    assert nearest("zzz", ["a", "b", "c", "d"]) == ["a", "b", "c"]
    assert nearest("zzz", []) == []


def test_the_right_one_is_found_among_thousands() -> None:
    names = [f"voice-{i:05}" for i in range(5000)] + ["oscar-wilde"]
    assert nearest("oscr-wilde", names)[0] == "oscar-wilde"
    assert nearest("scar-wilde", names)[0] == "oscar-wilde"
