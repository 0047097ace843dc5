"""The networks: equal to the published ones, on any device, in any precision."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mioir
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


@pytest.mark.parametrize("variant, a, b", (("restormer-ep", "decoder_level2.1.attn.qkv.weight", "decoder_level2.2.attn.qkv.weight"),
                                           ("srresnet-ep", "prompt_shift7.bias", "prompt_scale7.bias")))
def test_parity_is_sharp_two_equal_shaped_tensors_swapped(variant, a, b):
    state = published_state(variant)
    state[a], state[b] = state[b], state[a]
    assert error(published(variant, state), variant) > 1e-3


def test_load_official_understands_wrappers_and_ignores_derived_buffers():
    state = published_state("swinir-none")
    state |= {name: torch.zeros(3) for name in VARIANTS["swinir-none"]["derived"]}
    wrapped = {"params": {f"module.{k}": v for k, v in state.items()}, "params_ema": {}}
    model = load_official(build_model("swinir"), wrapped)
    assert torch.equal(model.groups[1].conv.weight, state["layers.1.conv.weight"])


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("prompt_scalehr.weight"), ("missing", "prompt_scalehr.weight")),
    (lambda s: s.update(extra=torch.zeros(1)), ("unexpected", "extra")),
    (lambda s: s.update({"conv_last.bias": torch.zeros(4)}), ("mis-shaped", "conv_last.bias", "(4,)")),
])
def test_load_official_is_strict_and_names_the_key(change, words):
    state = published_state("srresnet-ep")
    change(state)
    with pytest.raises(ValueError) as caught:
        load_official(build_model("srresnet", "ep"), state)
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


def test_a_batch_equals_its_images_one_by_one():
    model, x, task = small("restormer", "ep"), torch.rand(9, 3, 24, 40), torch.arange(9) % 7
    together = restore(model, x, task)                         # nine images: prompts are read once each
    each = torch.cat([restore(model, x[i:i + 1], task[i:i + 1]) for i in range(9)])
    assert (together - each).abs().max() < 1e-5


def test_prompt_weights_mix_the_prompt_images():
    model, x = small("srresnet", "ep"), torch.rand(1, 3, 16, 16)
    weights = torch.tensor([[0, 0, 0, 1, 0.5, 0, 0]])
    direct = model.body(x, model.path((model.prompts[3] + 0.5 * model.prompts[4])[None, None]))
    assert torch.allclose(model(x, weights), direct, atol=1e-6)


def test_each_prompt_gives_another_output_and_prompts_come_from_a_fixed_seed():
    model, x = small("restormer", "ep"), torch.rand(1, 3, 16, 16)
    outputs = torch.cat([model(x, torch.tensor([i])) for i in range(7)])
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-6 for i in range(7) for j in range(i))
    assert torch.equal(model.prompts, small("srresnet", "ep", seed=5).prompts)
    assert model.prompts.shape == (7, 128, 128) and 0 <= model.prompts.min() and model.prompts.max() < 1
    assert model.prompts[0, 0, :2].tolist() == pytest.approx([0.4963, 0.7682], abs=1e-4)       # torch's first numbers of seed 0


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


@torch.no_grad()
def test_restormers_attention_in_half_precision_does_not_overflow():
    """Maps of 300 give products of 9e4 x 65536 pixels, far beyond 65504; those of a black picture have no length."""
    torch.manual_seed(0)
    attention = mioir.ChannelAttention(8, 2)
    f = 300 * torch.rand(1, 8, 256, 256)
    assert torch.allclose(attention(f), attention.half()(f.half()).float(), atol=1.0, rtol=1e-2)
    assert not attention(0 * f.half()).any()


# All fourteen, at the paper's sizes, which takes longest -------------------------------------------------------

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_parameter_counts_equal_the_published_ones(variant):
    state = published_state(variant)
    arch, prompt = variant.split("-")
    info = recognise(state)
    assert (info["arch"], info["prompt"], info["published"]) == (arch, None if prompt == "none" else prompt, True)
    model = published(variant, state)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[variant]["params"]
    assert error(model, variant) < 1e-5
