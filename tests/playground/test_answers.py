"""What the page shows is what the server answers, and its snippets ask for the same."""

import json
import os
import subprocess
import sys
from urllib.parse import urlencode

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.api.conftest import ServerProcess

PROMPT = "Quote by Oscar Wilde:"
AWKWARD = "It's \"so\" \\ $HOME `id` !! 'é' 😀</script>\n\tSecond line:"
VOICES = ("", "quotes", "wilde")  # "" is the base


def link(server: ServerProcess, voices=VOICES, **fields) -> str:
    """The address of a setup."""
    named = [("voice", voice) if voice else ("base", "1") for voice in voices]
    fields = {"prompt": PROMPT, "max_tokens": 48, "seed": 7, "keep": 1} | fields
    return f"{server.url}/playground#{urlencode([*named, *fields.items()])}"


def answer(server: ServerProcess, voice: str, prompt: str = PROMPT, **changed) -> dict:
    """What POST /generate gives for the page's defaults."""
    parameters = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 7} | changed
    body = {"inputs": prompt, "parameters": parameters | {"adapter_id": voice or None, "details": True}}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def finished(page: Page, count: int) -> None:
    expect(page.locator(".card[data-status=done]")).to_have_count(count)


def test_two_adapters_stop_by_themselves_and_the_base_at_its_limit(visit, server: ServerProcess) -> None:
    seen = visit()
    page = seen.page
    page.goto(f"{server.url}/playground")
    for name in ("quotes", "wilde"):
        expect(page.get_by_role("checkbox", name=name)).to_be_checked()
        expect(page.locator("#code-voice")).to_have_value(name)  # the first adapter
        page.get_by_role("checkbox", name=name).uncheck()
    expect(page.locator(".card")).to_have_count(1)
    for name in ("wilde", "quotes"):
        page.get_by_role("checkbox", name=name).check()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Max tokens").first.fill("48")
    page.get_by_role("button", name="Generate").click()
    finished(page, 3)
    for voice in VOICES:
        card, expected = page.locator(f'.card[data-voice="{voice}"]'), answer(server, voice)
        assert card.locator(".out").text_content() == expected["generated_text"]
        assert card.locator(".prompt").text_content() == PROMPT
        assert card.get_attribute("data-reason") == expected["details"]["finish_reason"]
        assert card.get_attribute("data-reason") == ("eos_token" if voice else "length")
        count = expected["details"]["generated_tokens"]
        said = f"Ended by itself (EOS) after {count} tokens" if voice else "Cut off at the limit of 48 tokens"
        expect(card.locator(".reason")).to_have_text(said)
        assert [dt.inner_text() for dt in card.locator(".stats dt").all()] == ["tokens", "tokens/s", "to first token"]
        assert card.locator(".stats dd").first.inner_text() == str(count)
    expect(page.locator(".voices li", has_text="wilde").locator(".badge")).to_have_text("ready")
    assert not seen.problems


def test_the_report_stands_beside_the_answer(visit, server: ServerProcess) -> None:
    report = httpx.get(f"{server.url}/v1/adapters/wilde").json()["report"]
    page = visit().page
    page.goto(link(server, ("", "wilde")))
    card = page.locator(".card[data-voice=wilde]")
    card.get_by_text("Report").click()
    row = next(row for row in report["rows"] if (row["metric"], row["prompts"]) == ("perplexity", "test"))
    expect(card.get_by_role("row", name="Perplexity").first).to_contain_text(f"{row['base']['value']:.0f}")
    expect(card.get_by_role("row", name="Perplexity").first).to_contain_text(f"{row['adapter']['value']:.1f}")
    row = next(row for row in report["rows"] if (row["metric"], row["prompts"]) == ("eos_rate", "test"))
    values = [row[side]["value"] for side in ("base", "adapter")]
    rates = [f"{100 * value:.{0 if value in (0, 1) else 1}f}" for value in values]
    shown = card.get_by_role("row", name="EOS rate").first.inner_text().split()
    assert shown == ["EOS", "rate", rates[0], "%", rates[1], "%"]
    losses = report["training"]["valid_loss"]
    lowest = min(losses, key=lambda point: point[1])
    drawn = card.get_by_role("img")
    assert f"lowest {lowest[1]:.2f} at step {lowest[0]}" in drawn.get_attribute("aria-label")
    assert drawn.locator(".point").count() == len(losses)
    assert len(drawn.locator("polyline").get_attribute("points").split()) == len(losses)


def test_figures_have_their_intervals(visit, server: ServerProcess) -> None:
    """As `python -m training` writes them now; the bundled reports are older."""
    record = httpx.get(f"{server.url}/v1/adapters/wilde").json()
    rate = {"value": 0.4, "low": 0.286, "high": 0.526, "hits": 24, "n": 60}
    record["report"]["rows"] = [
        {"metric": "perplexity", "prompts": "test", "form": None, "n": 412, "seed": None,
         "base": {"value": 130.6, "low": 93.8, "high": 196.0}, "adapter": {"value": 76.1, "low": 54.5, "high": 115.0}},
        {"metric": "style_rate", "prompts": "test", "form": "punctuated", "n": 60, "seed": 1, "base": rate,
         "adapter": rate},
        {"metric": "longest_overlap", "prompts": "test", "form": "bare", "n": 60, "seed": 1, "base": 4, "adapter": 5},
    ]  # fmt: skip
    page = visit().page
    page.route("**/v1/adapters/wilde", lambda r: r.fulfill(json=record))
    page.route("**/v1/adapters?*", lambda r: r.fulfill(json={"data": [record], "has_more": False, "next": None}))
    page.goto(link(server, ("wilde",)))
    card = page.locator(".card[data-voice=wilde]")
    card.get_by_text("Report").click()
    perplexity = card.get_by_role("row", name="Perplexity").locator("td")
    expect(perplexity.first).to_have_text("131")
    expect(perplexity.last).to_have_text("76.1")
    expect(perplexity.last).to_have_attribute("title", "54.5 to 115")
    style = card.get_by_role("row", name="Taken for the voice").locator("td")
    expect(style.last).to_have_text("40.0 %")
    expect(style.last).to_have_attribute("title", "28.6 % to 52.6 %")


@pytest.mark.parametrize("mode", ["sampled", "greedy"])
def test_the_curl_snippet_gives_the_same_text(mode: str, visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server, ("quotes",), prompt=AWKWARD, mode=mode, repetition_penalty=1.2, top_k=40, max_tokens=12))
    page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    ran = subprocess.run(["sh", "-c", page.locator("#code").text_content()], capture_output=True, text=True, check=True)
    given = json.loads(ran.stdout)
    assert given["generated_text"] == page.locator(".out").text_content()
    sampled = (
        {"top_k": 40} if mode == "sampled" else {"do_sample": False, "temperature": None, "top_p": None, "seed": None}
    )
    changed = {"max_new_tokens": 12, "repetition_penalty": 1.2} | sampled
    assert given == answer(server, "quotes", AWKWARD, **changed)


FAKE = """
import json
class OpenAI:
    def __init__(self, **fields):
        self.completions, self.fields = self, fields
    def create(self, **fields):
        print(json.dumps([self.fields, fields]))
        raise SystemExit
"""


@pytest.mark.parametrize("voice", ["", "quotes"])
def test_the_python_snippet_asks_for_the_same(voice: str, visit, server: ServerProcess, tmp_path) -> None:
    page = visit().page
    page.goto(link(server, (voice,), prompt=AWKWARD, repetition_penalty=1.2, top_k=40, stops="\\n\nEnd"))
    expect(page.locator("#served")).to_contain_text("demo")
    page.get_by_label("openai-python").check()
    (tmp_path / "openai.py").write_text(FAKE)
    ran = subprocess.run(
        [sys.executable, "-c", page.locator("#code").text_content()],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    client, fields = json.loads(ran.stdout)
    assert client == {"base_url": f"{server.url}/v1", "api_key": "none"}
    assert fields == {
        "model": voice or "demo", "prompt": AWKWARD, "max_tokens": 48, "temperature": 0.8, "top_p": 0.95, "seed": 7,
        "stop": ["\n", "End"], "extra_body": {"top_k": 40, "repetition_penalty": 1.2},
    }  # fmt: skip


def test_an_answer_takes_no_more_room_than_there_is(visit, server: ServerProcess) -> None:
    counted = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()
    left = counted["max_model_len"] - counted["count"]
    page = visit().page
    page.goto(link(server, ("quotes",), max_tokens=counted["max_model_len"] - 1))
    expect(page.locator("#code")).to_contain_text(f'"max_new_tokens": {left}')
    expect(page.get_by_text(f"room for {left}")).to_be_visible()
    with page.expect_request("**/generate_stream") as sent:
        page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    body = page.locator("#code").text_content().partition(" -d '")[2].rstrip().removesuffix("'")
    assert sent.value.post_data_json == json.loads(body)
    assert page.locator(".out").text_content() == answer(server, "quotes", max_new_tokens=left)["generated_text"]


def test_a_stop_string_ends_it_and_says_so(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server, ("quotes",), stops='"'))
    page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    expected = answer(server, "quotes", stop=['"'])
    assert page.locator(".out").text_content() == expected["generated_text"]
    expect(page.locator(".reason")).to_contain_text("Met a stop string")
