"""What a run says while it goes on, to people, to TensorBoard and to programs."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.runtime import progress
from lwm.runtime.errors import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "resnet32", "--image-size", "8", "--epochs", "2", "--save-interval", "1"]
ROW = {"epoch": 3, "loss": 1.5, "accuracy": 50.0, "classification": 1.0, "distillation": 0.4, "attention": 0.1}
ROW |= {"images_per_second": 812.4, "test_accuracy": None}


def test_the_line_of_an_epoch_has_terms_accuracies_speed_and_time_left():
    assert progress.line_of(ROW, 20, 10.0) == (
        "epoch 3/20: loss 1.5 (classification 1, distillation 0.4, attention 0.1), training accuracy 50.0 %, "
        "812 images/s, 3 min left"
    )
    last = progress.line_of({**ROW, "epoch": 20, "test_accuracy": 61.25}, 20, 10.0)
    assert last.endswith("test accuracy 61.2 %, 812 images/s")
    assert progress.line_of({**ROW, "epoch": 19}, 20, 10.0).endswith("10 s left")


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """Teacher and student of the digits, watched by TensorBoard; and what the student's run printed."""
    folder = tmp_path_factory.mktemp("quick")
    flags = [*SMALL, "--output-dir", str(folder)]
    assert trainer.main(flags) == 0
    command = [sys.executable, str(ROOT / "incremental_learning_system.py"), *flags, "--json", "--tensorboard"]
    done = subprocess.run([*command, "--teacher", str(folder / "teacher_model.pth")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_line_an_epoch_and_the_accuracies_as_the_last(quick):
    lines = quick[1].splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    last = json.loads(lines[-1])
    assert last["model"].endswith("student_model.pth")
    assert 0 <= last["test_accuracy"] <= 100
    assert last.keys() >= {"test_accuracy_old", "test_accuracy_new", "test_task_aware"}


def test_tensorboard_has_every_number_of_the_log_and_the_settings(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((quick[0] / "tensorboard" / "student").iterdir())) == 1
    events = EventAccumulator(str(quick[0] / "tensorboard" / "student"))
    events.Reload()
    header, *rows = (quick[0] / "student_log.csv").read_text().splitlines()
    names = header.split(",")
    for name in names[1:]:
        values = [scalar.value for scalar in events.Scalars(f"student/{name}")]
        assert values == pytest.approx([float(row.split(",")[names.index(name)]) for row in rows], rel=1e-5)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "gamma = 0.1" in text
    (strips,) = events.Images("student/maps")  # image, teacher's map, student's map
    assert strips.width == 3 * 8
    assert strips.height == 8 * progress.STRIPS
    assert not (quick[0] / "tensorboard" / "teacher").exists()  # it was not asked for


@pytest.mark.usefixtures("unrendered")
def test_quiet_says_nothing_but_the_last_line(quick, capsys):
    flags = ["--teacher", str(quick[0] / "teacher_model.pth"), "--student", str(quick[0] / "student_model.pth")]
    flags += ["--output-dir", str(quick[0])]
    assert demo.main([*flags, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert demo.main([*flags, "--quiet", "--json"]) == 0
    metrics = json.loads((quick[0] / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out) == {name: metrics[name] for name in ("readout", "teacher", "student")}
    assert demo.main([*flags, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert json.loads(lines[-1])["teacher"] == metrics["teacher"]


def test_a_bar_is_for_somebody_who_watches(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.bar([1, 2])) == [1, 2]
    assert "0/2" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    progress.be_quiet()
    assert list(progress.bar([1, 2])) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_run_that_is_refused_leaves_no_trace_of_tensorboard(quick, capsys):
    flags = [*SMALL, "--output-dir", str(quick[0]), "--resume", "--tensorboard", "--seed", "1"]
    assert trainer.main(flags) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert not (quick[0] / "tensorboard" / "teacher").exists()


def test_quiet_still_says_what_is_wrong(capsys):
    assert incremental.main(["--teacher", "nowhere.pth", "--quiet"]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert "nowhere.pth" in done.err
    print("heard again")
    assert capsys.readouterr().out == "heard again\n"


def test_silence_ends_with_the_script(capsys):
    @one_line_errors
    def main(argv=None):
        progress.be_quiet()
        print("unheard")

    assert main([]) == 0
    print("heard")
    assert capsys.readouterr().out == "heard\n"


def test_without_tensorboard_it_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert trainer.main([*SMALL, "--output-dir", str(tmp_path / "x"), "--tensorboard"]) == 2
    assert "--tensorboard: pip install tensorboard first" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_that_tensorboard_cannot_have_is_said_before_the_training(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    assert trainer.main([*SMALL, "--output-dir", str(tmp_path), "--tensorboard"]) == 2
    assert "is no folder; take another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_the_time_left_is_that_of_the_epochs_of_this_run(capsys, monkeypatch, tmp_path):
    clock = iter([100.0, 104.0, 108.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    watch = progress.Watch(types.SimpleNamespace(epochs=10, tensorboard=False), tmp_path, "teacher")
    for epoch in (7, 8):  # resumed after six
        watch({**ROW, "epoch": epoch})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("12 s left")
    assert lines[1].endswith("8 s left")
