"""Values that follow the images: batch size, epochs, rate and image size."""

import pytest
from conftest import image_folder, page

import train_teacher_model as trainer
from lwm.runtime import checkpoint, recommended
from lwm.runtime.settings import read_settings


def settings(*flags, dataset="folder"):
    return read_settings("train_teacher_model", list(flags), page(DATASET=dataset))


def student_settings(*flags):
    return read_settings("incremental_learning_system", ["--teacher", "t.pth", *flags], page(DATASET="folder"))


@pytest.mark.parametrize("images", [10, 300, 2500, 50_000])
def test_few_images_get_small_batches_and_enough_steps(images):
    chosen = recommended.by_images(settings(), images, "lr", pretrained=False)
    steps = chosen.epochs * -(-images // chosen.batch_size)
    assert steps >= recommended.FEWEST_STEPS
    assert 16 <= chosen.batch_size <= 128
    assert chosen.epochs == recommended.FEWEST_EPOCHS or steps < 1.2 * recommended.FEWEST_STEPS


def test_the_rate_is_linear_in_the_batch_and_a_tenth_for_pretrained_weights():
    def rate(*flags, images=10_000, pretrained=False, dataset="folder"):
        return recommended.by_images(settings(*flags, dataset=dataset), images, "lr", pretrained).lr

    assert rate("--batch-size", "128") == pytest.approx(0.1)
    assert rate("--batch-size", "16") == pytest.approx(0.0125, rel=0.05)
    assert rate("--batch-size", "512", images=64) == pytest.approx(0.05)  # a batch is no larger than the images
    assert rate("--batch-size", "128", pretrained=True) == pytest.approx(0.01)
    assert rate("--lr", "0.3", "--batch-size", "16", pretrained=True) == 0.3
    assert rate(dataset="digits") == pytest.approx(0.03)


def test_the_student_of_a_pretrained_teacher_computes_as_it_does_in_few_steps_at_a_rate_that_is_measured():
    def chosen(*flags, rate="incremental_lr", **known):
        return recommended.by_images(student_settings(*flags), 160, rate, **known)

    near = chosen(pretrained=True, measured=True)
    assert (near.batch_norm, near.new_rows, near.incremental_lr) == ("frozen", "closed-form", None)
    assert recommended.NEAR_STEPS <= near.epochs * 10 < recommended.FEWEST_STEPS / 2
    assert chosen("--incremental-lr", "0.5", pretrained=True, measured=True).incremental_lr == 0.5
    assert chosen("--batch-norm", "train", pretrained=True).batch_norm == "train"
    assert chosen(pretrained=True).incremental_lr == pytest.approx(0.03 * 0.1 / 8, rel=0.01)
    far = chosen(pretrained=False, measured=True)
    assert (far.batch_norm, far.incremental_lr) == ("train", pytest.approx(0.03 / 8, rel=0.01))
    assert far.epochs * 10 >= recommended.FEWEST_STEPS


@pytest.mark.parametrize(("side", "size"), [(28, 32), (32, 32), (84, 64), (96, 96), (4000, 96), (None, 96)])
def test_the_image_size_is_that_of_the_images_up_to_a_bound(side, size):
    assert recommended.image_size(settings(), side).image_size == size
    assert recommended.image_size(settings("--image-size", "48"), side).image_size == 48


def test_a_run_on_a_folder_says_what_it_takes_and_trains_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recommended, "FEWEST_STEPS", 4)
    monkeypatch.setattr(recommended, "FEWEST_EPOCHS", 1)
    folder = image_folder(tmp_path / "photos", {"a": 20, "b": 20}, {"a": 2, "b": 2})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--old-classes", "a,b", "--model", "resnet32"]
    assert trainer.main([*flags, "--image-size", "16", "--output-dir", str(tmp_path)]) == 0
    task = checkpoint.load(tmp_path / "teacher_model.pth")["tasks"][0]
    assert (task["batch_size"], task["pretrained"]) == (16, False)
    assert "BATCH_SIZE = 16 " in capsys.readouterr().err
