"""Evaluate a model as the paper does, or restore one's own pictures with it.

    python eval.py --input assets/coffee_noisy.png --output restored.png    # the shipped model
    python eval.py --input assets/photos --output restored --compare        # a folder of pictures
    python eval.py runs/restormer-seq-ep-demo                         # seven tasks: in, out, gain
    python eval.py runs/restormer-seq-ep-demo --pairs LQ GT --task noise    # one's own pairs
    python eval.py --prompt-matrix --output matrix.png                # what a wrong prompt costs
    python eval.py Restormer_S_EP.pth --prompts type7.npy --classifier Classifier.pth \\
                   --testsets MiO100 --output sets.json               # the paper's 19 test sets

The protocol (paper, Section 5.1), each point where it is computed below:
  - images are compared as 8-bit RGB: the output is clamped to [0,1], times 255, rounded (restored);
  - 4 pixels at each border are cut off, then PSNR and SSIM are taken (inside_border, psnr, ssim);
  - a set's score is the plain mean over its images (score), and an average over sets is the plain
    mean over the sets, however many images each holds (score_sets);
  - the weights are the raw ones, not their moving average (--weights raw, the default);
  - a picture runs through the network whole, not in tiles (testsets);
  - with --testsets, the task classifier names the prompt of an "ep" model (named_by).

Words used throughout
  lq, gt      a degraded ("low-quality") image and its ground truth: (1,3,H,W) floats in [0,1]
  picture     the same as (H,W,3) uint8, red green blue: what a file holds and what metrics compare
  pairs       {task: [(lq, gt), ...]}
  task        what a model is told: one of mioir.TASKS by name; (1,7) weights, a mixture of the
              seven prompt images; or None, for a model that is told nothing
  task_of     a function of lq that gives its task: the true one, the user's, or the classifier's
  "ep", "ap"  model.prompt: explicit prompts (need a task), adaptive prompts (need none); or None
  In-Dis      degraded as strongly as the training data; Out-Dis: more strongly than any of them;
              Unknown: by cameras and in other ways for which no task is given
  -M, -S      trained on all tasks mixed, or sequentially, one task more each time
  own truth   a pair whose lq equals its gt, such as a black frame that was darkened. Its PSNR is
              infinite: it counts in no mean, and is reported

Sources: Kong, Dong, Zhang, arXiv 2401.03379, Section 5.1, Tables 3 and 4; for the metrics Wang,
Bovik, Sheikh, Simoncelli 2004 (SSIM) and BasicSR, whose conventions the published figures follow.
"""
import argparse
import contextlib
import ctypes
import io
import json
import math
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

# The four files depend on each other in one direction: mioir <- degrade <- eval <- train.
from degrade import (RANGES, SUFFIXES, OneLineParser, dead_leaves, degrade, ends_in_one_line,
                     find_depths, gaussian_taps, lacks_memory, list_images, nfc, open_image,
                     progress, read_photo, require_folder, seeded, short_name, time_left, to_image,
                     to_rgb, to_tensor, whole_file)
from mioir import (ANSWERS, TASKS, TaskClassifier, auto_tile, check_tile, choose_task,
                   classify, load_model, parse_task, restore)


# ---- Metrics (paper, Section 5.1) ----------------------------------------------------------------

def inside_border(a, b, crop):
    """Two (H,W,3) uint8 pictures without `crop` pixels on each side, as float64.

    The cut comes from super-resolution, where the outermost pixels depend on how a method pads;
    the paper keeps it for every task. float64, since differences of uint8 would wrap around.
    Raises ValueError for anything but two uint8 pictures of one size with something left inside.
    """
    if a.shape != b.shape or a.ndim != 3 or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError("metrics take two uint8 (H,W,3) arrays of one size, "
                         f"not {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    h, w = a.shape[:2]
    if min(h, w) <= 2 * crop:
        raise ValueError(f"{w} x {h} pixels: nothing left after cutting {crop} off each side")
    inside = np.s_[crop:h - crop, crop:w - crop]
    return a[inside].astype(np.float64), b[inside].astype(np.float64)


def psnr(a, b, crop=4):
    """Peak signal-to-noise ratio in dB of two (H,W,3) uint8 pictures; infinite for equal ones.

        PSNR = 10 log10(255^2 / MSE),    MSE = mean of (a - b)^2 over pixels and channels

    255 is the peak of 8 bits. Half the root-mean-square error is 6.02 dB more. MSE is taken over
    red, green and blue together, not over luminance alone, which many papers report instead.
    """
    a, b = inside_border(a, b, crop)
    mse = np.mean((a - b) ** 2)
    if mse == 0:
        return float("inf")
    return float(10 * np.log10(255 ** 2 / mse))


def local_mean(x):
    """Each pixel's Gaussian-weighted neighbourhood: (C,1,H,W) -> (C,1,H-10,W-10), not padded.

    The window of Wang et al.: 11 x 11 taps exp(-d^2 / (2 * 1.5^2)) with sum 1. A Gaussian of x and
    y is a product of one of x and one of y, so columns then rows cost 22 products, not 121.
    """
    taps = gaussian_taps(5, torch.tensor(1.5, dtype=torch.float64))                # (11,)
    columns = F.conv2d(x, taps.view(1, 1, 11, 1))                                  # (C,1,H-10,W)
    return F.conv2d(columns, taps.view(1, 1, 1, 11))                               # (C,1,H-10,W-10)


def ssim(a, b, crop=4):
    """Structural similarity of two (H,W,3) uint8 pictures: at most 1, for equal ones.

                2 mu_a mu_b + C1             2 sigma_ab + C2
        SSIM = --------------------  *  ----------------------------
               mu_a^2 + mu_b^2 + C1     sigma_a^2 + sigma_b^2 + C2

    mu, sigma^2 and sigma_ab are mean, variance and covariance in an 11 x 11 Gaussian window around
    a pixel. The first factor compares brightness, the second contrast and structure at once. C1
    and C2 keep both defined on flat areas. Averaged over all windows and the three channels (Wang
    et al. 2004, eq. 13; per channel of RGB as BasicSR's calculate_ssim).
    """
    a, b = inside_border(a, b, crop)
    # (H,W,3) -> (3,1,H,W): three grey images, so that the convolution keeps the channels apart.
    a = torch.from_numpy(a).permute(2, 0, 1)[:, None]
    b = torch.from_numpy(b).permute(2, 0, 1)[:, None]
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11 x 11 pixels after the cut, not {tuple(a.shape[2:])}")
    mean_a = local_mean(a)                                                         # mu_a
    mean_b = local_mean(b)                                                         # mu_b
    var_a = local_mean(a * a) - mean_a ** 2              # sigma_a^2 = E[a^2] - E[a]^2
    var_b = local_mean(b * b) - mean_b ** 2              # sigma_b^2
    covariance = local_mean(a * b) - mean_a * mean_b     # sigma_ab = E[ab] - E[a] E[b]
    c1 = (0.01 * 255) ** 2                               # K1 = 0.01, K2 = 0.03 in Wang et al.,
    c2 = (0.03 * 255) ** 2                               # L = 255, the range of 8 bits
    # One fraction, not a product of two: last digits depend on the order of the operations.
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return float(similarity.mean())


# ---- Scoring a model -----------------------------------------------------------------------------

def restored(model, lq, task, device, tile=None):
    """What a model makes of one image, as a picture: (1,3,H,W) in [0,1] -> (H,W,3) uint8.

    The step from the network to what is compared and stored. Rounding is part of the protocol. Its
    error is spread evenly over one grey level, with a mean square of 1/12: alone it would give
    10 log10(255^2 * 12) = 58.9 dB, so next to a model's error it hardly counts.

    task: a name or (1,7) weights; "ep" models alone read it, others may get None.
    tile: edge of the tiles in pixels; 0: the image is run whole; None: as mioir.auto_tile says.
    """
    h, w = lq.shape[2:]
    tile = auto_tile(model, h, w) if tile is None else tile
    with memory_errors_explained(h, w, tile):
        y = restore(model, lq.to(device), task, tile, report=tile_reporter())
        # Section 5.1: clamped, times 255, rounded. A network's output may leave [0,1].
        return to_image(y)


def score(model, pairs, task_of, device, tile=None):
    """([PSNR in, out, gain, SSIM in, out, gain], n): plain means over pairs, [(lq, gt), ...], and
    how many of them were left out: own truths, and what the model restored exactly.

    "in" is the degraded image, "out" the restored one, both against the truth. As in the paper the
    decibels are averaged, not the squared errors: each image counts the same, however hard it is.
    (The decibels of the mean error would be ruled by the worst image.) Where no pair is left, the
    six are None. task_of: a function of lq that gives the task that the model is told.
    """
    rows = []
    for lq, gt in pairs:
        before, truth = to_image(lq), to_image(gt)                     # (H,W,3) uint8 each
        after = restored(model, lq, task_of(lq), device, tile)
        p_in, p_out = psnr(before, truth), psnr(after, truth)
        s_in, s_out = ssim(before, truth), ssim(after, truth)
        rows.append([p_in, p_out, p_out - p_in, s_in, s_out, s_out - s_in])
    return plain_mean(rows), sum(math.inf in row for row in rows)


def plain_mean(rows):
    """The mean of each column over the rows that hold finite numbers alone: rows with an infinite
    PSNR or with None count nowhere. None for each column where no row is left."""
    finite = [row for row in rows if None not in row and math.inf not in row]
    return np.mean(finite, 0).tolist() if finite else [None] * len(rows[0])


def mean_psnr(model, pairs, device):
    """{task: mean PSNR in dB} of the restored images; an "ep" model is told the true task. None for
    a task whose pairs are all left out, as in score."""
    means = {}
    for task, examples in pairs.items():
        rows = [[psnr(picture, to_image(gt)) for picture in                   # before and after
                 (to_image(lq), restored(model, lq, task, device))] for lq, gt in examples]
        _, means[task] = plain_mean(rows)
    return means


def counted(total, own):
    """"100 images", and how many of them count in no mean: own truths, or restored exactly."""
    which = "is its own truth, or was" if own == 1 else "are their own truths, or were"
    return f"{total} images" + (f"; {own} of {total} {which} restored exactly" if own else "")


# ---- Which prompt: the user's word, or the classifier's ------------------------------------------
# An "ep" model restores what its prompt names. In all of the paper's tables the prompt is chosen by
# a small classifier that looks at the degraded image: nothing about the image has to be known.

def named_by(classifier, counts):
    """A `task_of` that asks the task classifier. counts: a Counter of the names that it gave.

    The image is known to be degraded, so "none", which our classifier may answer, is left aside.
    """
    def task_of(lq):
        name, _ = classify(classifier, lq, damaged=True)
        counts[name] += 1
        return name
    return task_of


def confusion(classifier, pairs):
    """({task: accuracy in %}, 7 or 8 rows of counts) of a classifier on degraded images; and on
    clean ones, if there are pairs["none"].

                    named blur  noise  jpeg  ...
        truly blur       7       0      1           The diagonal is right; off it one reads which
        truly noise      0       8      0           two tasks look alike. The accuracy of a task is
        ...                                         the diagonal's share of its row.
    """
    classifier.eval()
    named = {task: Counter(classify(classifier, lq)[0] for lq, _ in examples)
             for task, examples in pairs.items()}
    accuracy = {task: 100 * counts[task] / counts.total() for task, counts in named.items()}
    answers = classifier.answers                           # the tasks, perhaps "none" after them
    matrix = [[named.get(task, {}).get(name, 0) for name in answers] for task in answers]
    return accuracy, matrix


# ---- The paper's Tables 3 and 4 ------------------------------------------------------------------
# PSNR in dB as published, keyed by (arch, schedule, prompt): the seven In-Dis sets in ORDER, then
# the averages over the In-Dis, Out-Dis and Unknown sets. None where the paper gives no figure.
#
# What to read in it, in the In-Dis averages:
#   - sequential against mixed, the same network and number of iterations: SRResNet 29.52 -> 29.81,
#     SwinIR 31.05 -> 31.90;
#   - an explicit prompt on top of mixed training: 29.52 -> 30.26, and 31.05 -> 31.75;
#   - both together: 30.36, and 32.26, the best of each network;
#   - an adaptive prompt gains little here, and SwinIR-M and SRResNet-S even lose with it: 31.05 ->
#     30.45, 29.81 -> 29.76. But of the variants with a figure, S+AP is the best on Unknown: 19.08,
#     and 18.98.

ORDER = ("sr", "blur", "noise", "jpeg", "rain", "haze", "dark")     # the tables' columns, not TASKS
GROUPS = ("In-Dis", "Out-Dis", "Unknown")
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


def schedule_of(args, info):
    """"M" or "S": from the stages of a checkpoint of train.py (more than one is sequential), or
    from a published file's name, as SRResNet_S_EP.pth; None if that says nothing. A published file
    holds weights alone, and mixed and sequential training give weights of the same shapes."""
    if "facts" in info:
        return "S" if len(info["facts"].get("periods", ())) > 1 else "M"
    found = re.search(r"[_-]([MS])(?=[_.-])", Path(args.checkpoint).name)
    return found[1] if found else None


# ---- The paper's 19 test sets --------------------------------------------------------------------

# {name: (group, true task, folder of the degraded images, folder of the true ones)}. The folders
# are those of the published archive, its spelling "unknow" included:
#
#     original/GT/*.png                          the truth of In-Dis and Out-Dis
#     single_indis/rain/*                        In-Dis: seven folders
#     single_outbig/rain_outbig/*                Out-Dis: seven folders
#     unknow/DIV2K_valid_HR_toLR/*               the truth of four of the Unknown sets
#     unknow/LQ_LR/valid-input-noisy/*           these four
#     unknow/Toled_val/HQ/*  .../LQ/*            the fifth has a truth of its own
#
# An Unknown set has no true task: difficult, mild and wild are NTIRE 2018's, valid-input-noisy is
# NTIRE 2020's, and Toled_val was taken by a camera under a display.
_UNKNOWN = ("DIV2K_valid_LR_difficult", "DIV2K_valid_LR_mild", "DIV2K_valid_LR_wild",
            "valid-input-noisy")
TESTSETS = {
    **{task: ("In-Dis", task, f"single_indis/{task}", "original/GT") for task in ORDER},
    **{f"{task}_outbig": ("Out-Dis", task, f"single_outbig/{task}_outbig", "original/GT")
       for task in ORDER},
    **{name: ("Unknown", None, f"unknow/LQ_LR/{name}", "unknow/DIV2K_valid_HR_toLR")
       for name in _UNKNOWN},
    "Toled_val": ("Unknown", None, "unknow/Toled_val/LQ", "unknow/Toled_val/HQ"),
}


def read_pairs(pairs):
    """Reads [(LQ file, GT file), ...] one by one, as pairs (lq, gt) of one size."""
    for lq_path, gt_path in pairs:
        (lq, noted), (gt, noted_too) = open_image(lq_path), open_image(gt_path)
        if noted or noted_too:                             # as of a file of several pages
            progress(f"{lq_path} or {gt_path}: {', '.join(noted or noted_too)}")
        lq, gt = to_tensor(to_rgb(lq)), to_tensor(to_rgb(gt))                      # (1,3,H,W)
        # An LQ may lack its GT's last rows or columns, where H or W is no multiple of the scale.
        if np.abs(np.subtract(lq.shape, gt.shape)).max() > 8:
            raise ValueError(f"{lq_path} and {gt_path} are not of one size: not a pair, unless the "
                             "LQ is a smaller copy; then enlarge it first")
        _, _, h, w = np.minimum(lq.shape, gt.shape)
        if min(h, w) < 19:                                 # ssim's 11, and 4 cut off each side
            raise ValueError(f"{gt_path}: {w} x {h} pixels; to be measured it needs 19 x 19")
        yield lq[:, :, :h, :w], gt[:, :, :h, :w]


def score_sets(files, model, task_of, device, tile):
    """Scores the sets `files`, {name: [(LQ file, GT file), ...]}. Returns {name: score's six}, of
    the sets and of the groups In-Dis, Out-Dis and Unknown, each the plain mean over its sets; and
    {name: how many of its pairs count in no mean}. task_of: None where the true task is told."""
    scores, own, start = {}, {}, time.monotonic()
    for name, pairs in files.items():
        _, task, *_ = TESTSETS[name]
        tell = task_of or (lambda lq: task)
        scores[name], own[name] = score(model, read_pairs(pairs), tell, device, tile)
        left = time_left(start, len(scores), len(files))
        result = f"{figure(scores[name][1])} dB over {counted(len(pairs), own[name])}"
        progress(f"{name}: {result}, {left}")
    for group in GROUPS:
        members = [scores[name] for name in files if TESTSETS[name][0] == group]
        if members:
            scores[group] = plain_mean(members)
    return scores, own


def comparable_figures(args, info, counts):
    """{name of a set or group: the paper's PSNR in dB}, as far as PAPER has it and it may stand
    beside ours: for a model of the paper's size, and for sets and groups that are here as
    published. A difference from other images, or of another network, looks like a result and is
    none.

    A set of In-Dis or Out-Dis has 100 images; of the Unknown ones we only know that they are five.
    counts: {set: number of images here}.
    """
    # sizes: what differs from the paper's network. Its figures: raw weights, tasks found, not told.
    told = args.oracle and info["prompt"] == "ep"
    if info["sizes"] or args.weights != "raw" or told:
        return {}
    row = PAPER.get((info["arch"], schedule_of(args, info), info["prompt"]), ())
    figures = dict(zip((*ORDER, *GROUPS), row))
    for name, (group, *_) in TESTSETS.items():
        complete = name in counts and (group == "Unknown" or counts[name] == 100)
        if not complete:
            figures[name] = figures[group] = None                      # so is the group's mean
    return {name: figure for name, figure in figures.items() if figure is not None}


def score_table(what, scores, paper=()):
    """{name: score's six} as Markdown, `what` above the names; and, where the paper has figures to
    compare with, {name: PSNR}, those and the difference. Out-Dis and Unknown sets have no figures
    of their own in the paper, only their groups' averages."""
    header = [what, "PSNR in", "out", "gain", "SSIM in", "out", "gain"]
    if paper:
        header += ["paper", "difference"]
    rows = []
    for name, numbers in scores.items():
        row = [f"{name} average" if name in GROUPS else name, *numbers[:3]]
        row += [figure(number, 4) for number in numbers[3:]]             # SSIM: two decimals more
        if paper:
            row += [paper[name], f"{numbers[1] - paper[name]:+.2f}"] if name in paper else ["", ""]
        rows.append(row)
    return markdown(header, rows)


def find_sets(root, told):
    """{name: [(LQ file, GT file), ...]} of the sets that are in a folder. told: the true tasks are
    to be told; then the Unknown sets are left out, for nobody knows what was done to them."""
    files = {}
    for name, (_, task, lq, gt) in TESTSETS.items():
        if (root / lq).is_dir() and not (told and task is None):
            files[name] = match_pairs(root / lq, root / gt)
    if not files:
        raise ValueError(f"--testsets {root}: no set to score there, such as single_indis/rain")
    return files


# ==================================================================================================
# Not in the paper: images that we degrade ourselves, the user's word on the task, pairing files,
# the commands, restoring one's own pictures, memory and time, tables and pictures, files, the
# command line.
# ==================================================================================================

# ---- Images that we degrade ourselves ------------------------------------------------------------
# The paper's test sets have to be downloaded. These pairs need no download and come out the same
# every time: a seed decides each image and each degradation, so two runs can be compared.

def builtin_images(count=8, edge=128):
    """The built-in validation images, [(image (1,3,E,E), depth (1,1,E,E)), ...]: dead leaves, from
    seeds of their own, so that no training run has seen them."""
    return [dead_leaves(edge, edge, seeded("validation", k)) for k in range(count)]


def load_images(args):
    """[(image (1,3,H,W), depth (1,1,h,w) or None), ...]: built in, or those of --images. A file
    that cannot be read is named and skipped. Without a depth map haze gets degrade's prior, far at
    the top and near at the bottom."""
    if not args.images:
        return builtin_images()
    images = []
    for path, depth_path in find_depths([args.images], args.depth).items():
        try:
            image, depth = read_photo(path, depth_path)                # (H,W,3), (h,w) or None
            depth = None if depth is None else torch.from_numpy(depth)[None, None]
            images.append((to_tensor(image), depth))
        except ValueError as error:
            progress(f"skipped {error}")
    if not images:
        raise ValueError(f"{args.images}: no readable image")
    return images


def validation_pairs(images, split="in", seed=0):
    """images, [(gt (1,3,H,W), depth (1,1,h,w) or None), ...] -> {task: [(lq, gt), ...]}.

    split: the strengths in degrade.RANGES, "in" or "out". "out" lacks sr: the paper does not say
    how its harder sr set was made. Each pair's seed names its task and the image's number, so it
    stays as it is when tasks are left out or images come after it.
    """
    pairs = {}
    for task in RANGES[split]:
        pairs[task] = []
        for k, (gt, depth) in enumerate(images):
            generator = seeded("validation", seed, split, task, k)
            pairs[task].append((degrade(gt, task, split, depth, generator), gt))
    return pairs


def clean_pairs(images, seed=0):
    """[(lq, gt), ...] with nothing to restore, lq = gt, for a classifier that can answer "none".

    Three kinds in turn, as one meets them: the image as it is; a JPEG of quality 95, by pillow's
    encoder; a smaller copy, by a factor of 0.7 to 1. images: as validation_pairs takes them.
    """
    pairs = []
    for k, (gt, _) in enumerate(images):
        image = Image.fromarray(to_image(gt))
        if k % 3 == 1:
            file = io.BytesIO()                            # a file in memory
            image.save(file, "JPEG", quality=95)
            image = Image.open(file)
        if k % 3 == 2:
            factor = 0.7 + 0.3 * torch.rand((), generator=seeded("clean", seed, k)).item()
            image = ImageOps.scale(image, factor, Image.Resampling.LANCZOS)
        x = to_tensor(to_rgb(image))                               # (1,3,H,W)
        pairs.append((x, x))
    return pairs


def input_psnr(pairs):
    """{task: mean PSNR in dB} of the degraded images themselves: what a model has to beat. A model
    that returns its input scores this, so it also says how hard a task's images are. Own truths are
    left out, as in mean_psnr, and reported."""
    means = {}
    for task, examples in pairs.items():
        rows = [[psnr(to_image(lq), to_image(gt))] for lq, gt in examples]
        [means[task]] = plain_mean(rows)
        if [math.inf] in rows:
            progress(f"{task}: {counted(len(rows), rows.count([math.inf]))}")
    return means


def evaluate(model, pairs, device, say, trained=TASKS):
    """Rows [task, *score's six], and as the last row the mean over the tasks in `trained`.

    An "ep" model is told the true task, so this measures restoration alone, without the
    classifier's mistakes. say(text) is called after each task.
    """
    rows = []
    for task, examples in pairs.items():
        numbers, own = score(model, examples, lambda lq: task, device)
        rows.append([task, *numbers])
        change = f"{figure(numbers[0])} -> {figure(numbers[1])} dB"
        say(f"{task}: {change} over {counted(len(examples), own)}")
    known = [numbers for task, *numbers in rows if task in trained]
    return [*rows, ["mean", *plain_mean(known or [[None] * 6])]]


# ---- The user's word on the task: --task, --classifier -------------------------------------------

MODEL = Path(__file__).parent / "assets" / "restormer.pt"                 # these two are shipped
CLASSIFIER = MODEL.with_name("classifier.pt")


def load_classifier(path, device):
    """The classifier of --classifier, or, for None, the one that ships in assets/.

    Raises ValueError where it can't be loaded or holds a restoration model, with what to do.
    """
    path = path or CLASSIFIER
    try:
        classifier, _ = load_model(path, device=device)
    except ValueError as error:                # no checkpoint, or one from before a task was added
        raise ValueError(f"--classifier {error}; or name the task, such as --task noise") from None
    if not isinstance(classifier, TaskClassifier):
        raise ValueError(f"--classifier {path} is a restoration model, not a task classifier")
    return classifier


def asked_task(args, model, info, device):
    """What --task asks for: ((1,7) weights for all images alike, None); or for --task auto (None,
    the classifier that names each one's task); or (None, None) for a model that takes no prompt.
    A --task without effect, or of a task that the model has not learned, is reported."""
    if args.task is None:                                  # auto
        return None, load_classifier(args.classifier, device) if model.prompt == "ep" else None
    if model.prompt != "ep":
        print("--task ignored: this model takes no prompt")
        return None, None
    # A prompt that training never used is an image like any other: what it does is not known.
    named = {task for task, weight in zip(TASKS, args.task[0]) if weight > 0}
    unknown = named - learned(info)
    if unknown:
        print(f"warning: this model has not learned {', '.join(sorted(unknown))}")
    return args.task, None


def learned(info):
    """The set of tasks that a checkpoint of train.py has met; all, where a file does not tell.

    Its facts list each stage's tasks, the stages to come included; "stage" counts those that are
    over, and "iteration" the iterations of the one after them: from the first on, it counts, too.
    """
    stages = info.get("facts", {}).get("order") or [TASKS]
    met = info.get("stage", len(stages)) + (info.get("iteration", 0) > 0)
    return {task for stage in stages[:met] for task in stage}


# ---- Which file belongs to which -----------------------------------------------------------------

def match_pairs(lq_folder, gt_folder):
    """[(LQ file, GT file), ...] of two folders, by path and name alone. The GT of LQ/a/b.png is
    looked for in GT/a, then in all of GT; names fit as partners says. A GT without an LQ is left
    out, and how many were is said. Never by order: a wrong pair would not stop the run, only spoil
    the average. Raises ValueError that names LQs without a GT, or an LQ that fits two."""
    lqs, gts = list_images([lq_folder]), list_images([gt_folder])
    # {subfolder, or None for anywhere: {name: [GT file, ...]}}
    named = defaultdict(lambda: defaultdict(list))
    for gt in gts:
        for folder in (plain_name(gt.parent.relative_to(gt_folder)), None):
            for name in {plain_name(gt.stem), joined_name(gt.stem)}:
                named[folder][name].append(gt)
    pairs, lone = [], []
    for lq in lqs:
        folder = plain_name(lq.parent.relative_to(lq_folder))
        fits = partners(lq.stem, named[folder]) or partners(lq.stem, named[None])
        if len(fits) > 1:
            raise ValueError(f"{lq} fits {fits[0]} and {fits[1]}: give each GT its LQ's path below "
                             "its folder, and one ending")
        lone += [] if fits else [str(lq)]
        pairs += [(lq, gt) for gt in fits]
    if lone:
        raise ValueError(f"{len(lone)} of {len(lqs)} have no GT of their name in {gt_folder}, such "
                         f"as {', '.join(lone[:3])}; rename or remove them")
    unused = len(gts) - len({gt for _, gt in pairs})
    if unused:
        progress(f"{unused} of {len(gts)} in {gt_folder} have no LQ: left out")
    return pairs


def plain_name(name):
    """A file's name as it is compared: an accent is one character, though some systems store it as
    two (Unicode's NFC), and a number is its value: "0801" is "801"."""
    return re.sub(r"\d+", lambda digits: str(int(digits[0])), nfc(name))


def joined_name(name):
    """The same without what may stand between a word and its number: "frame_001" is "frame1"."""
    return re.sub(r"(?<=[^\W\d_])[\W_]+(?=\d)", "", plain_name(name))


def partners(stem, gts):
    """The GT files with the longest name that an LQ's stem begins with; [] where there is none.
    gts: {name: files}. The names as they are come first, then the joined ones.

    LQ stems may go on after it ("0801_rain", "0801x4m"), but not with a digit: "10" is not of "1".
    Of several files, one of the very same name comes before the others.
    """
    for name in (plain_name(stem), joined_name(stem)):
        for end in range(len(name), 0, -1):                            # the longest first
            if name[:end] in gts and not name[end:end + 1].isdigit():
                fits = gts[name[:end]]
                return [gt for gt in fits if gt.stem == stem] or fits
    return []


# ---- The commands that measure -------------------------------------------------------------------
# Each prints a table on stdout, and below it how it was measured.

def label(row, info):
    """What a table calls a task, or its row "mean". A poor figure on a task that was never trained
    is no fault of the model's, and the reader should see which is which."""
    return row if row in (*learned(info), "mean") else f"{row} (not trained)"


def measured(args, model, how):
    """How figures were taken, in a line. how: the way in which an "ep" model gets its tasks."""
    task = f", task {how}" if model.prompt == "ep" else ""
    return (f"PSNR in dB and SSIM on 8-bit RGB, 4 border pixels cut, {args.weights} weights, "
            f"prompt {model.prompt}{task}")


def testsets(args, model, info, device):
    """The table over whichever of the 19 sets are in the folder, and with --output the same as
    JSON. With --expect 30.36 it ends in an error unless that is the In-Dis average, within
    --tolerance: so a figure that somebody promised can be checked by a command."""
    told = args.oracle and model.prompt == "ep"
    # The paper's figures contain the published classifier's mistakes, and ours makes others.
    if info["published"] and model.prompt == "ep" and not (told or args.classifier):
        raise ValueError("add --classifier Classifier.pth, or --oracle to tell the true tasks")
    files = find_sets(Path(args.testsets), told)
    missing = [name for name in TESTSETS if name not in files]
    progress(f"left out: {', '.join(missing) or 'none'}")
    _, classifier = (None, None) if told else asked_task(args, model, info, device)
    task_of = named_by(classifier, Counter()) if classifier else None
    # Whole, however large: in tiles a network sees less than the whole picture, so tiles could
    # change the figures. So auto_tile has no say here; --tile N is for those who lack the memory.
    scores, own = score_sets(files, model, task_of, device, args.tile or 0)
    counts = {name: len(pairs) for name, pairs in files.items()}
    paper = comparable_figures(args, info, counts)
    convention = measured(args, model, "named by the classifier" if classifier else "told")
    print(score_table("set", scores, paper) + f"\n\n{convention}")
    for name in filter(own.get, own):                                  # those that have any
        print(f"{name}: {counted(counts[name], own[name])}")
    if args.output:
        saved = {"checkpoint": str(args.checkpoint), "convention": convention, "missing": missing,
                 "images": counts, "own_truths": own, "paper": paper}
        for k, column in enumerate(("psnr_in", "psnr", "gain", "ssim_in", "ssim", "ssim_gain")):
            saved[column] = {name: numbers[k] for name, numbers in scores.items()}
        with result_file(args.output) as file:
            file.write(json.dumps(saved, indent=1, allow_nan=False).encode())
    if args.expect is not None:
        got = scores.get("In-Dis", [None, None])[1] or math.nan
        if not abs(got - args.expect) <= args.tolerance:               # so that NaN fails, too
            raise ValueError(f"expected an In-Dis average of {args.expect:g} dB, got {got:.2f}")
        print(f"as expected, over {sum(name in ORDER for name in files)} of the 7 In-Dis sets")


def table(args, model, info, device):
    """PSNR and SSIM of each task before and after, In-Dis and Out-Dis, and with --output a picture
    of the first image of each. Tasks that the model has not learned are marked, and not in the
    mean. For a task classifier, the tables are of which task it names how often.

    Not to be compared with the paper's table: other images, and other draws from the same ranges.
    """
    images = load_images(args)
    for split, name in (("in", "In-Dis"), ("out", "Out-Dis (sr: ranges not published)")):
        print(f"\n{name}, {len(images)} images, seed {args.seed}\n")
        pairs = validation_pairs(images, split, args.seed)
        if isinstance(model, TaskClassifier):
            if "none" in model.answers:
                pairs["none"] = clean_pairs(images, args.seed)
            print(confusion_text(*confusion(model, pairs)))
            continue
        rows = evaluate(model, pairs, device, progress, learned(info))
        print(score_table("task", {label(name, info): row for name, *row in rows}))
        if split == "in" and args.output:
            task_strips(args.output, model, pairs, device, learned(info))
    if not isinstance(model, TaskClassifier):
        print(f"\n{measured(args, model, 'told')}")


def own_pairs(args, model, info, device):
    """score's six over --pairs LQ GT, matched as the test sets' pictures are. An "ep" model is told
    --task, or else what the classifier names, which is then reported."""
    pairs = match_pairs(*map(Path, args.pairs))
    task, classifier = asked_task(args, model, info, device)
    named = Counter()
    task_of = named_by(classifier, named) if classifier else lambda lq: task
    numbers, own = score(model, read_pairs(pairs), task_of, device, args.tile)
    print(score_table("pairs", {f"{len(pairs)} of {args.pairs[0]}": numbers}))
    names = ", ".join(f"{name} {count}" for name, count in named.most_common())
    how = f"; the classifier named their tasks: {names} (--task NAME tells one)" if named else ""
    print(f"\n{counted(len(pairs), own)}{how}")


def prompt_matrix(args, model, info, device):
    """Each task's images restored with each of the seven prompts: what a wrong prompt costs. With
    --output a picture of the table, too.

    Row: what was done to the images. Column: what the model is told. A model that has learned to
    use its prompts is best on the diagonal. Where it is as good off it, it ignores the prompt.
    """
    if model.prompt != "ep":
        raise ValueError("--prompt-matrix needs a model with explicit prompts (train.py --prompt)")
    images = load_images(args)
    pairs = validation_pairs(images, "in", args.seed)
    before = input_psnr(pairs)
    rows = []
    for task, examples in pairs.items():
        # mean_psnr prompts with the key: the same images under seven keys, seven prompts.
        scores = mean_psnr(model, dict.fromkeys(TASKS, examples), device)
        rows.append((label(task, info), [*scores.values(), before[task]]))
    header = [*TASKS, "input"]
    print(markdown(["images \\ prompt", *header], [[task, *values] for task, values in rows]))
    print(f"\nPSNR in dB, {len(images)} images, seed {args.seed}, {args.weights} weights")
    if args.output:
        title = "PSNR in dB: images of a task (row) restored with each prompt (column)"
        diagonal = {(i, i) for i in range(len(TASKS))}
        matrix_picture(args.output, title, header, rows, diagonal, reference="last")


def confusion_text(accuracy, matrix):
    """confusion's two results as a table, and the mean of the tasks' accuracies."""
    answers = ANSWERS[:len(matrix)]                                    # with or without "none"
    rows = [[task, *counts] for task, counts in zip(answers, matrix)]
    text = markdown(["true task \\ named as, images", *answers], rows)
    return f"{text}\n\naccuracy {np.mean(list(accuracy.values())):.1f} % on held-out images"


# ---- Restoring one's own pictures ----------------------------------------------------------------

# What can be written. The ending decides; PNG, TIFF and BMP keep every pixel as it was restored.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}


def process_input(args, model, info, device):
    """--input FILE or DIR, to --output: restores a picture, or all pictures of a folder. What goes
    into a folder keeps its name."""
    source, target = Path(args.input), Path(args.output)
    asked = asked_task(args, model, info, device)
    if source.is_dir():
        process_folder(source, target, args, model, info, asked)
        return
    if target.is_dir() or args.output.endswith(("/", "\\")):           # a folder, perhaps a new one
        target = target / source.name
    print(process_file(source, target, args, model, info, asked))


def process_folder(source, out, args, model, info, asked):
    """All pictures below a folder, to the same names below `out`. A picture that is there already,
    as after an interruption, is counted and left, but for --overwrite. Goes on after a bad file;
    then names all bad ones at the end, and the exit code is 1."""
    if out.is_file() or out.suffix.lower() in FORMATS or out.resolve() == source.resolve():
        raise ValueError(f"--input is a folder: name another one with --output, not {out}")
    # Where `out` lies in `source`, its own results are not restored again.
    files = [p for p in list_images([source]) if out.resolve() not in p.resolve().parents]
    bad, taken, there, start = [], {}, 0, time.monotonic()
    for count, path in enumerate(files, 1):
        try:
            target = free_name(path, out / path.relative_to(source), taken, args.compare)
            if target.exists() and not args.overwrite:
                there += 1
                continue
            line = process_file(path, target, args, model, info, asked)
        except (ValueError, OSError) as error:              # this file's fault: the next one
            # Some errors, as open_image's, name it themselves.
            bad.append(error if str(error).startswith(str(path)) else f"{path}: {error}")
            continue
        print(f"{count}/{len(files)} {line} | {time_left(start, count, len(files))}", flush=True)
    for error in bad:
        print(f"failed: {error}", file=sys.stderr)
    earlier = f", {there} of them from before; --overwrite makes them anew" if there else ""
    print(f"{len(files) - len(bad)} of {len(files)} pictures are in {out}{earlier}")
    if bad:
        sys.exit(1)


def free_name(path, target, taken, compare):
    """Where a picture of a folder goes: to its own name, with an ending that can be written. taken:
    {name: the picture that has it}; a name that another picture has is a ValueError."""
    if target.suffix.lower() not in FORMATS:                           # a.gif becomes a.gif.png
        target = target.with_name(short_name(target.name, 251) + ".png")
    for name in (target, beside(target))[:1 + compare]:
        if taken.setdefault(name, path) != path:
            raise ValueError(f"{taken[name]} takes the name {name}; rename one of the two")
    return target


def beside(target):
    """Where the before/after picture of a result goes."""
    return target.with_name(short_name(target.stem, 243) + "_compare.png")


def process_file(source, target, args, model, info, asked):
    """One file to one file of the same size; returns what is worth saying about it, in a line.
    asked: (task, classifier), see asked_task.

    What takes memory that grows with the picture stands inside a guard, open_image's or this one's,
    so that one picture too large for this machine can't end a folder.
    """
    # Both names are asked for before minutes of work, not after.
    claim(target, FORMATS, args, source)
    if args.compare:
        claim(beside(target), FORMATS, args, source)
    # open_image turns the picture upright, takes the first of several frames, and notes it.
    original, notes = open_image(source)
    w, h = original.size
    tile = auto_tile(model, h, w) if args.tile is None else args.tile
    (task, classifier), untouched = asked, False
    with memory_errors_explained(h, w, tile):
        picture = to_rgb(original)                                     # (H,W,3) uint8
        x = to_tensor(picture)                                         # (1,3,H,W)
        if classifier:
            task, note = name_task(classifier, x, info)
            notes, untouched = [*notes, note], task is None
        if not untouched:
            notes += [f"in tiles of {tile}"] if tile else []
            picture = restored(model, x, task, next(model.parameters()).device, tile)
        save_picture(target, picture, original, source if untouched else None)
        if args.compare and not untouched:
            compare_picture(beside(target), original, target)
    return ", ".join([f"{source} -> {target}", f"{w} x {h}", *notes])


def name_task(classifier, x, info):
    """choose_task's task, or None where the picture is better left as it is; and what is to be said
    about it."""
    task, name, sure = choose_task(classifier, x)
    note = "nothing found" if name == "none" else f"task {name}, {100 * sure:.0f} % sure"
    if task is None:
        note += ": left as it is; --task NAME forces one"
    elif task not in learned(info):
        note += "; warning: this model has not learned it"
    return task, note


def save_picture(target, picture, original, untouched=None):
    """Writes an (H,W,3) uint8 picture as what the PIL image `original` was. untouched: the file
    it was read from, if it is as it was: that is copied, unless another format is asked for.

    The network knows red, green and blue alone. So grey is restored as three equal channels and
    stored as one again; alpha passes by the network unchanged; a colour profile is copied, since it
    says what the numbers mean. EXIF data, GPS place and DPI are dropped: they may say what is no
    longer so, as a thumbnail does. (A file that is copied keeps them.) The file appears whole or
    not at all, on a full disk, too.
    """
    out = Image.fromarray(picture)
    bands = original.getbands()                                        # as ("R","G","B","A")
    kind = FORMATS[target.suffix.lower()]
    if bands[0] in ("1", "L"):
        out = out.convert("L")
    if "A" in bands and kind not in ("JPEG", "BMP"):                   # those two hold no alpha
        out.putalpha(original.getchannel("A"))
    # CMYK's profile fits no RGB. (None: no profile; quality is for JPEG and WebP to read.)
    profile = None if "C" in bands else original.info.get("icc_profile")
    with result_file(target) as file:
        if untouched and FORMATS.get(untouched.suffix.lower()) == kind:
            file.write(untouched.read_bytes())
        else:
            out.save(file, format=kind, quality=95, icc_profile=profile)


# ---- Memory, time, precision ---------------------------------------------------------------------
# A photo of 24 megapixels has 1,465 times as many pixels as a training crop of 128 x 128. It takes
# minutes on a CPU, and more memory than there is: it is restored in tiles, and says how far it is.

@contextlib.contextmanager
def memory_errors_explained(h, w, tile):
    """Around code for H x W pixels: where memory runs out, a ValueError says which tiles to try.

    The memory a network takes grows with the pixels it sees at once, tile * tile of them: tiles of
    half the edge take a quarter. Other errors pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        how = f"in tiles of {tile}" if tile else "whole"
        raise ValueError(f"not enough memory to restore {w} x {h} pixels {how}; "
                         f"try it in tiles (--tile {tile // 2 or 512})") from None


def tile_reporter():
    """A function report(done, tiles) that says every ten seconds how far a large picture is: one
    can tell a slow run from a dead one, and is not told of ten thousand tiles."""
    start = spoke = time.monotonic()

    def report(done, tiles):
        nonlocal spoke
        if time.monotonic() - spoke >= 10:
            spoke = time.monotonic()
            progress(f"tile {done} of {tiles}, {time_left(start, done, tiles)}")
    return report


def tune_cpu():
    """Two settings that change no result worth having, for training and evaluation on a CPU.

    Numbers below 1e-38, as e^-100 in a shifted window, slow a CPU down: they become zeros.
    Linux takes large freed blocks back and clears new ones, for every feature map: a twentieth of
    the demo's time. glibc is told to keep them."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):                         # glibc has it; others may not
            libc.mallopt(-4, 0)                              # M_MMAP_MAX: no block of its own
            libc.mallopt(-1, 2 ** 31 - 1)                    # M_TRIM_THRESHOLD: give nothing back


def set_precision(precision="fp32"):
    """What a GPU computes in. TF32 keeps 10 bits of a product's mantissa: faster on GPUs from 2020
    on. "tf32" allows it everywhere; "tf32conv" in convolutions, but not in matrix products, as the
    paper's torch 1.12 did, and as torch does unless told; any other word, nowhere."""
    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "tf32conv")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


# ---- Tables and pictures -------------------------------------------------------------------------

def figure(number, digits=2):
    """A number as a table shows it; "-" for None, where there is none."""
    return "-" if number is None else f"{number:.{digits}f}"


def markdown(header, rows):
    """A Markdown table that also reads well where nothing renders it: columns are aligned, the
    first to the left, the others to the right. Floats are given two decimals, and None is "-";
    whatever needs more comes as text.

        | task |  PSNR |
        |------|------:|
        | rain | 26.46 |
    """
    lines = []
    for row in (header, *rows):
        lines.append([figure(cell) if cell is None or isinstance(cell, float) else str(cell)
                      for cell in row])
    first, *others = [max(map(len, column)) for column in zip(*lines)]             # widths
    text = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, others)]
        text.append("| " + " | ".join([name.ljust(first), *padded]) + " |")
    rule = ["-" * (first + 2)] + ["-" * (width + 1) + ":" for width in others]     # ":" is: right
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def write(pen, at, text, size=15, anchor="la", colour="black"):
    """Writes on a sheet. anchor: where the text lies from the point `at`: "l" begins there, "m" is
    centred, "r" ends there; then "a", below it, or "m", centred on it."""
    text = text.encode(errors="replace").decode()              # a name that is no UTF-8
    pen.text(at, text, colour, ImageFont.load_default(size), anchor)


def gain_colour(gain, reach):
    """(R,G,B): white for no gain, towards green above, towards red below, most at +-reach; grey for
    NaN, where nothing is known."""
    if math.isnan(gain):
        return 225, 225, 225
    full = (46, 160, 90) if gain > 0 else (214, 69, 65)
    strength = 0.85 * min((abs(gain) / reach) ** 0.5, 1)       # the root lets small gains be seen
    return tuple(int(255 + (channel - 255) * strength) for channel in full)


def grid(columns, rows, cell, corner, title=""):
    """A white sheet for a table of pictures or colours, with the names of its columns above and of
    its rows to the left. cell, corner: (width, height) in pixels of a cell, and of what lies left
    of and above the first one. Returns (sheet, pen)."""
    (w, h), (left, top) = cell, corner
    size = (left + w * len(columns) + 16, top + h * len(rows) + 16)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    write(pen, (12, 10), title, 18)
    for j, name in enumerate(columns):
        write(pen, (left + (j + 0.5) * w, top - 14), name, anchor="mm")
    for i, name in enumerate(rows):
        write(pen, (left - 10, top + (i + 0.5) * h), name, anchor="rm")
    return sheet, pen


def matrix_picture(path, title, columns, rows, outlined=(), reference="first"):
    """Draws a table of numbers. A cell is the greener, the more it exceeds its reference, and the
    redder, the more it falls short of it; a cell that is None is grey.

    rows: [(name, [number or None, ...]), ...]. reference: what a cell is compared with; "first":
    the first row, same column, as stages are with the input; "last": the last column, same row, as
    prompts are with the input. outlined: {(row, column), ...} to frame, as a stage's tasks.
    """
    left, top, w, h = 190, 66, 78, 34
    sheet, pen = grid(columns, [name for name, _ in rows], (w, h), (left, top), title)
    numbers = np.array([values for _, values in rows], float)              # None becomes NaN
    gains = numbers - (numbers[:1] if reference == "first" else numbers[:, -1:])
    reach = max(np.abs(np.nan_to_num(gains)).max(), 1e-6)
    for i, (_, values) in enumerate(rows):
        for j, number in enumerate(values):
            x, y = left + j * w, top + i * h
            frame = "black" if (i, j) in outlined else None
            box = (x + 1, y + 1, x + w - 2, y + h - 2)
            pen.rectangle(box, gain_colour(gains[i, j], reach), frame, 2)
            write(pen, (x + w / 2, y + h / 2), figure(number), anchor="mm")
    save_sheet(sheet, path)


def task_strips(path, model, pairs, device, trained=TASKS, edge=192):
    """Draws the central edge x edge of the first image of each task. It is cut out, not shrunk to:
    shrinking would hide noise, blocks and blur. An "ep" model is told which task it is. Tasks that
    are not in `trained` are marked.

                degraded   restored   truth
        blur    [      ]   [      ]   [      ]
        noise   [      ]   [      ]   [      ]
    """
    left, top, step = 110, 30, edge + 6
    names = [task if task in trained else f"{task}\n(not trained)" for task in pairs]
    sheet, _ = grid(["degraded", "restored", "truth"], names, (step, step), (left, top))
    for i, (task, examples) in enumerate(pairs.items()):
        lq, gt = examples[0]
        pictures = to_image(lq), restored(model, lq, task, device), to_image(gt)   # (H,W,3) each
        for j, picture in enumerate(pictures):
            h, w, _ = picture.shape
            size = min(h, w, edge)       # that of a smaller one is shown larger, pixel by pixel
            y, x = (h - size) // 2, (w - size) // 2
            cut = Image.fromarray(picture[y:y + size, x:x + size])
            cut = cut.resize((edge, edge), Image.Resampling.NEAREST)
            sheet.paste(cut, (left + j * step, top + i * step))
    save_sheet(sheet, path)


def compare_picture(path, before, after):
    """before | after, each whole and in its own shape, shrunk to a longer side of 1200 at most.
    before: a PIL image; after: the file that was written, as it shows what is in it: grey as grey,
    and what is transparent on white.

    A person compares pictures; what a task does to pixels is for task_strips to show.
    """
    with Image.open(after) as written:
        images = [before.convert("RGBA"), written.convert("RGBA")]
    for image in images:
        image.thumbnail((1200, 1200))                          # keeps the shape, never enlarges
    left, right = images
    sheet = Image.new("RGB", (2 * left.width + 6, left.height), "white")
    sheet.paste(left, (0, 0), left)                            # itself as its mask: by its alpha
    sheet.paste(right, (left.width + 6, 0), right)
    save_sheet(sheet, path)


# ---- Curves: the loss and the learning rate of a training run ------------------------------------
# A plotter of some fifty lines, since the repository needs torch, numpy and pillow alone.

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2",
            "#7f7f7f")
_LEFT, _RIGHT = 80, 980                                      # of both panels, in pixels


def curves_panel(pen, top, bottom, curves, end, ticks, begins):
    """Draws {name: [(iteration, y), ...]} between the pixel rows top and bottom; the names stand to
    the right, each in its curve's colour. end: the last iteration. ticks: {text: y} of the numbers
    on the y axis, from its lower to its upper end. begins: {label: iteration} to mark."""
    low, *_, high = ticks.values()

    def place(x, y):                                         # in pictures y grows downwards
        return np.interp(x, (0, end), (_LEFT, _RIGHT)), np.interp(y, (low, high), (bottom, top))
    for text, y in ticks.items():
        pen.line((place(0, y), place(end, y)), "#dddddd")
        write(pen, (_LEFT - 8, place(0, y)[1]), text, 14, "rm")
    for x in range(0, end + 1, max(end // 5, 1)):            # there is no half iteration
        pen.line((place(x, low), place(x, high)), "#dddddd")
        write(pen, (place(x, low)[0], bottom + 13), f"{x:,}", 14, "mm")
    for text, x in begins.items():
        pen.line((place(x, low), place(x, high)), "#888888")
        write(pen, (place(x, low)[0] + 3, top - 15), text, 12)
    for k, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        pen.line([place(x, y) for x, y in points], colour, 2)
        write(pen, (_RIGHT + 8, top + 16 * k), name, 14, colour=colour)


def read_curves(log, begins):
    """A log.jsonl -> {task: [(iteration, log10 of the loss), ...]}. The log counts each stage's
    iterations from 1; here they are counted over all stages. begins: {label: iteration at which
    the stage begins}, in the stages' order.

    A line that can't be read, as the last one of a machine that lost power, is passed over, and so
    is one of another kind. Where iterations were run again after a kill, the last line counts.
    """
    first, losses = list(begins.values()), {}
    try:
        lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []                                           # no log: no losses
    for line in lines:
        try:
            entry = json.loads(line)
            x = first[entry["stage"] - 1] + entry["iteration"]
            for task, loss in entry["loss"].items():         # 0 has no logarithm
                if math.isfinite(loss):
                    losses.setdefault(task, {})[x] = math.log10(max(loss, 1e-12))
        except (ValueError, TypeError, LookupError, AttributeError):
            continue
    return {task: sorted(points.items()) for task, points in losses.items()}


def curves_picture(path, title, log, rates, begins):
    """Draws a log.jsonl: the loss of each task on a logarithmic axis, the learning rate below.
    rates: [(iteration, learning rate), ...], counted over all stages; begins: as in read_curves,
    and marked.

    Logarithmic, since what counts late in training are a few per cent of a loss that may differ
    from task to task by a factor of ten. One above the other with the same x, so that one sees a
    sequential run's stages: the rate restarts, and a task more begins its curve.
    """
    losses = read_curves(log, begins)
    end = max(x for x, _ in rates)
    sheet = Image.new("RGB", (_RIGHT + 80, 570), "white")
    pen = ImageDraw.Draw(sheet)
    write(pen, (12, 10), f"{title}: loss per task, and learning rate, by iteration", 18)
    powers = [power for points in losses.values() for _, power in points] or [0]
    powers = range(math.floor(min(powers)), math.floor(max(powers)) + 2)
    ticks = {f"{10.0 ** power:g}": power for power in powers}
    curves_panel(pen, 60, 376, losses, end, ticks, begins)
    highest = max(rate for _, rate in rates)
    curves_panel(pen, 426, 536, {"lr": rates}, end, {"0": 0, f"{highest:.1e}": highest}, {})
    save_sheet(sheet, path)


# ---- Files ---------------------------------------------------------------------------------------
# What cannot be read or written is reported in one line that names the file, before any work is
# done where that can be known.

def claim(path, endings, args, source=None):
    """To be called before the work begins, for every file that a command will write for its user:
    makes its folder. Raises ValueError for an ending of another kind, and where a file would be
    overwritten: none is without --overwrite, and never `source`, the picture that it is made of."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path}: the ending must be one of {' '.join(endings)}")
    if source and path.exists() and path.samefile(source):
        raise ValueError(f"{path} is the picture itself; choose another --output")
    if path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists; choose another name or add --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: not written ({error.strerror})") from None


@contextlib.contextmanager
def result_file(path):
    """degrade.whole_file for what a user asked for: where it can't be written, what was there is
    kept, and a ValueError names it."""
    try:
        with whole_file(path) as file:
            yield file
    except (OSError, ValueError) as error:             # ValueError: too large for this format
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not written ({reason})") from None


def save_sheet(sheet, path):
    """Writes a picture of this file's own making, in the format that its ending names."""
    with result_file(path) as file:
        sheet.save(file, format=FORMATS[Path(path).suffix.lower()])


def export(args, model, info, device):
    """The weights alone, in half precision: an eighth of train.py's file; loads as that does.

    train.py's file holds four float32 copies (raw, EMA, Adam's two moments). Here raw and EMA are
    the same tensors, which torch.save stores once, and half precision halves them.
    """
    path = Path(args.export)
    if info["published"]:
        raise ValueError("--export takes a checkpoint of train.py")
    if re.fullmatch(r"(last|stage\d+)\.pt", path.name.lower()):
        raise ValueError(f"--export {path}: a run calls so what --resume needs; choose another")
    claim(path, (".pt", ".pth"), args)
    half = model.half().state_dict()                         # whole numbers stay as they are
    with result_file(path) as file:
        torch.save({**info, "raw": half, "ema": half}, file)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def read_prompts(path):
    """The prompt images of a published "ep" checkpoint, from their .npy file: (7,128,128) float32.
    Raises ValueError with one line that names the file and what is wrong with it."""
    due = (len(TASKS), 128, 128)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, a header that promises more than the file holds costs no memory. (A pickle
            # could run code.)
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            prompts = np.array(found, np.float32)
    except Exception as error:         # damaged headers lead numpy to a dozen kinds
        reason = getattr(error, "strerror", None) or "not a .npy file of numbers"
        raise ValueError(f"--prompts {path}: {reason}") from None
    if prompts.shape != due or found.dtype.kind not in "fiu" or not np.isfinite(prompts).all():
        raise ValueError(f"--prompts {path}: takes finite numbers {due}, not {found.shape} of "
                         f"{found.dtype}")
    return prompts


# ---- The command line ----------------------------------------------------------------------------

# {flag: (its command, the other flags that it reads)}. The first of these that is given decides;
# without any it is the table. A flag that the command does not read is refused, not ignored.
COMMANDS = {
    "export": (export, ()),                                            # weights to a small file
    "input": (process_input, ("task", "classifier", "compare", "tile", "output")),
    "testsets": (testsets, ("oracle", "expect", "tolerance", "classifier", "tile", "output")),
    "pairs": (own_pairs, ("task", "classifier", "tile")),              # one's own, LQ and GT
    "prompt_matrix": (prompt_matrix, ("images", "depth", "seed", "output")),
    "table": (table, ("images", "depth", "seed", "output")),           # in, out, gain of each task
}
READ_BY_ALL = ("checkpoint", "weights", "prompts", "overwrite", "max_pixels")
# What --output may end in, for the commands that write one file.
ENDINGS = {"testsets": (".json",), "prompt_matrix": FORMATS, "table": FORMATS}


def check_flags(parser, args):
    """Sets args.mode; ends the command where a flag is given that this mode does not read.

    Someone who adds --expect 30 and forgets --testsets would believe a check that never ran.
    """
    args.mode = next(mode for mode in COMMANDS if mode == "table" or getattr(args, mode))
    read = (args.mode, *COMMANDS[args.mode][1], *READ_BY_ALL)
    for name, value in vars(args).items():
        if name not in ("mode", *read) and value != parser.get_default(name):
            readers = [f"--{mode}" for mode, (_, flags) in COMMANDS.items() if name in flags]
            hint = f": it goes with {' or '.join(readers)}" if readers else ""
            text = f"--{name} is of no use for --{args.mode}{hint}".replace("_", "-")
            parser.error(text.replace("--table", "the table"))
    if args.depth and not args.images:
        parser.error("--depth goes with --images: it is the folder of their depth maps")
    if args.input and not args.output:
        parser.error("--input needs --output: a picture's name, or a folder")
    if args.classifier and (args.oracle or args.task is not None):
        parser.error("--classifier is for --task auto; leave it out with --oracle or another task")


def check_paths(args):
    """Raises ValueError for a file or folder that is not there, and for a result that can't be
    written, before the model is loaded."""
    checkpoint = Path(args.checkpoint)
    if checkpoint.suffix.lower() in SUFFIXES:
        raise ValueError(f"{checkpoint} is a picture, not a checkpoint; give it, or a folder "
                         "of pictures, as --input")
    if not checkpoint.exists():
        runs = ", ".join(str(run.parent) for run in sorted(Path("runs").glob("*/last.pt")))
        raise ValueError(f"{checkpoint}: No such file; runs there are: {runs or 'none yet'}")
    for folder in (args.images, args.depth, args.testsets, *(args.pairs or ())):
        if folder is not None:
            require_folder(folder)
    for flag in ("input", "classifier", "prompts"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            raise ValueError(f"--{flag} {path}: No such file or folder")
    if args.output and args.mode in ENDINGS:
        claim(Path(args.output), ENDINGS[args.mode], args)


def task_or_auto(text):
    """The value of --task: None for auto, else (1,7) weights."""
    try:
        return None if text.lower() == "auto" else parse_task(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def arguments(argv):
    """The command line, parsed; exits with one line where flags are unknown or of no use."""
    parser = OneLineParser("eval.py", description=__doc__.partition("\nThe protocol")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", default=MODEL, metavar="CKPT", help="a file of train.py, a run's "
        "folder, or a published checkpoint (default: the model in assets/)")
    add("--output", metavar="PATH", help="where pictures or a report go (default: none is written)")
    add("--overwrite", action="store_true", help="replace files that are there (default: refuse)")
    add("--weights", choices=("raw", "ema"), default="raw", help="default: raw, as in the paper")
    add("--export", metavar="FILE", help="write the model's weights alone, in half precision")
    add("--max-pixels", type=int, metavar="N", help="of a picture, at most (default: 89 millions)")
    add = parser.add_argument_group("restore").add_argument
    add("--input", metavar="PATH", help="a picture, or a folder of pictures; needs --output")
    add("--task", type=task_or_auto, help=f"one of {', '.join(TASKS)}; or a mixture, such as "
        "noise:0.7,jpeg:0.3 (default: auto, the classifier's)")
    add("--classifier", metavar="FILE", help="for --task auto (default: the one in assets/)")
    add("--compare", action="store_true", help="also write before/after pictures (default: no)")
    add("--tile", type=int, metavar="N", help="restore in tiles of N x N pixels; 0: whole "
        "(default: 512 above a megapixel; with --testsets 0)")
    add = parser.add_argument_group("score").add_argument
    add("--images", metavar="DIR", help="photos to degrade (default: eight built-in images)")
    add("--depth", metavar="DIR", help="depth maps of --images, for haze (default: a prior)")
    add("--seed", type=int, default=0, help="decides how they are degraded (default: 0)")
    add("--pairs", nargs=2, metavar=("LQ", "GT"), help="one's own two folders, matched by name")
    add = parser.add_argument_group("test sets").add_argument
    add("--testsets", metavar="DIR", help="the published test sets, whichever are in this folder")
    add("--oracle", action="store_true", help="tell the true task (default: the classifier's)")
    add("--expect", type=float, metavar="DB", help="fail unless the In-Dis average is this")
    add("--tolerance", type=float, default=0.05, metavar="DB", help="of --expect (default: 0.05)")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt-matrix", action="store_true", help="score each task's images with each prompt")
    add("--prompts", metavar="NPY", help="type7.npy, for a published checkpoint with prompt ep")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def run(args):
    """Does what the flags ask for. Raises ValueError or OSError with one line on what is wrong."""
    Image.MAX_IMAGE_PIXELS = args.max_pixels or Image.MAX_IMAGE_PIXELS
    check_paths(args)
    set_precision("fp32")                                    # so that scores are the same anywhere
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = read_prompts(args.prompts) if args.prompts else None
    model, info = load_model(args.checkpoint, args.weights, device, prompts)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{info['arch']}, prompt {info['prompt']}, {size:,} {args.weights} weights, on {device}")
    if isinstance(model, TaskClassifier) and (args.output or args.mode not in ("table", "export")):
        raise ValueError(f"{args.checkpoint} restores nothing; give it as --classifier")
    if args.tile:
        check_tile(model, args.tile)
    command, _ = COMMANDS[args.mode]
    command(args, model, info, device)


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit."""
    tune_cpu()
    args = arguments(argv)
    with ends_in_one_line("eval.py"):
        run(args)


if __name__ == "__main__":
    main()
