"""Evaluate a model, or restore one's own pictures with it.

    python eval.py --input photo.jpg --output restored.png        # with the model that is shipped
    python eval.py runs/demo/last.pt                                  # seven tasks: in, out, gain
    python eval.py runs/demo/last.pt --input photos/ --output restored/ --task auto --compare
    python eval.py Restormer_S_EP.pth --prompts type7.npy --testsets MiO100   # the paper's 19 sets
    python eval.py runs/demo/last.pt --prompt-matrix                  # what a wrong prompt costs

Metrics are the paper's: PSNR and SSIM on 8-bit RGB, output clamped and rounded, 4 border pixels
cut, averaged over the images of a set; raw weights, not EMA. Source: paper, Section 5.1; BasicSR.
"""
import argparse
import ctypes
import functools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from degrade import (RANGES, dead_leaves, degrade, find_depths, list_images, open_image, read_depth,
                     read_image, seeded, to_image, to_rgb, to_tensor, whole_file)
from mioir import TASKS, TaskClassifier, load_model, restore


# ---- Metrics -------------------------------------------------------------------------------------

def _cut(a, b, crop):
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 3:
        raise ValueError("metrics take two uint8 (H,W,3) arrays of one size, "
                         f"not {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    if min(a.shape[:2]) <= 2 * crop:
        raise ValueError(f"an image of {a.shape[1]} x {a.shape[0]} has nothing left after cutting "
                         f"{crop} pixels off each side")
    h, w = a.shape[:2]
    return tuple(x[crop:h - crop, crop:w - crop].astype(np.float64) for x in (a, b))


def psnr(a, b, crop=4):
    """Peak signal-to-noise ratio in dB of two uint8 (H,W,3) arrays without `crop` border pixels."""
    a, b = _cut(a, b, crop)
    mse = np.mean((a - b) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255 ** 2 / mse))


def ssim(a, b, crop=4):
    """Structural similarity of two uint8 (H,W,3) arrays: 11x11 Gaussian of sigma 1.5, no padding,
    mean over pixels and the three channels (Wang et al. 2004; `calculate_ssim` of BasicSR)."""
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[:, None] for x in _cut(a, b, crop))     # (3,1,h,w)
    if min(a.shape[2:]) < 11:
        raise ValueError("SSIM needs 11 pixels in height and width after the cut, "
                         f"not {tuple(a.shape[2:])}")
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    taps = taps / taps.sum()

    def local_mean(x):
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a ** 2, local_mean(b * b) - mean_b ** 2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return float(similarity.mean())


def mean_psnr(model, pairs, device):
    """{task: PSNR in dB} over {task: [(lq, gt), ...]}; "ep" is told the task."""
    return {task: float(np.mean([psnr(restored(model, lq, task, device), to_image(gt))
                                 for lq, gt in examples])) for task, examples in pairs.items()}


def input_psnr(pairs):
    """{task: PSNR in dB} of the degraded images themselves: what a model has to beat."""
    return {task: float(np.mean([psnr(to_image(lq), to_image(gt)) for lq, gt in examples]))
            for task, examples in pairs.items()}


def confusion(classifier, pairs, device):
    """Returns ({task: accuracy in %}, 7 rows of counts: true task x named task)."""
    classifier.eval()
    matrix = np.zeros((len(TASKS), len(TASKS)), int)
    for task, examples in pairs.items():
        for lq, _ in examples:
            named, _ = classify(classifier, lq, device)
            matrix[TASKS.index(task), TASKS.index(named)] += 1
    accuracy = {task: 100 * matrix[i, i].item() / len(pairs[task])
                for i, task in enumerate(TASKS) if task in pairs}
    return accuracy, matrix.tolist()


def restored(model, lq, task, device, tile=None):
    """(1,3,H,W) -> (H,W,3) uint8. task: a name or (1,7) weights; only "ep" models need one.
    tile: edge of the tiles in pixels; None: by `auto_tile`; 0: the image is run whole."""
    task = torch.tensor([TASKS.index(task)]) if isinstance(task, str) else task
    task = None if task is None else task.to(device)
    tile = auto_tile(lq) if tile is None else tile
    report = functools.partial(show_tiles, time.monotonic())
    try:
        return to_image(restore(model, lq.to(device), task, tile or None, report=report))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        h, w = lq.shape[2:]
        mend = f"in tiles (--tile {tile // 2})" if tile else "in tiles (--tile 512)"
        raise ValueError(f"not enough memory to restore {w} x {h} pixels "
                         f"{f'in tiles of {tile}' if tile else 'whole'}; try it {mend}") from None


def show_tiles(start, done, tiles):
    """Tells a person at a terminal how far a large picture is."""
    if sys.stderr.isatty():
        left = (time.monotonic() - start) / done * (tiles - done)
        print(f"\r  tile {done} of {tiles}, {left:.0f} s left ", end="\n" * (done == tiles),
              file=sys.stderr, flush=True)


def auto_tile(x):
    """Whole (0) up to a megapixel; above it, tiles of 512, so that memory stays bounded."""
    return 512 if x.shape[2] * x.shape[3] > 2 ** 20 else 0


# ---- Validation: the same images, degraded in the same way, every time ---------------------------

def builtin_images(count=8, edge=128):
    """The built-in validation images: dead leaves no training run sees. [(image, depth), ...]"""
    return [dead_leaves(edge, edge, seeded("validation", k)) for k in range(count)]


def validation_pairs(images, split="in", seed=0):
    """{task: [(lq, gt), ...]} for images [(gt (1,3,H,W), depth (1,1,h,w) or None), ...]."""
    return {task: [(degrade(gt, task, split, depth, seeded("validation", seed, split, task, k)), gt)
                   for k, (gt, depth) in enumerate(images)]
            for task in RANGES[split]}


# ---- Tables and pictures -------------------------------------------------------------------------

def markdown(header, rows):
    """A Markdown table with its columns aligned; numbers are given two decimals."""
    def text(cell):
        return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
    lines = [[text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in
                               enumerate(zip(line, widths))) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def matrix_picture(path, title, columns, rows, outlined=(), reference="first"):
    """Draws a table of numbers: each cell green by its gain on its reference, red by its loss.
    rows: [(name, [number, ...]), ...]. reference: "first" row, same column, or "last" column,
    same row. outlined: set of (row, column) to frame, such as the tasks a stage trains on.
    """
    cell_w, cell_h, left, top = 78, 34, 190, 66
    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    size = (left + cell_w * len(columns) + 16, top + cell_h * len(rows) + 16)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 10), title, "black", bold)
    for j, column in enumerate(columns):
        pen.text((left + (j + 0.5) * cell_w, top - 14), column, "black", font, anchor="mm")
    gains = np.array([values for _, values in rows])
    gains = gains - (gains[:1] if reference == "first" else gains[:, -1:])
    reach = max(np.abs(gains).max(), 1e-6)
    for i, (name, values) in enumerate(rows):
        pen.text((left - 10, top + (i + 0.5) * cell_h), name, "black", font, anchor="rm")
        for j, value in enumerate(values):
            strength = min((abs(gains[i, j]) / reach) ** 0.5, 1)
            colour = (46, 160, 90) if gains[i, j] > 0 else (214, 69, 65)
            fill = tuple(int(255 + (c - 255) * 0.85 * strength) for c in colour)
            x, y = left + j * cell_w, top + i * cell_h
            pen.rectangle((x + 1, y + 1, x + cell_w - 2, y + cell_h - 2), fill,
                          "black" if (i, j) in outlined else None, 2)
            pen.text((x + cell_w / 2, y + cell_h / 2), f"{value:.2f}", "black", font, anchor="mm")
    picture.save(path)


_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")


def curves_picture(path, title, log):
    """Draws a log.jsonl: the loss of each task on a logarithmic axis, the learning rate below."""
    entries = [e for e in map(json.loads, Path(log).read_text().splitlines()) if "loss" in e]
    offset, at, last = 0, [], (1, 0)
    for entry in entries:                                       # iterations counted over all stages
        offset += last[1] if entry["stage"] > last[0] else 0
        last = entry["stage"], entry["iteration"]
        at.append(offset + last[1])
    width, heights, left, top, font = 900, (320, 110), 70, 56, ImageFont.load_default(14)
    picture = Image.new("RGB", (width + left + 110, sum(heights) + top + 70), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 8), f"{title}: loss per task, and learning rate, by iteration", "black",
             ImageFont.load_default(18))
    curves = {task: [(x, e["loss"][task]) for x, e in zip(at, entries) if task in e["loss"]]
              for task in TASKS}
    panels = ((curves, True), ({"lr": [(x, e["lr"]) for x, e in zip(at, entries)]}, False))
    for (lines, logarithmic), height in zip(panels, heights):
        values = np.array([y for line in lines.values() for _, y in line])
        values = np.log10(values.clip(1e-12)) if logarithmic else values
        low, high = values.min() if logarithmic else 0.0, values.max() + 1e-12

        def place(x, y):
            y = np.log10(max(y, 1e-12)) if logarithmic else y
            return left + width * x / max(at), top + height * (1 - (y - low) / (high - low + 1e-12))
        pen.rectangle((left, top, left + width, top + height), None, "black")
        for y in np.linspace(low, high, 4):
            value = 10 ** y if logarithmic else y
            label = f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"
            pen.text((left - 8, place(0, value)[1]), label, "black", font, "rm")
        for x in np.linspace(0, max(at), 6)[1:]:
            pen.text((place(x, 1)[0], top + height + 12), f"{x:.0f}", "black", font, "mm")
        ends = []
        for (name, line), colour in zip(lines.items(), _COLOURS):
            if line:
                pen.line([place(*point) for point in line], colour, 2)
                ends.append((place(*line[-1])[1], name, colour))
        above = top + height + 8
        for y, name, colour in sorted(ends, reverse=True):  # names at the curves' ends, kept apart
            above = min(y, above - 16)
            pen.text((left + width + 8, above), name, colour, font, "lm")
        top += height + 40
    picture.save(path)


def strip_picture(path, header, rows, edge=192):
    """Draws rows of pictures: [(name, [(H,W,3) uint8, ...]), ...], their central edge x edge."""
    left, top, font = 76, 30, ImageFont.load_default(16)
    size = (left + (edge + 6) * len(header), top + (edge + 6) * len(rows))
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for j, text in enumerate(header):
        pen.text((left + j * (edge + 6) + edge / 2, top / 2), text, "black", font, anchor="mm")
    for i, (name, images) in enumerate(rows):
        pen.text((left - 10, top + i * (edge + 6) + edge / 2), name, "black", font, anchor="rm")
        for j, image in enumerate(images):
            y, x = (max(s - edge, 0) // 2 for s in image.shape[:2])
            cut = Image.fromarray(image[y:y + edge, x:x + edge])
            if max(cut.size) < edge:                 # small images are shown larger, pixel by pixel
                cut = cut.resize((edge, edge), Image.Resampling.NEAREST)
            picture.paste(cut, (left + j * (edge + 6), top + i * (edge + 6)))
    picture.save(path)


def task_strips(path, model, pairs, device):
    """degraded | restored | truth for the first image of each task."""
    rows = [(task, [to_image(lq), restored(model, lq, task, device), to_image(gt)])
            for task, ((lq, gt), *_) in pairs.items()]
    strip_picture(path, ["degraded", "restored", "truth"], rows)


# ---- Which prompt: the user's word, or the classifier's ------------------------------------------

MODEL = Path(__file__).parent / "assets" / "srresnet.pt"                  # these two are shipped
CLASSIFIER = MODEL.with_name("classifier.pt")


def parse_task(text):
    """"noise" or "noise:0.7,jpeg:0.3" -> (1,7) weights, a mixture of the tasks' prompt images."""
    weights = torch.zeros(1, len(TASKS))
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: choose auto, one of {', '.join(TASKS)}, or a "
                             "mixture such as noise:0.7,jpeg:0.3")
        try:
            weights[0, TASKS.index(name)] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--task {text}: {weight!r} is not a number") from None
    return weights


@torch.no_grad()
def classify(classifier, x, device):
    """(task name, confidence in [0,1]) for one image (1,3,H,W), of which every pixel counts.

    The classifier looks at blocks of 9 x 9 that do not overlap, then averages what it found: so a
    large picture can be read in strips of whole blocks, with the same result in little memory.
    """
    x = F.pad(x, (0, max(9 - x.shape[3], 0), 0, max(9 - x.shape[2], 0)), mode="replicate")
    total, blocks = 0, 0
    for strip in x.split(9 * 64, 2):                                          # (1,3,576,W)
        rows = strip.shape[2] // 9                       # of blocks; fewer than 9 pixels are no row
        if rows:
            total = total + rows * classifier.features(strip.to(device)).mean((2, 3))     # (1,32)
            blocks += rows
    probability = classifier.head(total / blocks).softmax(1)[0]                       # (7,)
    return TASKS[probability.argmax().item()], probability.max().item()


def load_classifier(path, device):
    """The classifier of --classifier, or the one that ships in assets/."""
    path = path or CLASSIFIER
    if not Path(path).exists():
        raise ValueError(f"there is no classifier {path} to tell the task: name it with --task "
                         f"(one of {', '.join(TASKS)}), or train one (train.py --arch classifier) "
                         "and give --classifier FILE")
    classifier, _ = load_model(path, device=device)
    if not isinstance(classifier, TaskClassifier):
        raise ValueError(f"--classifier {path} is a restoration model, not a task classifier")
    return classifier


# ---- The table over images that we degrade ourselves ---------------------------------------------

def evaluate(model, pairs, device, say):
    """Rows (task, PSNR in, out, gain, SSIM in, out, gain) of {task: [(lq, gt), ...]}, and mean."""
    rows = []
    for task, examples in pairs.items():
        scores = []
        for lq, gt in examples:
            y = restored(model, lq, task, device)
            x, truth = to_image(lq), to_image(gt)
            scores.append([psnr(x, truth), psnr(y, truth), ssim(x, truth), ssim(y, truth)])
        p_in, p_out, s_in, s_out = np.mean(scores, 0).tolist()
        rows.append([task, p_in, p_out, p_out - p_in, s_in, s_out, s_out - s_in])
        say(f"{task}: {p_in:.2f} -> {p_out:.2f} dB over {len(examples)} images")
    rows.append(["mean", *np.mean([row[1:] for row in rows], 0).tolist()])
    return [[*row[:4], *(f"{value:.4f}" for value in row[4:6]), f"{row[6]:+.4f}"] for row in rows]


def result(args, name):
    """--output, or a file beside the checkpoint; for the shipped one, in the working folder."""
    folder = Path() if args.checkpoint == MODEL else Path(args.checkpoint).parent
    path = Path(args.output or folder / name)
    check_ending(path, [".json"] if name.endswith(".json") else FORMATS)
    return path


def check_ending(path, kinds):
    """Raises ValueError before any work is done, where the result could not be written."""
    if path.suffix.lower() not in kinds:
        raise ValueError(f"--output {path}: the ending must be one of {' '.join(kinds)}")


def load_images(args):
    """[(image (1,3,H,W), depth or None), ...]: built in, or of --images; bad files are skipped."""
    if not args.images:
        return builtin_images()
    images = []
    for path, depth in find_depths(list_images([args.images]), args.depth).items():
        try:
            depth = depth and torch.from_numpy(read_depth(depth))[None, None]
            images.append((to_tensor(read_image(path)), depth))
        except ValueError as error:
            print(f"skipped {error}", file=sys.stderr)
    if not images:
        raise ValueError(f"{args.images}: no readable image")
    return images


def table(args, model, device):
    """PSNR and SSIM of each task before and after, In-Dis and Out-Dis, and a strip picture."""
    images, strips = load_images(args), result(args, "strips.png")
    header = ["task", "PSNR in", "out", "gain", "SSIM in", "out", "gain"]
    for split, title in (("in", "In-Dis"), ("out", "Out-Dis")):
        pairs = validation_pairs(images, split, args.seed)
        rows = evaluate(model, pairs, device, lambda text: print("  " + text, file=sys.stderr))
        print(f"\n{title}, {len(images)} images, seed {args.seed}"
              f"{'' if split == 'in' else ' (sr: ranges not published)'}\n\n"
              f"{markdown(header, rows)}")
        if split == "in":
            task_strips(strips, model, pairs, device)
    print(f"\nPSNR in dB and SSIM on 8-bit RGB, 4 border pixels cut, {args.weights} weights, "
          f"true task told. Picture: {strips}")


def prompt_matrix(args, model, device):
    """Each task's images restored with each of the seven prompts: what a wrong prompt costs."""
    if model.prompt != "ep":
        raise ValueError("--prompt-matrix needs a model with explicit prompts (train.py --prompt)")
    images, path = load_images(args), result(args, "prompts.png")
    rows, pairs = [], validation_pairs(images, "in", args.seed)
    before = input_psnr(pairs)
    for task, examples in pairs.items():
        scores = mean_psnr(model, dict.fromkeys(TASKS, examples), device)   # one for each prompt
        rows.append([task, *scores.values(), before[task]])
    print(markdown(["images \\ prompt", *TASKS, "input"], rows))
    matrix_picture(path, "PSNR in dB: images of a task (row) restored with each prompt (column)",
                   [*TASKS, "input"], [(row[0], row[1:]) for row in rows],
                   {(i, i) for i in range(len(TASKS))}, reference="last")
    print(f"\nPSNR in dB, {len(images)} images, seed {args.seed}, {args.weights} weights. "
          f"Picture: {path}")


def confusion_text(accuracy, matrix):
    """The confusion matrix of a task classifier as a table, and its accuracy."""
    rows = [[task, *counts] for task, counts in zip(TASKS, matrix)]
    return (markdown(["true task \\ named as, images", *TASKS], rows)
            + f"\n\naccuracy {np.mean(list(accuracy.values())):.1f} % on held-out images")


def classifier_table(args, classifier, device):
    """How often a task classifier names the task of degraded images."""
    if args.input or args.testsets or args.prompt_matrix or args.interpolate:
        raise ValueError(f"{args.checkpoint} is a task classifier, which restores nothing; "
                         "give it as --classifier")
    images = load_images(args)
    for split, title in (("in", "In-Dis"), ("out", "Out-Dis")):
        pairs = validation_pairs(images, split, args.seed)
        print(f"\n{title}, {len(images)} images, seed {args.seed}\n")
        print(confusion_text(*confusion(classifier, pairs, device)))


# ---- The paper's 19 test sets --------------------------------------------------------------------

# Published PSNR (Tables 3 and 4): sr, blur, noise, jpeg, rain, haze, dark, then the averages over
# the In-Dis, Out-Dis and Unknown sets; None where the paper gives none.
ORDER = ("sr", "blur", "noise", "jpeg", "rain", "haze", "dark")
PAPER = {
    ("srresnet", "M", None): (25.52, 30.01, 30.49, 32.46, 32.38, 25.57, 30.20, 29.52, 24.88, 18.02),
    ("srresnet", "S", None): (25.72, 30.49, 30.67, 32.73, 32.81, 25.78, 30.45, 29.81, None, None),
    ("srresnet", "M", "ep"): (25.73, 30.78, 30.81, 33.12, 34.26, 25.84, 31.29, 30.26, None, None),
    ("srresnet", "S", "ep"): (25.90, 31.23, 30.88, 33.16, 34.31, 26.13, 30.91, 30.36, 25.43, 17.84),
    ("srresnet", "M", "ap"): (25.52, 30.16, 30.48, 32.52, 33.46, 25.55, 29.48, 29.60, None, None),
    ("srresnet", "S", "ap"): (25.73, 30.66, 30.60, 32.68, 34.13, 25.51, 28.97, 29.76, 24.88, 19.08),
    ("swinir", "M", None): (25.51, 30.63, 30.81, 32.79, 34.38, 28.83, 34.43, 31.05, 26.09, 18.36),
    ("swinir", "S", None): (26.02, 31.58, 31.36, 33.40, 36.69, 29.58, 34.64, 31.90, None, None),
    ("swinir", "M", "ep"): (25.77, 31.26, 31.22, 33.41, 36.56, 29.16, 34.90, 31.75, None, None),
    ("swinir", "S", "ep"): (26.15, 31.98, 31.48, 33.66, 37.84, 29.65, 35.05, 32.26, 26.97, 18.70),
    ("swinir", "M", "ap"): (25.40, 30.33, 30.22, 32.34, 33.77, 27.88, 33.20, 30.45, None, None),
    ("swinir", "S", "ap"): (26.04, 31.74, 31.40, 33.48, 36.94, 29.37, 34.99, 32.00, 26.86, 18.98),
}
GROUPS = ("In-Dis", "Out-Dis", "Unknown")
_UNKNOWN = ("DIV2K_valid_LR_difficult", "DIV2K_valid_LR_mild", "DIV2K_valid_LR_wild",
            "valid-input-noisy")
TESTSETS = {  # name: (group, task or None, folder of LQ, folder of GT)
    **{t: ("In-Dis", t, f"single_indis/{t}", "original/GT") for t in ORDER},
    **{f"{t}_outbig": ("Out-Dis", t, f"single_outbig/{t}_outbig", "original/GT") for t in ORDER},
    **{s: ("Unknown", None, f"unknow/LQ_LR/{s}", "unknow/DIV2K_valid_HR_toLR") for s in _UNKNOWN},
    "Toled_val": ("Unknown", None, "unknow/Toled_val/LQ", "unknow/Toled_val/HQ"),
}


def match_pairs(lq_folder, gt_folder):
    """[(LQ file, GT file), ...]: by stem, where an LQ stem may go on after the GT's ("0801_rain",
    "0801x4m"); if stems say nothing, in sorted order. Raises ValueError where neither works."""
    lqs, gts = list_images([lq_folder]), list_images([gt_folder])
    by_stem = {gt.stem: gt for gt in gts}
    def partner(stem):
        longest = [s for s in by_stem if stem == s or re.match(re.escape(s) + "(?![0-9])", stem)]
        return by_stem[max(longest, key=len)] if longest else None
    pairs = [(lq, partner(lq.stem)) for lq in lqs]
    if all(gt for _, gt in pairs):
        return pairs
    if len(lqs) == len(gts):
        return list(zip(lqs, gts))
    raise ValueError(f"{lq_folder}: {len(lqs)} images can't be paired with the {len(gts)} of "
                     f"{gt_folder}, by name or by order")


def schedule_of(args, info):
    """"M" or "S": from our checkpoint's stages, or a published file's name, as Restormer_S_EP."""
    if not info["published"]:
        return "S" if len(info["facts"]["periods"]) > 1 else "M"
    found = re.search(r"[_-]([MS])(?=[_.-])", Path(args.checkpoint).name)
    return found[1] if found else None


def score_set(pairs, model, task, classifier, device, tile):
    """[PSNR, SSIM], averaged over [(LQ file, GT file), ...]; a classifier overrules the task."""
    values = []
    for lq_path, gt_path in pairs:
        lq, gt = to_tensor(read_image(lq_path)), read_image(gt_path)
        named = classify(classifier, lq, device)[0] if classifier else task
        h, w = (min(s) for s in zip(gt.shape[:2], lq.shape[2:]))      # an LQ may lack the last rows
        y = restored(model, lq, named, device, tile)
        values.append((psnr(y[:h, :w], gt[:h, :w]), ssim(y[:h, :w], gt[:h, :w])))
    return np.mean(values, 0).tolist()


def score_sets(root, present, model, classifier, device, tile):
    """{set's or group's name: [PSNR, SSIM]}: the sets present in the folder root, then the groups'
    means. Without a classifier an "ep" model is told the true task."""
    scores, start = {}, time.monotonic()
    for name in present:
        _, task, lq_folder, gt_folder = TESTSETS[name]
        if task is None and model.prompt == "ep" and not classifier:
            raise ValueError(f"{name}: nobody knows this set's degradation; "
                             "leave --oracle out, so that the classifier chooses the prompt")
        pairs = match_pairs(root / lq_folder, root / gt_folder)
        scores[name] = score_set(pairs, model, task, classifier, device, tile)
        print(f"  {name}: {scores[name][0]:.2f} dB over {len(pairs)} images, "
              f"{time.monotonic() - start:.0f} s so far", file=sys.stderr)
    for group in GROUPS:
        members = [scores[name] for name in present if TESTSETS[name][0] == group]
        if members:
            scores[group] = np.mean(members, 0).tolist()
    return scores


def testsets(args, model, info, device):
    """The table over whichever of the 19 sets are in the folder; the same as JSON beside it."""
    root = Path(args.testsets)
    report = result(args, f"{Path(args.checkpoint).stem}.testsets.json")
    present = [name for name, (_, _, lq, _) in TESTSETS.items() if (root / lq).is_dir()]
    if not present:
        raise ValueError(f"--testsets {root}: no such folder, or none of the published ones in "
                         "it, such as single_indis/rain and original/GT")
    missing = [name for name in TESTSETS if name not in present]
    print(f"not there, left out: {', '.join(missing) or 'none'}", file=sys.stderr)
    ask = model.prompt == "ep" and not args.oracle
    if ask and info["published"] and not args.classifier:
        raise ValueError("the paper's figures had the published classifier choose the prompts: add "
                         "--classifier Classifier.pth, or --oracle to tell the true tasks")
    classifier = load_classifier(args.classifier, device) if ask else None
    # The published protocol runs every picture whole, however large.
    scores = score_sets(root, present, model, classifier, device, args.tile or 0)
    paper = PAPER.get((info["arch"], schedule_of(args, info), info["prompt"]), (None,) * 10)
    paper_of = dict(zip((*ORDER, *GROUPS), paper))
    incomplete = {TESTSETS[name][0] for name in missing}      # their averages are not the paper's
    rows = []
    for name, (db, similarity) in scores.items():
        stated = None if name in incomplete else paper_of.get(name)
        beside = ("", "") if stated is None else (stated, f"{db - stated:+.2f}")
        rows.append([name + " average" * (name in GROUPS), db, *beside, f"{similarity:.4f}"])
    told = ("no prompt" if model.prompt is None else "adaptive prompt" if model.prompt == "ap" else
            "prompts chosen by the classifier" if ask else "true task told (--oracle)")
    convention = f"RGB, 8 bit, 4 border pixels cut, {args.weights} weights, {told}"
    print(markdown(["set", "PSNR", "paper", "difference", "SSIM"], rows) + f"\n\n{convention}")
    report.write_text(json.dumps({
        "checkpoint": str(args.checkpoint), "convention": convention, "missing": missing,
        "psnr": {k: v[0] for k, v in scores.items()}, "ssim": {k: v[1] for k, v in scores.items()},
        "paper": {k: v for k, v in paper_of.items() if v is not None}}, indent=1))
    print(f"JSON: {report}")
    if args.expect is not None:
        got = scores.get("In-Dis", [float("nan")])[0]
        if not abs(got - args.expect) <= args.tolerance:
            sys.exit(f"eval.py: expected an In-Dis average of {args.expect:g} "
                     f"+- {args.tolerance:g} dB, got {got:.2f}")
        print(f"In-Dis average {got:.2f} dB: as expected")


# ---- Restoring one's own pictures ----------------------------------------------------------------

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}


def restore_picture(source, target, args, model, classifier, device):
    """One file to one file of the same size; returns what is worth saying about it."""
    if target.exists() and not args.overwrite:
        raise ValueError(f"{target} exists; choose another --output or add --overwrite")
    picture, notes = open_image(source)
    rgb = to_rgb(picture)
    x = to_tensor(rgb)
    name = args.task
    if classifier is not None:
        name, confidence = classify(classifier, x, device)
        doubt = "" if confidence > 0.6 else " - low: look at it, or name the task with --task"
        notes.append(f"task {name}, {100 * confidence:.0f} % sure{doubt}")
    task = parse_task(name) if model.prompt == "ep" else None
    tile = auto_tile(x) if args.tile is None else args.tile
    if tile:
        notes.append(f"in tiles of {tile}")
    y = restored(model, x, task, device, tile)
    save_picture(target, y, picture)
    if args.compare:
        strip = target.with_name(target.stem + "_compare.png")
        strip_picture(strip, ["before", "after"], [("", [rgb, y])], min(max(rgb.shape[:2]), 1200))
    return ", ".join([f"{source} -> {target}", f"{y.shape[1]} x {y.shape[0]}", *notes])


def save_picture(target, rgb, like):
    """Writes what `like` was: grey stays grey, alpha and ICC profile stay. Whole or not at all."""
    out, bands = Image.fromarray(rgb), like.getbands()
    if bands[0] in ("1", "L", "I", "F"):
        out = out.convert("L")
    kind = FORMATS[target.suffix.lower()]
    if "A" in bands and kind != "JPEG" and kind != "BMP":
        out.putalpha(like.getchannel("A"))
    profile = like.info.get("icc_profile") if "C" not in bands else None  # CMYK's fits no RGB
    options = {"icc_profile": profile} if profile else {}
    options |= {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            out.save(unfinished, format=kind, **options)
    except OSError as error:
        raise ValueError(f"{target}: not written ({error.strerror or error})") from None


def restore_pictures(args, model, device):
    """--input FILE or DIR. A folder goes on after a bad file, names it, and the exit code is 1."""
    source = Path(args.input)
    auto = model.prompt == "ep" and args.task in (None, "auto")
    classifier = load_classifier(args.classifier, device) if auto else None
    if args.task not in (None, "auto"):
        parse_task(args.task)                               # complain before any work is done
    if not source.is_dir():
        target = Path(args.output or source.with_name(source.stem + "_restored.png").name)
        target = target / source.name if target.is_dir() else target
        check_ending(target, FORMATS)
        print(restore_picture(source, target, args, model, classifier, device))
        return
    if not args.output:
        raise ValueError("--input is a folder: name another one with --output")
    files, bad, start = list_images([source]), [], time.monotonic()
    for count, path in enumerate(files, 1):
        try:
            target = Path(args.output) / path.relative_to(source)
            said = restore_picture(path, target, args, model, classifier, device)
            left = (time.monotonic() - start) / count * (len(files) - count)
            print(f"{count}/{len(files)} {said} | {left:.0f} s left", flush=True)
        except ValueError as error:
            bad.append(str(error))
    for reason in bad:
        print(f"failed: {reason}", file=sys.stderr)
    print(f"{len(files) - len(bad)} of {len(files)} pictures restored to {args.output}")
    if bad:
        sys.exit(1)


def interpolate(args, model, device):
    """A strip from one task's prompt to another's: --interpolate noise,jpeg --steps 5."""
    names = args.interpolate.split(",")
    if model.prompt != "ep" or len(names) != 2 or not args.input or args.steps < 2:
        raise ValueError("--interpolate A,B needs an 'ep' model, two tasks, --input FILE "
                         "and --steps of at least 2")
    first, second = map(parse_task, names)
    x, path = to_tensor(read_image(args.input)), result(args, "interpolation.png")
    shares = [k / (args.steps - 1) for k in range(args.steps)]
    images = [restored(model, x, (1 - s) * first + s * second, device, args.tile) for s in shares]
    strip_picture(path, ["input", *(f"{names[0]} {1 - s:.2f} {names[1]} {s:.2f}" for s in shares)],
                  [("", [to_image(x), *images])])
    print(f"picture: {path}")


# ---- The command line ----------------------------------------------------------------------------

def arguments(argv):
    """The command line, parsed; exits with one line where flags are unknown."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message} (see python eval.py --help)")
    add = parser.add_argument
    add("checkpoint", nargs="?", default=MODEL,
        help="written by train.py, or published with the paper (default: the one in assets/)")
    add("--images", metavar="DIR", help="evaluate on these, not on the built-in images")
    add("--depth", metavar="DIR", help="depth maps of --images, for haze")
    add("--seed", type=int, default=0, help="of the degradations")
    add("--testsets", metavar="DIR", help="evaluate on the published test sets in this folder")
    add("--oracle", action="store_true", help="with --testsets: tell the true task")
    add("--expect", type=float, metavar="DB", help="with --testsets: fail unless In-Dis gives this")
    add("--tolerance", type=float, default=0.05, metavar="DB")
    add("--prompt-matrix", action="store_true", help="each task's images with each prompt")
    add("--interpolate", metavar="A,B", help="with --input: a strip from prompt A to B")
    add("--steps", type=int, default=5, help="pictures in that strip")
    add("--input", metavar="PATH", help="a picture, or a folder of pictures, to restore")
    add("--output", metavar="PATH", help="where the result goes")
    add("--task", help="auto (the classifier decides), a task, or a mixture noise:0.7,jpeg:0.3")
    add("--classifier", metavar="FILE", help="for auto (default: the one in assets/)")
    add("--compare", action="store_true", help="also write before/after pictures")
    add("--tile", type=int, metavar="N", help="tiles of N pixels, 0: whole (default: whole up to a megapixel, then 512; "
        "whole with --testsets)")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--max-pixels", type=int, metavar="N", help="accept larger pictures than pillow would")
    add("--weights", choices=("raw", "ema"), default="raw", help="raw: as the paper does")
    add("--export", metavar="FILE", help="write these weights alone, in half precision")
    add("--prompts", metavar="NPY", help="type7.npy, for a published 'ep' checkpoint")
    args = parser.parse_args(argv)
    if args.tile is not None and args.tile < 0:
        parser.error(f"--tile must be positive, or 0 for the picture whole, not {args.tile}")
    return args


def tune_cpu():
    """Linux takes large freed blocks back and clears new ones, for every feature map: a twentieth
    of the demo's time. glibc is told to keep them (M_MMAP_MAX 0, largest M_TRIM_THRESHOLD).
    Numbers below 1e-38, as e^-100 in a shifted window, slow a CPU down: they become zeros."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
        mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)


def export(path, model, info):
    """The weights alone, in half precision: a seventh of train.py's file; loads as that does."""
    if info["published"]:
        raise ValueError("--export takes a checkpoint of train.py")
    half = {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()}
    with whole_file(path) as unfinished:
        torch.save({**info, "raw": half, "ema": half}, unfinished)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")


def read_prompts(path):
    """The (7,128,128) prompt images of a published "ep" checkpoint, from their .npy file."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--prompts {path}: not a .npy file of numbers ({error})") from None


def run(args):
    """Does what the flags ask for. Raises ValueError or OSError with one line on what is wrong."""
    if args.max_pixels:
        Image.MAX_IMAGE_PIXELS = args.max_pixels
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, info = load_model(args.checkpoint, args.weights, device,
                             args.prompts and read_prompts(args.prompts))
    if args.export:
        return export(args.export, model, info)
    if isinstance(model, TaskClassifier):
        return classifier_table(args, model, device)
    name = f"{info['arch']}{'-' + info['prompt'].upper() if info['prompt'] else ''}"
    print(f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{args.weights} weights, on {device}")
    if args.interpolate:
        interpolate(args, model, device)
    elif args.input:
        restore_pictures(args, model, device)
    elif args.testsets:
        testsets(args, model, info, device)
    elif args.prompt_matrix:
        prompt_matrix(args, model, device)
    else:
        table(args, model, device)


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit."""
    tune_cpu()
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
