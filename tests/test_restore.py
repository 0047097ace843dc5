"""restore: at any size, in tiles, from any kind of picture, with any task, or the one that a classifier names."""
import contextlib
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

import mioir
from mioir import TASKS, build_model, restore
from test_models import KINDS, small


def pad(x, right, bottom, left=0, top=0):
    return F.pad(x, (left, right, top, bottom), mode="reflect")


def uformers_square(x):
    """37 rows, reflected back and forth, become 128; 200 columns 256; then 64 rows more on either side."""
    rows = [min(row % 72, 72 - row % 72) for row in range(128)]
    return pad(pad(x, 56, 0)[:, :, rows], 0, 64, 0, 64)


@torch.no_grad()
@pytest.mark.parametrize("arch, padded, top", [
    ("srresnet", lambda x: x, 0), ("swinir", lambda x: pad(x, 0, 3), 0), ("restormer", lambda x: pad(x, 56, 27), 0),
    ("promptir", lambda x: pad(x, 56, 27), 0), ("uformer", uformers_square, 64)])
def test_restore_pads_as_the_published_protocol_does(arch, padded, top):
    """DESIGN 6: to nothing; 8; 64; 64; 128, then the shorter side on both ends to a square. An "ap" prompt is the padded image."""
    model, x, seen = small(arch, None if arch == "promptir" else "ap"), torch.rand(1, 3, 37, 200), []
    model.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y)))
    y = restore(model, x)
    (given, made), = seen
    assert torch.equal(given, padded(x)) and torch.equal(made, model(padded(x))) and torch.equal(y, made[:, :, top:top + 37, :200])


def test_what_restore_needs_to_know_of_each_network():
    """(multiple, square, overlap, context), by DESIGN 6 and the radius of SRResNet: 1 + 16 x 2 + 1 + 1 convolutions."""
    known = {arch: (m.multiple, m.square, m.overlap, m.context) for arch, m in mioir.MODELS.items()}
    assert known == {"srresnet": (1, False, 80, 35), "swinir": (8, False, 64, 16), "restormer": (64, False, 64, 16),
                     "uformer": (128, True, 64, 16), "promptir": (64, False, 64, 16)}
    model, x = build_model("srresnet", width=2).double(), torch.rand(1, 3, 81, 81, dtype=torch.float64, requires_grad=True)
    for parameter in model.parameters():
        parameter.data.abs_()                                  # no ReLU is silent
    model(x)[0, :, 40, 40].sum().backward()
    rows = x.grad.sum((0, 1, 3)).nonzero()
    assert (rows.min(), rows.max()) == (40 - 35, 40 + 35)


@pytest.mark.parametrize("prompt", (None, "ep", "ap"))
def test_tiles_of_srresnet_equal_the_whole(prompt):
    model, done = small("srresnet", prompt), []
    x, task = torch.rand(1, 3, 150, 210), torch.tensor([1])
    tiled = restore(model, x, task, tile=96, report=lambda *counts: done.append(counts))
    assert (tiled - restore(model, x, task, tile=0)).abs().max() < 1e-6
    assert done == [(k, 5 * 9) for k in range(1, 46)]          # tiles of 96 begin every 16 pixels, the last one at the edge


def test_neighbouring_tiles_fade_into_each_other():
    """Tiles of 60 that share 20 pixels, 4 of which each of the two spoils: what is left has 13 steps."""
    (first, left), (second, right) = mioir.tile_weights(100, 60, 20, 4, torch.zeros(()))
    assert (first, second) == (slice(0, 60), slice(40, 100))
    steps = [k / 13 for k in range(1, 13)]
    assert right.tolist() == pytest.approx([0.0] * 4 + steps + [1.0] * 44) and torch.allclose(left, right.flip(0))


def test_tiles_come_by_themselves_above_a_megapixel_of_what_the_network_sees():
    assert [mioir.auto_tile(small("restormer"), *size) for size in ((1024, 1024), (1024, 1025), (300, 2000))] == [0, 512, 0]
    assert [mioir.auto_tile(small("uformer"), *size) for size in ((1024, 1024), (300, 2000), (20, 1025))] == [0, 512, 512]

    class Seeing(mioir.Backbone):
        def body(self, x, prompt):
            sizes.append(tuple(x.shape[2:]))
            return x
    model, x = Seeing(None, {}, 64), torch.rand(1, 3, 1030, 1030)
    for tile, expected in ((None, {(512, 512)}), (0, {(1030, 1030)}), (700, {(700, 700)})):
        sizes = []
        assert torch.allclose(restore(model, x, tile=tile), x, atol=1e-6) and set(sizes) == expected
    for tile, overlap in ((64, None), (-3, None), (100, 32)):
        words = f"tile {tile}, overlap {overlap or 64}: too small for this model; a tile needs at least {(overlap or 64) + 1} .*, an overlap 33"
        with pytest.raises(ValueError, match=words):
            restore(model, x, tile=tile, overlap=overlap)


# Kinds of pictures --------------------------------------------------------------------------------------

def kinds(folder):
    """The same picture, (name, x), in each kind that restore takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    Image.fromarray(pixels).save(folder / "x.png")
    return {"tensor": tensor[None], "image of a batch": tensor, "uint8": pixels, "float": pixels.astype(np.float64) / 255,
            "PIL": Image.fromarray(pixels), "path": folder / "x.png", "name": str(folder / "x.png")}


def test_restore_gives_back_the_kind_it_was_given(tmp_path):
    model, pictures = small("srresnet", "ep"), kinds(tmp_path)
    truth = restore(model, pictures["tensor"], torch.tensor([TASKS.index("noise")]))[0].permute(1, 2, 0).numpy()
    for kind, x in pictures.items():
        y = restore(model, x, "noise")
        expected = Image.Image if kind in ("path", "name", "PIL") else type(x)
        assert isinstance(y, expected) and getattr(y, "dtype", None) == getattr(x, "dtype", None), kind
        if torch.is_tensor(y):
            assert y.shape == x.shape
            y = y.reshape(3, 20, 30).permute(1, 2, 0).numpy()
        y, bytes_or_floats = np.asarray(y), np.asarray(y).dtype
        if bytes_or_floats == np.uint8:
            assert np.abs(y / 255 - truth.clip(0, 1)).max() < 0.003, kind
        else:
            assert np.abs(y - truth).max() < 1e-6, kind


def test_restore_mixes_tasks_and_leaves_grey_pictures_grey():
    model, x = small("srresnet", "ep"), torch.rand(2, 3, 20, 30)
    weights = torch.tensor([[0, 0.7, 0.3, 0, 0, 0, 0]])
    for text in ("Noise:0.7, jpeg:0.3", "noise:7,jpeg:3"):
        assert torch.allclose(restore(model, x, text), restore(model, x, weights), atol=1e-6)
    for mode, expected in (("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("P", "RGB")):
        assert restore(model, Image.new(mode, (30, 20)), "noise").mode == expected
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    floats, levels = restore(model, grey / np.float32(255), "noise"), restore(model, grey, "noise")
    colour = restore(model, np.stack([grey / np.float32(255)] * 3, 2), "noise")
    assert np.abs(floats - colour @ np.float32((0.299, 0.587, 0.114))).max() < 1e-6
    assert levels.dtype == np.uint8 and np.abs(levels - (floats * 255).clip(0, 255)).max() < 0.51
    assert np.array_equal(restore(model, Image.fromarray(grey), "noise"), levels)
    assert torch.equal(restore(model, x.double(), "jpeg"), restore(model, x, "jpeg").double())
    assert restore(model, x.half(), "jpeg").dtype == torch.float16


def test_restore_turns_a_cameras_picture_upright(tmp_path):
    """As pillow's own function does, which fails where other values of EXIF are odd."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    model = small("srresnet")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        expected = restore(model, np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))))
        for x in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
            assert np.array_equal(np.asarray(restore(model, x)), expected)


@pytest.mark.parametrize("x, task, words", [
    (torch.rand(1, 3, 8, 8) * 255, "noise", "divide by 255"), (np.full((8, 8, 3), 90.0), "noise", "divide by 255"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "noise", "divide by 255"), (np.zeros((8, 8, 4)), "noise", "(H,W,3)"),
    (np.zeros((3, 8, 8), np.uint8), "noise", "(H,W,3)"), (torch.rand(8, 8), "noise", "(N,3,H,W)"), ([1], "noise", "not (1,) of int64"),
    (torch.rand(1, 3, 8, 8), 7, "0 to 6"), (torch.rand(1, 3, 8, 8), -1, "0 to 6"), (torch.rand(1, 3, 8, 8), True, "0 to 6"),
    (torch.rand(1, 3, 8, 8), ["noise"], "a name of TASKS"), (Image.new("I;16", (8, 8)), "noise", "8 bits"), (torch.rand(1, 3, 8, 8), "fog", "unknown task 'fog'"), (torch.full((1, 3, 8, 8), math.nan), "noise", "nan"), (Image.new("F", (8, 8)), "noise", "8 bits"),
    (torch.rand(1, 3, 8, 8), "noise:x", "'x' is not a number")])
def test_restore_refuses_what_it_cannot_read_in_one_line(x, task, words):
    with pytest.raises(ValueError) as caught:
        restore(small("srresnet", "ep"), x, task)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_restore_leaves_every_modules_mode_as_it_was_also_after_an_exception():
    class Failing(mioir.Backbone):
        def body(self, x, prompt):
            raise KeyError("inside")
    for model in (small("srresnet", "ep"), Failing(None, {}, 64)):
        model.train()
        model.frozen = torch.nn.Dropout().eval()           # someone keeps a part in eval mode
        before = [module.training for module in model.modules()]
        with contextlib.suppress(KeyError):
            restore(model, torch.rand(1, 3, 8, 8), "noise")
        with pytest.raises(ValueError):
            restore(model, torch.rand(8, 8), "noise")
        assert [module.training for module in model.modules()] == before and model.training


# Which task ------------------------------------------------------------------------------------------

def test_a_task_may_be_a_row_of_any_kind():
    model, x = small("srresnet", "ep"), torch.rand(2, 3, 9, 9)
    expected = model.body(x, model.path(model.prompts[2][None, None])).detach()
    weights = torch.zeros(1, 7)
    weights[0, 2] = 1
    for task in ("jpeg", 2, np.int64(2), np.uint8(2), torch.tensor([2]), torch.tensor([2, 2]), torch.tensor([2], dtype=torch.uint8),
                 torch.tensor([2], dtype=torch.int16), weights, weights.double(), weights.repeat(2, 1)):
        assert torch.allclose(restore(model, x, task), expected, atol=1e-6), task


NOT_TASKS = [torch.tensor([7]), torch.tensor([-1]), torch.tensor([0, 7]), torch.tensor([True]), torch.tensor(2), torch.tensor([1, 2, 3]),
             torch.tensor([[1]]), torch.tensor([2.0]), torch.zeros(1, 7), torch.full((1, 7), float("nan")), torch.full((1, 7), float("inf")),
             torch.tensor([[1.0, -1, 0, 0, 0, 0, 0]]), torch.ones(1, 6), torch.ones(3, 7), torch.ones(7), torch.tensor([])]


@pytest.mark.parametrize("task", NOT_TASKS, ids=range(len(NOT_TASKS)))
def test_a_tensor_that_is_no_task_is_refused_and_what_is_taken_is_said(task):
    """-1 would be the last row, bool a mask, and NaN a black picture."""
    model, x = small("srresnet", "ep"), torch.rand(2, 3, 8, 8)
    for call in (restore, lambda model, x, task: model(x, task)):
        with pytest.raises(ValueError, match=r"LongTensor \(N,\) of rows, 0 to 6, or a FloatTensor \(N,7\) of weights") as caught:
            call(model, x, task)
        assert "\n" not in str(caught.value)


def test_a_network_of_ones_own_with_two_prompts_is_given_rows_not_names():
    class Two(torch.nn.Module):
        prompts = torch.rand(2, 1, 128, 128)

        def forward(self, x, task):
            rows.append(task.tolist())
            return x
    rows, x = [], torch.rand(1, 3, 8, 8)
    for task in (0, 1, torch.tensor([1])):
        restore(Two(), x, task)
    assert rows == [[0], [1], [1]]
    for task, words in (("jpeg", "names are those of TASKS, 7 in number; this network has 2 prompts of its own: give a row, 0 to 1"),
                        ("noise", "names are those of TASKS"), (2, "0 to 1"), (torch.tensor([2]), "0 to 1")):
        with pytest.raises(ValueError, match=words):
            restore(Two(), x, task)


def test_a_model_made_before_a_task_was_added_refuses_that_task(monkeypatch):
    model, x = small("srresnet", "ep"), torch.rand(1, 3, 8, 8)
    before = restore(model, x, "noise")
    monkeypatch.setattr(mioir, "TASKS", (*TASKS, "snow"))
    assert torch.equal(restore(model, x, "noise"), before) and torch.allclose(restore(model, x, "noise:2"), before, atol=1e-6)
    for task in ("snow", "noise,snow", 7):
        with pytest.raises(ValueError, match="a model of 7 prompts takes"):
            restore(model, x, task)


def test_a_model_in_data_parallel_is_restored_with():
    model, x = small("uformer", "ap"), torch.rand(1, 3, 30, 140)
    wrapped = torch.nn.DataParallel(model).train()
    assert torch.equal(restore(wrapped, x), restore(model, x)) and wrapped.training and model.training


def says(name, probability, none=True):
    """A classifier that always gives this answer."""
    classifier = mioir.build_classifier(8, none)
    with torch.no_grad():
        classifier.head.weight.zero_()
        others = (1 - probability) / (len(classifier.answers) - 1)
        classifier.head.bias[:] = torch.tensor([math.log(probability if answer == name else others) for answer in classifier.answers])
    return classifier


@pytest.mark.parametrize("name, probability, none, task", [
    ("rain", 0.99, True, "rain"), ("none", 0.99, True, None), ("rain", 0.5, True, None), ("none", 0.5, True, None), ("rain", 0.5, False, "rain")])
def test_auto_restores_what_the_classifier_names_and_leaves_alone_what_it_does_not(name, probability, none, task):
    classifier, x = says(name, probability, none), torch.rand(2, 3, 20, 30)
    chosen, named, sure = mioir.choose_task(classifier, x[:1])
    assert (chosen, named) == (task, name) and sure == pytest.approx(probability, abs=1e-3)
    model = small("srresnet", "ep")
    expected = x if task is None else restore(model, x, task)
    assert torch.allclose(restore(model, x, "auto", classifier=classifier), expected, atol=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    picture = restore(model, Image.fromarray(pixels), "auto", classifier=classifier)
    assert picture.mode == "L" and (np.asarray(picture) == pixels).all() == (task is None)
    for prompt in (None, "ap"):                                # these read no task: nobody is asked
        assert torch.equal(restore(small("srresnet", prompt), x, "auto", classifier="not asked"), restore(small("srresnet", prompt), x))


def test_auto_asks_picture_by_picture_and_a_damaged_one_is_never_called_clean():
    class ByBrightness(mioir.TaskOrNone):
        def decide(self, found):
            return torch.eye(8)[[self.bright]] * 20
    classifier, model, x = ByBrightness(8), small("srresnet", "ep"), torch.rand(3, 3, 20, 30)
    answers = iter((7, 1, 3))                                  # none, noise, rain
    classifier.look = lambda strip: setattr(classifier, "bright", next(answers)) or torch.cat((strip, strip), 1)
    y = restore(model, x, "auto", classifier=classifier)
    assert torch.equal(y[0], x[0])
    assert torch.allclose(y[1:], restore(model, x[1:], torch.tensor([1, 3])), atol=1e-6)
    assert mioir.classify(says("none", 0.9), x[:1], damaged=True)[0] in TASKS


def test_our_classifier_looks_at_faint_detail_and_at_the_blocks_that_have_most():
    classifier, x = mioir.build_classifier(8, none=True), torch.full((1, 3, 9, 9), 0.5)
    x[0, 0, 4, 4] += 1 / 255                                   # one grey level: 8/9 of it above the mean, half as much in units of two
    x[0, 1, 0, 0] += 0.5                                       # clipped; a corner has four neighbours, itself among them
    seen = classifier.look(x)[0]
    assert torch.equal(seen[:3], x[0]) and seen[3, 4, 4].item() == pytest.approx(4 / 9, abs=1e-3) and seen[4, 0, 0] == 1
    assert seen[3, 4, 5].item() == pytest.approx(-1 / 18, abs=1e-3) and seen[3, 4, 6] == seen[3, 0, 4] == 0        # nor beyond the border
    classifier.head = torch.nn.Identity()                      # 32 means over 48 blocks, then 32 means over the highest three
    found = torch.arange(48.0).expand(1, 32, 48)
    assert classifier.decide(found)[0].tolist() == [23.5] * 32 + [46.0] * 32


@pytest.mark.parametrize("none", (False, True))
def test_the_classifier_reads_a_large_picture_in_strips_as_it_would_read_it_whole(none):
    torch.manual_seed(0)
    classifier = mioir.build_classifier(8, none)
    classifier.head.weight.data.mul_(30)
    for h, w in ((1300, 9), (576, 40), (580, 40), (585, 40), (9, 9)):
        x = torch.full((1, 3, h, w), 0.5)
        x[:, :, 575::576] += 0.006                             # faint, in the rows just above where strips begin
        whole = classifier(x).softmax(1)[0]
        name, sure = mioir.classify(classifier, x)
        assert sure == pytest.approx(whole.max().item(), abs=1e-6) and name == classifier.answers[whole.argmax()]
    assert mioir.classify(classifier, torch.rand(1, 3, 2, 5))[0] in classifier.answers


# All networks, which takes longest -------------------------------------------------------------------------

@pytest.mark.parametrize("arch, prompt", KINDS)
def test_restore_keeps_any_size_and_float32_agrees_with_float64(arch, prompt):
    model = small(arch, prompt)
    for n, h, w in ((2, 37, 61), (1, 1, 1), (1, 130, 70))[:2 if arch == "uformer" else 3]:     # it makes squares of 128 and 256
        x, task = torch.rand(n, 3, h, w), torch.tensor([6, 2])[:n]
        y = restore(model, x, task)
        exact = restore(model.double(), x.double(), task)
        model.float()
        assert y.shape == x.shape
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("arch, bound", (("swinir", 1e-6), ("restormer", 1e-3), ("uformer", 1e-2), ("promptir", 8e-3)))
def test_tiles_of_the_others_stay_close_and_keep_the_size(arch, bound):
    """These see farther than a tile. Twice what was measured with these weights."""
    model = small(arch)
    x = torch.rand(1, 3, 150, 290, generator=torch.Generator().manual_seed(0))
    y, whole = restore(model, x, tile=128), restore(model, x, tile=0)
    assert y.shape == x.shape and (y - whole).pow(2).mean().sqrt() < bound
    assert arch == "swinir" or not torch.equal(y, whole)
