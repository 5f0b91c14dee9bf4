"""The page as people meet it: themes, keyboard, phone, links, keys, trouble, and text that stays text."""

import json
import re
from pathlib import Path
from urllib.parse import parse_qs

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.api.conftest import ServerProcess
from tests.playground.conftest import KEY
from tests.playground.test_answers import finished, link

LONG = {"max_tokens": 200, "mode": "sampled"}
HOSTILE = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>'
CONTRAST = Path(__file__).with_name("contrast.js").read_text()


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_theme_is_the_systems_until_another_is_chosen(scheme: str, visit, server: ServerProcess) -> None:
    page = visit(color_scheme=scheme, reduced_motion="reduce").page
    page.goto(link(server, max_tokens=4))
    system, toggle = background(page), page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", str(scheme == "dark").lower())
    page.get_by_role("button", name="Generate").click()
    finished(page, 3)
    for summary in page.locator(".report > summary:visible").all():
        summary.click()
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    toggle.click()
    chosen = background(page)
    assert chosen != system
    page.reload()
    assert background(page) == chosen
    expect(toggle).to_have_attribute("aria-pressed", str(scheme != "dark").lower())


def test_it_works_by_keyboard_alone(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server, ("",), **LONG))
    expect(page.get_by_role("checkbox", name="quotes")).to_be_visible()
    seen: list[str] = []
    for _ in range(80):  # round the whole page, and out of it
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.closest('li,div')?.innerText || ''")
        )
        outlined = page.evaluate(
            """() => [document.activeElement, document.activeElement.nextElementSibling].some(
                 (node) => node === document.body || (node && getComputedStyle(node).outlineStyle !== "none"))"""
        )
        assert outlined, f"no focus is shown on {seen[-1]!r}"
        if seen.count("copy-link") == 2:
            break
    assert {"prompt", "generate", "theme", "find", "temperature", "seed", "stops", "code", "copy-code"} <= set(seen)
    assert seen.count("copy-link") == 2, "the focus is trapped"

    address = page.evaluate("location.href")
    page.locator(".skip").press("Enter")
    expect(page.locator("#answers")).to_be_focused()
    assert page.evaluate("location.href") == address, "it holds the setup"

    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".card[data-status=streaming]")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".card")).to_have_attribute("data-reason", "stopped")
    expect(page.get_by_role("status").filter(has_text="Stopped by you")).to_have_count(1)


def test_stop_ends_the_request_on_the_server_too(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server, ("quotes", ""), **LONG))
    before = server.metric("chorus_requests_finished_total", finish_reason="abort")
    page.get_by_role("button", name="Generate").click()
    base = page.locator('.card[data-voice=""]')
    base.get_by_role("button", name="Stop").click()
    expect(base).to_have_attribute("data-reason", "stopped")
    finished(page, 1)
    server.wait_until(lambda: server.metric("chorus_requests_finished_total", finish_reason="abort") == before + 1)


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_small_screen(width: int, visit, server: ServerProcess) -> None:
    page = visit(viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True).page
    page.goto(link(server, prompt="Quote by " + "W" * 60 + ":", max_tokens=8))
    page.get_by_role("button", name="Generate").click()
    finished(page, 3)
    for summary in page.locator("summary:visible").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.get_by_role("button", name="Generate").bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    assert box["height"] >= 40 or width > 640


def test_no_other_host_is_asked(visit, server: ServerProcess) -> None:
    seen = visit()
    seen.page.goto(link(server, max_tokens=8))
    seen.page.get_by_role("button", name="Generate").click()
    finished(seen.page, 3)
    assert len(seen.asked) > 15
    assert [url for url in seen.asked if not url.startswith(f"{server.url}/")] == []
    assert not seen.problems


def test_a_link_shares_the_setup_without_the_key(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(f"{server.url}/playground")
    page.evaluate("sessionStorage.setItem('chorus-api-key', 'hidden')")
    page.get_by_role("checkbox", name="love").check()
    page.get_by_role("checkbox", name="wilde").uncheck()
    page.get_by_label("Prompt", exact=True).fill("On love: ü & #")
    page.get_by_label("Temperature").first.fill("1.2")
    page.get_by_label("Greedy").check()
    page.get_by_label("Stop strings").fill("\\n")
    expect(page).to_have_url(re.compile("stops="))  # the last change; the address follows at leisure
    url = page.evaluate("location.href")
    assert "hidden" not in url
    assert parse_qs(url.partition("#")[2])["voice"] == ["quotes", "love"]
    other = visit().page
    other.goto(url)
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("On love: ü & #")
    expect(other.get_by_label("Temperature").first).to_have_value("1.2")
    expect(other.get_by_label("Greedy")).to_be_checked()
    expect(other.get_by_label("Stop strings")).to_have_value("\\n")
    expect(other.locator(".card h3")).to_have_text(["demo", "quotes", "love"])
    assert other.evaluate("location.href") == url


def test_a_seed_is_rolled_unless_it_is_kept(visit, server: ServerProcess) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).page
    page.goto(f"{server.url}/playground")
    page.get_by_label("Max tokens").first.fill("1")
    seeds = []
    for _ in range(2):
        page.get_by_role("button", name="Generate").click()
        finished(page, 3)
        seeds.append(page.get_by_label("Seed", exact=True).input_value())
    assert seeds[0] != seeds[1]
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert parse_qs(page.evaluate("navigator.clipboard.readText()"))["keep"] == ["1"]
    expect(page).to_have_url(re.compile(f"seed={seeds[1]}"))
    for kept in (False, True):
        page.reload()
        expect(page.get_by_label("Seed", exact=True)).to_have_value(seeds[1])
        expect(page.get_by_label("Keep it")).to_be_checked(checked=kept)
        page.get_by_label("Keep it").check()
        expect(page).to_have_url(re.compile("keep=1"))
    page.get_by_role("button", name="Generate").click()
    finished(page, 3)
    assert page.get_by_label("Seed", exact=True).input_value() == seeds[1]
    page.get_by_role("button", name="Roll another seed").click()
    assert page.get_by_label("Seed", exact=True).input_value() != seeds[1]


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit, locked: ServerProcess) -> None:
    seen = visit()
    page = seen.page
    page.goto(link(locked, ("", "alpha"), max_tokens=4))
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_role("button", name="Cancel").click()
    for typed in ("z", ""):
        page.get_by_label("Find a voice").fill(typed)
        expect(page.locator("#voices-note")).to_have_text("The list needs the key.")
    page.locator("#code-voice").select_option("")
    expect(page.locator("#code")).to_contain_text("Authorization: Bearer $CHORUS_API_KEY")
    page.get_by_label("openai-python").check()
    expect(page.locator("#code")).to_contain_text('api_key=os.environ["CHORUS_API_KEY"]')
    expect(page.locator("#code")).to_contain_text("model=None")  # the base, whose name only the key would tell
    page.get_by_label("curl").check()
    page.locator("#open-key").click()
    expect(dialog).to_contain_text("wants a key")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("refused this key")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("checkbox", name="beta")).to_be_visible()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Remove demo")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    finished(page, 2)
    assert '-H "Authorization: Bearer $CHORUS_API_KEY"' in page.locator("#code").text_content()
    stored = page.evaluate("JSON.stringify([{...localStorage}, document.cookie, location.href])")
    assert KEY not in stored
    assert page.evaluate("sessionStorage.getItem('chorus-api-key')") == KEY
    assert not [url for url in seen.asked if KEY in url]


def test_a_refused_adapter_says_why(visit, locked: ServerProcess) -> None:
    reason = "IA3"
    page = visit(extra_http_headers={"X-API-Key": KEY}).page
    page.goto(link(locked, ("misfit", "alpha"), max_tokens=4))
    row = page.locator(".voices li", has_text="misfit")
    expect(row.locator(".badge")).to_have_text("refused")
    expect(row).to_contain_text(reason)
    page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    expect(page.locator(".card[data-voice=misfit] .reason")).to_contain_text("This adapter was refused")
    expect(page.locator(".card[data-voice=misfit] .reason")).to_contain_text(reason)


def test_a_request_that_is_not_taken_says_why_and_when_to_come_back(visit, server: ServerProcess) -> None:
    page = visit().page
    full = {"error": "1024 requests are waiting", "error_type": "overloaded"}
    page.route("**/generate_stream", lambda r: r.fulfill(status=429, json=full, headers={"Retry-After": "2"}), times=1)
    page.goto(link(server, ("quotes",), max_tokens=2))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".reason")).to_have_text("The server is full: 1024 requests are waiting")
    expect(page.get_by_role("button", name="Try again in")).to_be_disabled()
    page.get_by_role("button", name="Try again", exact=True).click()
    finished(page, 1)
    limited = {"error": "8 requests of this caller are under way", "error_type": "rate_limited"}
    page.route("**/generate_stream", lambda r: r.fulfill(status=429, json=limited), times=1)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".reason")).to_have_text(f"Your own limit is reached: {limited['error']}")
    page.route("**/generate_stream", lambda r: r.abort(), times=1)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".reason")).to_have_text("The server does not answer.")


def test_an_answer_that_breaks_off_is_no_answer(visit, server: ServerProcess) -> None:
    page = visit().page
    token = {"id": 1, "text": " So far", "logprob": -1, "special": False, "skipped": False}
    event = {"index": 1, "token": token, "generated_text": None, "details": None}
    body = f"data: {json.dumps(event)}\n\ndata: " + json.dumps(
        {"error": "the worker died", "error_type": "unavailable"}
    )
    page.route("**/generate_stream", lambda r: r.fulfill(body=body + "\n\n", content_type="text/event-stream"))
    page.goto(link(server, ("quotes",)))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".reason")).to_have_text("the worker died")
    expect(page.locator(".out")).to_have_text(" So far")
    page.route("**/generate_stream", lambda r: r.fulfill(body=f"data: {json.dumps(event)}\n\n"))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".reason")).to_have_text("The answer broke off.")


def test_a_server_that_starts_is_waited_for(visit, server: ServerProcess) -> None:
    page = visit().page
    missing = {"ready": False, "missing": ["the inference worker does not answer (starting or restarting)"]}
    page.route("**/ready", lambda r: r.fulfill(status=503, json=missing, headers={"Retry-After": "1"}), times=1)
    page.goto(link(server))
    expect(page.get_by_role("alert").filter(has_text="Not ready yet")).to_be_visible()
    expect(page.get_by_role("checkbox", name="quotes")).to_be_checked()
    expect(page.locator("#banner")).to_be_hidden()


def test_an_empty_setup_says_what_is_missing(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server, (), prompt=""))
    expect(page.get_by_text("Pick the base or an adapter")).to_be_visible()
    expect(page.locator("#code")).to_be_empty()
    expect(page.locator("#copy-code")).to_be_disabled()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#notice")).to_contain_text("Pick a voice first")
    page.get_by_role("checkbox", name="love").check()
    expect(page.locator("#copy-code")).to_be_enabled()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#notice")).to_contain_text("Write a prompt first")
    page.get_by_role("button", name=re.compile("^“On love")).click()
    assert page.get_by_label("Prompt", exact=True).input_value().startswith("On love")


def test_hostile_text_stays_text(visit, server: ServerProcess) -> None:
    record = httpx.get(f"{server.url}/v1/adapters/quotes").json()
    record |= {"name": HOSTILE, "reason": HOSTILE, "digest": HOSTILE}
    record["report"]["config"]["template"] = HOSTILE
    record["report"]["samples"] = [{"prompt": HOSTILE}]
    record["report"]["rows"][0]["prompts"] = HOSTILE
    record["report"]["training"]["valid_loss"][0] = [HOSTILE, HOSTILE]
    listed = {"data": [record], "has_more": False, "next": None, "refused": [{"name": "x", "reason": HOSTILE}]}
    token = {"id": 1, "text": HOSTILE, "logprob": -1, "special": False, "skipped": False}
    details = {"finish_reason": HOSTILE, "generated_tokens": 1}
    event = {"index": 1, "token": token, "generated_text": HOSTILE, "details": details}
    seen = visit()
    page = seen.page
    page.route("**/v1/adapters?*", lambda r: r.fulfill(json=listed))
    page.route("**/v1/adapters/*", lambda r: r.fulfill(json=record))
    page.route("**/generate_stream", lambda r: r.fulfill(body=f"data: {json.dumps(event)}\n\n"))
    page.goto(link(server, (HOSTILE,), prompt=HOSTILE, stops=HOSTILE))
    page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    page.locator(".report > summary").click()
    assert page.locator(".out").text_content() == HOSTILE
    assert page.locator(".card h3").text_content() == HOSTILE
    assert page.locator(".report dd code").first.text_content() == HOSTILE
    for _ in range(2):
        page.wait_for_timeout(100)
        assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 1  # the logo
    assert not seen.problems


def test_it_works_where_storage_is_closed(visit, server: ServerProcess) -> None:
    seen = visit()
    for name in ("localStorage", "sessionStorage"):
        seen.page.add_init_script(f"Object.defineProperty(window, '{name}', {{get() {{ throw new Error('closed') }}}})")
    seen.page.goto(link(server, max_tokens=8))
    seen.page.get_by_role("button", name="Generate").click()
    finished(seen.page, 3)
    seen.page.locator("#theme").click()
    assert not seen.problems
