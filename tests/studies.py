"""Two small protocols of the digits."""

from pathlib import Path

import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.experiments.protocols import METHODS, Protocol

FIVE = Protocol("about", "digits", slice(0, 10), (2,) * 5, "--epochs 1", METHODS, order=None, shuffle=True)
TINY = Protocol(
    about="digits in three tasks",
    dataset="digits",
    order=None,
    pool=slice(0, 6),
    groups=(2, 2, 2),
    flags="--model resnet32 --image-size 8 --epochs 1",
    methods={"lwf": "--method lwf", "lwm": "--method lwm"},
)
TINY_FORMS = {"lwf": "softmax", "lwm": "binary"}


def run_tiny(cells: Path, method: str) -> None:
    """Seed 0 of a method of TINY, in the folders in which reproduce.py leaves it."""
    flags = [*TINY.flags.split(), "--dataset", "digits", "--seed", "0"]
    form = TINY_FORMS[method]
    model = cells / f"first-{form}" / "teacher_model.pth"
    assert trainer.main([*flags, "--old-classes", "0,1", "--loss-form", form, "--output-dir", str(model.parent)]) == 0
    for number, new in ((1, "2,3"), (2, "4,5")):
        more = ["--method", method, "--teacher", str(model), "--new-classes", new]
        model = cells / method / str(number) / "student_model.pth"
        assert incremental.main([*flags, *more, "--output-dir", str(model.parent)]) == 0
