"""The networks: equal to the published ones, at any size, on any device, from any kind of picture, with any task."""
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mioir
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from mioir import ARCHS, TASKS, TaskClassifier, build_model, load_official, recognise, restore
from reference import OUTPUTS, VARIANTS, published_input, published_prompts, published_state

ROOT = Path(__file__).parent.parent
SMALL = {
    "srresnet": dict(width=16, blocks=3),
    "swinir": dict(dim=12, depths=(2, 2), heads=2, width=8),
    "restormer": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1, heads=(1, 2, 2, 4)),
    "uformer": dict(dim=8, depths=(1, 1, 1, 2, 1, 2, 1, 1, 1), heads=(1, 2, 2, 2, 2, 2, 2, 2, 2)),
    "promptir": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1, heads=(1, 2, 2, 4), prompt_dims=(4, 4, 8),
                     prompt_sizes=(8, 8, 4)),
}
KINDS = [(arch, prompt) for arch in ARCHS for prompt in (None, "ep", "ap") if arch != "promptir" or not prompt]


def small(arch, prompt=None, seed=0):
    torch.manual_seed(seed)
    return build_model(arch, prompt, **SMALL[arch]).eval()


def published(variant, state=None):
    arch, prompt = variant.split("-")
    prompt = None if prompt == "none" else prompt
    model = TaskClassifier() if arch == "classifier" else build_model(arch, prompt)
    load_official(model, state or published_state(variant), published_prompts() if prompt == "ep" else None)
    return model.eval()


@torch.no_grad()
def error(model, variant):
    """Largest difference from the published output, as a share of its largest value."""
    rows = VARIANTS[variant]["rows"]
    x = published_input(variant)
    golden = torch.from_numpy(OUTPUTS[variant])
    if variant.startswith("classifier"):
        y = model(x).softmax(1)
    else:
        y = model(x, None if rows is None else torch.tensor(rows))[:, :, ::4, ::4]
    return ((y - golden).abs().max() / golden.abs().max()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_parameter_counts_equal_the_published_ones(variant):
    state = published_state(variant)
    arch, prompt = variant.split("-")
    info = recognise(state)
    assert (info["arch"], info["prompt"], info["published"]) == (arch, None if prompt == "none" else prompt, True)
    model = published(variant, state)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[variant]["params"]
    assert error(model, variant) < 1e-5


def stated_start(arch, prompt, name, shape):
    """Deviation and mean of a fresh tensor, as DESIGN and the published code have them; None: constant 0 or 1."""
    fan_in = math.prod(shape[1:])
    torch_default = (1 / math.sqrt(3 * fan_in), 0)                         # U(-a, a) with a = fan_in ** -0.5
    if name == "prompts" or name.endswith("components"):
        return 1 / math.sqrt(12), 0.5                                      # U(0, 1)
    if arch == "srresnet" and (name.startswith("blocks") or name.startswith("conv_") and prompt is None):
        return (0.1 * math.sqrt(2 / fan_in), 0) if len(shape) == 4 else None
    if name.endswith("bias_table"):
        return 0.02, 0
    if name.endswith("modulator"):
        return 1, 0
    if len(shape) == 2 and arch in ("swinir", "uformer"):
        return 0.02, 0
    if len(shape) >= 2 and not name.endswith("temperature"):
        return (1 / math.sqrt(3 * shape[1] * 4), 0) if name.startswith("up.") and arch == "uformer" else torch_default
    return None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_starts_as_the_published_one(variant):
    """Mean and deviation of each fresh weight, within five standard errors; what is constant is 0 or 1."""
    arch, prompt = variant.split("-")
    prompt = None if prompt == "none" else prompt
    torch.manual_seed(3)
    model = TaskClassifier() if arch == "classifier" else build_model(arch, prompt)
    zero_bias = arch in ("swinir", "uformer")
    for name, value in model.state_dict().items():
        stated = stated_start(arch, prompt, name, value.shape)
        if stated:
            deviation, mean = stated
            value = value[value.abs() < 1.9] if deviation == 0.02 else value       # torch's trunc_normal_ gives a 2 now and then
            error = 5 * deviation / math.sqrt(value.numel())
            assert abs(value.mean() - mean) < error and abs(value.std() - deviation) < error, name
        elif "norm" in name or name.endswith("temperature"):
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
        elif arch == "srresnet" and (name.startswith("blocks") or name.startswith("conv_") and prompt is None):
            assert (value == 0).all(), name
        else:                                                  # the bias of a linear layer or a convolution
            linear = dict(model.named_modules())[name.removesuffix(".bias")].__class__ is torch.nn.Linear
            assert name.endswith(".bias") and (value == 0).all() == (zero_bias and linear), name


def test_parity_is_sharp_two_equal_shaped_tensors_swapped():
    state = published_state("restormer-ep")
    a, b = "decoder_level2.1.attn.qkv.weight", "decoder_level2.2.attn.qkv.weight"
    state[a], state[b] = state[b], state[a]
    assert error(published("restormer-ep", state), "restormer-ep") > 1e-3


def test_parity_is_sharp_one_prompt_layer_silenced():
    state = published_state("srresnet-ep")
    state["prompt_shift7.bias"] = torch.zeros_like(state["prompt_shift7.bias"])       # filled() keeps its tensors
    assert error(published("srresnet-ep", state), "srresnet-ep") > 1e-3


def test_load_official_understands_wrappers_and_ignores_derived_buffers():
    state = published_state("swinir-none")
    state |= {name: torch.zeros(3) for name in VARIANTS["swinir-none"]["derived"]}
    wrapped = {"params": {f"module.{k}": v for k, v in state.items()}, "params_ema": {}}
    model = load_official(build_model("swinir"), wrapped)
    assert torch.equal(model.groups[1].conv.weight, state["layers.1.conv.weight"])


def broken(change):
    state = published_state("srresnet-ep")
    change(state)
    return state


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("prompt_scalehr.weight"), ("missing", "prompt_scalehr.weight")),
    (lambda s: s.update(extra=torch.zeros(1)), ("unexpected", "extra")),
    (lambda s: s.update({"conv_last.bias": torch.zeros(4)}), ("mis-shaped", "conv_last.bias", "(4,)")),
])
def test_load_official_is_strict_and_names_the_key(change, words):
    with pytest.raises(ValueError) as caught:
        load_official(build_model("srresnet", "ep"), broken(change))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("call, word", [
    (lambda: build_model("resnet"), "srresnet"),
    (lambda: build_model("restormer", "both"), "'ep'"),
    (lambda: build_model("promptir", "ep"), "prompts of its own"),
    (lambda: build_model("srresnet", depth=3), "depth"),
    (lambda: small("srresnet", "ep")(torch.rand(1, 3, 8, 8)), "task"),
    (lambda: restore(small("srresnet"), torch.rand(4, 8, 8)), "(N,3,H,W)"),
    (lambda: load_official(build_model("srresnet", "ep"), published_state("srresnet-ep"), torch.rand(6, 128, 128)),
     "(7, 128, 128)"),
])
def test_mistakes_get_one_clear_line(call, word):
    with pytest.raises(ValueError, match="(?s)" + word.replace("(", r"\(").replace(")", r"\)")) as caught:
        call()
    assert "\n" not in str(caught.value)


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


def test_a_batch_equals_its_images_one_by_one():
    model, x, task = small("restormer", "ep"), torch.rand(9, 3, 24, 40), torch.arange(9) % 7
    together = restore(model, x, task)                         # nine images: prompts are read once each
    each = torch.cat([restore(model, x[i:i + 1], task[i:i + 1]) for i in range(9)])
    assert (together - each).abs().max() < 1e-5


def test_prompt_weights_mix_the_prompt_images():
    model, x = small("srresnet", "ep"), torch.rand(1, 3, 16, 16)
    weights = torch.zeros(1, 7)
    weights[0, TASKS.index("rain")] = 1
    assert torch.allclose(model(x, weights), model(x, torch.tensor([TASKS.index("rain")])), atol=1e-6)
    weights[0, TASKS.index("haze")] = 0.5
    direct = model.body(x, model.path((model.prompts[3] + 0.5 * model.prompts[4])[None, None]))
    assert torch.allclose(model(x, weights), direct, atol=1e-6)


def test_each_prompt_gives_another_output_and_prompts_come_from_a_fixed_seed():
    model, x = small("restormer", "ep"), torch.rand(1, 3, 16, 16)
    outputs = torch.cat([model(x, torch.tensor([i])) for i in range(7)])
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-6 for i in range(7) for j in range(i))
    assert torch.equal(model.prompts, small("srresnet", "ep", seed=5).prompts)
    assert model.prompts.shape == (7, 128, 128) and 0 <= model.prompts.min() and model.prompts.max() < 1
    assert model.prompts[0, 0, :2].tolist() == pytest.approx([0.4963, 0.7682], abs=1e-4)       # torch's first numbers of seed 0


@pytest.mark.parametrize("prompt", (None, "ep", "ap"))
def test_tiles_of_srresnet_equal_the_whole(prompt):
    model, done = small("srresnet", prompt), []
    x, task = torch.rand(1, 3, 150, 210), torch.tensor([1])
    tiled = restore(model, x, task, tile=96, report=lambda *counts: done.append(counts))
    assert (tiled - restore(model, x, task, tile=0)).abs().max() < 1e-6
    assert done == [(k, 5 * 9) for k in range(1, 46)]          # tiles of 96 begin every 16 pixels, the last one at the edge


@pytest.mark.parametrize("arch, bound", (("swinir", 1e-6), ("restormer", 1e-3), ("uformer", 1e-2), ("promptir", 8e-3)))
def test_tiles_of_the_others_stay_close_and_keep_the_size(arch, bound):
    """These see farther than a tile. Twice what was measured with these weights."""
    model = small(arch)
    x = torch.rand(1, 3, 150, 290, generator=torch.Generator().manual_seed(0))
    y, whole = restore(model, x, tile=128), restore(model, x, tile=0)
    assert y.shape == x.shape and (y - whole).pow(2).mean().sqrt() < bound
    assert arch == "swinir" or not torch.equal(y, whole)


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
    for tile, overlap, words in ((64, None, "tile 64 is too small for this model, whose tiles share 64 pixels: at least 65"), (-3, None, "tile -3"),
                                 (100, 32, "overlap 32 is too small for this model: at least 33")):
        with pytest.raises(ValueError, match=words):
            restore(model, x, tile=tile, overlap=overlap)


def test_window_shift_masks_only_strangers():
    mask = mioir.shift_mask(16, 16, 8, 4, "cpu")
    assert mask.shape == (4, 64, 64) and set(mask.unique().tolist()) == {-100.0, 0.0}
    assert not mask[0].any() and mask[3].any()
    assert mask[3, 0, 3] == 0 and mask[3, 0, 4] == -100        # columns 3 and 4 meet across the seam


def test_drop_path_drops_whole_images_in_training_only():
    drop = mioir.DropPath(0.5)
    x = torch.ones(1000, 1, 1, 4)
    assert torch.equal(drop.eval()(x), x)
    y = drop.train()(x)[:, 0, 0]
    assert set(y.unique().tolist()) == {0.0, 2.0} and (y == y[:, :1]).all()
    assert 400 < (y[:, 0] > 0).sum() < 600


@pytest.mark.parametrize("arch, prompt", [*KINDS, ("classifier", None)])
def test_every_model_is_device_clean(arch, prompt):
    """On the meta device, which holds no numbers, a tensor made on the CPU by mistake raises an error."""
    with torch.device("meta"):
        model = TaskClassifier(8) if arch == "classifier" else build_model(arch, prompt, **SMALL[arch])
        x = torch.rand(2, 3, 128, 128)
        y = model(x) if arch == "classifier" else model(x, torch.zeros(2, dtype=torch.long))
        y.mean().backward()
        assert y.is_meta and all(p.grad.is_meta for p in model.parameters())
        if arch != "classifier":
            assert restore(model, x[:, :, :50, :70], torch.zeros(2, dtype=torch.long)).shape[2:] == (50, 70)


class LargestTensors(TorchDispatchMode):
    """Notes the numbers in the largest tensor made inside `with`, and the most matrices that one product takes."""
    def __init__(self):
        super().__init__()
        self.numbers = self.matrices = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, out.numel() if torch.is_tensor(out) else 0)
        if function is torch.ops.aten.bmm.default:
            self.matrices = max(self.matrices, len(out))
        return out


@pytest.mark.parametrize("arch", ARCHS)
def test_whole_pictures_of_the_test_sets_size_run_in_the_papers_networks(arch):
    """2040 x 1356, untiled, on a device that is no CPU: no tensor larger than the widest feature map, so that memory is that of
    the maps; and below 65,536 matrices a product, more than which some of CUDA's kernels refuse."""
    with torch.device("meta"), torch.no_grad(), LargestTensors() as largest:
        y = restore(build_model(arch), torch.rand(1, 3, 1356, 2040), tile=0)
    widest = {"srresnet": 64, "swinir": 360, "restormer": 2 * 255, "promptir": 2 * 255, "uformer": 256}[arch]
    pixels = 2048 ** 2 if arch == "uformer" else 2048 * 1408
    assert y.shape == (1, 3, 1356, 2040) and largest.numbers <= widest * pixels and largest.matrices < 65536


def test_import_builds_and_prints_nothing():
    code = ("import torch; before = torch.random.get_rng_state(); import mioir; "
            "assert torch.equal(before, torch.random.get_rng_state())")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shifted", (False, True))
def test_attention_in_chunks_of_windows_is_attention_of_all_at_once(shifted):
    """36 windows of two images: two chunks of 16, and 4. Forward and gradients."""
    torch.manual_seed(5)
    attention = mioir.WindowAttention(12, 3, 4).double()
    t = torch.randn(2, 36, 16, 12, dtype=torch.float64, requires_grad=True)
    mask = mioir.shift_mask(24, 24, 4, 2, "cpu").double() if shifted else None
    chunks = attention(t, mask)
    at_once = attention.attend(t, attention.bias_table[attention.index].permute(2, 0, 1), mask)
    assert torch.allclose(chunks, at_once, atol=1e-12)
    towards, inputs = torch.randn_like(chunks), (t, *attention.parameters())
    for a, b in zip(*(torch.autograd.grad(out, inputs, towards, retain_graph=True) for out in (chunks, at_once))):
        assert torch.allclose(a, b, atol=1e-12)


# restore takes pictures; load_model takes what people have ----------------------------------------------

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
    weights = torch.zeros(1, 7)
    weights[0, TASKS.index("noise")], weights[0, TASKS.index("jpeg")] = 0.7, 0.3
    assert torch.allclose(restore(model, x, "Noise:0.7, jpeg:0.3"), restore(model, x, weights), atol=1e-6)
    assert torch.allclose(restore(model, x, "jpeg"), restore(model, x, torch.tensor([TASKS.index("jpeg")] * 2)), atol=1e-6)
    for mode, expected in (("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("P", "RGB")):
        assert restore(model, Image.new(mode, (30, 20)), "noise").mode == expected
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    floats, levels = restore(model, grey / np.float32(255), "noise"), restore(model, grey, "noise")
    colour = restore(model, np.stack([grey / np.float32(255)] * 3, 2), "noise")
    assert np.abs(floats - colour @ np.float32((0.299, 0.587, 0.114))).max() < 1e-6
    assert levels.dtype == np.uint8 and np.abs(levels - (floats * 255).clip(0, 255)).max() < 0.51
    assert np.array_equal(restore(model, Image.fromarray(grey), "noise"), levels)
    assert torch.equal(restore(model, x, TASKS.index("jpeg")), restore(model, x, "jpeg"))
    assert torch.equal(restore(model, x.double(), "jpeg"), restore(model, x, "jpeg").double())
    assert restore(model, x.half(), "jpeg").dtype == torch.float16


def test_restore_turns_a_cameras_picture_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    expected = np.asarray(restore(small("srresnet"), Image.fromarray(np.rot90(pixels, -1))))
    for x in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        assert np.array_equal(np.asarray(restore(small("srresnet"), x)), expected)


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
    assert seen[3, 4, 5].item() == pytest.approx(-1 / 18, abs=1e-3) and seen[3, 4, 6] == 0
    classifier.head = torch.nn.Identity()                      # 32 means over 48 blocks, then 32 means over the highest three
    found = torch.arange(48.0).expand(1, 32, 48)
    assert classifier.decide(found)[0].tolist() == [23.5] * 32 + [46.0] * 32


@pytest.mark.parametrize("none", (False, True))
def test_the_classifier_reads_a_large_picture_in_strips_as_it_would_read_it_whole(none):
    torch.manual_seed(0)
    classifier = mioir.build_classifier(8, none)
    for h, w in ((1300, 90), (576, 40), (580, 40), (585, 40), (9, 9)):
        x = torch.rand(1, 3, h, w)
        whole = classifier(x).softmax(1)[0]
        name, sure = mioir.classify(classifier, x)
        assert sure == pytest.approx(whole.max().item(), abs=1e-6) and name == classifier.answers[whole.argmax()]
    assert mioir.classify(classifier, torch.rand(1, 3, 2, 5))[0] in classifier.answers


@pytest.mark.parametrize("x, task, words", [
    (torch.rand(1, 3, 8, 8) * 255, "noise", "divide by 255"), (np.full((8, 8, 3), 90.0), "noise", "divide by 255"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "noise", "divide by 255"), (np.zeros((8, 8, 4)), "noise", "(H,W,3)"),
    (np.zeros((3, 8, 8), np.uint8), "noise", "(H,W,3)"), (torch.rand(8, 8), "noise", "(N,3,H,W)"), ([1], "noise", "list"),
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


@pytest.mark.parametrize("arch, prompt", [(arch, prompt) for arch, prompt in KINDS if prompt != "ap"])
def test_half_precision_stays_finite_and_close(arch, prompt):
    """Sums over 256 x 256 pixels and more leave float16's range where nobody looks; on a black picture lengths are 0."""
    model = small(arch, prompt)
    size = 128 if arch == "uformer" else 64               # a CPU is slow at float16; larger ones: the next test
    for x in (torch.rand(1, 3, size, size), torch.zeros(1, 3, size, size)):
        y = restore(model.float(), x, torch.tensor([1]))
        half = restore(model.half(), x.half(), torch.tensor([1]))
        assert half.dtype == torch.float16 and half.isfinite().all() and (half - y).abs().max() < 1e-2


def test_restormers_attention_in_half_precision_does_not_overflow():
    """Maps of 300 give products of 9e4 x 65536 pixels, far beyond 65504."""
    torch.manual_seed(0)
    attention = mioir.ChannelAttention(8, 2)
    f = 300 * torch.rand(1, 8, 256, 256)
    with torch.no_grad():
        assert torch.allclose(attention(f), attention.half()(f.half()).float(), atol=1.0, rtol=1e-2)
