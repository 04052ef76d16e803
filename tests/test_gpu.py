"""The command for a GPU that is lent for minutes: it ends in time and goes on where it stopped."""

from __future__ import annotations

import time

import torch
from conftest import refused

from lwm.experiments import gpu

SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""


def test_it_ends_in_time_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / "saves.py").write_text(SAVES)
    long = f"{tmp_path}/saves.py {tmp_path}/saved {tmp_path}/started"
    short = f"-c \"open('{tmp_path}/calls', 'a').write('x')\""
    fails = f"-c \"open('{tmp_path}/calls', 'a').write('y'); 1 / 0\""
    monkeypatch.setattr(gpu, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(gpu, "COMMANDS", (short, fails, long, short + " "))
    monkeypatch.setattr(gpu, "SAVING", 5)
    flags = ["--data-dir", str(tmp_path), "--work-dir", str(tmp_path / "work"), "--minutes", "0.15"]
    began = time.monotonic()
    assert gpu.main(flags) == 0
    assert time.monotonic() - began < 30
    assert (tmp_path / "started").exists() and (tmp_path / "saved").exists()
    assert "goes on" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "COMMANDS", (short, fails, short + " "))
    assert gpu.main(flags) == 0
    assert (tmp_path / "calls").read_text() == "xyyx"  # the first was done, and what had failed is tried again


def test_without_a_gpu_a_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "pick_device", lambda wanted: torch.device("cpu"))
    assert "reproduce.py" in refused(gpu.main.__wrapped__, ["--data-dir", str(tmp_path)])
