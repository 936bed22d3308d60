"""Test the two pages in a real headless Chromium, in front of a real scorer."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from rm_robust.data.records import Message, TokenGroup
from rm_robust.models.scorer import RewardScorer
from rm_robust.scoring.contract import ErrorReply, ScoreRequest
from serve.keys import new_key
from serve.launch import deploy_service, start_serve
from serve.settings import ModelSettings, ServiceSettings
from tests.support.local_serve import local_ray, local_service
from tests.support.tiny_reward_model import NUM_POSITIONS, save_tiny_reward_model

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs chromium on PATH, to open the pages in a browser", allow_module_level=True)
pytest.importorskip("playwright.sync_api", reason="needs the package playwright, to open the pages in a browser")
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM_ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DEADLINE_S = 30
PHONE = {"width": 375, "height": 667}
PROMPT = "please list the red river"
COMPLETIONS = ["the river is red", "seven quiet stone", "green and blue and green", "", "answer not please\nof apple"]
MARKUP = "<img src=x onerror=\"document.title = 'ran'\"><script>document.title = 'ran'</script>"
expect.set_options(timeout=DEADLINE_S * 1000)


@dataclass(frozen=True)
class Service:
    """One checkpoint behind two addresses that end in a slash.

    `open_url` asks nobody for a key; `guarded_url` accepts `key` alone.
    """

    open_url: str
    guarded_url: str
    key: str
    checkpoint_dir: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Deploy both services.

    The open one is the Serve application below a route prefix; the guarded one is what `python -m serve` runs.
    """
    checkpoint_dir = save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny")
    key, entry = new_key("alice")
    with local_ray(num_cpus=4):
        start_serve("127.0.0.1", 0)
        model = ModelSettings(model_name="tiny", checkpoint_dir=checkpoint_dir)
        open_url = deploy_service(ServiceSettings(models=(model,), insecure_no_auth=True), "open", "/open")
        guarded = ServiceSettings(models=(model.model_copy(update={"model_name": "tiny_guarded"}),), api_keys=(entry,))
        with local_service(guarded) as running:
            yield Service(f"{open_url}/", f"{running.url}/", key, checkpoint_dir)


def load_scorer(checkpoint_dir: Path) -> RewardScorer:
    return RewardScorer.load(
        checkpoint_dir, device="cpu", dtype="float32", max_length_tokens=NUM_POSITIONS, model_name="tiny"
    )


def token_group(scorer: RewardScorer, prompt: str | list[Message], completions: list[str]) -> TokenGroup:
    return TokenGroup(
        scorer.chat.prompt_ids(prompt), [scorer.chat.completion_ids(completion) for completion in completions]
    )


@dataclass(frozen=True)
class Expected:
    """What the scorer itself says about one prompt's completions, and how the page writes it, the best first."""

    values: list[float]
    scores: list[str]
    texts: list[str]
    token_counts: list[str]


class Scorer:
    """The checkpoint, loaded without any server."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self._scorer = load_scorer(checkpoint_dir)
        self.checkpoint_id = self._scorer.checkpoint_id

    def expected(self, prompt: str | list[Message], completions: list[str]) -> Expected:
        group = token_group(self._scorer, prompt, completions)
        scores = self._scorer.score_groups([group])[0]
        best_first = sorted(range(len(scores)), key=lambda index: -scores[index])
        counts = [len(group.completion_ids[index]) for index in best_first]
        return Expected(
            values=[scores[index] for index in best_first],
            scores=[f"{scores[index]:.4f}" for index in best_first],
            texts=[completions[index] or "(empty completion)" for index in best_first],
            token_counts=[f" · {count} token{'s' if count > 1 else ''}" for count in counts],
        )


@pytest.fixture(scope="module")
def scorer(service: Service) -> Scorer:
    return Scorer(service.checkpoint_dir)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """The page of a new browser context, every address that it asked, and every complaint of its console."""

    page: Page
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    statuses_looked_for: set[int] = field(default_factory=set)
    """The statuses that a test is about. Chromium complains about every status from 400 up."""


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a page, and check at the end that it kept the rules.

    It asked nothing of another origin, and its console has no error and no violation of the policy.
    """
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    visit = Visit(context.new_page())
    visit.page.on("request", lambda request: visit.addresses.append(request.url))
    visit.page.on(
        "console",
        lambda message: visit.complaints.append(message.text) if message.type in ("error", "warning") else None,
    )
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    yield visit
    origins = {urlsplit(address).netloc for address in visit.addresses if not address.startswith("data:")}
    page_origin = urlsplit(visit.page.url).netloc
    context.close()
    assert origins == {page_origin}
    ignored = tuple(
        f"Failed to load resource: the server responded with a status of {status} "
        for status in visit.statuses_looked_for
    )
    assert [complaint for complaint in visit.complaints if not complaint.startswith(ignored)] == []


def open_page(visit: Visit, url: str) -> Page:
    visit.page.goto(url)
    expect(visit.page.locator("#served")).to_contain_text("tiny")
    return visit.page


def open_without_key(visit: Visit, service: Service) -> Page:
    visit.statuses_looked_for.add(401)
    response = visit.page.goto(service.guarded_url)
    assert response is not None
    assert response.status == 401
    expect(visit.page.get_by_label("API key")).to_be_focused()
    return visit.page


def fill_completions(page: Page, completions: list[str]) -> None:
    for _ in range(len(completions) - page.locator("#completions textarea").count()):
        page.get_by_role("button", name="Add completion").click()
    for number, completion in enumerate(completions, start=1):
        page.get_by_label(f"Completion {number}", exact=True).fill(completion)


def press_score(page: Page) -> None:
    page.get_by_role("button", name="Score", exact=True).click()


def expect_ranking(page: Page, expected: Expected) -> None:
    ranking = page.locator("#ranking")
    expect(ranking.locator(".score")).to_have_text(expected.scores)
    assert ranking.locator(".text").all_text_contents() == expected.texts
    assert ranking.locator(".tokens").all_text_contents() == expected.token_counts


def test_completions_are_ranked_by_the_scorers_own_scores(visit: Visit, service: Service, scorer: Scorer) -> None:
    page = open_page(visit, service.open_url)
    page.get_by_label("One user turn").fill(PROMPT)
    fill_completions(page, COMPLETIONS)
    press_score(page)
    expected = scorer.expected(PROMPT, COMPLETIONS)
    expect_ranking(page, expected)
    expect(page.get_by_role("status")).to_have_text(
        f"5 completions scored. Best: completion {COMPLETIONS.index(expected.texts[0]) + 1} with {expected.scores[0]}."
    )
    assert page.locator("#origin code").first.get_attribute("title") == scorer.checkpoint_id
    shares = [
        float(width.removesuffix("%")) / 100
        for width in page.locator(".fill").evaluate_all("bars => bars.map(bar => bar.style.width)")
    ]
    greatest, least = expected.values[0], expected.values[-1]
    assert shares == pytest.approx([(value - least) / (greatest - least) for value in expected.values], abs=1e-4)
    assert page.locator(".zero").count() == (5 if least < 0 < greatest else 0)


@pytest.mark.parametrize("num_completions", [1, 12])
def test_any_number_of_completions_is_scored(
    visit: Visit, service: Service, scorer: Scorer, num_completions: int
) -> None:
    completions = [("red " * number).strip() for number in range(1, num_completions + 1)]
    page = open_page(visit, service.open_url)
    page.get_by_label("One user turn").fill(PROMPT)
    if num_completions == 1:
        page.get_by_role("button", name="Remove completion 2").click()
    fill_completions(page, completions)
    press_score(page)
    expect_ranking(page, scorer.expected(PROMPT, completions))


def test_messages_get_the_scorers_scores_as_rows_and_as_json(visit: Visit, service: Service, scorer: Scorer) -> None:
    messages: list[Message] = [
        {"role": "user", "content": "list the red stone"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and the blue"},
    ]
    page = open_page(visit, service.open_url)
    page.get_by_label("One user turn").fill(messages[0]["content"])
    page.get_by_role("radio", name="Messages").check()
    expect(page.get_by_label("Content of message 1")).to_have_value(messages[0]["content"])
    for number, message in enumerate(messages[1:], start=2):
        page.get_by_role("button", name="Add message").click()
        page.get_by_label(f"Role of message {number}").select_option(message["role"])
        page.get_by_label(f"Content of message {number}").fill(message["content"])
    fill_completions(page, COMPLETIONS[:2])
    press_score(page)
    expect_ranking(page, scorer.expected(messages, COMPLETIONS[:2]))

    page.get_by_role("radio", name="JSON").check()
    assert json.loads(page.get_by_label("A list of messages").input_value()) == messages
    page.get_by_label("A list of messages").fill(json.dumps(messages[:1]))
    press_score(page)
    expect_ranking(page, scorer.expected(messages[:1], COMPLETIONS[:2]))


def test_messages_that_are_not_json_are_not_sent(visit: Visit, service: Service) -> None:
    page = open_page(visit, service.open_url)
    page.get_by_role("radio", name="JSON").check()
    page.get_by_label("A list of messages").fill("[{")
    press_score(page)
    expect(page.locator("#error")).to_contain_text("The messages are not JSON")
    assert not [address for address in visit.addresses if address.endswith("/v1/score")]


def test_a_browser_without_a_key_gets_the_page_and_scores_once_it_has_one(
    visit: Visit, service: Service, scorer: Scorer
) -> None:
    page = open_without_key(visit, service)
    page.get_by_label("API key").fill(service.key)
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    fill_completions(page, COMPLETIONS[:2])
    page.get_by_label("One user turn").fill(PROMPT)
    press_score(page)
    expect_ranking(page, scorer.expected(PROMPT, COMPLETIONS[:2]))


def test_a_wrong_key_is_refused_in_the_servers_words(visit: Visit, service: Service) -> None:
    page = open_without_key(visit, service)
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(0)
    page.get_by_label("API key").fill("rmk_not-the-key")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key-error")).to_contain_text("unauthorized (401): A valid key is needed")
    page.get_by_label("API key").fill("no header carries this: é")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key-error")).to_have_text("A key has ASCII characters and no spaces.")


@pytest.mark.parametrize("keep", [False, True])
def test_a_key_outlives_its_page_only_when_that_is_ticked(visit: Visit, service: Service, keep: bool) -> None:
    page = open_without_key(visit, service)
    page.get_by_label("API key").fill(service.key)
    page.get_by_label("Keep it until this tab is closed").set_checked(keep)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#served")).to_contain_text("tiny")
    assert page.evaluate("Object.values(sessionStorage)") == ([service.key] if keep else [])
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    if not keep:
        expect(page.get_by_label("API key")).to_be_focused()
        return
    expect(page.locator("#served")).to_contain_text("tiny")
    page.get_by_role("button", name="Forget it").click()
    expect(page.get_by_label("API key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


def tab_to(page: Page, accessible_name: str) -> None:
    """Press Tab until this element has the focus. Each element on the way must show its outline."""
    for _ in range(20):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
        if (
            focused.evaluate(
                "element => element.ariaLabel || element.labels?.[0]?.textContent.trim() || element.textContent"
            )
            == accessible_name
        ):
            return
    raise AssertionError(f"20 times Tab did not reach {accessible_name!r}")


def test_the_keyboard_alone_is_enough(visit: Visit, service: Service, scorer: Scorer) -> None:
    page = open_without_key(visit, service)
    page.keyboard.type(service.key)
    page.keyboard.press("Enter")
    expect(page.get_by_label("One user turn")).to_be_focused()
    page.keyboard.type(PROMPT)
    tab_to(page, "Completion 1")
    page.keyboard.type(COMPLETIONS[0])
    tab_to(page, "Completion 2")
    page.keyboard.type(COMPLETIONS[1])
    page.keyboard.press("Alt+A")
    expect(page.get_by_label("Completion 3", exact=True)).to_be_focused()
    page.keyboard.type(COMPLETIONS[2])
    page.keyboard.press("Control+Enter")
    expect_ranking(page, scorer.expected(PROMPT, COMPLETIONS[:3]))
    page.get_by_label("One user turn").focus()
    tab_to(page, "Remove completion 1")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Completion 1", exact=True)).to_be_focused()
    tab_to(page, "Score")
    page.keyboard.press("Enter")
    expect_ranking(page, scorer.expected(PROMPT, COMPLETIONS[1:3]))
    expect(page.get_by_role("button", name="Score", exact=True)).to_be_focused()


def test_a_servers_error_is_shown_in_its_own_words(visit: Visit, service: Service) -> None:
    visit.statuses_looked_for.add(422)
    page = open_page(visit, service.open_url)
    page.get_by_role("radio", name="JSON").check()
    page.get_by_label("A list of messages").fill("[]")
    with page.expect_response("**/v1/score") as reply:
        press_score(page)
    error = ErrorReply.model_validate_json(reply.value.body()).error
    expect(page.locator("#error")).to_have_text(f"{error.type} (422): {error.message}")
    expect(page.get_by_role("button", name="Score", exact=True)).to_be_enabled()


def test_a_second_press_cancels_the_first(visit: Visit, service: Service, scorer: Scorer) -> None:
    page = open_page(visit, service.open_url)
    page.get_by_label("One user turn").fill(PROMPT)
    fill_completions(page, COMPLETIONS[:2])
    held: list[object] = []
    page.route("**/v1/score", lambda route: route.continue_() if held else held.append(route))
    press_score(page)
    expect(page.get_by_role("button", name="Score", exact=True)).to_be_disabled()
    page.get_by_label("Completion 2", exact=True).fill(COMPLETIONS[2])
    with page.expect_event("requestfailed") as cancelled:
        page.keyboard.press("Control+Enter")
    assert cancelled.value.failure == "net::ERR_ABORTED"
    expect_ranking(page, scorer.expected(PROMPT, [COMPLETIONS[0], COMPLETIONS[2]]))


def test_text_of_users_is_shown_and_never_becomes_markup(visit: Visit, service: Service, scorer: Scorer) -> None:
    page = open_page(visit, service.open_url)
    title = page.title()
    page.get_by_label("One user turn").fill(MARKUP)
    page.get_by_role("radio", name="Messages").check()
    fill_completions(page, [MARKUP, "red"])
    press_score(page)
    expect_ranking(page, scorer.expected(MARKUP, [MARKUP, "red"]))
    assert page.locator("img").count() == 0
    assert page.title() == title


@pytest.mark.parametrize("path", ["", "docs"])
def test_nothing_runs_over_the_side_of_a_phone(visit: Visit, service: Service, path: str) -> None:
    page = visit.page
    page.set_viewport_size(PHONE)
    page.goto(service.open_url + path)
    if path == "":
        page.get_by_label("One user turn").fill("w" * 60)
        page.get_by_role("radio", name="Messages").check()
        fill_completions(page, ["w" * 80, "red"])
        press_score(page)
        expect(page.locator("#ranking li")).to_have_count(2)
    else:
        expect(page.locator(".operation").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_the_pages_work_without_the_slash_behind_the_prefix(visit: Visit, service: Service) -> None:
    page = open_page(visit, service.open_url.rstrip("/"))
    assert service.open_url + "v1/models" in visit.addresses
    assert page.get_by_role("link", name="API documentation").evaluate("link => link.href") == service.open_url + "docs"


def test_the_documentation_shows_every_path_and_its_statuses(visit: Visit, service: Service) -> None:
    visit.statuses_looked_for.add(401)
    page = visit.page
    response = page.goto(service.guarded_url + "docs")
    assert response is not None
    assert response.status == 401
    page.get_by_label("API key").fill(service.key)
    page.keyboard.press("Enter")
    expect(page.locator(".operation").first).to_be_visible()
    openapi = httpx.get(
        service.guarded_url + "openapi.json", headers={"authorization": f"Bearer {service.key}"}, trust_env=False
    ).json()
    shown = {
        (section.locator(".path").inner_text(), section.locator(".method").inner_text().lower()): section.locator(
            ".statuses code"
        ).all_inner_texts()
        for section in page.locator(".operation").all()
    }
    assert shown == {
        (path, method): list(operation["responses"])
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }
    assert page.get_by_role("link", name="Score completions").evaluate("link => link.href") == service.guarded_url


def test_the_documentations_example_of_a_score_request_is_one(visit: Visit, service: Service) -> None:
    visit.page.goto(service.open_url + "docs")
    section = visit.page.locator("#post-v1-score")
    expect(section).to_be_visible()
    request = ScoreRequest.model_validate_json(section.locator("pre").first.inner_text())
    assert request.inputs[0].completions
    assert section.locator("tr.depth-1 code").all_inner_texts()[:2] == ["prompt", "completions"]


@pytest.mark.parametrize("path", ["", "docs"])
def test_the_policy_admits_the_pages_own_script_and_style_by_hash_alone(
    visit: Visit, service: Service, path: str
) -> None:
    response = visit.page.goto(service.open_url + path)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    injected = (
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
        "document.head.append(s); return window.ran ?? 0 }"
    )
    assert visit.page.evaluate(injected) == 0
    assert [complaint for complaint in visit.complaints if "Content Security Policy" in complaint]
    visit.complaints.clear()


def test_the_page_asks_for_models_and_scores_and_nothing_else(visit: Visit, service: Service) -> None:
    page = open_page(visit, service.open_url)
    page.get_by_label("One user turn").fill(PROMPT)
    press_score(page)
    expect(page.locator("#ranking li")).to_have_count(2)
    asked = [address for address in visit.addresses if not address.startswith("data:")]
    assert asked == [service.open_url, service.open_url + "v1/models", service.open_url + "v1/score"]
