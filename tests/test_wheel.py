"""The project installed: one name, lwm, whatever else lies beside a user's program."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tinyruns import ROOT


def test_a_wheel_brings_one_name_and_answers_from_a_folder_with_modules_of_its_own(tmp_path, whole):
    source, user = tmp_path / "source", tmp_path / "user"
    for part in ("lwm", "models"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lwm"}
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)], check=True
    )
    (tmp_path / "site" / "other.py").write_text("")  # of another project, beside lwm
    for name in ("models", "images", "runtime", "config"):
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").write_text("mine = True")
    program = user / "program.py"
    program.write_text(
        "import sys, numpy, models, images\n"
        "import lwm.models, lwm.images\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('lwm.other') is None\n"
        "from lwm import Classifier\n"
        "assert models.mine and images.mine and not hasattr(lwm.models, 'mine') and not hasattr(lwm.images, 'mine')\n"
        "classifier = Classifier.load(sys.argv[1])\n"
        "(answer,) = classifier.predict([numpy.zeros((8, 8, 3), numpy.uint8)])\n"
        "assert answer.label in classifier.class_names\n"
        "print(lwm.__file__)\n"
    )
    there = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, str(program), str(whole / "student_model.pth")]
    said = subprocess.run(command, cwd=user, env=there, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()).is_relative_to(tmp_path / "site")
