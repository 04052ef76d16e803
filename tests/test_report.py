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
from conftest import checkpoint_of, picture, randomised, step_of

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import evaluation
from lwm.images.datasets import Images
from lwm.reporting import report

HOSTILE = ["<script>alert(1)</script>", "quotes \"' & co", "c", "d", "e"]
SMALL = ["--model", "resnet32", "--image-size", "8", "--epochs", "2"]


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


def images(count: int, classes: int, size: int) -> Images:
    pixels = torch.from_numpy(np.stack([picture(seed, size, size).transpose(2, 0, 1) for seed in range(count)]))
    return Images(pixels, torch.arange(count) % classes)


def pair(names: list[str], old: int, size: int = 16):
    """A teacher and a student with their checkpoints."""
    models = [randomised("resnet32", count, size, seed=count).float() for count in (old, len(names))]
    with torch.no_grad():
        for model in models:  # so that no map is all zero
            model.fc.weight.abs_()
    steps = [step_of(names[:old]), step_of(names[old:], group_accuracy=[40.0, 50.0], method="lwm")]
    before = checkpoint_of(models[0], "resnet32", names[:old], size, steps=steps[:1])
    after = checkpoint_of(models[1], "resnet32", names, size, steps=steps)
    return models, *(saved | {"readout": "head"} for saved in (before, after))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> types.SimpleNamespace:
    """The page of a student whose classes have hostile names."""
    path = tmp_path_factory.mktemp("made") / "page.html"
    (teacher, student), before, after = pair(HOSTILE, 3)
    test = images(40, 5, 16)
    found = evaluation.compare(teacher, student, before, after, test)
    report.of_student(path, before, after, test, found)
    return types.SimpleNamespace(path=path, page=Page(path), found=found, test=test)


def test_the_numbers_are_those_of_the_metrics(made):
    metrics = made.found.metrics
    cells = re.findall(r"<td>([^<]*)</td>", made.page.source)
    for value in (
        metrics["student"]["accuracy"],
        metrics["student"]["accuracy_old"],
        metrics["teacher"]["accuracy_old"],
    ):
        assert f"{value:.1f}" in cells
    row = re.search(r'<th scope="row">c</th>(.*)</tr>', made.page.source)[1]
    shown = re.findall(r"<td>([^<]*)</td>", row)
    before, now = metrics["classes"]["teacher"][2], metrics["classes"]["student"][2]
    distance, overlap = (metrics["attention"][name][2] for name in ("distance", "overlap"))
    assert shown == [
        "0",
        *(f"{value:.1f}" for value in (before, now, before - now)),
        f"{distance:.2f}",
        f"{overlap:.1f}",
    ]


def test_what_is_confused_most_comes_first():
    counts = np.array([[5, 5, 0], [0, 10, 0], [8, 1, 1]])
    assert report._confused(counts, ["a", "b", "c"]) == [("c", "a", 8, 10), ("a", "b", 5, 10), ("c", "b", 1, 10)]


def test_names_of_strangers_are_text(made):
    assert "<script>alert" not in made.page.source
    assert HOSTILE[0] in made.page.text
    assert any(each["alt"] == f"A test image of {HOSTILE[1]}" for each in made.page.all("img"))
    (policy,) = (each["content"] for each in made.page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_it_is_accessible_and_needs_no_network(made):
    page = made.page
    assert page.all("html")[0]["lang"] == "en"
    assert all(each.get("alt") for each in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(next_ - level <= 1 for level, next_ in itertools.pairwise(levels))
    assert all("scope" in each for each in page.all("th"))
    for name in ("src", "href"):
        targets = [each[name] for _, each in page.tags if name in each]
        assert all(target.startswith("data:") for target in targets)


def test_the_gallery_takes_the_most_urgent_of_each_class_in_turn(monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 4)
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    urgency = torch.tensor([5.0, 9.0, 8.0, 7.0, 1.0, 2.0])
    assert report.in_turn(labels, urgency) == [1, 2, 5, 4]


def test_a_hundred_classes_at_224_px_stay_under_5_mb(tmp_path):
    names = [f"class {number}" for number in range(100)]
    noise = torch.randint(0, 256, (150, 3, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    test = Images(torch.from_numpy(np.stack([picture(i, 224, 224).transpose(2, 0, 1) for i in range(150)])), None)
    test = Images((0.9 * test.pixels + 0.1 * noise).to(torch.uint8), torch.arange(150) % 90)
    saved = checkpoint_of(randomised("resnet32", 100, 224).float(), "resnet32", names, 224)
    explained = torch.randn(150, 100), torch.rand(150, 7, 7)
    report.of_teacher(tmp_path / "page.html", saved, test, explained)
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    assert len([each for each in Page(tmp_path / "page.html").all("li")]) == report.SHOWN


def test_the_scripts_write_their_pages(tmp_path):
    flags = ["--output-dir", str(tmp_path)]
    assert trainer.main([*SMALL, *flags]) == 0
    assert incremental.main(["--teacher", str(tmp_path / "teacher_model.pth"), "--epochs", "2", *flags]) == 0
    both = ["--teacher", str(tmp_path / "teacher_model.pth"), "--student", str(tmp_path / "student_model.pth")]
    assert demo.main([*both, *flags]) == 0
    pages = {kind: Page(tmp_path / f"{kind}_report.html") for kind in ("teacher", "student", "demo")}
    assert "Teacher of 2 classes" in pages["teacher"].text
    student = json.loads((tmp_path / "metrics.json").read_text())["student"]
    for kind in ("student", "demo"):
        assert f"{student['accuracy_old']:.1f} % of the old classes' test images" in " ".join(pages[kind].text.split())
    for page in pages.values():
        alts = [each["alt"] for each in page.all("img")]
        assert sum("loss" in alt for alt in alts) == 1
        assert len(page.all("li")) == report.SHOWN


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


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_an_error_or_a_request_and_filters_by_class(made, browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(made.path.as_uri())
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [made.path.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert all(browser.execute_script("return [...document.images].map((image) => image.naturalWidth > 0)"))
    page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(255, 255, 255)") == (scheme == "light")

    def shown() -> list[str]:
        return browser.execute_script(
            "const cards = [...document.querySelectorAll('.card')];"
            "return cards.filter((card) => card.offsetHeight > 0).map((card) => card.dataset.label)"
        )

    old = int((made.test.labels < 3).sum())
    assert len(shown()) == old
    choose = "const s = document.querySelector('#class'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    browser.execute_script(choose, "1")
    assert set(shown()) == {"1"}
    assert (
        browser.execute_script("return document.querySelector('output').textContent")
        == f"{len(shown())} of {old} images"
    )
    browser.execute_script(choose, "")
    assert len(shown()) == old
