"""The page to draw on: how it is served, and everything that it does, in a real Chromium."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from gateway.page import fields_of
from handler.api.schema import PICTURE_FIELDS
from handler.config import HandlerConfig
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.browsers import need_chromium, running_chromium
from tests.support.client import curl
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.loras import kohya_lora
from tests.support.serving import serve
from tests.support.traffic import metrics, until

PROMPT = "a large red heart on a cyan background"
T = TypeVar("T")


def test_every_field_of_a_picture_is_in_the_form() -> None:
    described = {each["name"]: each for each in fields_of(HandlerConfig(height=512))}
    assert PICTURE_FIELDS.keys() - described.keys() == {"num_images"}
    assert described["n"]["maximum"] == 10
    assert described["height"]["default"] == 512
    assert described["task"]["choices"] == ["text-to-image", "image-to-image", "inpainting"]
    json.dumps(described)


class Page:
    """What a test does with the page, in its user's words."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self) -> None:
        self.driver.get(self.url)
        self.wait(lambda: "is ready" in self["ready"].text)

    def open_as_new(self) -> None:
        """As for somebody who was never here."""
        self.driver.get(f"{self.url}/healthz")
        clear = "arguments[0] = arguments[arguments.length - 1]; localStorage.clear();"
        clear += "sessionStorage.clear(); const r = indexedDB.deleteDatabase('draw');"
        clear += "r.onsuccess = r.onerror = () => arguments[0]();"
        self.driver.execute_async_script(clear)
        self.driver.get_log("browser")
        self.open()

    def __getitem__(self, element_id: str) -> WebElement:
        return self.driver.find_element(By.ID, element_id)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], T], timeout_s: float = 60) -> T:
        # What is asked about may be drawn anew in between.
        passing = (NoSuchElementException, StaleElementReferenceException)
        wait = WebDriverWait(self.driver, timeout_s, 0.05, ignored_exceptions=passing)
        return wait.until(lambda _: condition())

    def field(self, name: str) -> WebElement:
        return self[f"field-{name}"]

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.field(name).clear()
            self.field(name).send_keys(str(value))

    def value(self, name: str) -> str:
        return self.field(name).get_property("value")

    def problem(self, name: str) -> str:
        return self[f"field-{name}-problem"].text

    def draw(self) -> None:
        """Draw, and wait for the end."""
        number = len(self.pictures)
        self["draw"].click()
        self.wait(lambda: self["status"].text.startswith("Done"))
        self.wait(lambda: len(self.pictures) > number)

    @property
    def pictures(self) -> list[WebElement]:
        return self.all("#pictures li")

    def last_picture(self) -> bytes:
        """The file of the newest picture of the gallery."""
        # From where it is kept: the page may not fetch what lies in blobs.
        script = """
            const done = arguments[arguments.length - 1];
            indexedDB.open('draw').onsuccess = (opened) => {
              const database = opened.target.result;
              const all = database.transaction('pictures').objectStore('pictures').getAll();
              all.onsuccess = () => {
                const reader = new FileReader();
                reader.onload = () => done(reader.result.split(',')[1]);
                reader.readAsDataURL(all.result.at(-1).blob);
                database.close();
              };
            };"""
        return base64.b64decode(self.driver.execute_async_script(script))

    @property
    def seed_viewed(self) -> str:
        """The seed of the picture that is shown large."""
        return self.one("#viewer-settings dt[data-name=seed] + dd").text

    def drop(self, path: Path, selector: str = "#stage") -> None:
        """Drop a file as a file manager does."""
        media_type = {"jpg": "jpeg"}.get(path.suffix[1:], path.suffix[1:])
        script = """
            const [element, content, name, type] = arguments;
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            for (const kind of ['dragover', 'drop']) element.dispatchEvent(new DragEvent(
              kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));"""
        content = base64.b64encode(path.read_bytes()).decode()
        arguments = (self.one(selector), content, path.name, f"image/{media_type}")
        self.driver.execute_script(script, *arguments)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def drawing_gateway(gateway: RunningGateway) -> RunningGateway:
    need_chromium()
    return gateway


@pytest.fixture(scope="module")
def browser(drawing_gateway: RunningGateway) -> Iterator[webdriver.Chrome]:
    with running_chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, drawing_gateway: RunningGateway) -> Iterator[Page]:
    """The page as a newcomer sees it; what it does may not end in the console."""
    page = Page(browser, drawing_gateway.url)
    page.open_as_new()
    yield page
    refused = "the server responded with a status of 4"
    assert [message for message in page.console() if refused not in message] == []


def in_flight(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_in_flight", 0.0)


def array(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


@pytest.mark.server
class TestServing:
    def test_nothing_inline_and_nothing_from_elsewhere(self, gateway: RunningGateway) -> None:
        answer = curl(f"{gateway.url}/")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert b"<script>" not in answer.body
        assert b"style=" not in answer.body
        assert b"http" not in answer.body

    @pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/page.css", "/page/icon.svg"])
    def test_it_is_sent_again_only_where_it_has_changed(
        self, gateway: RunningGateway, path: str
    ) -> None:
        first = curl(f"{gateway.url}{path}")
        assert (first.status, first.headers["cache-control"]) == (200, "no-cache")
        etag = first.headers["etag"]
        for known, status in ((etag, 304), (f'"other", W/{etag}', 304), ('"other"', 200)):
            again = curl(f"{gateway.url}{path}", "-H", f"If-None-Match: {known}")
            assert again.status == status
            assert bool(again.body) == (status == 200)

    def test_other_files_are_not_served(self, gateway: RunningGateway) -> None:
        for name in ("nothing.js", "..%2fpage.py", "%2e%2e%2fkeys.py"):
            assert curl(f"{gateway.url}/page/{name}").status == 404

    def test_fields_of_a_model(self, gateway: RunningGateway) -> None:
        """With the limits of its archive."""
        answer = curl(f"{gateway.url}/v1/fields?model=dall-e-3").json()
        steps = next(each for each in answer["fields"] if each["name"] == "num_inference_steps")
        assert (answer["model"], answer["ready"]) == ("stable_diffusion", True)
        assert (steps["default"], steps["maximum"]) == (4, 1000)
        assert curl(f"{gateway.url}/v1/fields?model=nothing").status == 404

    def test_fields_that_the_model_has(self, gateway: RunningGateway) -> None:
        fields = curl(f"{gateway.url}/v1/fields").json()["fields"]
        named = {each["name"]: each for each in fields}
        assert {"prompt", "seed", "image", "strength", "clip_skip", "n"} <= named.keys()
        assert not named.keys() & {"pag_scale", "true_cfg_scale", "loras", "control_image"}
        assert {"ddim", "euler"} <= set(named["scheduler"]["suggestions"])


@pytest.fixture(scope="module")
def gateway_with_loras(
    drawing_gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    """In front of an instance of its own, with two LoRAs in a folder."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "pipeline")
    for seed, name in enumerate(("ink", "wool")):
        ends = ("to_q", "to_v", "to_out.0", "proj_in", "conv1")
        tensors = kohya_lora({"lora_unet": pipeline.unet}, seed=seed, alpha=2.0, std=0.2, ends=ends)
        save_file(tensors, folder / f"{name}.safetensors")
    for server in serve(tmp_path_factory.mktemp("instance"), lora_dir=str(folder)):
        with running_gateway(tmp_path_factory.mktemp("gateway"), [server.state_dir]) as running:
            yield running


@pytest.mark.server
@pytest.mark.slow
def test_loras_are_offered(browser: webdriver.Chrome, gateway_with_loras: RunningGateway) -> None:
    page = Page(browser, gateway_with_loras.url)
    page.open_as_new()
    page["details-more"].find_element(By.TAG_NAME, "summary").click()
    buttons = {each.text: each for each in page.all("[data-field=loras] .shapes button")}
    assert buttons.keys() == {"ink", "wool"}
    assert page.all("[data-field=pag_scale]") == []
    page.fill(prompt=PROMPT, seed=3)
    page.draw()
    without = array(page.last_picture())
    for name, expected in (("ink", "ink:1"), ("wool", "ink:1, wool:1"), ("ink", "wool:1")):
        # From below the bar with the button Draw.
        page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[name])
        buttons[name].click()
        assert page.value("loras") == expected
    pressed = {name: each.get_attribute("aria-pressed") for name, each in buttons.items()}
    assert pressed == {"ink": "false", "wool": "true"}
    page.draw()
    assert np.abs(array(page.last_picture()) - without).max() > 20
    assert page.console() == []


@pytest.mark.server
@pytest.mark.slow
class TestInABrowser:
    def test_it_draws_with_previews_and_keeps_the_picture(self, page: Page) -> None:
        """The gallery has it again when the page is opened again."""
        page.fill(prompt=PROMPT, num_inference_steps=60, width=512, height=512)
        page["draw"].click()
        page.wait(lambda: page.all(".tile.preview img[src^=blob]"))
        page.wait(lambda: "preview" in page["status"].text)
        assert page["cancel"].is_displayed()
        page.wait(lambda: page["status"].text.startswith("Done"))
        page.wait(lambda: len(page.pictures) == 1)
        assert Image.open(io.BytesIO(page.last_picture())).size == (512, 512)
        seed = page.value("seed")
        page.open()
        page.wait(lambda: len(page.pictures) == 1)
        assert page.value("prompt") == PROMPT
        page.one("#pictures button").click()
        assert PROMPT in page["viewer-prompt"].text
        assert seed in page["viewer-settings"].text
        assert "512 × 512" in page["viewer-settings"].text

    def test_a_seed_is_drawn_or_kept(self, page: Page) -> None:
        page.fill(prompt=PROMPT)
        page.draw()
        first, first_seed = page.last_picture(), page.value("seed")
        page.draw()
        assert page.value("seed") != first_seed
        page.fill(seed=first_seed)
        assert page["field-seed-keep"].is_selected()
        page.draw()
        assert page.value("seed") == first_seed
        assert np.array_equal(array(page.last_picture()), array(first))

    def test_several_pictures(self, page: Page) -> None:
        page.fill(prompt=PROMPT, n=3, seed=5)
        page["draw"].click()
        page.wait(lambda: len(page.pictures) == 3)
        assert len(page.all(".tile.finished")) == 3
        page.one("#pictures button").click()
        seeds = set()
        for number in range(3):
            # In the order in which they were finished.
            page.wait(lambda seen=number: len(seeds | {page.seed_viewed}) > seen)  # type: ignore[misc]
            seeds.add(page.seed_viewed)
            ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT).perform()
        assert seeds == {"5", "6", "7"}

    def test_it_cancels(self, page: Page, instance: TorchServer) -> None:
        page.fill(prompt=PROMPT, num_inference_steps=1000, width=512, height=512)
        page["draw"].click()
        assert until(lambda: in_flight(instance), lambda number: number > 0) > 0
        page["cancel"].click()
        page.wait(lambda: page["status"].text == "Cancelled.")
        assert until(lambda: in_flight(instance), lambda number: number == 0) == 0
        assert page.pictures == []
        assert page["draw"].is_enabled()

    def test_problems_stand_by_their_fields(self, page: Page) -> None:
        more = page["details-more"].find_element(By.TAG_NAME, "summary")
        more.click()
        page.fill(prompt=PROMPT, guidance_scale=99, scheduler="nothing")
        more.click()
        page["draw"].click()
        page.wait(lambda: page.problem("guidance_scale"))
        assert "allowed: 0 to 30" in page.problem("guidance_scale")
        assert page["details-more"].get_property("open")
        assert "nothing" in page.problem("scheduler")
        assert "2 fields" in page["problem"].text
        assert page.driver.switch_to.active_element == page.field("guidance_scale")
        assert page.field("guidance_scale").get_attribute("aria-invalid") == "true"
        page.fill(guidance_scale=5, scheduler="euler")
        page.draw()
        assert not page["problem"].is_displayed()
        assert page.problem("scheduler") == ""

    def test_without_a_prompt(self, page: Page) -> None:
        page["draw"].click()
        page.wait(lambda: page.problem("prompt"))

    @pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
    def test_settings_come_back_from_a_picture(
        self, page: Page, tmp_path: Path, output_format: str
    ) -> None:
        prompt = 'ein "großer" Stern, 星'
        path = tmp_path / f"star.{output_format}"
        body = {"prompt": prompt, "negative_prompt": "blue", "seed": 12, "scheduler": "euler"}
        body |= {"num_inference_steps": 7, "guidance_scale": 3.5, "width": 320, "height": 192}
        url = f"{page.url}/predictions/stable_diffusion"
        data = json.dumps({**body, "output_format": output_format})
        path.write_bytes(curl(url, "-H", "Content-Type: application/json", "-d", data).body)
        page.drop(path)
        page.wait(lambda: page.value("prompt"))
        page.wait(lambda: "settings of star" in page["notice"].text)
        shown = {name: page.value(name) for name in body if name != "scheduler"}
        assert shown == {name: str(body[name]) for name in shown}
        assert page["field-seed-keep"].is_selected()
        page.draw()
        if output_format == "png":
            assert np.array_equal(array(page.last_picture()), array(path.read_bytes()))

    def test_a_picture_without_settings_is_drawn_from(self, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "blue.png"
        Image.new("RGB", (256, 256), (20, 60, 220)).save(path)
        page.drop(path)
        page.wait(lambda: page.one(".painter canvas").is_displayed())

    def test_only_what_is_painted_is_drawn_anew(self, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "blue.png"
        Image.new("RGB", (256, 256), (20, 60, 220)).save(path)
        page.fill(prompt=PROMPT, num_inference_steps=20, seed=1)
        page["details-picture"].find_element(By.TAG_NAME, "summary").click()
        page.field("image").send_keys(str(path))
        canvas = page.wait(lambda: page.one(".painter canvas"))
        page.wait(lambda: canvas.size["width"] > 100)
        page.fill(strength=1)
        page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        across, down = canvas.size["width"], canvas.size["height"]
        # The left half, by one stroke of the largest brush.
        page["brush-size"].send_keys(Keys.END)
        stroke = ActionChains(page.driver)
        stroke.move_to_element_with_offset(canvas, int(-across * 0.25), int(-down * 0.45))
        stroke.click_and_hold().move_by_offset(0, int(down * 0.9))
        stroke.release().perform()
        page.wait(lambda: "% is drawn anew" in page.one(".painter").text)
        page.draw()
        change = np.abs(array(page.last_picture()) - (20, 60, 220)).mean(axis=(0, 2))
        assert change[160:].max() < 6
        assert change[:96].mean() > 20
        # All of it comes back with the settings.
        page["reset"].click()
        page.wait(lambda: not page.one(".painter").is_displayed())
        page.one("#pictures button").click()
        page["viewer-use"].click()
        page.wait(lambda: "% is drawn anew" in page.one(".painter").text)
        assert page["field-seed-keep"].is_selected()

    def test_by_keyboard_alone(self, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "blue.png"
        Image.new("RGB", (256, 256), (20, 60, 220)).save(path)

        def press(*keys: str) -> None:
            ActionChains(page.driver).send_keys(*keys).perform()

        def tab_to(condition: Callable[[WebElement], Any]) -> None:
            for _ in range(60):
                if condition(page.driver.switch_to.active_element):
                    return
                press(Keys.TAB)
            raise AssertionError("no such element can be reached with Tab")

        def tab_to_id(element_id: str) -> None:
            tab_to(lambda element: element.get_attribute("id") == element_id)

        tab_to_id("field-prompt")
        press(PROMPT)
        tab_to_id("field-num_inference_steps")
        press("10")
        tab_to(lambda element: element.text == "Begin with a picture")
        press(Keys.ENTER)
        tab_to_id("field-image")
        page.driver.switch_to.active_element.send_keys(str(path))
        page.wait(lambda: page.one(".painter canvas").is_displayed())
        tab_to(lambda element: element.tag_name == "canvas")
        press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, " ")
        page.wait(lambda: "% is drawn anew" in page.one(".painter").text)
        ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(
            Keys.CONTROL
        ).perform()
        page.wait(lambda: len(page.pictures) == 1)
        tab_to(lambda element: element.get_attribute("class") == "thumbnail")
        press(Keys.ENTER)
        assert page["viewer"].is_displayed()
        press(Keys.ESCAPE)
        page.wait(lambda: not page["viewer"].is_displayed())
        focused = page.driver.switch_to.active_element
        assert focused.get_attribute("class") == "thumbnail"

    def test_every_control_has_a_name(self, page: Page) -> None:
        script = """
            document.querySelectorAll('details').forEach((each) => { each.open = true; });
            return [...document.querySelectorAll('input, select, textarea, button, canvas')]
              .filter((each) => !each.labels?.length && !each.textContent.trim()
                && !each.getAttribute('aria-label') && each.getAttribute('aria-hidden') !== 'true')
              .map((each) => each.outerHTML);"""
        assert page.driver.execute_script(script) == []

    def test_pictures_can_be_deleted(self, page: Page) -> None:
        page.fill(prompt=PROMPT, n=2)
        page["draw"].click()
        page.wait(lambda: len(page.pictures) == 2)
        page.one("#pictures button").click()
        page["viewer-delete"].click()
        page.wait(lambda: len(page.pictures) == 1)
        page["clear"].click()
        page.driver.switch_to.alert.accept()
        page.wait(lambda: page.pictures == [])
        page.open()
        assert page.pictures == []

    @pytest.mark.parametrize("language", ["curl", "Python", "OpenAI"])
    def test_the_code_draws_the_same_picture(
        self, page: Page, tmp_path: Path, language: str
    ) -> None:
        page.fill(prompt='it\'s a "red" ring, 星', seed=3, width=192, guidance_scale=4)
        page.draw()
        page["open-code"].click()
        page.one(f"input[value={language}] + span").click()
        code = page["code-text"].text
        command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        (written,) = tmp_path.glob("picture*.png")
        assert np.array_equal(array(written.read_bytes()), array(page.last_picture()))

    @pytest.mark.parametrize("language", ["curl", "Python", "OpenAI"])
    def test_the_code_takes_pictures(self, page: Page, tmp_path: Path, language: str) -> None:
        path = tmp_path / "image.png"
        Image.new("RGB", (128, 128), (20, 60, 220)).save(path)
        page.fill(prompt=PROMPT, seed=3, n=2)
        page.drop(path)
        page.wait(lambda: page.one(".painter canvas").is_displayed())
        page["open-code"].click()
        page.one(f"input[value={language}] + span").click()
        code = page["code-text"].text
        command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        if language == "curl":
            assert len(json.loads(done.stdout)["data"]) == 2
        else:
            assert len(list(tmp_path.glob("picture*.png"))) == 2

    @pytest.mark.parametrize("width_px", [320, 768])
    def test_nothing_is_wider_than_a_phone(
        self, drawing_gateway: RunningGateway, width_px: int
    ) -> None:
        with running_chromium(width_px, 640, scheme="dark") as driver:
            page = Page(driver, drawing_gateway.url)
            page.open()
            page.fill(prompt=PROMPT)
            page.draw()
            everything = "document.querySelectorAll('details').forEach((e) => { e.open = true; })"
            driver.execute_script(everything)
            for dialog in (None, "open-code", "open-key"):
                if dialog is not None:
                    driver.execute_script(f"document.getElementById('{dialog}').click()")
                width = driver.execute_script("return document.documentElement.scrollWidth")
                assert width <= width_px
                driver.execute_script(
                    "document.querySelectorAll('dialog[open]').forEach((each) => each.close())"
                )
            page.one("#pictures button").click()
            assert page["viewer-use"].is_displayed()
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width_px
            assert page.console() == []

    def test_it_asks_for_a_key(
        self, browser: webdriver.Chrome, instance: TorchServer, tmp_path: Path
    ) -> None:
        command = [sys.executable, "-m", "gateway.keys", "--name", "me"]
        made = subprocess.run(
            [*command, "--file", str(tmp_path / "keys")], check=True, capture_output=True, text=True
        )
        with running_gateway(tmp_path, [instance.state_dir], require_keys=True) as guarded:
            page = Page(browser, guarded.url)
            browser.get(guarded.url)
            page.wait(lambda: page["key-value"].is_displayed())
            page["key-value"].send_keys("wrong", Keys.ENTER)
            page.wait(lambda: "not one of" in page["key-why"].text)
            page.wait(lambda: page["key-value"].is_displayed())
            page["key-value"].send_keys(made.stdout.strip(), Keys.ENTER)
            page.wait(lambda: "is ready" in page["ready"].text)
            page.fill(prompt=PROMPT)
            page.draw()
            page["open-code"].click()
            assert "$KEY" in page["code-text"].text
            assert made.stdout.strip() not in page["code-text"].text
            assert "401" in "".join(page.console())
