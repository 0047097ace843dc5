"""The weights in assets/ do what assets/README.md says; and checkpoints are exported as they were."""
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eval as evaluation
import mioir
from degrade import degrade, read_image, seeded, to_tensor
from eval import validation_pairs

ASSETS = Path(__file__).parent.parent / "assets"


def stated_gains():
    """{task: gain in dB} of the table in assets/README.md."""
    text = (ASSETS / "README.md").read_text()
    return {task: float(gain) for task, gain in
            re.findall(r"^\| (\w+) +\| +[\d.]+ \| +[\d.]+ \| +(-?[\d.]+) \|", text, re.MULTILINE) if task in mioir.TASKS}


def test_shipped_weights_gain_what_is_stated():
    model, info = mioir.load_model(evaluation.MODEL)
    photos = [(to_tensor(read_image(ASSETS / "photos" / f"{name}.png")), None) for name in ("coffee", "tulips")]
    rows = evaluation.evaluate(model, validation_pairs(photos), "cpu", lambda text: None)
    measured, stated = {row[0]: row[3] for row in rows if row[0] in mioir.TASKS}, stated_gains()
    assert (info["arch"], info["prompt"]) == ("restormer", "ep") and set(stated) == set(mioir.TASKS)
    for task, gain in stated.items():
        assert measured[task] == pytest.approx(gain, abs=0.05), task


def test_what_any_weights_expect_of_the_code_stays_so():
    """Whatever the weights: Restormer's pictures are reflected to multiples of 64; noise differs from channel to channel; what is
    far, at the top, has most haze."""
    model, _ = mioir.load_model(evaluation.MODEL)
    x = to_tensor(read_image(ASSETS / "photos" / "coffee.png"))[:, :, :70, :90]
    with torch.no_grad():
        by_hand = model(F.pad(x, (0, 38, 0, 58), mode="reflect"), torch.tensor([1]))[:, :, :70, :90]
    assert torch.equal(mioir.restore(model, x, "noise"), by_hand)
    noise = degrade(torch.full((1, 3, 90, 90), 0.5), "noise", generator=seeded(1))[0].flatten(1)
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.1
    haze = degrade(torch.zeros(1, 3, 90, 90), "haze", generator=seeded(1))[0, 0]
    assert haze[:9].mean() > haze[40:50].mean() > haze[-9:].mean()


def test_one_command_restores_the_sample_and_finds_its_task(tmp_path, capsys):
    evaluation.main(["--input", str(ASSETS / "coffee_noisy.png"), "--output", str(tmp_path / "out.png")])
    assert "task noise" in capsys.readouterr().out
    truth, before, after = map(read_image, (ASSETS / "photos" / "coffee.png", ASSETS / "coffee_noisy.png", tmp_path / "out.png"))
    assert evaluation.psnr(after, truth) > evaluation.psnr(before, truth) + 3
    model, _ = mioir.load_model(evaluation.MODEL)              # from Python the same, with the classifier that ships
    assert np.array_equal(np.asarray(mioir.restore(model, ASSETS / "coffee_noisy.png", "auto")), after)


def test_the_shipped_classifier_knows_the_sample_photos():
    classifier, _ = mioir.load_model(evaluation.CLASSIFIER)
    photos = [(to_tensor(read_image(path)), None) for path in sorted((ASSETS / "photos").glob("*.png"))]
    for seed in (0, 1):
        accuracy, _ = evaluation.confusion(classifier, validation_pairs(photos, seed=seed))
        assert np.mean(list(accuracy.values())) >= 95


@pytest.mark.parametrize("grey", (False, True), ids=("colour", "grey"))
@pytest.mark.parametrize("quality", (None, 90), ids=("png", "jpeg"))
def test_noise_is_found_in_grey_pictures_and_in_saved_ones(grey, quality):
    """As files hold it: one channel of noise, or noise that a JPEG's 8 x 8 blocks have rounded."""
    classifier, _ = mioir.load_model(evaluation.CLASSIFIER)
    random = np.random.default_rng(0)
    for path in sorted((ASSETS / "photos").glob("*.png")):
        clean = np.asarray(Image.open(path).convert("L" if grey else "RGB"), np.float32)
        noisy = Image.fromarray((clean + random.normal(0, 30, clean.shape)).round().clip(0, 255).astype(np.uint8))
        if quality:
            file = io.BytesIO()
            noisy.save(file, "JPEG", quality=quality)
            noisy = Image.open(file)
        name, sure = evaluation.classify(classifier, to_tensor(np.asarray(noisy.convert("RGB"))))
        assert name == "noise" and sure > mioir.DOUBT[name], path.name


def test_clean_photos_are_left_as_they_are(tmp_path, capsys):
    """PNG and JPEG of quality 95, by the command: at most one of the twelve is touched."""
    clean, out = tmp_path / "clean", tmp_path / "out"
    clean.mkdir()
    for path in sorted((ASSETS / "photos").glob("*.png")):
        shutil.copy(path, clean / path.name)
        Image.open(path).convert("RGB").save(clean / f"{path.stem}.jpg", quality=95)
    evaluation.main(["--input", str(clean), "--output", str(out)])
    same = [path.read_bytes() == (out / path.name).read_bytes() for path in clean.iterdir()]
    assert len(same) == 12 and sum(same) >= 11
    assert capsys.readouterr().out.count("left as it is; --task NAME forces one") == sum(same)


def test_assets_are_small_and_weights_are_half_precision():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for path in (evaluation.MODEL, evaluation.CLASSIFIER):
        state = torch.load(path, weights_only=True)["raw"]
        assert {value.dtype for value in state.values()} == {torch.float16}


def test_an_exported_checkpoint_restores_the_same_picture(finished, tmp_path, capsys):
    small = tmp_path / "small.pt"
    evaluation.main([str(finished / "last.pt"), "--weights", "ema", "--export", str(small)])
    (model, info), (half, half_info) = mioir.load_model(finished / "last.pt", "ema"), mioir.load_model(small)
    assert half_info == info and small.stat().st_size < (finished / "last.pt").stat().st_size / 6
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x, torch.tensor([3])), half(x, torch.tensor([3])), atol=2e-3)


def test_export_refuses_a_published_file(tmp_path):
    torch.manual_seed(0)
    names = mioir.by_published_names("classifier", None, mioir.TaskClassifier().state_dict())
    torch.save(names, tmp_path / "published.pth")
    with pytest.raises(SystemExit, match="checkpoint of train.py"):
        evaluation.main([str(tmp_path / "published.pth"), "--export", str(tmp_path / "half.pt")])
    assert not (tmp_path / "half.pt").exists()
