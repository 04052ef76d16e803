"""Classes renamed, merged and removed: the mathematics, and the script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, image_folder, picture, refused, task_of

import edit_classes
import export
import incremental_learning_system as incremental
import predict
from lwm import classifiers, editing, models
from lwm.images.files import fitted
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")


def features_of_three(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    counts = torch.tensor([9, 5, 7])
    labels = torch.arange(3).repeat_interleave(counts)
    centres = 3 * torch.randn(3, channels, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), channels, generator=generator, dtype=torch.float64), labels


def three(channels: int) -> dict:
    """A checkpoint of the classes a, b and c with statistics, whose head is LDA."""
    features, labels = features_of_three(channels)
    statistics = classifiers.measure(features, labels, 3)
    weight, bias = classifiers.lda(statistics)
    model = {"fc.weight": weight.float(), "fc.bias": bias.float()}
    tasks = [task_of("ab"), task_of("c", again=["b"], group_accuracy=[90.0, 80.0])]
    kept = classifiers.to_checkpoint(statistics)
    return checkpoint_of(torch.nn.Identity(), "", "abc", tasks=tasks, statistics=kept) | {"model": model}


@pytest.mark.parametrize("channels", [6, models.WIDEST + 1])
def test_merged_statistics_are_those_of_all_images_under_one_name(channels):
    features, labels = features_of_three(channels)
    edited = editing.merge(three(channels), ["a", "c"], "ac")
    expected = classifiers.measure(features, torch.tensor([0, 1, 0])[labels], 2)
    for name in ("counts", "means", "scatters", "derived"):
        kept = edited["statistics"][name].double()
        torch.testing.assert_close(kept, getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_the_merged_row_of_an_lda_is_the_lda_of_the_mean_of_the_means():
    """Among the classes that stay, with the covariance as it was."""
    statistics = classifiers.from_checkpoint(three(6))
    covariance = classifiers.shared_covariance(statistics)
    means = torch.stack([statistics.means[[0, 2]].mean(0), statistics.means[1]])
    weight = torch.linalg.solve(covariance, means.T).T
    bias = -(weight * means).sum(1) / 2
    head = classifiers.lda(statistics)
    row = editing.merged_row(head, statistics, [0, 2])
    for ours, old, expected in zip(row, head, (weight, bias), strict=True):
        torch.testing.assert_close(ours - old[1], expected[0] - expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [6, models.WIDEST + 1])
def test_a_head_that_is_lda_stays_lda_and_another_keeps_its_other_rows(channels):
    before = three(channels)
    edited = editing.merge(before | {"unknown": {"head": [0.0], "lda": [0.0]}}, ["c", "a"], "ac")
    expected = classifiers.lda(classifiers.from_checkpoint(edited))
    for name, part in zip(("fc.weight", "fc.bias"), expected, strict=True):
        torch.testing.assert_close(edited["model"][name].double(), part, rtol=1e-3, atol=1e-2)
    assert edited["unknown"] == {}
    trained = before | {"model": {name: 2 * part for name, part in before["model"].items()}}
    edited = editing.merge(trained, ["c", "a"], "ac")
    assert torch.equal(edited["model"]["fc.weight"][1], trained["model"]["fc.weight"][1])


def test_what_was_derived_of_a_merged_class_gives_way_to_what_was_measured():
    features, labels = features_of_three(models.WIDEST + 1)
    before = three(models.WIDEST + 1)
    before["statistics"]["derived"] = torch.tensor([1.0, 0.0, 0.0])
    edited = editing.merge(before, ["a", "c"], "ac")["statistics"]
    assert edited["counts"].tolist() == [7, 5] and edited["derived"].tolist() == [0, 0]
    torch.testing.assert_close(edited["means"][0].double(), features[labels == 2].mean(0), rtol=1e-4, atol=1e-4)
    of = before["statistics"]
    covariance = of["scatters"] / of["counts"].sum()  # that all share is as it was
    torch.testing.assert_close(edited["scatters"] / edited["counts"].sum(), covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [6, models.WIDEST + 1])
def test_what_is_removed_leaves_rows_and_statistics_of_the_others(channels):
    features, labels = features_of_three(channels)
    before = three(channels)
    edited = editing.remove(before | {"unknown": {"head": [0.0], "lda": [0.0]}}, ["b"])
    assert edited["unknown"].keys() == {"head"}  # whose rows stay
    assert edited["class_names"] == ["a", "c"]
    assert [(task["classes"], task["again"]) for task in edited["tasks"]] == [(["a"], []), (["c"], [])]
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(edited["model"][name], before["model"][name][[0, 2]])
    kept = classifiers.from_checkpoint(edited)
    stay = labels != 1
    expected = classifiers.measure(features[stay], labels[stay] // 2, 2)
    torch.testing.assert_close(kept.counts, expected.counts)
    torch.testing.assert_close(kept.means, expected.means, rtol=1e-5, atol=1e-5)
    if channels <= models.WIDEST:
        torch.testing.assert_close(kept.scatters, expected.scatters, rtol=1e-4, atol=1e-4)
    else:  # of all classes at once: the covariance stays
        plain = [s.scatters[0] / s.counts.sum() for s in (kept, classifiers.from_checkpoint(before))]
        torch.testing.assert_close(*plain, rtol=1e-5, atol=1e-5)


def test_a_task_without_classes_goes_and_more_images_follow_their_class():
    edited = editing.rename(editing.remove(three(6), ["c"]), "b", "bee")
    assert [(task["classes"], task["again"]) for task in edited["tasks"]] == [(["a", "bee"], []), ([], ["bee"])]
    edited = editing.remove(three(6), ["b", "c"])
    assert [task["classes"] for task in edited["tasks"]] == [["a"]]
    edited = editing.merge(three(6), ["b", "c"], "bc")  # the second task's images are more of the merged class
    assert [(task["classes"], task["again"]) for task in edited["tasks"]] == [(["a", "bc"], []), ([], ["bc"])]
    edited = editing.merge(three(6), ["a", "c"], "ac")
    assert [(task["classes"], task["again"]) for task in edited["tasks"]] == [(["ac", "b"], []), ([], ["b", "ac"])]
    taken = three(6)
    taken["tasks"][0]["pretrained"] = True
    assert editing.remove(taken, ["a", "b"])["tasks"][0]["pretrained"]
    edited = editing.merge(three(6), ["a", "b"], "ab")
    assert [(task["classes"], task["again"]) for task in edited["tasks"]] == [(["ab"], []), (["c"], ["ab"])]


def test_what_cannot_be_edited_is_refused_in_a_line():
    whole = three(6)
    assert "'d'" in refused(editing.rename, whole, "d", "e")
    assert "--merge" in refused(editing.rename, whole, "a", "b")
    assert "'c'" in refused(editing.merge, whole, ["a", "b"], "c")
    assert "two" in refused(editing.merge, whole, ["a"], "d")
    assert "--measure-old" in refused(editing.merge, whole | {"statistics": {}}, ["a", "b"], "d")
    assert "every class" in refused(editing.remove, whole, ["a", "b", "c"])


def test_the_script_writes_beside_the_model_and_the_next_task_goes_on_from_it(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "student_model.pth"
    student.write_bytes((whole / "student_model.pth").read_bytes())
    edits = ["--rename", "0=zero", "--merge", "2,3=curly", "--remove", "1"]
    assert edit_classes.main([str(student), *edits]) == 0
    said = capsys.readouterr()
    assert "zero 0, curly 1" in said.err and "2 classes, zero, curly" in said.out
    path = tmp_path / "student_model_edited.pth"
    edited, before = checkpoint.load(path), checkpoint.load(student)
    assert edited["class_names"] == ["zero", "curly"]
    assert torch.equal(edited["model"]["fc.weight"][0], before["model"]["fc.weight"][0])
    assert edit_classes.main([str(student), "--remove", "1"]) == 2  # the edit of before is kept
    assert edit_classes.main([str(student), "--remove", "1", "--overwrite"]) == 0
    assert checkpoint.load(path)["class_names"] == ["0", "2", "3"]
    assert edit_classes.main([str(path), *edits[:4], "--output", str(path), "--overwrite"]) == 2
    photos = image_folder(tmp_path / "photos", {"owl": 6, "fox": 6}, {"owl": 2, "fox": 2})
    step = ["--teacher", str(path), "--dataset", "folder", "--data-dir", str(photos), "--new-classes", "all"]
    assert incremental.main([*step, "--output-dir", "next"]) == 0
    assert checkpoint.load("next/student_model.pth")["class_names"] == ["0", "2", "3", "fox", "owl"]
    # Other programs know outputs by number: a file can have them in any order.
    (tmp_path / "order.txt").write_text("owl\n3\nfox\n0\n2\n")
    flags = ["--checkpoint", "next/student_model.pth", "--classifier", "head", "--class-order", "order.txt"]
    assert export.main([*flags, "--output", "ordered.onnx"]) == 0
    assert export.main([*flags[:4], "--output", "plain.onnx"]) == 0
    ordered, plain = (predict.open_onnx(f"{name}.onnx") for name in ("ordered", "plain"))
    assert ordered.class_names == ["owl", "3", "fox", "0", "2"]
    pixels = fitted(picture(1), 8)[None]
    np.testing.assert_allclose(ordered.logits(pixels), plain.logits(pixels)[:, [4, 2, 3, 0, 1]], atol=1e-5)
