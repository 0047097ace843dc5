"""eval.py and degrade.py as tools: pictures of every kind kept what they are, hostile input refused."""
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import degrade
import eval as evaluation
import mioir
import train
from degrade import TASKS
from reference import published_prompts, published_state

ROOT = Path(__file__).parent.parent
SMALL = dict(width=16, blocks=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (41, 60, 3), dtype=np.uint8)


def store(path, model, arch, prompt, sizes):
    torch.save({"mioir": 1, "arch": arch, "prompt": prompt, "sizes": sizes, "raw": model.state_dict(),
                "ema": model.state_dict(), "facts": {"order": [list(TASKS)] * 7, "periods": [[1]] * 7}, "stage": 7,
                "iteration": 0, "table": []}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small "ep" model, an "ap" model and a classifier, untrained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for prompt in ("ep", "ap"):
        model = mioir.build_model("srresnet", prompt, **SMALL)
        store(folder / f"{prompt}.pt", model, "srresnet", prompt, SMALL)
    store(folder / "classifier.pt", mioir.TaskClassifier(16), "classifier", None, {"width": 16})
    return folder


def run(*argv):
    evaluation.main([str(a) for a in argv])


def restore(files, source, target, *more, model="ep.pt", task="noise"):
    run(files / model, "--input", source, "--output", target, *(["--task", task] if task else []), *more)
    return Image.open(target)


def refused(*argv):
    """Runs eval.py, which must stop with one line; returns the line."""
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    line = str(stopped.value.code)
    assert line.startswith("eval.py: ") and "\n" not in line and "Traceback" not in line
    return line


# Pictures that work -----------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", evaluation.FORMATS)
def test_every_ending_is_written_as_what_it_says(files, tmp_path, suffix):
    """PNG, TIFF and BMP keep every pixel, the others come close; the file is of the kind that its ending names."""
    Image.fromarray((np.indices((41, 60)).sum(0)[..., None] + np.array([0, 40, 90])).astype(np.uint8)).save(tmp_path / "in.png")
    lossless = np.asarray(restore(files, tmp_path / "in.png", tmp_path / "whole.png"))
    out = restore(files, tmp_path / "in.png", tmp_path / f"out{suffix}")
    kinds = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
    assert out.format == kinds.get(suffix, "JPEG")
    assert out.format != "JPEG" or out.quantization[0][0] == 2                                 # of quality 95
    error = np.abs(np.asarray(out).astype(int) - lossless).mean()
    assert error == 0 if out.format in ("PNG", "TIFF", "BMP") else 0 < error < 4
    assert {p.name for p in tmp_path.iterdir()} == {"in.png", "whole.png", f"out{suffix}"}


def grey(path):
    Image.fromarray(PIXELS[:, :, 0]).save(path)


def palette(path):
    Image.fromarray(PIXELS).convert("P").save(path)


def bilevel(path):
    Image.fromarray(PIXELS).convert("1").save(path)


def alpha(path):
    Image.fromarray(np.dstack((PIXELS, PIXELS[:, :, 0]))).save(path)


def clear(path):
    Image.fromarray(np.dstack((PIXELS, 0 * PIXELS[:, :, 0]))).save(path)


def palette_alpha(path):
    """One colour of the palette is clear: PNG's tRNS."""
    Image.fromarray(PIXELS).convert("P").save(path, transparency=3)


def colour_clear(path):
    pixels = PIXELS.copy()
    pixels[:9] = 9, 8, 7
    Image.fromarray(pixels).save(path, transparency=(9, 8, 7))


def grey_alpha(path):
    Image.fromarray(np.dstack((PIXELS[:, :, 0], PIXELS[:, :, 1])), "LA").save(path)


def cmyk(path):
    Image.fromarray(PIXELS).convert("CMYK").save(path)


def animated(path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def one_pixel(path):
    Image.fromarray(PIXELS[:1, :1]).save(path)


def thin(path):
    Image.fromarray(np.tile(PIXELS[:3, :50], (1, 100, 1))).save(path)


def icc(path):
    from PIL import ImageCms
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(PIXELS).save(path, icc_profile=profile)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(path, exif=exif)


@pytest.mark.parametrize("make, size, mode, model", [
    (grey, (60, 41), "L", "ep.pt"), (palette, (60, 41), "RGB", "ep.pt"), (bilevel, (60, 41), "L", "ep.pt"),
    (alpha, (60, 41), "RGBA", "ep.pt"), (clear, (60, 41), "RGBA", "ep.pt"), (palette_alpha, (60, 41), "RGBA", "ep.pt"),
    (colour_clear, (60, 41), "RGBA", "ep.pt"), (grey_alpha, (60, 41), "LA", "ap.pt"), (one_pixel, (1, 1), "RGB", "ep.pt"),
    (one_pixel, (1, 1), "RGB", "ap.pt"), (thin, (5000, 3), "RGB", "ap.pt"), (icc, (60, 41), "RGB", "ep.pt"),
    (turned, (41, 60), "RGB", "ep.pt"), (animated, (60, 41), "RGB", "ep.pt"), (cmyk, (60, 41), "RGB", "ep.pt")])
def test_pictures_stay_what_they_are(files, tmp_path, make, size, mode, model):
    """Size, mode, transparency and profile; and the colours are those that the model made of what the file shows."""
    source = tmp_path / {animated: "in.webp", cmyk: "in.tif"}.get(make, "in.png")
    make(source)
    out = restore(files, source, tmp_path / "out.png", model=model)
    assert out.size == size and out.mode == mode
    if "A" in mode:
        assert np.array_equal(np.asarray(out.getchannel("A")), np.asarray(Image.open(source).convert("RGBA").getchannel("A")))
    assert ("icc_profile" in out.info) == (make is icc)
    x = torch.from_numpy(np.asarray(ImageOps.exif_transpose(Image.open(source)).convert("RGB")) / np.float32(255)).permute(2, 0, 1)[None]
    network, _ = mioir.load_model(files / model)
    expected = Image.fromarray((mioir.restore(network, x, "noise")[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())
    assert np.array_equal(np.asarray(out.convert("RGB")), np.asarray(expected.convert("L").convert("RGB") if "L" in mode else expected))


@pytest.mark.parametrize("kind", (np.uint16, np.int32, np.float32))
def test_grey_of_more_than_8_bits_is_refused_with_the_mend(files, tmp_path, kind):
    Image.fromarray(PIXELS[:, :, 0].astype(kind)).save(tmp_path / "in.tif")
    line = refused(files / "ep.pt", "--input", tmp_path / "in.tif", "--output", tmp_path / "out.png", "--task", "haze")
    assert "in.tif" in line and "more than 8 bits" in line and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ("Größe 東京 ☂.png", "a" * 240 + ".png", "with space.png", "-dash.png",
                                  os.fsdecode(b"caf\xe9.png")))
def test_unusual_names(files, tmp_path, name):
    (tmp_path / "in").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "in" / name)
    run(files / "ep.pt", "--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "haze")
    assert Image.open(tmp_path / "out" / name).size == (60, 41)


def test_what_is_read_but_not_written_becomes_a_png(files, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "a.avif", "a.ppm", "a.png"):
        Image.fromarray(PIXELS).save(tmp_path / "in" / name)
    run(files / "ep.pt", "--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "haze")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.gif.png", "a.avif.png", "a.ppm.png", "a.png"}


def test_a_folder_goes_on_after_broken_files_and_says_so(files, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for k in range(7):
        Image.fromarray(PIXELS[k:]).save(tmp_path / "in" / "deep" / f"{k}.png")
    for name in ("x.png", "y.jpg", "z.webp"):
        (tmp_path / "in" / name).write_bytes(b"broken")
    with pytest.raises(SystemExit) as stopped:
        run(files / "ep.pt", "--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "rain")
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "7 of 10" in said.out
    assert all(name in said.err for name in ("x.png", "y.jpg", "z.webp"))
    assert sorted(p.name for p in (tmp_path / "out" / "deep").iterdir()) == [f"{k}.png" for k in range(7)]
    assert len(list((tmp_path / "out").rglob("*"))) == 8


def test_comparisons_show_the_file_that_was_written_and_nothing_where_nothing_was_changed(files, tmp_path, capsys):
    """Grey as grey, transparent on white; asked for by auto, too, which reports what the classifier named."""
    grey(tmp_path / "grey.png")
    alpha(tmp_path / "alpha.png")
    for name in ("grey", "alpha"):
        restore(files, tmp_path / f"{name}.png", tmp_path / f"{name}_out.png", "--compare")
        shown = np.asarray(Image.open(tmp_path / f"{name}_out_compare.png")).astype(int)
        for half, file in ((shown[:, :60], f"{name}.png"), (shown[:, 66:], f"{name}_out.png")):
            picture = Image.open(tmp_path / file).convert("RGBA")
            rgb, a = np.asarray(picture).astype(float)[..., :3], np.asarray(picture)[..., 3:] / 255
            assert np.abs(half - (rgb * a + 255 * (1 - a))).max() <= 1.01
    restore(files, tmp_path / "grey.png", tmp_path / "kept.png", "--compare", "--classifier", answering(tmp_path, "none"), task="auto")
    assert (tmp_path / "kept.png").exists() and not (tmp_path / "kept_compare.png").exists()


def test_tiles_are_as_large_as_asked_and_give_the_same_picture(files, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.tile(PIXELS, (4, 4, 1))).save(tmp_path / "in.png")                      # 240 x 164
    seen, forward = [], mioir.SRResNet.forward

    def spy(model, x, *more, **named):
        seen.append(tuple(x.shape[2:]))
        return forward(model, x, *more, **named)
    monkeypatch.setattr(mioir.SRResNet, "forward", spy)
    for model in ("ep.pt", "ap.pt"):
        whole = np.asarray(restore(files, tmp_path / "in.png", tmp_path / "a.png", "--overwrite", "--tile", "0", model=model)).astype(int)
        assert seen == [(164, 240)]
        tiled = np.asarray(restore(files, tmp_path / "in.png", tmp_path / "b.png", "--overwrite", "--tile", "96", model=model))
        assert set(seen[1:]) == {(96, 96)} and np.abs(whole - tiled).max() <= 1 and "in tiles of 96" in capsys.readouterr().out
        seen.clear()


def test_seed_depth_and_images_reach_the_degradations(files, tmp_path, capsys):
    """The input's PSNR is that of noise of this seed, and of haze by a map that is far in one corner only."""
    photo, depth = tmp_path / "photos" / "a.png", np.zeros((16, 16), np.float32)
    for folder in ("photos", "maps"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.tile(PIXELS, (2, 2, 1))).save(photo)
    depth[:4, :4] = 7
    np.save(tmp_path / "maps" / "a.npy", depth)
    gt = degrade.to_tensor(degrade.read_image(photo))
    run(files / "ap.pt", "--images", photo.parent, "--depth", tmp_path / "maps", "--seed", 3)
    rows = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in capsys.readouterr().out.split("Out-Dis")[0].splitlines()
            if line.startswith("| ") and "task" not in line}
    for task, given in (("noise", None), ("haze", torch.from_numpy(depth)[None, None])):
        lq = degrade.degrade(gt, task, "in", given, degrade.seeded("validation", 3, "in", task, 0))
        assert rows[task] == pytest.approx(evaluation.psnr(degrade.to_image(lq), degrade.to_image(gt)), abs=0.006)
    assert rows["haze"] > 18                               # most of it is near, and clear


def test_more_pixels_than_pillow_would_take_are_read_where_asked_for(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(PIXELS).save(tmp_path / "in.png")                                          # 2460
    argv = (files / "ep.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--task", "noise")
    assert "--max-pixels" in refused(*argv)
    run(*argv, "--max-pixels", 3000)
    assert Image.open(tmp_path / "out.png").size == (60, 41)


# Pictures and requests that cannot work ---------------------------------------------------------------

def truncated(folder):
    Image.fromarray(PIXELS).save(folder / "whole.png")
    (folder / "bad.png").write_bytes((folder / "whole.png").read_bytes()[:900])
    (folder / "whole.png").unlink()


def bomb(folder):
    """A PNG of a few bytes that claims 60000 x 60000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
                                     + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


BAD_PICTURES = {
    "truncated PNG": (truncated, "not a readable image"),
    "zero bytes": (lambda f: (f / "bad.png").write_bytes(b""), "not a readable image"),
    "text": (lambda f: (f / "bad.png").write_text("hello"), "not a readable image"),
    "random bytes": (lambda f: (f / "bad.png").write_bytes(np.random.default_rng(0).bytes(4000)), "not a readable image"),
    "PNG head alone": (lambda f: (f / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "not a readable image"),
    "JPEG head alone": (lambda f: (f / "bad.png").write_bytes(b"\xff\xd8\xff\xe0"), "not a readable image"),
    "GIF head alone": (lambda f: (f / "bad.png").write_bytes(b"GIF89a"), "not a readable image"),
    "TIFF head alone": (lambda f: (f / "bad.png").write_bytes(b"II*\0\x08\0\0\0"), "not a readable image"),
    "WebP head alone": (lambda f: (f / "bad.png").write_bytes(b"RIFF\x10\0\0\0WEBPVP8 "), "not a readable image"),
    "decompression bomb": (bomb, "--max-pixels"),
    "missing": (lambda f: None, "No such file"),
    "a checkpoint": (lambda f: torch.save({"a": 1}, f / "bad.png"), "not a readable image"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_are_refused_by_name(files, tmp_path, kind):
    make, words = BAD_PICTURES[kind]
    make(tmp_path)
    line = refused(files / "ep.pt", "--input", tmp_path / "bad.png", "--output", tmp_path / "out.png", "--task", "noise")
    assert "bad.png" in line and words in line
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.png"}


@pytest.mark.parametrize("make, words", [(lambda p: None, "No such file"), (lambda p: p.write_text("hello"), "not a checkpoint")])
def test_bad_checkpoints_are_refused_by_name(tmp_path, make, words):
    """All kinds: test_checkpoints.py."""
    make(tmp_path / "model.pt")
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    line = refused(tmp_path / "model.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--task", "noise")
    assert "model.pt" in line and words in line and not (tmp_path / "out.png").exists()


def npy(values, **more):
    file = io.BytesIO()
    np.save(file, values, **more)
    return file.getvalue()


GOOD = npy(np.random.default_rng(0).random((7, 128, 128)))
BAD_PROMPTS = {
    "one image": npy(np.zeros((128, 128))), "six": npy(np.zeros((6, 128, 128))), "words": npy(np.full((7, 128, 128), "0.5")),
    "bools": npy(np.ones((7, 128, 128), bool)), "complex": npy(np.ones((7, 128, 128), complex)), "nothing": b"", "half": GOOD[:4000],
    "nan": npy(np.full((7, 128, 128), np.nan)), "too large for float32": npy(np.full((7, 128, 128), 1e300)),
    "objects": npy(np.full((7, 128, 128), None), allow_pickle=True), "a picture": b"\x89PNG\r\n\x1a\n",
    "promises terabytes": GOOD.replace(b"(7, 128, 128)", b"(7, 1280000, 128000)".ljust(20)[:20])}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_prompts_that_are_none_are_refused_in_one_line(tmp_path, kind):
    (tmp_path / "p.npy").write_bytes(BAD_PROMPTS[kind])
    with pytest.raises(ValueError, match="--prompts .*p.npy: (not a .npy|takes finite)"):
        evaluation.read_prompts(tmp_path / "p.npy")


class Trap:
    def __reduce__(self):
        return print, ("the file ran code",)


def test_prompts_that_are_a_pickle_run_nothing(tmp_path, capsys):
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a .npy"):
        evaluation.read_prompts(tmp_path / "p.npy")
    assert "ran code" not in capsys.readouterr().out


def test_damaged_prompts_are_read_or_refused_and_nothing_else(tmp_path):
    """300 files with bytes changed, cut or put in, mostly in the head: finite images, or one line."""
    random, path = np.random.default_rng(1), tmp_path / "p.npy"
    for _ in range(300):
        data, at = bytearray(GOOD), int(random.integers(0, random.choice((10, 128, len(GOOD)))))
        for place in range(at, at + int(random.integers(1, 4))):
            data[place:place + int(random.integers(0, 3))] = random.bytes(int(random.integers(0, 3)))
        path.write_bytes(data[:int(random.integers(1, len(data)))] if random.random() < 0.2 else data)
        try:
            assert evaluation.read_prompts(path).shape == (7, 128, 128)
        except ValueError as error:
            assert str(error).startswith(f"--prompts {path}: ") and "\n" not in str(error)


BAD_REQUESTS = {
    "unknown task": (["--task", "fog"], ["fog", "haze"]),
    "mixture of nothing": (["--task", "noise:"], []),
    "mixture with a word": (["--task", "noise:much"], ["much"]),
    "auto without a classifier": (["--task", "auto", "--classifier", "nothing.pt"], ["nothing.pt", "--classifier"]),
    "a restorer as classifier": (["--task", "auto", "--classifier", "ep.pt"], ["not a task classifier"]),
    "an ending that is no picture's": (["--output", "out.doc"], ["out.doc", ".png"]),
    "a folder for one picture": (["--output", "pictures"], ["pictures", ".png"]),
    "negative tile": (["--tile", "-3"], ["tile -3"]),
    "tile too small for its overlap": (["--tile", "32"], ["tile 32", "at least 81"]),
    "prompts that are no file": (["--prompts", "nothing.npy"], ["nothing.npy"]),
    "several pictures": (["b.png"], ["b.png"]),
    "negative weights": (["--task", "noise:-1,jpeg:2"], ["negative"]),
    "weights of nothing": (["--task", "noise:0"], ["all zero"]),
    "a weight that is no number": (["--task", "noise:nan"], ["task noise:nan"]),
    "a missing picture": (["--input", "nothing.png"], ["--input nothing.png: No such file"]),
    "a picture onto itself": (["--output", "in.png", "--overwrite"], ["in.png is the picture itself"]),
    "a classifier that is not asked": (["--classifier", "classifier.pt"], ["--classifier", "auto"]),
    "weights that are neither": (["--weights", "best"], ["best", "ema"]),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_requests_are_refused(files, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(files)
    argv, words = BAD_REQUESTS[kind]
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    argv = [tmp_path / "in.png" if a == "in.png" else a for a in argv]
    argv = ["ep.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--task", "noise", *argv]
    if kind == "mixture of nothing":                       # means weight 1: not an error
        run(*argv)
        assert (tmp_path / "out.png").exists()
        return
    line = refused(*argv)
    assert all(word in line for word in words) and not (tmp_path / "out.png").exists()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "in.png")), PIXELS)


def test_a_folder_that_cannot_be_written_and_a_full_disk_leave_nothing(files, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    (tmp_path / "file").write_text("in the way")
    line = refused(files / "ep.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "file" / "out.png", "--task", "sr")
    assert "not written" in line or "Not a directory" in line
    code = ("import resource, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import eval; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); eval.main()")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), files / "ep.pt", "--input", tmp_path / "in.png",
                           "--output", tmp_path / "out.png", "--task", "sr"], capture_output=True, text=True)
    assert done.returncode == 1 and "not written" in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"in.png", "file"}


@pytest.mark.parametrize("folder", ("new/deep/", "there"))
def test_one_picture_goes_into_a_folder_which_is_made_where_it_is_not_there(files, tmp_path, folder):
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    (tmp_path / "there").mkdir()
    run(files / "ep.pt", "--input", tmp_path / "in.png", "--output", f"{tmp_path}/{folder}", "--task", "noise")
    assert Image.open(tmp_path / folder / "in.png").size == (60, 41)


def test_an_output_that_cannot_be_is_refused_before_any_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "restored", lambda *more: pytest.fail("asked too late"))
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    (tmp_path / "file").write_text("in the way")
    for output in ("file/out.png", "file/deeper/out.png", "file/"):
        assert "not written" in refused(files / "ep.pt", "--input", tmp_path / "in.png", "--output", f"{tmp_path}/{output}", "--task", "sr")


def test_words_that_belong_together_are_not_taken_for_a_checkpoint(tmp_path):
    """As a shell makes of --input *.png."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert "is a picture, not a checkpoint; give it, or a folder of pictures, as --input" in refused("--input", tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "o")
    assert "name another one" in refused("--input", tmp_path, "--output", f"{tmp_path}/.", "--task", "noise")
    assert "--input needs --output" in refused("--input", tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# Do no harm -------------------------------------------------------------------------------------------

def answering(folder, name, sure=True, none=True):
    """A classifier that gives one answer, whatever it sees."""
    classifier = mioir.build_classifier(16, none)
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.zero_()[mioir.ANSWERS.index(name)] = 9.0 if sure else 0.5
    return store(folder / "answers.pt", classifier, "classifier", None, {"width": 16, "none": none})


@pytest.mark.parametrize("name, sure, none, touched, words", [
    ("none", True, True, False, "nothing found: left as it is; --task NAME forces one"),
    ("noise", False, True, False, " % sure: left as it is; --task NAME forces one"),
    ("noise", True, True, True, "task noise, 100 % sure"),
    ("noise", False, False, True, "task noise, 22 % sure")])        # the published one has seven answers, all of damage
def test_auto_leaves_a_clean_or_doubtful_picture_alone_and_names_the_flag(files, tmp_path, capsys, name, sure, none, touched, words):
    turned(tmp_path / "in.png")                                     # with EXIF, which only a copy keeps
    classifier = answering(tmp_path, name, sure, none)
    restore(files, tmp_path / "in.png", tmp_path / "out.png", "--classifier", classifier, task=None)
    assert words in capsys.readouterr().out
    assert ((tmp_path / "in.png").read_bytes() != (tmp_path / "out.png").read_bytes()) == touched


def test_a_clean_picture_left_alone_changes_its_format_where_that_is_asked_for(files, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    out = restore(files, tmp_path / "in.png", tmp_path / "out.bmp", "--classifier", answering(tmp_path, "none"), task="auto")
    assert np.array_equal(np.asarray(out), PIXELS)


def test_clean_pairs_are_originals_jpegs_and_smaller_copies(monkeypatch):
    images = evaluation.builtin_images(3, 64)
    (same, _), (jpeg, _), (smaller, _) = pairs = evaluation.clean_pairs(images, 3)
    assert torch.equal(*pairs[1]) and np.array_equal(degrade.to_image(same), degrade.to_image(images[0][0]))
    assert 35 < evaluation.psnr(degrade.to_image(jpeg), degrade.to_image(images[1][0])) < 60
    assert 0.7 * 64 - 1 <= smaller.shape[2] < 64 and torch.equal(smaller, evaluation.clean_pairs(images, 3)[2][0])


def test_a_classifier_with_eight_answers_shows_eight_rows_and_their_mean(tmp_path, capsys, monkeypatch):
    images = evaluation.builtin_images(2, 64)
    monkeypatch.setattr(evaluation, "builtin_images", lambda: images)
    asked, real = [], evaluation.confusion
    monkeypatch.setattr(evaluation, "confusion", lambda classifier, pairs: asked.append(pairs) or real(classifier, pairs))
    run(answering(tmp_path, "none"))
    assert torch.equal(asked[0]["none"][0][0], degrade.quantize(images[0][0])) and not torch.equal(*asked[0]["noise"][0])
    said = capsys.readouterr().out
    assert "accuracy 12.5 %" in said and "accuracy 14.3 %" in said  # one of eight; Out-Dis lacks sr
    row = next(line for line in said.splitlines() if line.startswith("| none"))
    assert [int(n) for n in row.split("|")[2:-1]] == [0] * 7 + [2]


# Nothing is overwritten, nothing is ignored -----------------------------------------------------------

WRITES = {
    "strips": ([], "x.png"), "matrix": (["--prompt-matrix"], "x.png"),
    "testsets": (["--testsets", "sets"], "x.json"), "export": (["--export", "x.pt"], "x.pt"),
    "picture": (["--input", "in.png", "--task", "noise"], "x.png"),
    "comparison": (["--input", "in.png", "--task", "noise", "--compare"], "x_compare.png"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_every_file_that_is_there_stays_and_is_named_before_any_work(files, tmp_path, kind, monkeypatch):
    def work(*more, **named):
        raise AssertionError("asked too late")
    monkeypatch.chdir(tmp_path)
    for name in ("restored", "to_tensor"):
        monkeypatch.setattr(evaluation, name, work)
    (tmp_path / "sets" / "single_indis" / "rain").mkdir(parents=True)
    Image.fromarray(PIXELS).save("in.png")
    argv, name = WRITES[kind]
    (tmp_path / name).write_text("precious")
    output = [] if kind == "export" else ["--output", name.replace("_compare", "")]
    line = refused(files / "ep.pt", *argv, *output)
    assert f"{name} exists" in line and "--overwrite" in line and (tmp_path / name).read_text() == "precious"


def test_pictures_are_written_where_output_says_and_nowhere_else(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = evaluation.builtin_images(1, 64)
    monkeypatch.setattr(evaluation, "builtin_images", lambda: images)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((files / "ep.pt").read_bytes())
    run(tmp_path / "run")                                  # a folder stands for its last.pt
    run(tmp_path / "run", "--prompt-matrix")
    assert "| rain" in capsys.readouterr().out and [p.name for p in tmp_path.rglob("*")] == ["run", "last.pt"]
    run(tmp_path / "run", "--output", "new/strips.png")
    sheet, model = np.asarray(Image.open("new/strips.png")), mioir.load_model(files / "ep.pt")[0]
    for i, task in enumerate(TASKS):                       # degraded, restored, truth: pixels tripled
        (lq, gt), = evaluation.validation_pairs(images)[task]
        for j, picture in enumerate((degrade.to_image(lq), evaluation.restored(model, lq, task, "cpu"), degrade.to_image(gt))):
            cell = sheet[31 + 198 * i:223 + 198 * i:3, 111 + 198 * j:303 + 198 * j:3]
            assert np.array_equal(cell, picture)


def test_export_makes_its_folder_and_never_replaces_a_runs_checkpoint(files, tmp_path):
    saved = torch.load(files / "ep.pt", weights_only=True)
    torch.save({**saved, "optimizer": {}, "stage": 0, "iteration": 1}, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    assert "--resume" in refused(tmp_path / "last.pt", "--export", tmp_path / "last.pt", "--overwrite")
    assert (tmp_path / "last.pt").read_bytes() == before
    run(tmp_path / "last.pt", "--export", tmp_path / "new" / "half.pt")
    run(tmp_path / "last.pt", "--export", tmp_path / "new" / "half.pt", "--overwrite")
    assert "optimizer" not in torch.load(tmp_path / "new" / "half.pt", weights_only=True)


@pytest.mark.parametrize("argv, words", [
    (["--expect", "30"], ["--expect", "--testsets"]), (["--task", "noise"], ["--task", "--input"]),
    (["--oracle"], ["--oracle", "--testsets"]), (["--tolerance", "0.1"], ["--tolerance"]),
    (["--compare"], ["--compare", "--input"]),
    (["--tile", "0"], ["--tile", "the table"]), (["--classifier", "c.pt"], ["--classifier", "--input or --testsets"]),
    (["--prompt-matrix", "--expect", "3"], ["--expect", "--prompt-matrix"]),
    (["--export", "x.pt", "--tile", "512"], ["--tile", "--export"]), (["--export", "x.pt", "--output", "y.pt"], ["--output"]),
    (["--input", "a.png", "--testsets", "b"], ["--testsets", "--input"]), (["--testsets", "nowhere"], ["nowhere: no such folder"]),
    (["--pairs", ".", "nowhere"], ["nowhere: no such folder"]), (["--input", "a.png", "--images", "b"], ["--images"]),
    (["--input", "a.png", "--seed", "1"], ["--seed"]), (["--testsets", "b", "--task", "noise"], ["--task"]),
    (["--depth", "d"], ["--depth", "--images"]), (["--testsets", "b", "--oracle", "--classifier", "c.pt"], ["--oracle"]),
    (["--images", "a file.png"], ["a file.png is a file"]), (["--testsets", "a file.png"], ["is a file"]),
    (["--task", "fog", "--input", "a file.png", "--output", "b.png"], ["'fog'", "haze"])])
def test_a_flag_that_would_be_ignored_is_refused_before_the_checkpoint_is_read(tmp_path, argv, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no checkpoint.pt").write_text("which would be refused, too")
    Image.fromarray(PIXELS).save("a file.png")
    line = refused("no checkpoint.pt", *argv)
    assert all(word in line for word in words) and "no checkpoint" not in line


@pytest.mark.parametrize("argv, words", [
    (["in.png"], ["is a picture", "as --input"]), (["folder"], ["folder/last.pt: No such file"]),
    (["nothing.pt"], ["nothing.pt: No such file", "there are: none yet"]),
    (["--input", "folder", "--output", "in.png"], ["--input is a folder"]),
    (["--input", "folder", "--output", "new.png"], ["--input is a folder"])])
def test_a_mistaken_path_is_called_what_it_is(tmp_path, argv, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("in.png")
    (tmp_path / "folder").mkdir()
    assert all(word in (line := refused(*argv)) for word in words) and "unreadable" not in line


# What a line says -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("noise,jpeg", {"noise": 0.5, "jpeg": 0.5}), (" Noise : 3 , JPEG:1", {"noise": 0.75, "jpeg": 0.25}), ("noise:7", {"noise": 1})])
def test_mixtures_are_normalised_and_read_generously(text, expected):
    weights = evaluation.parse_task(text)[0].tolist()
    assert weights == pytest.approx([expected.get(task, 0) for task in TASKS])


def test_a_task_that_a_model_cannot_read_or_has_not_learned_is_said(files, tmp_path, capsys, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    restore(files, tmp_path / "in.png", tmp_path / "a.png", model="ap.pt", task="noise")
    assert "--task ignored: this model takes no prompt" in capsys.readouterr().out
    saved = torch.load(files / "ep.pt", weights_only=True)
    order = [["noise"], ["noise", "rain"], ["noise", "rain", "sr"]]
    torch.save({**saved, "stage": 1, "iteration": 1, "facts": {"order": order, "periods": [[1]] * 3}}, tmp_path / "half.pt")
    run(tmp_path / "half.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "b.png", "--task", "rain")
    assert "warning" not in capsys.readouterr().out
    run(tmp_path / "half.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "c.png", "--task", "noise,sr")
    assert "warning: this model has not learned sr" in capsys.readouterr().out
    for name, warned in (("sr", True), ("rain", False)):
        run(tmp_path / "half.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "d.png", "--overwrite", "--classifier", answering(tmp_path, name))
        assert ("warning: this model has not learned it" in capsys.readouterr().out) == warned
    images = evaluation.builtin_images(1, 64)
    monkeypatch.setattr(evaluation, "builtin_images", lambda: images)
    run(tmp_path / "half.pt")
    said = capsys.readouterr().out
    assert "| haze (not trained) |" in said and "| noise  " in said and "rain (not" not in said


def test_comparisons_show_the_whole_picture_in_its_own_shape(files, tmp_path):
    Image.fromarray(np.tile(PIXELS, (1, 40, 1))).save(tmp_path / "in.png")                     # 2400 x 41
    restore(files, tmp_path / "in.png", tmp_path / "out.png", "--compare")
    assert Image.open(tmp_path / "out_compare.png").size == (2406, 21)                         # two of 1200 x 21


def test_a_folders_own_results_are_not_restored_again(files, tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for _ in range(2):
        run(files / "ep.pt", "--input", tmp_path, "--output", tmp_path / "out", "--task", "noise", "--compare", "--overwrite")
        assert "1 of 1 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("where", ("to_rgb", "to_tensor", "choose_task", "restored"))
def test_a_picture_beyond_the_memory_is_named_and_the_rest_goes_on(files, tmp_path, where, monkeypatch, capsys):
    for name, width in (("a", 60), ("b", 50), ("c", 60)):
        Image.fromarray(PIXELS[:, :width]).save(tmp_path / f"{name}.png")
    real, calls = getattr(evaluation, where), []

    def lacking(*more, **named):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*more, **named)
    monkeypatch.setattr(evaluation, where, lacking)
    with pytest.raises(SystemExit):
        run(files / "ep.pt", "--input", tmp_path, "--output", tmp_path / "out", "--classifier", files / "classifier.pt")
    said = capsys.readouterr()
    assert "2 of 3" in said.out and f"failed: {tmp_path / 'b.png'}: not enough memory" in said.err


def test_a_long_picture_reports_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 10000, 3))
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    report = evaluation.tile_reporter()
    for done in range(1, 21):
        report(done, 20)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 10 and all("of 20" in line and "left" in line for line in lines)


def test_names_that_a_terminal_cannot_show_fail_nothing_and_no_posix_module_is_needed(files, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("Größe.png".encode(), b"\xff.png"):
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as file:
            Image.fromarray(PIXELS).save(file, "PNG")
    code = ("import sys; sys.modules.update(dict.fromkeys(('resource', 'fcntl', 'pwd', 'grp', 'termios'))); "
            "sys.path.insert(0, sys.argv.pop(1)); import eval; eval.main()")
    done = subprocess.run([sys.executable, "-c", code, ROOT, files / "ep.pt", "--input", tmp_path / "in", "--output",
                           tmp_path / "out", "--task", "noise"], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"2 of 2" in done.stdout and b"failed" not in done.stderr, done
    assert len(list((tmp_path / "out").iterdir())) == 2


# Test sets --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("testsets")
    (folder / "photos" / "more").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(degrade.to_image(degrade.dead_leaves(64, 80, degrade.seeded(k))[0])).save(folder / "photos" / name)
    degrade.main(["--images", str(folder / "photos"), "--out", str(folder / "sets"), "--split", "both", "--seed", "4"])
    return folder


def test_the_test_set_table(files, written, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "CLASSIFIER", "no classifier is asked where the truth is told")
    run(files / "ep.pt", "--testsets", written / "sets", "--oracle", "--output", written / "report.json")
    said = capsys.readouterr()
    assert "Toled_val" in said.err and "In-Dis average" in said.out and "Out-Dis average" in said.out
    report = json.loads((written / "report.json").read_text())
    assert report["paper"] == {} and "paper" not in said.out    # another model, other images: not to be compared
    assert report["gain"]["rain"] == pytest.approx(report["psnr"]["rain"] - report["psnr_in"]["rain"])
    assert "PSNR in" in said.out and "gain" in said.out and report["images"]["rain"] == 3
    model, _ = mioir.load_model(files / "ep.pt")
    scores = []
    for name in ("a", "b", "more_c"):
        lq = degrade.to_tensor(degrade.read_image(written / "sets" / "single_indis" / "rain" / f"{name}.png"))
        gt = degrade.read_image(written / "sets" / "original" / "GT" / f"{name}.png")
        scores.append(evaluation.psnr(evaluation.restored(model, lq, "rain", "cpu"), gt))
    assert report["psnr"]["rain"] == pytest.approx(np.mean(scores), abs=1e-6)
    similar = [evaluation.ssim(*(degrade.read_image(written / "sets" / folder / f"{n}.png") for folder in ("single_indis/rain", "original/GT")))
               for n in ("a", "b", "more_c")]
    assert report["ssim_in"]["rain"] == pytest.approx(np.mean(similar)) and "ap.pt" not in report["checkpoint"]
    average = np.mean([report["psnr"][task] for task in TASKS])
    assert report["psnr"]["In-Dis"] == pytest.approx(average)
    run(files / "ep.pt", "--testsets", written / "sets", "--oracle", "--expect", average, "--output", written / "r.json", "--overwrite")
    line = refused(files / "ep.pt", "--testsets", written / "sets", "--oracle", "--expect", average + 1,
                   "--output", written / "r.json", "--overwrite")
    assert f"{average:.2f}" in line


def test_a_test_set_with_an_own_truth_gives_finite_means_and_valid_json(files, written, tmp_path, capsys):
    shutil.copytree(written / "sets", tmp_path / "sets")
    shutil.copy(tmp_path / "sets/original/GT/a.png", tmp_path / "sets/single_indis/dark/a.png")
    run(files / "ap.pt", "--testsets", tmp_path / "sets", "--output", tmp_path / "r.json")

    def refuse(word):
        raise AssertionError(word)
    report = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)      # NaN and Infinity are no JSON
    assert report["own_truths"]["dark"] == 1 and report["own_truths"]["rain"] == 0 and "dark: 3 images; 1 of 3 is its own truth" in capsys.readouterr().out
    gt, lq = (degrade.read_image(tmp_path / "sets" / f / "b.png") for f in ("original/GT", "single_indis/dark"))
    gt2, lq2 = (degrade.read_image(tmp_path / "sets" / f / "more_c.png") for f in ("original/GT", "single_indis/dark"))
    assert report["psnr_in"]["dark"] == pytest.approx((evaluation.psnr(lq, gt) + evaluation.psnr(lq2, gt2)) / 2)


def test_the_classifier_tells_the_task_of_each_picture_and_never_says_none(files, written, tmp_path):
    """One that calls everything noise: the rain set scores as told noise. One that calls everything clean: as its next guess."""
    reports = {}
    for name in ("noise", "none"):
        path = answering(tmp_path, name)
        if name == "none":
            classifier, _ = mioir.load_model(path)
            with torch.no_grad():
                classifier.head.bias[TASKS.index("noise")] = 3
            store(path, classifier, "classifier", None, {"width": 16, "none": True})
        run(files / "ep.pt", "--testsets", written / "sets", "--classifier", path, "--output", tmp_path / f"{name}.json")
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    model, _ = mioir.load_model(files / "ep.pt")
    pictures = [[degrade.read_image(written / "sets" / folder / f"{n}.png") for n in ("a", "b", "more_c")]
                for folder in ("single_indis/rain", "original/GT")]
    told = np.mean([evaluation.psnr(evaluation.restored(model, degrade.to_tensor(lq), "noise", "cpu"), gt) for lq, gt in zip(*pictures)])
    assert reports["noise"]["psnr"]["rain"] == pytest.approx(told, abs=1e-6) == reports["none"]["psnr"]["rain"]
    assert "named by the classifier" in reports["noise"]["convention"]


def test_a_set_whose_task_nobody_knows_is_left_out_where_the_true_task_is_told(files, tmp_path):
    (tmp_path / "unknow" / "LQ_LR" / "valid-input-noisy").mkdir(parents=True)
    argv = (files / "ep.pt", "--testsets", tmp_path, "--output", tmp_path / "r.json")
    assert "no set to score" in refused(*argv, "--oracle") and "no images" in refused(*argv)


def test_the_papers_figures_stand_beside_full_models_on_complete_sets_only():
    info = {"arch": "srresnet", "prompt": "ep", "sizes": {}, "published": False, "facts": {"periods": [[1]] * 7}}
    args = evaluation.arguments([])
    whole = dict.fromkeys(evaluation.TESTSETS, 100)
    figures = evaluation.comparable_figures(args, info, whole)
    assert figures["rain"] == 34.31 and figures["In-Dis"] == 30.36 and figures["Unknown"] == 17.84
    fewer = evaluation.comparable_figures(args, info, {**whole, "rain": 2})
    assert set(figures) - set(fewer) == {"rain", "In-Dis"}
    assert "Unknown" not in evaluation.comparable_figures(args, info, {**dict.fromkeys(TASKS, 100), "Toled_val": 30})
    assert "Out-Dis" in figures and "Out-Dis" not in evaluation.comparable_figures(args, info, {**whole, "rain_outbig": 99})
    assert evaluation.comparable_figures(args, {**info, "sizes": {"width": 16}}, whole) == {}
    for other in (["--weights", "ema"], ["--testsets", ".", "--oracle"]):      # the paper's: raw, tasks named by the classifier
        assert evaluation.comparable_figures(evaluation.arguments(other), info, whole) == {}
    told = evaluation.arguments(["--testsets", ".", "--oracle"])
    plain = evaluation.comparable_figures(told, {**info, "prompt": None}, whole)     # takes no task
    assert plain["In-Dis"] == 29.81
    assert "difference" not in evaluation.score_table("set", {"rain": [20.0, 30.0, 10.0, 0.8, 0.9, 0.1]}, {})


def test_the_published_protocol_runs_pictures_whole_and_says_so_where_memory_lacks(files, written, tmp_path, monkeypatch):
    """Above a megapixel, too, where one's own photos are tiled."""
    tiles, real = [], evaluation.restore
    monkeypatch.setattr(evaluation, "auto_tile", lambda model, h, w: 32)
    monkeypatch.setattr(evaluation, "restore", lambda model, x, task, tile, **more: tiles.append(tile) or real(model, x, task, 0))
    argv = (files / "ep.pt", "--testsets", written / "sets", "--oracle", "--overwrite", "--output", tmp_path / "r.json")
    run(*argv)
    run(*argv, "--tile", "0")
    assert set(tiles) == {0}
    tiles.clear()
    run(*argv, "--tile", "112")
    assert set(tiles) == {112}

    def lacking(*more, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(evaluation, "restore", lacking)
    assert "not enough memory to restore 80 x 64 pixels whole; try it in tiles (--tile 512)" in refused(*argv)
    assert "in tiles of 112" in refused(*argv, "--tile", "112")


def test_a_published_model_is_scored_with_the_published_classifier_or_the_truth(written, tmp_path):
    torch.save({"params": published_state("srresnet-ep")}, tmp_path / "SRResNet_S_EP.pth")
    np.save(tmp_path / "type7.npy", published_prompts())
    line = refused(tmp_path / "SRResNet_S_EP.pth", "--prompts", tmp_path / "type7.npy", "--testsets", written / "sets")
    assert "--classifier Classifier.pth" in line and "--oracle" in line


def test_ones_own_pairs_are_scored(files, written, capsys):
    """Two folders of pictures, matched by name: PSNR in, out and gain are the metric's."""
    lq, gt = written / "sets" / "single_indis" / "rain", written / "sets" / "original" / "GT"
    run(files / "ep.pt", "--pairs", lq, gt, "--task", "rain")
    cells = [cell.strip() for cell in next(line for line in capsys.readouterr().out.splitlines() if "| 3 of" in line).split("|")]
    before = np.mean([evaluation.psnr(degrade.read_image(lq / f"{n}.png"), degrade.read_image(gt / f"{n}.png"))
                      for n in ("a", "b", "more_c")])
    (written / "odd").mkdir()
    for n in ("a", "b", "more_c"):
        Image.fromarray(PIXELS).save(written / "odd" / f"{n}.png")
    assert "not of one size" in refused(files / "ep.pt", "--pairs", lq, written / "odd", "--task", "rain")
    run(files / "ep.pt", "--pairs", lq, gt, "--classifier", answering(files, "rain"))
    said = capsys.readouterr().out
    assert "the classifier named their tasks: rain 3" in said and "| 3 of" in said
    assert [float(cell) for cell in said.split("| 3 of")[1].split("|")[1:7]] == [float(cell) for cell in cells[2:8]]
    model, _ = mioir.load_model(files / "ep.pt")
    after = [evaluation.psnr(evaluation.restored(model, degrade.to_tensor(degrade.read_image(lq / f"{n}.png")), "rain", "cpu"),
                             degrade.read_image(gt / f"{n}.png")) for n in ("a", "b", "more_c")]
    assert float(cells[3]) == pytest.approx(np.mean(after), abs=0.006) and 0 < float(cells[5]) < 1
    assert cells[1].startswith("3 of ") and float(cells[2]) == pytest.approx(before, abs=0.006)
    assert float(cells[4]) == pytest.approx(float(cells[3]) - float(cells[2]), abs=0.011)


def stems(tmp_path, lq, gt):
    """What match_pairs makes of files with these names, as {LQ: GT}."""
    for folder, names in (("lq", lq), ("gt", gt)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        for name in names.split():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS).save(tmp_path / folder / f"{name}.png")
    pairs = evaluation.match_pairs(tmp_path / "lq", tmp_path / "gt")
    return {str(a.relative_to(tmp_path / "lq"))[:-4]: str(b.relative_to(tmp_path / "gt"))[:-4] for a, b in pairs}


@pytest.mark.parametrize("lq, gt, expected", [
    ("0801x4m 0802_rain 1", "0801 0802 1", {"0801x4m": "0801", "0802_rain": "0802", "1": "1"}),
    ("001 002 010", "1 2 10", {"001": "1", "002": "2", "010": "10"}),
    ("frame_001 frame_010", "frame1 frame10", {"frame_001": "frame1", "frame_010": "frame10"}),
    ("img1_2 img1", "img1 img1_2", {"img1_2": "img1_2", "img1": "img1"}),
    ("babyx4 baby_50", "baby", {"babyx4": "baby", "baby_50": "baby"}),
    ("a1 a_1", "a_1 a1", {"a1": "a1", "a_1": "a_1"}),
    ("cafe\u0301_rain", "caf\u00e9 other", {"cafe\u0301_rain": "caf\u00e9"}),
    ("day01/1_rain night/1_rain", "day1/1 night/1", {"day01/1_rain": "day1/1", "night/1_rain": "night/1"}),
    ("rain/7 noise/7", "7", {"rain/7": "7", "noise/7": "7"})])
def test_pairs_are_matched_by_path_and_name(tmp_path, lq, gt, expected):
    assert stems(tmp_path, lq, gt) == expected


@pytest.mark.parametrize("lq, gt, words", [
    ("12", "1", ["1 of 1", "12.png"]), ("a x", "a b", ["1 of 2", "x.png"]), ("x y z", "a b c", ["3 of 3", "x.png", "y.png", "z.png"]),
    ("noisy_1 noisy_2", "clean_1 clean_2", ["noisy_1.png"]), ("1 2 3 4 5", "9", ["5 of 5", "3.png", "rename or remove"]),
    ("1", "day/1 night/1", ["give each GT its LQ's path"])])
def test_pairs_that_do_not_match_are_named_and_refused(tmp_path, lq, gt, words):
    with pytest.raises(ValueError) as error:
        stems(tmp_path, lq, gt)
    assert all(word in str(error.value) for word in words) and "4.png" not in str(error.value)


def test_a_gt_without_an_lq_is_left_out_and_counted(tmp_path, capsys):
    assert stems(tmp_path, "a", "a b c") == {"a": "a"} and "2 of 3" in capsys.readouterr().err


def test_a_picture_too_large_for_its_format_leaves_what_was_there(tmp_path):
    for name, write in (("sheet.webp", evaluation.save_sheet), ("one.webp", lambda image, path: evaluation.save_picture(
            path, np.asarray(image), image))):
        (tmp_path / name).write_bytes(b"before")
        with pytest.raises(ValueError, match=f"{name}: not written"):
            write(Image.new("RGB", (16400, 2)), tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"before" and len(list(tmp_path.glob(".*"))) == 0


def test_a_broken_link_is_called_one_and_the_rest_goes_on(tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    assert [path.name for path in degrade.list_images([tmp_path])] == ["a.png"] and len(degrade.photo_items([tmp_path])) == 1
    assert "b.png (a broken link)" in capsys.readouterr().err


def test_the_prompt_matrix_tells_each_task_in_turn(files, written, tmp_path, capsys):
    """Row: what was done; column: what is told."""
    run(files / "ep.pt", "--prompt-matrix", "--images", written / "photos", "--output", tmp_path / "m.png")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 8 and Image.open(tmp_path / "m.png").size == (190 + 8 * 78 + 16, 66 + 7 * 34 + 16)
    model, _ = mioir.load_model(files / "ep.pt")
    names = [cell.strip() for cell in rows[0]]
    photos = [(degrade.to_tensor(degrade.read_image(path)), None) for path in sorted((written / "photos").rglob("*.png"))]
    pairs = evaluation.validation_pairs(photos)["haze"]
    path = tmp_path / "m.png"
    pixels = np.asarray(Image.open(path)).astype(int)
    for i, row in enumerate(rows[1:]):                      # green where a prompt gains on the input, the last column; its own is framed
        for j in range(7):
            top, left, gain = 66 + 34 * i, 190 + 78 * j, float(row[j + 1]) - float(row[8])
            green = pixels[top + 6, left + 8, 1] - pixels[top + 6, left + 8, 0]
            assert abs(gain) < 0.1 or (green > 0) == (gain > 0)
            assert (pixels[top + 1, left + 8].sum() == 0) == (i == j)
    told_dark = [evaluation.psnr(evaluation.restored(model, lq, "dark", "cpu"), degrade.to_image(gt)) for lq, gt in pairs]
    haze = next(row for row in rows if row[0].strip() == "haze")
    assert float(haze[names.index("dark")]) == pytest.approx(np.mean(told_dark), abs=0.006)
    assert "explicit prompts" in refused(files / "ap.pt", "--prompt-matrix")


@pytest.mark.parametrize("module", (train, evaluation, degrade))
def test_help_shows_three_worked_examples(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert not stopped.value.code and capsys.readouterr().out.count(f"python {module.__name__}.py ") >= 3


def test_a_folder_that_is_run_again_counts_what_is_there(files, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(PIXELS).save(tmp_path / "in" / f"{name}.png")
    argv = (files / "ep.pt", "--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "noise")
    run(*argv)
    (tmp_path / "out" / "b.png").unlink()
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    capsys.readouterr()
    run(*argv)                                                     # exits with 0
    said = capsys.readouterr()
    assert "3 of 3 pictures" in said.out and "2 of them from before; --overwrite" in said.out and "failed" not in said.err
    assert (tmp_path / "out" / "b.png").exists() and (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    run(*argv, "--overwrite")
    assert "from before" not in capsys.readouterr().out and (tmp_path / "out" / "a.png").stat().st_mtime_ns > before


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_folder_that_is_stopped_ends_in_one_line(files, tmp_path, number):
    (tmp_path / "in").mkdir()
    for k in range(60):
        Image.fromarray(np.tile(PIXELS, (5, 5, 1))).save(tmp_path / "in" / f"{k:02d}.png")
    command = [sys.executable, ROOT / "eval.py", files / "ep.pt", "--input", "in", "--output", "out", "--task", "noise"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    line = [process.stdout.readline() for _ in range(3)][-1]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.splitlines() == [f"eval.py: stopped by {number.name}"]
    assert "2/60" in line and sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".png"] * len(out.splitlines() + [1, 2])


def test_a_closed_pipe_ends_quietly_and_calls_nothing_failed(files, tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(60):                                    # more than are done before this process closes its end
        Image.fromarray(np.tile(PIXELS, (5, 5, 1))).save(tmp_path / "in" / f"{k}.png")
    command = [sys.executable, ROOT / "eval.py", files / "ep.pt", "--input", "in", "--output", "out", "--task", "noise"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize("typed, meant", [("--ouput", "--output"), ("--taks", "--task"), ("--promt-matrix", "--prompt-matrix")])
def test_a_typing_error_is_answered_with_what_is_meant(tmp_path, typed, meant):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    line = refused("--input", tmp_path / "a.png", typed, "x.png")
    assert typed in line and f"is {meant} meant?" in line


def test_names_that_would_be_too_long_are_cut_and_stay_apart(files, tmp_path):
    (tmp_path / "in").mkdir()
    names = [f"{'a' * 247}{k}.gif" for k in range(2)] + [f"{'é' * 123}.png"]
    for name in names:
        Image.fromarray(PIXELS).convert("P" if name[-3:] == "gif" else "RGB").save(tmp_path / "in" / name)
    run(files / "ep.pt", "--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "noise", "--compare")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(found) == 6 and sum(name.endswith("_compare.png") for name in found) == 3 and names[2] in found


def test_two_pictures_of_a_folder_never_take_one_name(tmp_path, capsys):
    """Even with --overwrite, which is for what was there before."""
    for name in ("a.gif", "a.gif.png", "b.jpg", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / "in" / name)
    for flags, lost in (((), ["a.gif.png"]), (("--compare",), ["a.gif.png", "b.png"])):
        with pytest.raises(SystemExit):
            evaluation.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--task", "noise", "--overwrite", *flags])
        said = capsys.readouterr()
        assert f"{4 - len(lost)} of 4" in said.out and said.err.count("rename one of the two") == len(lost)
        assert all(name in said.err for name in lost)


def test_a_pair_of_several_pages_is_reported(tmp_path, capsys):
    pages = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (lq, gt), = evaluation.read_pairs([(tmp_path / "a.tif", tmp_path / "a.tif")])
    assert "a.tif: the first of its frames" in capsys.readouterr().err and np.array_equal(degrade.to_image(gt), PIXELS)


def test_a_pair_too_small_to_be_measured_is_named(tmp_path):
    Image.fromarray(PIXELS[:16, :40]).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="small.png: 40 x 16 pixels; to be measured it needs 19 x 19"):
        next(evaluation.read_pairs([(tmp_path / "small.png", tmp_path / "small.png")]))
