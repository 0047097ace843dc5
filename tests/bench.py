"""Speed and memory, measured; not a test. Everything is compared inside one run, interleaved.

    python tests/bench.py networks                   # ours against a straight transcription, all backbones
    python tests/bench.py networks --arch swinir --size 128
    python tests/bench.py memory                     # activation memory of a training step, with --checkpointing
    python tests/bench.py data                       # crops/s from PNG files and from the cache; degradation
    python tests/bench.py pixels                     # seconds per megapixel of the paper's sizes
    python tests/bench.py tiles RUN/last.pt ...      # what tiles change, for trained models

"Transcription" means the published layers written down as they stand: attention by explicit softmax
matrices, layer norm by mean and variance over rearranged tokens, a shift mask made anew in every block,
the prompt read once per image, f * scale + shift + f. It shares our weights and must agree to 1e-4.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import degrade  # noqa: E402
import mioir  # noqa: E402
from eval import markdown, psnr, restored  # noqa: E402
from mioir import ARCHS, TASKS, build_model, recompute_blocks, restore  # noqa: E402
from train import peak_memory  # noqa: E402


# ---- The transcription: classes that take over our modules' weights ------------------------------------

class TokenLayerNorm2d(mioir.LayerNorm2d):
    def forward(self, f):
        h, w = f.shape[2:]
        t = f.flatten(2).transpose(1, 2).contiguous()                      # b c h w -> b (h w) c
        mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
        t = (t - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias
        return t.transpose(1, 2).reshape(f.shape[0], -1, h, w).contiguous()


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


class PerImagePromptPath(mioir.PromptPath):
    def forward(self, p, rows=slice(None)):
        features = [extract(p[rows]) for extract in self.extract]

        def modulate(site, f):
            z = features[self.extractor_of[site]]
            return f * self.scale[site](z)[:, :, None, None] + self.shift[site](z)[:, :, None, None] + f
        return modulate


TRANSCRIBED = {mioir.LayerNorm2d: TokenLayerNorm2d, mioir.ChannelAttention: NormalisedChannelAttention,
               mioir.WindowAttention: SoftmaxWindowAttention, mioir.WindowBlock: MaskMakingWindowBlock,
               mioir.PromptPath: PerImagePromptPath}


def transcribe(model):
    """Turns one of our models into its transcription; the weights stay where they are."""
    for module in model.modules():
        module.__class__ = TRANSCRIBED.get(type(module), type(module))
    return model


def pair(arch, device):
    """Our model and its transcription with equal weights."""
    prompt = None if arch == "promptir" else "ep"
    torch.manual_seed(0)
    ours = build_model(arch, prompt).to(device)
    theirs = build_model(arch, prompt).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, transcribe(theirs)


# ---- Networks -----------------------------------------------------------------------------------------

def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(model, x, task):
    model.train()
    model.zero_grad(set_to_none=True)
    (model(x, task) - x).abs().mean().backward()


@torch.no_grad()
def restoring(model, x, task):
    model.eval()
    return model(x, task)


def networks(args, device):
    rows = []
    for arch in args.arch:
        ours, theirs = pair(arch, device)
        crop = torch.rand(args.batch, 3, args.size, args.size, device=device)
        photo = torch.rand(1, 3, 256, 256, device=device)
        tasks = torch.arange(args.batch, device=device) % len(TASKS)
        a, b = restoring(ours, crop, tasks), restoring(theirs, crop, tasks)
        agreement = ((a - b).abs().max() / b.abs().max()).item()
        if agreement > 1e-4:
            sys.exit(f"bench.py: {arch}: the transcription disagrees by {agreement:.1e}")
        times = {}
        for name, work, x, task in (("train", training_step, crop, tasks), ("restore", restoring, photo, tasks[:1])):
            runs = [[seconds(lambda: work(model, x, task), device) for model in (ours, theirs)]
                    for _ in range(args.repeat + 1)][1:]
            times[name] = np.median(runs, axis=0)
        rows.append([arch, f"{agreement:.0e}", *(f"{t:.2f}" for t in (*times["train"], times["train"][0] / times["train"][1],
                                                                      *times["restore"], times["restore"][0] / times["restore"][1]))])
        print(rows[-1], flush=True)
    print(markdown(["", "differ by", "train s, ours", "theirs", "ratio", "restore 256 s, ours", "theirs", "ratio"], rows))


# ---- Memory -------------------------------------------------------------------------------------------

def memory(args, device):
    """Each figure comes from a fresh process: peak of one training step over the model and its gradients."""
    rows = []
    for arch in args.arch:
        peaks = []
        for kind in ("theirs", "ours", "checkpointing"):
            command = [sys.executable, __file__, "memory", "--child", kind, "--arch", arch, "--size", str(args.size),
                       "--batch", str(args.batch)]
            peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        rows.append([arch, *(f"{p:.2f}" for p in peaks), f"{peaks[1] / peaks[0]:.2f}", f"{peaks[2] / peaks[0]:.2f}"])
        print(rows[-1], flush=True)
    print(markdown(["GB per sample", "theirs", "ours", "--checkpointing", "ours / theirs", "checkpointing / theirs"], rows))


def memory_child(args, device):
    ours, theirs = pair(args.arch[0], device)
    model = theirs if args.child == "theirs" else ours
    del ours, theirs
    if args.child == "checkpointing":
        recompute_blocks(model)
    small = torch.rand(1, 3, 128, 128, device=device)[:, :, :, :]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = peak_memory(device)
    x = small.repeat(args.batch, 1, args.size // 128, args.size // 128)
    loss = (model.train()(x, torch.arange(args.batch, device=device) % len(TASKS)) - x).abs().mean()
    loss.backward()
    print((peak_memory(device) - before) / args.batch)


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
            samples = [degrade.sample(cache, tasks, 128, 0, 0, 0, i, 128) for i in range(128)]
            middle = time.perf_counter()
            degrade.make_batch(samples, 128, device)
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
    rows, pairs = [], degrade.validation_pairs(images)
    for path in args.checkpoints:
        model, info = mioir.load_model(path, device=device)
        for task in ("noise", "rain", "haze"):
            scores = []
            for lq, gt in pairs[task]:
                whole, tiled = (restored(model, lq, task, device, tile) for tile in (None, 512))
                gt = degrade.to_image(gt)
                scores.append((min(psnr(tiled, whole), 99.0), psnr(whole, gt), psnr(tiled, gt)))
            between, of_whole, of_tiled = np.mean(scores, 0)
            rows.append([f"{info['arch']} {info['prompt'] or ''}", task, f"{between:.1f}", f"{of_whole:.2f}",
                         f"{of_tiled:.2f}", f"{of_tiled - of_whole:+.3f}"])
            print(rows[-1], flush=True)
    print(markdown(["1024 x 768, tiles of 512", "images", "tiled to whole, dB", "whole to truth", "tiled to truth",
                    "difference"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("networks", "memory", "data", "pixels", "tiles"))
    parser.add_argument("checkpoints", nargs="*", help="for tiles")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--size", type=int, default=128, help="edge of the training crop")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, "
          f"{torch.get_num_threads()} threads")
    {"networks": networks, "memory": memory_child if args.child else memory, "data": data, "pixels": pixels,
     "tiles": tiles}[args.what](args, device)


if __name__ == "__main__":
    main()
