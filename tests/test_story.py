"""Three months of a classifier: made, extended twice, corrected, edited, compared, exported and served."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path

import pytest
from conftest import image_folder, write_images

import demo
import edit_classes
import export
import history
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm.reporting import serve
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")


def test_three_months(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = image_folder(Path("january"), dict.fromkeys(["cat", "dog"], 12), dict.fromkeys(["cat", "dog"], 4))
    assert trainer.main(
        f"--dataset folder --data-dir {first} --old-classes cat,dog --model resnet32 --image-size 16 --epochs 2 "
        "--output-dir runs/january".split()
    ) == 0  # fmt: skip
    teacher = "runs/january/teacher_model.pth"

    def step(month: str, images: dict[str, int], *flags: str) -> None:
        nonlocal teacher
        photos = image_folder(Path(f"photos-{month}"), images, dict.fromkeys(images, 3))
        own = ["--dataset", "folder", "--data-dir", str(photos), "--output-dir", f"runs/{month}"]
        assert incremental.main(["--teacher", teacher, *own, "--new-classes", *flags]) == 0
        teacher = f"runs/{month}/student_model.pth"

    step("february", {"lorry": 12, "truck": 12, "owl": 12}, "all")
    step("march", {"fox": 12}, "all")
    step("more", {"dog": 9}, "dog", "--method", "closed-form")
    assert edit_classes.main([teacher, "--merge", "lorry,truck=lorry", "--remove", "owl"]) == 0
    edited = "runs/more/student_model_edited.pth"
    before, saved = (checkpoint.load(path) for path in (teacher, edited))
    assert saved["class_names"] == ["cat", "dog", "lorry", "fox"]
    cat, dog, lorry, _, truck, fox = before["statistics"]["counts"].tolist()
    assert saved["statistics"]["counts"].tolist() == [cat, dog, lorry + truck, fox] and dog > 12
    teacher = edited
    step("april", {"elk": 12}, "all")

    capsys.readouterr()
    assert history.main(["runs/january", "runs/more", "runs/april", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["run"] == "runs/april"]
    assert [row["classes"] for row in rows] == [["cat", "dog"], ["lorry"], ["fox"], [], ["elk"]]
    assert [row["more_images_of"] for row in rows] == [[], [], [], ["dog"], []]
    assert rows[-1]["estimated_kept"] is not None and rows[-1]["accuracy"] is not None

    student = "runs/april/student_model.pth"
    write_images(Path("holiday"), 2)
    assert export.main(["--checkpoint", student, "--output", "own.onnx", "--input", "uint8"]) == 0
    capsys.readouterr()
    said = []
    for model in ("own.onnx", student):
        assert predict.main(["--checkpoint", model, "--json", "holiday"]) == 0
        said.append([row["classes"][0]["name"] for row in json.loads(capsys.readouterr().out)])
    assert said[0] == said[1]

    opened = threading.Event()

    class Observed(serve.Server):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            ports.append(self)
            opened.set()
            super().serve_forever(poll_interval)

    ports: list[Observed] = []
    monkeypatch.setattr(serve, "Server", Observed)
    flags = ["--teacher", edited, "--student", student, "--serve", "0"]
    thread = threading.Thread(target=demo.main, args=(flags,))
    thread.start()
    assert opened.wait(60)
    connection = http.client.HTTPConnection("127.0.0.1", ports[0].server_port, timeout=60)
    connection.request("POST", "/answer", Path("holiday/000.png").read_bytes())
    answers = {answer["role"]: answer["label"] for answer in json.loads(connection.getresponse().read())["answers"]}
    ports[0].shutdown()
    thread.join(60)
    assert answers["student"] == said[0][0] and answers["teacher"] in ("cat", "dog", "lorry", "fox")
