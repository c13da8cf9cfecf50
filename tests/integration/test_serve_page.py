"""The page in a real browser: prompt, click, images; beside the teacher; without a mouse; on a phone."""

from __future__ import annotations

import base64
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from fewstep_loadtest.running import deploy

CHROMIUM, DRIVER = shutil.which("chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or not DRIVER.exists(), reason="needs Debian's chromium and chromium-driver"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


@pytest.fixture(scope="module")
def address(ray_cluster: str):
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    models = [
        {"name": name, "source": name} for name in ("emoji64-student", "emoji-student", "emoji-edit-student")
    ]
    config = {"offer": {"models": models}}
    deploy(f"http://127.0.0.1:{port}", config, ray_actor_options={"num_cpus": 0.5})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def browser(address: str, tmp_path: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_window_size(1200, 1000)
    driver.get(address)
    wait(driver, lambda: driver.find_elements("css selector", "#model option"))
    yield driver
    log = driver.get_log("browser")
    errors = [entry for entry in log if entry["level"] == "SEVERE" and entry["source"] != "network"]
    driver.quit()
    assert not errors


def wait(driver, condition, seconds: float = 30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.1).until(lambda _: condition())


def status(driver) -> str:
    return driver.find_element("id", "status").text


def finished(driver, side: int = 64) -> list:
    """Finished images of so many pixels: decoded by the browser, with their final description."""
    images = driver.find_elements("css selector", "figure img")
    return [
        image for image in images if image.get_property("naturalWidth") == side and image.get_attribute("alt")
    ]


def test_a_click_generates_images_with_their_time_and_version(browser, tmp_path: Path) -> None:
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("owl, noto style")
    browser.find_element("id", "seed").send_keys("7")
    browser.find_element("id", "teacher").click()
    browser.find_element("id", "generate").click()
    wait(browser, lambda: status(browser).startswith("Done"))
    assert len(finished(browser)) == 8
    facts = [element.text for element in browser.find_elements("css selector", ".facts")]
    assert all("ms" in text and "emoji64-student" in text for text in facts)
    assert not any("pixels" in image.get_attribute("class") for image in finished(browser))
    heads = [element.text for element in browser.find_elements("css selector", ".strip h4")]
    assert heads == ["student, 4 evaluations", "teacher, 64 steps"]
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def test_small_images_are_shown_as_pixels(browser) -> None:
    browser.find_element("css selector", "#model option[value='emoji-student']").click()
    browser.find_element("id", "teacher").click()
    browser.find_element("id", "generate").click()
    wait(browser, lambda: status(browser).startswith("Done"))
    assert len(finished(browser, 16)) == 8
    assert all("pixels" in image.get_attribute("class") for image in finished(browser, 16)), (
        "16 pixels are not blurred"
    )


def test_the_page_works_without_a_mouse_and_keeps_the_visit_s_history(browser) -> None:
    from selenium.webdriver.common.keys import Keys

    for text in ("red heart, fluent style", "green apple, noto style"):
        prompt = browser.switch_to.active_element
        assert prompt.get_attribute("id") == "prompt"
        prompt.clear()
        prompt.send_keys(text, Keys.ENTER)
        wait(browser, lambda: status(browser).startswith("Generating") or status(browser).startswith("Done"))
        wait(browser, lambda: status(browser).startswith("Done"))
    entries = [element.text for element in browser.find_elements("css selector", ".entry h3")]
    assert entries == ["green apple, noto style", "red heart, fluent style"]


def test_previews_show_while_images_form(browser) -> None:
    seen = browser.execute_async_script(
        """
        const done = arguments[0]; const sources = new Set();
        new MutationObserver((changes) => changes.forEach((c) => sources.add(c.target.src)))
          .observe(document.getElementById("history"), { subtree: true, attributeFilter: ["src"] });
        document.getElementById("count").value = "1";
        document.getElementById("form").requestSubmit();
        const poll = setInterval(() => {
          if (!document.getElementById("status").textContent.startsWith("Done")) return;
          clearInterval(poll);
          done(sources.size);
        }, 50);
        """
    )
    assert seen >= 4


def test_each_image_can_be_drawn_again_by_command_and_by_curl(browser, address: str, tmp_path: Path) -> None:
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("owl's house, noto style")
    browser.find_element("id", "seed").send_keys("7")
    browser.find_element("id", "generate").click()
    wait(browser, lambda: status(browser).startswith("Done"))
    third = browser.find_elements("css selector", "figure")[2]
    shown = third.find_element("css selector", "a").get_attribute("href")
    third.find_element("css selector", ".reproduce").click()
    command = browser.find_element("id", "reproduce-command").text
    assert shlex.split(command) == [
        "jobs/generate.py", "--model", "emoji64-student", "--prompt", "owl's house, noto style", "--steps", "4",
        "--seed", "9",
    ]  # fmt: skip
    subprocess.run(browser.find_element("id", "reproduce-curl").text, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes() == base64.b64decode(shown.partition(",")[2])
    browser.find_element("id", "reproduce-close").click()


def test_an_image_is_edited_and_can_be_edited_again_by_command_and_by_curl(browser, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "it's red.png")
    assert not browser.find_element("id", "images").is_displayed(), (
        "the first model generates from text alone"
    )
    browser.find_element("css selector", "#model option[value='emoji-edit-student']").click()
    browser.find_element("id", "images").send_keys(str(tmp_path / "it's red.png"))
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("in noto style")
    browser.find_element("id", "generate").click()
    wait(browser, lambda: status(browser).startswith("Done"))
    assert len(finished(browser, 16)) == 4
    assert browser.find_element("css selector", ".references img").get_property("naturalWidth") == 16
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    figure = browser.find_elements("css selector", "figure")[1]
    shown = figure.find_element("css selector", "a").get_attribute("href")
    figure.find_element("css selector", ".reproduce").click()
    command = shlex.split(browser.find_element("id", "reproduce-command").text)
    assert command[command.index("--image") + 1] == "it's red.png"
    subprocess.run(browser.find_element("id", "reproduce-curl").text, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes() == base64.b64decode(shown.partition(",")[2])
    browser.find_element("id", "reproduce-close").click()
    wait(browser, lambda: browser.find_element("id", "images-label").text == "Image to edit")


def test_a_refusal_is_shown_to_the_reader(browser) -> None:
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("very " * 90 + "long")
    browser.find_element("id", "generate").click()
    error = browser.find_element("id", "error")
    wait(browser, lambda: "too long" in error.text)
    assert not browser.find_elements("css selector", ".entry")


def test_it_fits_a_phone(browser, tmp_path: Path) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    browser.find_element("id", "generate").click()
    wait(browser, lambda: status(browser).startswith("Done"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    assert browser.find_element("id", "generate").rect["height"] >= 40
    assert browser.save_screenshot(str(tmp_path / "phone.png"))


def test_the_api_s_page_needs_nothing_but_this_service(browser, address: str) -> None:
    browser.find_element("link text", "API").click()
    wait(browser, lambda: browser.title == "fewstep: API")
    assert "num_inference_steps" in browser.find_element("id", "ImageRequest").text
    assert browser.find_element("css selector", "body").value_of_css_property("max-width") != "none", (
        "has its style"
    )
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert loaded
    assert all(name.startswith(address) for name in loaded)
    blocked = [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert not blocked


def test_every_control_has_a_name(browser) -> None:
    unnamed = browser.execute_script(
        """
        return [...document.querySelectorAll("input, select, textarea, button")]
          .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id);
        """
    )
    assert unnamed == []
