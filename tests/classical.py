"""Classical restoration, one method a task: what a learned model has to beat.

    python tests/bench.py classical assets/restormer.pt --tune DIR --images DIR

Each takes and gives (1,3,H,W) in [0,1]. Their strengths are chosen on the photos in --tune, among
the settings in CLASSICAL; then methods and models restore the photos in --images.
"""
import itertools

import numpy as np
import torch
from torch.nn import functional as F

import degrade
import mioir
from eval import markdown, psnr, restored, validation_pairs


def box(x, r):
    """Mean over the (2r+1)^2 neighbours that lie inside the image: along columns, then rows."""
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
    """A guided filter splits off detail; of bright detail, streaks, `kept` stays; the veil goes."""
    smooth = guided(x, x, r, eps)
    detail = x - smooth
    return smooth + torch.where(detail > 0, kept * detail, detail) - veil


def dark_channel(x, share, least):
    """He et al. 2009: dark channel prior, 15x15 patches; a guided filter refines transmission."""
    def darkest(image):
        return -F.max_pool2d(-image.amin(1, keepdim=True), 15, 1, 7)
    dark = darkest(x).flatten()
    brightest = dark.topk(max(len(dark) // 1000, 1)).indices
    airlight = x.flatten(2)[:, :, brightest].mean(2)[:, :, None, None]
    transmission = guided(1 - share * darkest(x / airlight), x.mean(1, keepdim=True), 40, 1e-3)
    return (x - airlight) / transmission.clamp(least, 1) + airlight


def fixed_gamma(x, gamma):
    return x ** gamma


def unchanged(x):
    return x


def grid(**values):
    """All combinations of settings, as dicts."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


CLASSICAL = {  # task: (name, method, settings to choose from)
    "blur": ("Wiener filter", wiener,
             grid(sigma=(1.0, 1.25, 1.5, 1.75), ratio=(0.01, 0.02, 0.05, 0.1))),
    "noise": ("non-local means, sigma known", non_local_means,
              grid(strength=(0.4, 0.55, 0.7, 0.9))),
    "jpeg": ("bilateral filter", bilateral,
             grid(space=(0.7, 1.0, 1.5, 2.0), levels=(0.02, 0.03, 0.045, 0.07))),
    "rain": ("guided-filter split", rain_split,
             grid(r=(4, 8, 16), eps=(1e-3, 4e-3, 2e-2), kept=(0.3, 0.5, 0.7),
                  veil=(0.0, 0.03, 0.06))),
    "haze": ("dark channel prior", dark_channel,
             grid(share=(0.6, 0.7, 0.8, 0.95), least=(0.1, 0.2, 0.3, 0.4))),
    "dark": ("best fixed gamma", fixed_gamma, grid(gamma=(0.45, 0.5, 0.55, 0.6, 0.65, 0.7))),
    "sr": ("bicubic (the input)", unchanged, [{}]),
}


def sigmas(images):
    """The noise that validation_pairs (seed 0) put on each image: what non-local means is told."""
    drawn = []
    for k, (image, _) in enumerate(images):
        generator = degrade.seeded("validation", 0, "in", "noise", k)
        drawn.append(degrade.draw("noise", image.shape[2:], "in", generator)["sigma"].item())
    return drawn


def apply_classical(task, method, settings, pairs, noise):
    """PSNR of a classical method on each pair of a task; noise: the sigmas of the images."""
    scores = []
    for (lq, gt), sigma in zip(pairs, noise):
        known = {"sigma": sigma} if task == "noise" else {}
        y = method(lq, **settings, **known)
        scores.append(psnr(degrade.to_image(y), degrade.to_image(gt)))
    return scores


def best_settings(task, method, settings, pairs, noise):
    """Those with the highest mean PSNR on the tuning pairs."""
    means = [np.mean(apply_classical(task, method, chosen, pairs, noise)) for chosen in settings]
    return settings[int(np.argmax(means))]


def photos(folder, edge=None):
    """[(photo, no depth), ...] of a folder; edge: only the middle of each, for speed."""
    images = []
    for path in degrade.list_images([folder]):
        image = degrade.to_tensor(degrade.read_image(path))
        h, w = image.shape[2:]
        if edge:
            top, left = max(h - edge, 0) // 2, max(w - edge, 0) // 2
            image = image[:, :, top:top + edge, left:left + edge]
        images.append((image, None))
    return images


def compare(args, device):
    """Strengths chosen on --tune, then all methods and the models on --images, photo by photo."""
    tuning, images = photos(args.tune, 192)[::2], photos(args.images)
    models = [mioir.load_model(path, device=device)[0] for path in args.checkpoints]
    tuning_pairs, pairs = validation_pairs(tuning), validation_pairs(images)
    tuning_noise, noise = sigmas(tuning), sigmas(images)
    rows = []
    for task, (name, method, settings) in CLASSICAL.items():
        best = best_settings(task, method, settings, tuning_pairs[task], tuning_noise)
        before = [psnr(degrade.to_image(lq), degrade.to_image(gt)) for lq, gt in pairs[task]]
        columns = [before, apply_classical(task, method, best, pairs[task], noise)]
        for model in models:
            columns.append([psnr(restored(model, lq, task, device), degrade.to_image(gt))
                            for lq, gt in pairs[task]])
        said = ", ".join(f"{key} {value:g}" for key, value in best.items())
        scores = [f"{np.mean(column):.2f} +- {np.std(column):.1f}" for column in columns]
        rows.append([task, f"{name}: {said}" if said else name, *scores])
        print(rows[-1], flush=True)
    print(markdown(["images of", "classical method, as tuned", "input", "classical",
                    *map(str, args.checkpoints)], rows))
    print(f"PSNR in dB, mean +- deviation over {len(images)} photos; In-Dis, seed 0")
