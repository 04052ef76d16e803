"""The page of a run: what it says, that it escapes what strangers name, and that it works in a browser."""

import html.parser
import itertools
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, picture, randomised, task_of

from lwm import evaluation
from lwm.images.batches import Images
from lwm.reporting import report

HOSTILE = ["<script>alert(1)</script>", "quotes \"' & co", "c", "d", "e"]


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> types.SimpleNamespace:
    """The page of a student whose classes, three old and two new, have hostile names."""
    path = tmp_path_factory.mktemp("made") / "page.html"
    networks = [randomised("resnet32", count, 16, seed=count).float() for count in (3, 5)]
    with torch.no_grad():
        for network in networks:  # so that no map is all zero
            network.fc.weight.abs_()
    tasks = [task_of(HOSTILE[:3]), task_of(HOSTILE[3:], group_accuracy=[40.0, 50.0], method="lwm")]
    before, after = (
        checkpoint_of(network, "resnet32", HOSTILE[:count], 16, tasks=tasks[: count - 2], classifier="head")
        for network, count in zip(networks, (3, 5), strict=True)
    )
    pixels = np.stack([picture(seed).transpose(2, 0, 1) for seed in range(40)])
    test = Images(torch.from_numpy(pixels), torch.arange(40) % 5)
    found = evaluation.compare(*networks, before, after, test)
    report.of_student(path, before, after, test, found)
    return types.SimpleNamespace(path=path, page=Page(path), metrics=found.metrics, labels=test.labels)


def test_the_numbers_are_those_of_the_metrics(made):
    metrics = made.metrics
    cells = re.findall(r"<td>([^<]*)</td>", made.page.source)
    told = (metrics["student"]["accuracy"], metrics["student"]["accuracy_old"], metrics["teacher"]["accuracy_old"])
    assert {f"{value:.1f}" for value in told} <= set(cells)
    row = re.search(r'<th scope="row">c</th>(.*)</tr>', made.page.source)[1]
    before, now = metrics["classes"]["teacher"][2], metrics["classes"]["student"][2]
    distance, overlap = (metrics["attention"][name][2] for name in ("distance", "overlap"))
    expected = ["0", *(f"{value:.1f}" for value in (before, now, before - now)), f"{distance:.2f}", f"{overlap:.1f}"]
    assert re.findall(r"<td>([^<]*)</td>", row) == expected


def test_names_of_strangers_are_text(made):
    assert "<script>alert" not in made.page.source
    assert HOSTILE[0] in made.page.text
    assert any(HOSTILE[1] in each["alt"] for each in made.page.all("img"))
    assert len(made.page.all("li")) == min(report.SHOWN, int((made.labels < 3).sum()))
    (policy,) = (each["content"] for each in made.page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_it_is_accessible_and_needs_no_network(made):
    page = made.page
    assert page.all("html")[0]["lang"] == "en"
    assert all(each.get("alt") for each in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(next_ - level <= 1 for level, next_ in itertools.pairwise(levels))
    assert all("scope" in each for each in page.all("th"))
    targets = [each[name] for _, each in page.tags for name in ("src", "href") if name in each]
    assert all(target.startswith("data:") for target in targets)


# In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    if not driver or not shutil.which("chromium"):
        pytest.skip("there is no chromium with its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def test_it_opens_without_an_error_or_a_request_and_filters_by_class(made, browser):
    size = {"width": 360, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(made.path.as_uri())
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [made.path.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert all(browser.execute_script("return [...document.images].map((image) => image.naturalWidth > 0)"))

    def shown(choice: str) -> list[str]:
        return browser.execute_script(
            "const select = document.querySelector('#class'); select.value = arguments[0];"
            "select.dispatchEvent(new Event('change'));"
            "const cards = [...document.querySelectorAll('.card')];"
            "return cards.filter((card) => card.offsetHeight > 0).map((card) => card.dataset.label)",
            choice,
        )

    assert set(shown("1")) == {"1"}
    assert len(shown("")) == int((made.labels < 3).sum())
