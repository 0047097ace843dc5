"""Speed and memory, measured; not a test. Everything is compared inside one run, interleaved.

    python tests/bench.py networks                   # ours against a straight transcription, all backbones
    python tests/bench.py networks --arch swinir --size 128
    python tests/bench.py memory                     # activation memory of a training step, with --checkpointing
    python tests/bench.py data                       # crops/s from PNG files and from the cache; degradation
    python tests/bench.py pixels                     # seconds per megapixel of the paper's sizes
    python tests/bench.py tiles RUN/last.pt ...      # what tiles change, for trained models
    python tests/bench.py classical assets/srresnet.pt --tune DIR --images DIR   # against classical methods
    python tests/bench.py study                      # the paper's Table 3 in miniature: 14 trainings

"Transcription" means the published layers written down as they stand: attention by explicit softmax
matrices, layer norm by mean and variance over rearranged tokens, a shift mask made anew in every block,
the prompt read once per image, f * scale + shift + f, drop path in two passes. It shares our weights
and must agree to 1e-4.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import degrade  # noqa: E402
import mioir  # noqa: E402
import train  # noqa: E402
from eval import markdown, psnr, restored, tune_cpu, validation_pairs  # noqa: E402
from mioir import ARCHS, TASKS, build_model, restore  # noqa: E402
from train import lay_channels_last, recompute_blocks  # noqa: E402


# ---- The transcription: classes that take over our modules' weights ------------------------------------

class TokenLayerNorm(torch.nn.LayerNorm):
    def forward(self, t):
        mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
        return (t - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class TokenLayerNorm2d(mioir.LayerNorm2d):
    def forward(self, f):
        t = f.flatten(2).transpose(1, 2).contiguous()                      # b c h w -> b (h w) c
        return TokenLayerNorm.forward(self, t).transpose(1, 2).reshape(f.shape).contiguous()


class NormalisedChannelAttention(mioir.ChannelAttention):
    def forward(self, f):
        b, c, h, w = f.shape
        q, k, v = self.dwconv(self.qkv(f)).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.project((attention @ v).reshape(b, c, h, w))


class SoftmaxWindowAttention(mioir.WindowAttention):
    def forward(self, t, mask=None):
        n, windows, length, c = t.shape
        qkv = self.qkv(t.flatten(0, 1)).reshape(n * windows, length, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        attention = attention + self.bias_table[self.index.flatten()].view(length, length, -1).permute(2, 0, 1)[None]
        if mask is not None:
            attention = attention.view(n, windows, self.heads, length, length) + mask[None, :, None]
            attention = attention.view(-1, self.heads, length, length)
        out = (attention.softmax(-1) @ v).transpose(1, 2).reshape(n, windows, length, c)
        return self.project(out)


class MaskMakingWindowBlock(mioir.WindowBlock):
    def forward(self, f, mask):
        mask = mioir.shift_mask(*f.shape[1:3], self.window, self.window // 2, f.device) if self.shift else None
        return super().forward(f, mask)


class TwoPassDropPath(mioir.DropPath):
    def forward(self, f):
        if not self.training or self.probability == 0:
            return f
        keep = 1 - self.probability
        return f.div(keep) * f.new_empty(f.shape[0], 1, 1, 1).bernoulli_(keep)


class PerImagePromptPath(mioir.PromptPath):
    def forward(self, p, rows=slice(None)):
        features = [extract(p[rows]) for extract in self.extract]

        def modulate(site, f):
            z = features[self.extractor_of[site]]
            return f * self.scale[site](z)[:, :, None, None] + self.shift[site](z)[:, :, None, None] + f
        return modulate


TRANSCRIBED = {mioir.LayerNorm2d: TokenLayerNorm2d, mioir.ChannelAttention: NormalisedChannelAttention,
               mioir.WindowAttention: SoftmaxWindowAttention, mioir.WindowBlock: MaskMakingWindowBlock,
               mioir.DropPath: TwoPassDropPath, mioir.PromptPath: PerImagePromptPath}


def transcribe(model, norm_by_hand=False):
    """Turns one of our models into its transcription; the weights stay where they are."""
    classes = TRANSCRIBED | ({torch.nn.LayerNorm: TokenLayerNorm} if norm_by_hand else {})
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def pair(arch, device, norm_by_hand=False):
    """Our model and its transcription with equal weights."""
    prompt = None if arch == "promptir" else "ep"
    torch.manual_seed(0)
    ours = build_model(arch, prompt).to(device)
    theirs = build_model(arch, prompt).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, transcribe(theirs, norm_by_hand)


# ---- Networks -----------------------------------------------------------------------------------------

def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_backward(model, x, task):
    (model.train()(x, task) - x).abs().mean().backward()


def training_step(model, x, task):
    model.zero_grad(set_to_none=True)
    forward_backward(model, x, task)


@torch.no_grad()
def restoring(model, x, task):
    model.eval()
    return model(x, task)


def networks(args, device):
    rows = []
    for arch in args.arch:
        ours, theirs = pair(arch, device, args.norm_by_hand)
        crop = torch.rand(args.batch, 3, args.size, args.size, device=device)
        photo = torch.rand(1, 3, 256, 256, device=device)
        tasks = torch.arange(args.batch, device=device) % len(TASKS)
        a, b = restoring(ours, crop, tasks), restoring(theirs, crop, tasks)
        agreement = ((a - b).abs().max() / b.abs().max()).item()
        if agreement > 1e-4:
            sys.exit(f"bench.py: {arch}: the transcription disagrees by {agreement:.1e}")
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        if args.channels_last:
            lay_channels_last(ours)
        times = {}
        for name, work, x, task in (("train", training_step, crop, tasks), ("restore", restoring, photo, tasks[:1])):
            pairs = (ours, x.contiguous(memory_format=layout)), (theirs, x)
            runs = [[seconds(lambda: work(model, x, task), device) for model, x in pairs]
                    for _ in range(args.repeat + 1)][1:]
            times[name] = np.median(runs, axis=0)
        rows.append([arch, f"{agreement:.0e}", *(f"{t:.2f}" for t in (*times["train"], times["train"][0] / times["train"][1],
                                                                      *times["restore"], times["restore"][0] / times["restore"][1]))])
        print(rows[-1], flush=True)
    print(markdown(["", "differ by", "train s, ours", "theirs", "ratio", "restore 256 s, ours", "theirs", "ratio"], rows))


# ---- Memory -------------------------------------------------------------------------------------------

class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside `with` that live at the same time; `peak`: the most."""

    def __init__(self, known):
        super().__init__()
        self.live = {t.untyped_storage()._cdata: 0 for t in known}       # not counted: there before
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.live:                                         # else a view, or in place
            self.live[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.bytes -= self.live.pop(key)


def step_memory(model, args, device):
    """GB per sample that a training step needs beside the model and its gradients. A GPU counts it itself; else
    it is counted on torch's meta device, where tensors have sizes but no content: exact, and over in seconds."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.rand(args.batch, 3, args.size, args.size, device=device)
    task = torch.arange(args.batch, device=device) % len(TASKS)
    if device.type == "cuda":
        forward_backward(model, x, task)                                 # libraries take their own share first
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(model, x, task)
        return (torch.cuda.max_memory_allocated() - before) / args.batch / 1e9
    with LiveTensors([*model.state_dict().values(), *(p.grad for p in model.parameters())]) as tensors:
        forward_backward(model, x, task)
    return tensors.peak / args.batch / 1e9


def memory(args, device):
    rows, device = [], device if device.type == "cuda" else torch.device("meta")
    for arch in args.arch:
        ours, theirs = pair(arch, device, args.norm_by_hand)
        peaks = [step_memory(theirs, args, device), step_memory(ours, args, device)]
        recompute_blocks(ours)
        peaks.append(step_memory(ours, args, device))
        rows.append([arch, *(f"{p:.3f}" for p in peaks), f"{peaks[1] / peaks[0]:.2f}", f"{peaks[2] / peaks[0]:.2f}"])
    print(markdown(["GB per sample", "theirs", "ours", "--checkpointing", "ours / theirs", "checkpointing / theirs"], rows))


# ---- Data ---------------------------------------------------------------------------------------------

def data(args, device):
    """A folder of four 2040 x 1356 PNGs (as DIV2K), dead leaves enlarged."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "photos").mkdir()
        for k in range(4):
            image, _ = degrade.dead_leaves(678, 1020, degrade.seeded(k))
            image = degrade.add_noise(F.interpolate(image, scale_factor=2.0, mode="bicubic"), 2.0)
            Image.fromarray(degrade.to_image(image)).save(folder / "photos" / f"{k}.png")
        files = sorted((folder / "photos").glob("*.png"))
        start = time.perf_counter()
        for k in range(8):
            degrade.read_image(files[k % 4])[100:276, 200:376].copy()
        png = 8 / (time.perf_counter() - start)
        cache = degrade.ImageCache(folder / "cache", degrade.photo_items([folder / "photos"]), 128, lambda text: None)
        start = time.perf_counter()
        for k in range(2000):
            cache.crop(k % 4, (37 * k) % 1000, (53 * k) % 1800, 176)
        cached = 2000 / (time.perf_counter() - start)
        print(f"crops of 176 from 2040 x 1356 images: {png:.1f}/s from PNG, {cached:.0f}/s from the cache, "
              f"{cached / png:.0f} times as many")
        rows = []
        for tasks in (*((task,) for task in TASKS), TASKS):
            start = time.perf_counter()
            samples = [train.sample({"photos": cache}, tasks, 128, 128, (0, 0, 0, i)) for i in range(128)]
            middle = time.perf_counter()
            train.make_batch(samples, 128, device)
            end = time.perf_counter()
            rows.append([" ".join(tasks) if len(tasks) == 1 else "all seven", *(f"{128 / t:.0f}" for t in (
                middle - start, end - middle, end - start))])
        print(markdown(["crops/s of 128 x 128, batch of 128", "drawn", "degraded", "both"], rows))


# ---- Tiles --------------------------------------------------------------------------------------------

def pixels(args, device):
    """How long the paper's sizes take for a megapixel, from one of 512 x 512 (a tile of eval.py)."""
    rows = []
    for arch in args.arch:
        model = build_model(arch, None if arch == "promptir" else "ep").to(device).eval()
        task = torch.zeros(1, dtype=torch.long, device=device)
        x = torch.rand(1, 3, 512, 512, device=device)
        took = seconds(lambda: restore(model, x, task), device)
        rows.append([arch, f"{took * 2 ** 20 / 512 ** 2:.0f}"])
        print(rows[-1], flush=True)
    print(markdown(["paper's size", "s per megapixel"], rows))


def tiles(args, device):
    """Each model restores the same images whole and in tiles; PSNR between the two, and of each to the truth."""
    images = [degrade.dead_leaves(768, 1024, degrade.seeded("tiles", k)) for k in range(2)]
    rows, pairs = [], validation_pairs(images)
    for path in args.checkpoints:
        model, info = mioir.load_model(path, device=device)
        for task in ("noise", "rain", "haze"):
            scores = []
            for lq, gt in pairs[task]:
                whole, tiled = (restored(model, lq, task, device, tile) for tile in (0, 512))
                gt = degrade.to_image(gt)
                scores.append((min(psnr(tiled, whole), 99.0), psnr(whole, gt), psnr(tiled, gt)))
            between, of_whole, of_tiled = np.mean(scores, 0)
            rows.append([f"{info['arch']} {info['prompt'] or ''}", task, f"{between:.1f}", f"{of_whole:.2f}",
                         f"{of_tiled:.2f}", f"{of_tiled - of_whole:+.3f}"])
            print(rows[-1], flush=True)
    print(markdown(["1024 x 768, tiles of 512", "images", "tiled to whole, dB", "whole to truth", "tiled to truth",
                    "difference"], rows))


# ---- Classical methods: what a learned model has to beat ---------------------------------------------

def box(x, r):
    """Mean over the (2r+1)^2 neighbours that lie inside the image: along columns, then along rows."""
    x = F.avg_pool2d(x, (2 * r + 1, 1), 1, (r, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, 2 * r + 1), 1, (0, r), count_include_pad=False)


def neighbours(x, r):
    """(dy, dx, x shifted by that), for all shifts up to r; borders reflected."""
    h, w = x.shape[2:]
    padded = mioir.reflect_pad(x, r, r, r, r)
    for dy in range(-r, r + 1):
        for dx in range(-r, r + 1):
            yield dy, dx, padded[:, :, r + dy:r + dy + h, r + dx:r + dx + w]


def non_local_means(x, strength, sigma):
    """Buades et al. 2005: 7x7 patches, 21x21 neighbours; sigma in grey levels is known."""
    s, total, out = sigma / 255, 0, 0
    for _, _, other in neighbours(x, 10):
        distance = box((x - other).square().mean(1, keepdim=True), 3)
        weight = torch.exp(-(distance - 2 * s ** 2).clamp_min(0) / (strength * s) ** 2)
        total, out = total + weight, out + weight * other
    return out / total


def wiener(x, sigma, ratio):
    """Wiener filter for one fixed Gaussian kernel; ratio: of noise to signal power."""
    pad = 32
    x = mioir.reflect_pad(x, pad, pad, pad, pad)
    fy, fx = (torch.fft.fftfreq(s) for s in x.shape[2:])
    fx = fx[:x.shape[3] // 2 + 1].abs()
    kernel = torch.exp(-2 * (np.pi * sigma) ** 2 * (fy[:, None] ** 2 + fx[None] ** 2))
    y = torch.fft.irfft2(torch.fft.rfft2(x) * kernel / (kernel ** 2 + ratio), s=x.shape[2:])
    return y[:, :, pad:-pad, pad:-pad]


def bilateral(x, space, levels):
    """Tomasi and Manduchi 1998; space in pixels, levels in [0,1]."""
    total, out = 0, 0
    for dy, dx, other in neighbours(x, 4):
        weight = torch.exp(-(dy * dy + dx * dx) / (2 * space ** 2)
                           - (x - other).square().mean(1, keepdim=True) / (2 * levels ** 2))
        total, out = total + weight, out + weight * other
    return out / total


def guided(x, guide, r, eps):
    """He et al. 2010: x smoothed, with edges where the guide has them."""
    mean_x, mean_g = box(x, r), box(guide, r)
    slope = (box(x * guide, r) - mean_x * mean_g) / (box(guide * guide, r) - mean_g ** 2 + eps)
    return box(slope, r) * guide + box(mean_x - slope * mean_g, r)


def rain_split(x, r, eps, kept, veil):
    """A guided filter splits off detail; of what is brighter, a streak, `kept` stays; the veil goes."""
    smooth = guided(x, x, r, eps)
    detail = x - smooth
    return smooth + torch.where(detail > 0, kept * detail, detail) - veil


def dark_channel(x, share, least):
    """He et al. 2009: dark channel prior, 15x15 patches, transmission refined by a guided filter."""
    def darkest(image):
        return -F.max_pool2d(-image.amin(1, keepdim=True), 15, 1, 7)
    dark = darkest(x).flatten()
    brightest = dark.topk(max(len(dark) // 1000, 1)).indices
    airlight = x.flatten(2)[:, :, brightest].mean(2)[:, :, None, None]
    transmission = guided(1 - share * darkest(x / airlight), x.mean(1, keepdim=True), 40, 1e-3)
    return (x - airlight) / transmission.clamp(least, 1) + airlight


def grid(**values):
    """All combinations of settings, as dicts."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


CLASSICAL = {  # task: (name, method, settings to choose from)
    "blur": ("Wiener filter", wiener, grid(sigma=(1.0, 1.25, 1.5, 1.75), ratio=(0.01, 0.02, 0.05, 0.1))),
    "noise": ("non-local means, sigma known", non_local_means, grid(strength=(0.4, 0.55, 0.7, 0.9))),
    "jpeg": ("bilateral filter", bilateral, grid(space=(0.7, 1.0, 1.5, 2.0), levels=(0.02, 0.03, 0.045, 0.07))),
    "rain": ("guided-filter split", rain_split, grid(r=(4, 8, 16), eps=(1e-3, 4e-3, 2e-2), kept=(0.3, 0.5, 0.7),
                                                     veil=(0.0, 0.03, 0.06))),
    "haze": ("dark channel prior", dark_channel, grid(share=(0.6, 0.7, 0.8, 0.95), least=(0.1, 0.2, 0.3, 0.4))),
    "dark": ("best fixed gamma", lambda x, gamma: x ** gamma, grid(gamma=(0.45, 0.5, 0.55, 0.6, 0.65, 0.7))),
    "sr": ("bicubic (the input)", lambda x: x, [{}]),
}


def sigmas(images):
    """The noise that validation_pairs (seed 0) put on each image: what non-local means is told."""
    return [degrade.draw("noise", image.shape[2:], "in", degrade.seeded("validation", 0, "in", "noise", k))["sigma"].item()
            for k, (image, _) in enumerate(images)]


def apply_classical(task, method, settings, pairs, noise):
    """PSNR of a classical method on each pair of a task."""
    return [psnr(degrade.to_image(method(lq, **settings, **({"sigma": s} if task == "noise" else {}))),
                 degrade.to_image(gt)) for (lq, gt), s in zip(pairs, noise)]


def classical(args, device):
    """Strengths chosen on --tune, then all methods and the models on --images, photo by photo."""
    def photos(folder, edge=None):
        images = [degrade.to_tensor(degrade.read_image(path)) for path in degrade.list_images([folder])]
        middle = [tuple(slice(max(s - edge, 0) // 2, (s + edge) // 2) if edge else slice(None)
                        for s in image.shape[2:]) for image in images]
        return [(image[:, :, y, x], None) for image, (y, x) in zip(images, middle)]
    tuning, images = photos(args.tune, 192)[::2], photos(args.images)
    models = [mioir.load_model(path, device=device)[0] for path in args.checkpoints]
    tune_pairs, pairs = validation_pairs(tuning), evaluation.validation_pairs(images)
    tune_noise, noise = sigmas(tuning), sigmas(images)
    rows = []
    for task, (name, method, settings) in CLASSICAL.items():
        best = max(settings, key=lambda chosen: np.mean(
            apply_classical(task, method, chosen, tune_pairs[task], tune_noise)))
        before = [psnr(degrade.to_image(lq), degrade.to_image(gt)) for lq, gt in pairs[task]]
        scores = [before, apply_classical(task, method, best, pairs[task], noise)]
        for model in models:
            scores.append([psnr(restored(model, lq, task, device), degrade.to_image(gt))
                           for lq, gt in pairs[task]])
        said = ", ".join(f"{key} {value:g}" for key, value in best.items())
        rows.append([task, f"{name}{': ' if said else ''}{said}",
                     *(f"{np.mean(s):.2f} +- {np.std(s):.1f}" for s in scores)])
        print(rows[-1], flush=True)
    print(markdown(["images of", "classical method, as tuned", "input", "classical",
                    *(str(path) for path in args.checkpoints)], rows))
    print(f"PSNR in dB, mean +- deviation over {len(images)} photos; In-Dis, seed 0")


# ---- The paper in miniature ---------------------------------------------------------------------------

STUDY = {  # name: (flags, the paper's gain over M: SRResNet, Table 3, mean of the seven In-Dis sets)
    "M": ("", 0.0), "S": ("--seq", 0.29), "M+EP": ("--prompt ep", 0.74), "S+EP": ("--seq --prompt ep", 0.84),
    "M+AP": ("--prompt ap", 0.08), "S+AP": ("--seq --prompt ap", 0.24),
    "S+EP, reverse order": ("--seq --prompt ep --order dhrjnbs", None),
}


def study(args, device):
    """Six trainings of one small SRResNet and one in reverse order, two seeds each; goes on where it was."""
    runs = [(name, seed, Path(args.out) / f"{name.replace(' ', '').replace(',', '-')}-{seed}")
            for seed in (0, 1) for name in STUDY]

    def table(out):
        return torch.load(out / "last.pt", weights_only=True)["table"] if (out / "last.pt").exists() else []

    def one(job):
        name, seed, out = job
        command = [sys.executable, "train.py", "--arch", "srresnet", "--preset", "study", *STUDY[name][0].split(),
                   "--seed", str(seed), "--out", str(out), "--cache", str(Path(args.out) / f"cache-{seed}")]
        if len(table(out)) < (8 if "--seq" in command else 2):
            start, again = time.monotonic(), ["--resume"] if (out / "last.pt").exists() else []
            subprocess.run(command + again, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            print(f"{out}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, runs))
    finals = {(name, seed): table(out)[-1][1] for name, seed, out in runs}
    rows = []
    for name, (_, gain) in STUDY.items():
        psnrs = np.array([[finals[name, seed][task] for task in TASKS] for seed in (0, 1)])
        means = psnrs.mean(1)
        gains = means - [np.mean(list(finals["M", seed].values())) for seed in (0, 1)]
        rows.append([name, *psnrs.mean(0).tolist(), f"{means.mean():.2f}", f"{gains.mean():+.2f} ({gains[0]:+.2f}, "
                     f"{gains[1]:+.2f})", "not given" if gain is None else f"{gain:+.2f}"])
    print(markdown(["PSNR, mean of two seeds", *TASKS, "mean", "gain on M (each seed)", "the paper's gain"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("networks", "memory", "data", "pixels", "tiles", "classical", "study"))
    parser.add_argument("checkpoints", nargs="*", help="for tiles and classical")
    parser.add_argument("--tune", help="classical: photos to choose the strengths on")
    parser.add_argument("--images", help="classical: photos to compare on")
    parser.add_argument("--out", default="runs/study", help="study: where the trainings go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="study: trainings at a time, one thread each")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--size", type=int, default=128, help="edge of the training crop")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--norm-by-hand", action="store_true",
                        help="networks, memory: the transcription writes SwinIR's and Uformer's layer norm out as well")
    parser.add_argument("--channels-last", action="store_true", help="networks: ours as train.py --channels-last runs it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tune_cpu()                                                     # as train.py and eval.py: for both
    device = torch.device(args.device)
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, "
          f"{torch.get_num_threads()} threads")
    {"networks": networks, "memory": memory, "data": data, "pixels": pixels,
     "tiles": tiles, "classical": classical, "study": study}[args.what](args, device)


if __name__ == "__main__":
    main()
