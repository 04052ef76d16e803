"""The page of a run: what it says, that it escapes what strangers name, and that it works in a browser."""

import html.parser
import itertools
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, picture, randomised, task_of

from lwm import evaluation, models, verdict
from lwm.images.batches import Images
from lwm.reporting import report

HOSTILE = [
    "<script>alert(1)</script>",
    "quotes \"' & co",
    "c",
    "golden_retriever",
    "a name of seven words, none too long",
]


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
    tasks = [
        task_of(HOSTILE[:3]),
        task_of(
            HOSTILE[3:],
            group_accuracy=[40.0, 50.0],
            method="lwm",
            precision="a setting of 40 letters or more, in words",
        ),
    ]
    before, after = (
        checkpoint_of(network, "resnet32", HOSTILE[:count], 16, tasks=tasks[: count - 2], classifier="head")
        for network, count in zip(networks, (3, 5), strict=True)
    )
    pixels = np.stack([picture(seed).transpose(2, 0, 1) for seed in range(40)])
    test = Images(torch.from_numpy(pixels), torch.arange(40) % 5)
    found = evaluation.compare(*networks, before, after, test, 8)
    report.of_student(path, test, found)
    return types.SimpleNamespace(
        path=path, page=Page(path), images=test, found=found, metrics=found.metrics, labels=test.labels
    )


def test_the_numbers_are_those_of_the_metrics(made):
    metrics = made.metrics
    cells = re.findall(r"<td>([^<]*)</td>", made.page.source)
    told = (metrics["student"]["accuracy"], metrics["student"]["accuracy_old"], metrics["teacher"]["accuracy_old"])
    assert {f"{value:.1f}" for value in told} <= set(cells)
    row = re.search(r'<th scope="row">c</th>(.*)</tr>', made.page.source)[1]
    before, now = metrics["classes"]["teacher"][2], metrics["classes"]["student"][2]
    distance, overlap = (metrics["attention"][name][2] for name in ("distance", "overlap"))
    low, high = verdict.interval(now, 8)
    expected = ["0", "8", f"{before:.1f}", f"{now:.1f}", f"{low:.0f} to {high:.0f}", f"{before - now:.1f}"]
    expected += [f"{distance:.2f}", f"{overlap:.1f}"]
    assert re.findall(r"<td>([^<]*)</td>", row) == expected


def test_names_of_strangers_are_text(made):
    assert "<script>alert" not in made.page.source
    assert HOSTILE[0] in made.page.text
    assert any(HOSTILE[1] in each["alt"] for each in made.page.all("img"))
    assert len(made.page.all("li")) == len(made.labels)
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


def test_each_map_names_its_class_and_old_and_new_classes_have_theirs(made):
    """The true class's, and the answer's if it is another one; of a new class the student's alone."""
    found, old = made.found, 3
    answers = [side.logits.argmax(1).tolist() for side in found.sides]
    assert len(found.views) == 40
    for index, views in found.views.items():
        label = int(made.labels[index])
        expected = [
            (side.role, shown)
            for side, own in zip(found.sides, answers, strict=True)
            if label < old or side.role == "student"
            for shown in dict.fromkeys((label, own[index]))
        ]
        assert [(view.role, view.label) for view in views] == expected
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", made.page.source)
    assert sum(caption.startswith("student: ") for caption in captions) > 40
    side = found.sides[1]
    some = [(index, view) for index, views in found.views.items() for view in views if view.role == "student"]
    where, classes = torch.tensor([index for index, _ in some]), torch.tensor([view.label for _, view in some])
    pixels = made.images.pixels[where]
    torch.testing.assert_close(torch.stack([view.heat for _, view in some]), side.maps(pixels, classes))


def test_a_faint_map_is_as_visible_as_a_strong_one(made):
    """Each is drawn on its own scale, with its strength written beside it."""

    def drawn(factor: float) -> list[str]:
        views = {
            index: [view._replace(heat=view.heat * (factor if index else 1)) for view in own]
            for index, own in made.found.views.items()
        }
        cards = report._cards(made.images, made.found.sides, views, {})
        return [each["image"] for card in cards for each in card["maps"]]

    assert drawn(1) == drawn(2**-10)
    strengths = [int(found) for found in re.findall(r"strength (\d+)&nbsp;%", made.page.source)]
    assert max(strengths) == 100 > min(strengths)


def test_of_a_thousand_classes_the_page_stays_small_and_shows_the_worst_first(tmp_path):
    """Without its pictures; all classes are there, folded."""
    names = [f"class_number_{number}" for number in range(1000)]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 1000
    logits = torch.randn(2000, 1000, generator=generator) + 8 * torch.nn.functional.one_hot(labels, 1000)
    logits[labels == 700] -= 20 * torch.nn.functional.one_hot(torch.tensor([700]), 1000)
    model = models.build("resnet32", 1000, 8)
    saved = checkpoint_of(model, "resnet32", names, 8)
    side = evaluation.Side("", model, saved, logits, 8)
    pixels = torch.randint(0, 256, (2000, 3, 8, 8), dtype=torch.uint8, generator=generator)
    test = Images(pixels, labels)
    views = evaluation.explain([side], test)
    assert len(views) == evaluation.SHOWN
    report.of_teacher(tmp_path / "page.html", test, side, views)
    page = Page(tmp_path / "page.html")
    assert len(re.sub(r'src="data:[^"]*"', "", page.source)) < 500_000
    assert len(page.source) < 1_000_000
    open_rows, folded = page.source.split("<details>")[0], page.source.split("<details>")[1]
    assert len(re.findall("<tr><th scope=.row.>class_number_", open_rows.split('id="classes"')[1])) == verdict.NOTABLE
    assert '<th scope="row">class_number_700<' in open_rows
    assert all(f'<th scope="row">{name}<' in folded for name in names)


# In a browser -----------------------------------------------------------------------------------------------------


WIDE = """
return [...document.querySelectorAll(".wide")].filter((each) => each.querySelector("table"))
  .filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.textContent.slice(0, 200))
"""
BROKEN = r"""
const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.parentElement.closest("main, header") || node.parentElement.closest("option, script")) continue;
  for (const word of node.textContent.matchAll(/[\p{L}\p{N}_]+/gu)) {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    if (new Set([...range.getClientRects()].map((part) => Math.round(part.top))).size > 1) broken.push(word[0]);
  }
}
return broken
"""


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
    # No table is wider than the screen, and no word is broken: each lies in one line.
    assert browser.execute_script(WIDE) == []
    assert browser.execute_script(BROKEN) == []
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
    assert len(shown("")) == len(made.labels)
