"""What a run says while it goes on, to people, to TensorBoard and to programs."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.reporting import tensorboard
from lwm.runtime import progress
from lwm.runtime.errors import be_quiet, log, one_line_errors, start_log

DEMO_JSON = ("classifier", "teacher_classifier", "lost", "teacher", "student")
SMALL = ["--model", "resnet32", "--image-size", "8", "--epochs", "2", "--save-interval", "1"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Teacher and student of the digits, watched by TensorBoard; stdout and stderr of the student's run."""
    folder, out, err = tmp_path_factory.mktemp("quick"), io.StringIO(), io.StringIO()
    flags = [*SMALL, "--output-dir", str(folder)]
    assert trainer.main(flags) == 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        flags += ["--teacher", str(folder / "teacher_model.pth"), "--json", "--tensorboard"]
        assert incremental.main(flags) == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


def test_a_line_an_epoch_on_stderr_and_on_stdout_the_json_alone(quick):
    first, last = (line for line in quick[2].splitlines() if line.startswith("epoch "))
    for part in ("epoch 1/2", "classification", "attention", "test accuracy", "images/s", " left"):
        assert part in first
    assert "left" not in last
    assert json.loads(quick[1]).keys() >= {"model", "test_accuracy", "test_accuracy_old", "test_task_aware"}


def test_tensorboard_has_every_number_of_the_log_the_settings_and_maps(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(quick[0] / "tensorboard" / "student"))
    events.Reload()
    header, *rows = (quick[0] / "student_log.csv").read_text().splitlines()
    for column, name in enumerate(header.split(",")[1:], 1):
        values = [scalar.value for scalar in events.Scalars(f"student/{name}")]
        assert values == pytest.approx([float(row.split(",")[column]) for row in rows], rel=1e-5)
    assert "gamma = 0.1" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    (strips,) = events.Images("student/maps")  # image, teacher's map, student's map
    assert (strips.width, strips.height) == (3 * 8, 8 * tensorboard.SHOWN)


@pytest.mark.usefixtures("unrendered")
def test_quiet_leaves_what_was_asked_for(quick, capsys):
    flags = ["--teacher", str(quick[0] / "teacher_model.pth"), "--student", str(quick[0] / "student_model.pth")]
    flags += ["--output-dir", str(quick[0])]
    assert demo.main([*flags, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert "accuracy" in quiet.out
    assert quiet.err == ""
    assert demo.main([*flags, "--json"]) == 0
    loud = capsys.readouterr()
    metrics = json.loads((quick[0] / "metrics.json").read_text())
    assert json.loads(loud.out) == {name: metrics[name] for name in DEMO_JSON}
    assert quiet.out in loud.err


def test_quiet_leaves_warnings_and_ends_with_the_script(capsys):
    @one_line_errors
    def main(argv=None):
        if argv:
            be_quiet()
        log.info("on the way")
        log.warning("look out")

    for argv, expected in ((["quiet"], "warning: look out\n"), ([], "on the way\nwarning: look out\n")):
        assert main(argv) == 0
        assert capsys.readouterr() == ("", expected)
    assert incremental.main(["--teacher", "nowhere.pth", "--quiet"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err


def test_a_bar_is_for_somebody_who_watches(monkeypatch):
    for prepare in (start_log, be_quiet):
        monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
        terminal.isatty = lambda: True
        prepare()
        assert list(progress.bar([1, 2])) == [1, 2]
        assert ("0/2" in terminal.getvalue()) == (prepare is start_log)


@pytest.mark.parametrize(("wrong", "said"), [("seed", "seed"), ("missing", "pip install"), ("file", "no folder")])
def test_tensorboard_is_refused_before_the_training_and_leaves_no_trace(
    quick, tmp_path, monkeypatch, capsys, wrong, said
):
    flags = [*SMALL, "--output-dir", str(tmp_path), "--tensorboard"]
    if wrong == "seed":
        flags = [*SMALL, "--output-dir", str(quick[0]), "--tensorboard", "--resume", "--seed", "1"]
    elif wrong == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        (tmp_path / "tensorboard").touch()
    assert trainer.main(flags) == 2
    assert said in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == (wrong == "file")
    assert not (quick[0] / "tensorboard" / "teacher").exists()
