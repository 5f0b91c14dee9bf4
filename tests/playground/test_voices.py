"""The list of voices: asked for, found in, picked from, mixed."""

import httpx
from playwright.sync_api import Route, expect

from tests.api.conftest import ServerProcess
from tests.playground.test_answers import answer, finished, link


def test_a_list_that_is_asked_for_leaves_the_page_as_it_is(visit, server: ServerProcess) -> None:
    page, held = visit().page, list[Route]()
    page.route("**/v1/adapters?*", lambda route: held.append(route))
    names, note, find = page.locator(".voices .name"), page.locator("#voices-note"), page.get_by_label("Find a voice")

    def give(data: list[dict]) -> None:
        held.pop().fulfill(json={"data": data, "has_more": False, "next": None, "refused": []})

    with page.expect_request("**/v1/adapters?*"):
        page.goto(link(server))
    for typed in ("z", ""):
        find.fill(typed)
        expect(note).to_have_text("Asking for the voices …")
    listed = httpx.get(f"{server.url}/v1/adapters").json()["data"]
    give(listed)
    expect(names).to_have_count(1 + len(listed))
    expect(note).to_be_empty()
    with page.expect_request("**/v1/adapters?*"):
        page.get_by_role("button", name="Refresh the list").click()
    love = page.get_by_role("checkbox", name="love")
    love.press("Space")
    expect(love).to_be_checked()
    expect(names).to_have_count(1 + len(listed))
    expect(note).to_be_empty()
    give(listed[::-1])
    expect(names).to_have_text(["demo", *(record["name"] for record in listed[::-1])])
    expect(love).to_be_focused()
    with page.expect_request("**/v1/adapters?*"):
        page.get_by_role("button", name="Refresh the list").click()
    give([])
    expect(note).to_contain_text("No adapters yet")


def test_enter_in_the_empty_field_picks_nothing(visit, server: ServerProcess) -> None:
    page = visit().page
    page.goto(link(server))
    expect(page.get_by_role("checkbox", name="love")).to_be_visible()
    before = page.locator("#picked").text_content()
    page.get_by_label("Find a voice").press("Enter")
    expect(page.locator("#picked")).to_have_text(before or "")
    page.get_by_label("Find a voice").fill("love")
    page.get_by_label("Find a voice").press("Enter")
    expect(page.get_by_role("checkbox", name="love")).to_be_checked()


def test_a_mix_is_picked_by_its_name(visit, server: ServerProcess) -> None:
    mix = "quotes:0.7,wilde:0.3"
    page = visit().page
    page.goto(link(server, ("",)))
    page.get_by_role("checkbox", name="demo").uncheck()
    page.get_by_label("Find a voice").fill(" quotes: 0.7 , wilde :0.3")
    page.get_by_label("Find a voice").press("Enter")
    page.get_by_role("button", name="Generate").click()
    finished(page, 1)
    assert page.locator(".out").text_content() == answer(server, mix)["generated_text"]
