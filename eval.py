"""Evaluate a model as the paper does, or restore one's own pictures with it.

    python eval.py --input assets/coffee_noisy.png --output restored.png    # the shipped model
    python eval.py runs/restormer-seq-ep-demo                         # seven tasks: in, out, gain
    python eval.py runs/restormer-seq-ep-demo --input assets/photos --output restored --compare
    python eval.py Restormer_S_EP.pth --prompts type7.npy --classifier Classifier.pth \\
                   --testsets MiO100                                  # the paper's 19 test sets
    python eval.py --prompt-matrix                                    # what a wrong prompt costs

The protocol (paper, Section 5.1), each point where it is computed below:
  - images are compared as 8-bit RGB: the output is clamped to [0,1], times 255, rounded (restored);
  - 4 pixels at each border are cut off, then PSNR and SSIM are taken (inside_border, psnr, ssim);
  - a set's score is the plain mean over its images (score), and an average over sets is the plain
    mean over the sets, however many images each holds (score_sets);
  - the weights are the raw ones, not their moving average (--weights raw, the default);
  - a picture runs through the network whole, not in tiles (testsets);
  - a model with explicit prompts gets the prompt that the task classifier names (chosen_prompt).

Words used throughout
  lq, gt      a degraded ("low-quality") image and its ground truth: (1,3,H,W) floats in [0,1]
  picture     the same as (H,W,3) uint8, red green blue: what a file holds and what metrics compare
  pairs       {task: [(lq, gt), ...]}
  task        one of mioir.TASKS by name; or (1,7) weights, a mixture of the seven prompt images
  prompt      in commands: such a task for all pictures, or the classifier, which names each one's
  "ep", "ap"  model.prompt: explicit prompts (need a task), adaptive prompts (need none); or None
  In-Dis      degraded as strongly as the training data; Out-Dis: more strongly than any of them;
              Unknown: by cameras and in other ways for which no task is given
  -M, -S      trained on all tasks mixed, or sequentially, one task more each time

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
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

# The four files depend on each other in one direction: mioir <- degrade <- eval <- train.
from degrade import (RANGES, SUFFIXES, OneLineParser, dead_leaves, degrade, find_depths,
                     gaussian_taps, list_images, open_image, read_image, read_photo, seeded,
                     time_left, to_image, to_rgb, to_tensor, whole_file)
from mioir import (ANSWERS, DOUBT, TASKS, TaskClassifier, auto_tile, check_tile, choose_task,
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
    """Peak signal-to-noise ratio in dB of two (H,W,3) uint8 pictures; infinite if they are equal.

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
    """Structural similarity of two (H,W,3) uint8 pictures, at most 1; 1 only for equal ones.

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


# ---- Scoring a model on images that we degrade ourselves -----------------------------------------
# The paper's test sets have to be downloaded. These pairs need no download and come out the same
# every time: a seed decides each image and each degradation, so two runs can be compared.

def builtin_images(count=8, edge=128):
    """The built-in validation images, [(image (1,3,E,E), depth (1,1,E,E)), ...]: dead leaves, from
    seeds of their own, so that no training run has seen them."""
    return [dead_leaves(edge, edge, seeded("validation", k)) for k in range(count)]


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


def restored(model, lq, task, device, tile=None):
    """What a model makes of one image, as a picture: (1,3,H,W) in [0,1] -> (H,W,3) uint8.

    The step from the network to what is compared and stored. Rounding is part of the protocol. Its
    error is spread evenly over one grey level, with a mean square of 1/12: alone it would give
    10 log10(255^2 * 12) = 58.9 dB, so next to a model's error it hardly counts.

    task: a name or (1,7) weights; "ep" models alone read it, others may get None.
    tile: edge of the tiles in pixels; 0: the image is run whole; None: as auto_tile says.
    """
    tile = auto_tile(model, *lq.shape[2:]) if tile is None else tile
    with memory_errors_explained(*lq.shape[2:], tile):
        y = restore(model, lq.to(device), task, tile, report=tile_reporter())
        # Section 5.1: clamped, times 255, rounded. A network's output may leave [0,1].
        return to_image(y)


def mean_psnr(model, pairs, device):
    """{task: mean PSNR in dB} of the restored images; an "ep" model is told the true task.

    As in the paper the decibels are averaged, not the squared errors: each image counts the same,
    however hard it is. (The decibels of the mean error would be ruled by the worst image.)
    """
    means = {}
    for task, examples in pairs.items():
        values = [psnr(restored(model, lq, task, device), to_image(gt)) for lq, gt in examples]
        means[task] = float(np.mean(values))
    return means


def input_psnr(pairs):
    """{task: mean PSNR in dB} of the degraded images themselves: what a model has to beat. A model
    that returns its input scores this, so it also says how hard a task's images are."""
    means = {}
    for task, examples in pairs.items():
        means[task] = float(np.mean([psnr(to_image(lq), to_image(gt)) for lq, gt in examples]))
    return means


def score(model, pairs, prompt, device, tile=None):
    """[PSNR in, out, gain, SSIM in, out, gain], plain means over pairs, [(lq, gt), ...]: "in" is
    the degraded image, "out" the restored one, both against the truth. prompt: what `restored`
    takes as a task; or the classifier, which names one for each image."""
    scores = []
    for lq, gt in pairs:
        task = prompt
        if isinstance(prompt, TaskClassifier):
            task, _ = classify(prompt, lq, damaged=True)
        before, truth = to_image(lq), to_image(gt)                     # (H,W,3) uint8 each
        after = restored(model, lq, task, device, tile)
        scores.append([psnr(before, truth), psnr(after, truth),
                       ssim(before, truth), ssim(after, truth)])
    p_in, p_out, s_in, s_out = np.mean(scores, 0).tolist()
    return [p_in, p_out, p_out - p_in, s_in, s_out, s_out - s_in]


def evaluate(model, pairs, device, say):
    """Rows [task, *score's six], and their mean as the last row.

    An "ep" model is told the true task, so this measures restoration alone, without the
    classifier's mistakes. say(text) is called after each task.
    """
    rows = []
    for task, examples in pairs.items():
        rows.append([task, *score(model, examples, task, device)])
        say(f"{task}: {rows[-1][1]:.2f} -> {rows[-1][2]:.2f} dB over {len(examples)} images")
    return [*rows, ["mean", *np.mean([numbers for _, *numbers in rows], 0).tolist()]]


# ---- Which prompt: the user's word, or the classifier's ------------------------------------------
# An "ep" model restores what its prompt names. In all of the paper's tables the prompt is chosen by
# a small classifier that looks at the degraded image: nothing about the image has to be known.

MODEL = Path(__file__).parent / "assets" / "restormer.pt"                 # these two are shipped
CLASSIFIER = MODEL.with_name("classifier.pt")


def confusion(classifier, pairs, device):
    """({task: accuracy in %}, 7 or 8 rows of counts) of a classifier on degraded images; and on
    clean ones, if there are pairs["none"].

                    named blur  noise  jpeg  ...
        truly blur       7       0      1           The diagonal is right; off it one reads which
        truly noise      0       8      0           two tasks look alike. The accuracy of a task is
        ...                                         the diagonal's share of its row.
    """
    classifier.eval()
    answers = classifier.answers                           # the tasks, perhaps "none" after them
    matrix = np.zeros((len(answers), len(answers)), int)
    accuracy = {}
    for task, examples in pairs.items():
        row = answers.index(task)
        for lq, _ in examples:
            name, _ = classify(classifier, lq)
            matrix[row, answers.index(name)] += 1
        accuracy[task] = 100 * matrix[row, row].item() / len(examples)
    return accuracy, matrix.tolist()


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


def learned(info):
    """The set of tasks that a checkpoint of train.py has met; all, where a file does not say so.

    Its facts list each stage's tasks, the stages to come included; "stage" counts those that are
    over, so that order[stage] is the one in training, if any.
    """
    stages = info.get("facts", {}).get("order") or [TASKS]
    return {task for stage in stages[:info.get("stage", len(stages)) + 1] for task in stage}


def chosen_prompt(args, model, info, device):
    """What gives each picture its prompt: the (1,7) weights of --task; or the task classifier; or
    None, for a model that takes no prompt, and where --oracle tells the truth.

    A --task that has no effect, or no good one, is said.
    """
    if args.task in (None, "", "auto"):
        asked = model.prompt == "ep" and not args.oracle
        return load_classifier(args.classifier, device) if asked else None
    weights = parse_task(args.task)
    if model.prompt != "ep":
        print("--task ignored: this model takes no prompt")
        return None
    # A prompt that training never used is an image like any other: what it does is not known.
    named = {task for task, weight in zip(TASKS, weights[0]) if weight > 0}
    unknown = named - learned(info)
    if unknown:
        print(f"warning: this model has not learned {', '.join(sorted(unknown))}")
    return weights


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
        return "S" if len(info["facts"]["periods"]) > 1 else "M"
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


def match_pairs(lq_folder, gt_folder):
    """[(LQ file, GT file), ...] of two folders: by name where names fit (see partner), first in the
    same subfolder, then anywhere; what is left over on either side is counted and said. Where no
    name fits at all, in sorted order, if there are as many of one as of the other. ValueError if
    not, or where two GTs fit: a wrong pair would not stop the run, only spoil the average."""
    lqs, gts = list_images([lq_folder]), list_images([gt_folder])
    near, anywhere = {}, {}                                # by subfolder and stem; by stem
    for gt in gts:
        below = near.setdefault(gt.parent.relative_to(gt_folder), {})
        for stems in (below, anywhere):
            stems.setdefault(gt.stem, []).append(gt)
    pairs = {}
    for lq in lqs:
        below = near.get(lq.parent.relative_to(lq_folder), {})
        fits = partner(lq.stem, below) or partner(lq.stem, anywhere) or [None]
        if len(fits) > 1:
            raise ValueError(f"{lq} fits {fits[0]} and {fits[1]}: give each GT its LQ's path below "
                             "its folder, and one ending")
        pairs[lq] = fits[0]
    if not any(pairs.values()) and len(lqs) == len(gts):
        return list(zip(lqs, gts))
    lone, unused = list(pairs.values()).count(None), len(set(gts) - set(pairs.values()))
    alone = f"{lone} of {lq_folder}, {unused} of {gt_folder}"
    if lone == len(lqs):
        raise ValueError(f"can't be paired, by name or by order: {alone}")
    if lone or unused:
        progress(f"no partner, left out: {alone}")
    return [(lq, gt) for lq, gt in pairs.items() if gt is not None]


def partner(stem, gts):
    """GT files with the longest stem that an LQ's stem begins with, or None. gts: {stem: files}.

    LQ stems may go on after it ("0801_rain", "0801x4m"), but not with a digit: "10" is not of "1".
    """
    for end in range(len(stem), 0, -1):                                # the longest first
        if stem[:end] in gts and not stem[end:end + 1].isdigit():
            return gts[stem[:end]]
    return None


def read_pairs(pairs):
    """Reads [(LQ file, GT file), ...] one by one, as pairs (lq, gt) of one size."""
    for lq_path, gt_path in pairs:
        lq, gt = to_tensor(read_image(lq_path)), to_tensor(read_image(gt_path))    # (1,3,H,W)
        # An LQ may lack its GT's last rows or columns, where H or W is no multiple of the scale.
        if np.abs(np.subtract(lq.shape, gt.shape)).max() > 8:
            raise ValueError(f"{lq_path} and {gt_path} are not of one size: not a pair")
        _, _, h, w = np.minimum(lq.shape, gt.shape)
        if min(h, w) < 19:                                 # ssim's 11, and 4 cut off each side
            raise ValueError(f"{gt_path}: {w} x {h} pixels; to be measured it needs 19 x 19")
        yield lq[:, :, :h, :w], gt[:, :, :h, :w]


def score_sets(files, model, prompt, device, tile):
    """{name: score's six} of each of the sets `files`, {name: [(LQ file, GT file), ...]}, and of
    the groups In-Dis, Out-Dis and Unknown: the plain mean over a group's sets.

    prompt: the classifier; None: the true task is told, or the model needs none.
    """
    scores, start = {}, time.monotonic()
    for name, pairs in files.items():
        _, task, *_ = TESTSETS[name]
        scores[name] = score(model, read_pairs(pairs), prompt or task, device, tile)
        left = time_left(start, len(scores), len(files))
        progress(f"{name}: {scores[name][1]:.2f} dB over {len(pairs)} images, {left}")
    for group in GROUPS:
        members = [scores[name] for name in files if TESTSETS[name][0] == group]
        if members:
            scores[group] = np.mean(members, 0).tolist()
    return scores


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
        row += [f"{number:.4f}" for number in numbers[3:]]             # SSIM: two decimals more
        if paper:
            row += [paper[name], f"{numbers[1] - paper[name]:+.2f}"] if name in paper else ["", ""]
        rows.append(row)
    return markdown(header, rows)


def testsets(args, model, info, device):
    """The table over whichever of the 19 sets are in the folder; the same as JSON beside it. With
    --expect 30.36 it ends in an error unless that is the In-Dis average, within --tolerance: so a
    figure that somebody promised can be checked by a command."""
    root = Path(args.testsets)
    report = result_path(args, f"{args.checkpoint.stem}.testsets.json")
    files = {}
    for name, (_, task, lq, gt) in TESTSETS.items():
        # Nobody knows what was done to the Unknown sets: with --oracle there is nothing to tell.
        untold = args.oracle and model.prompt == "ep" and task is None
        if (root / lq).is_dir() and not untold:
            files[name] = match_pairs(root / lq, root / gt)
    missing = [name for name in TESTSETS if name not in files]
    if not files:
        raise ValueError(f"--testsets {root}: no set to score there, such as single_indis/rain")
    # The paper's figures contain the published classifier's mistakes, and ours makes others.
    if info["published"] and model.prompt == "ep" and not (args.oracle or args.classifier):
        raise ValueError("add --classifier Classifier.pth, or --oracle to tell the true tasks")
    progress(f"left out: {', '.join(missing) or 'none'}")
    prompt = chosen_prompt(args, model, info, device)                  # the classifier, or None
    # Whole, however large: in tiles a network sees less than the whole picture, so tiles could
    # change the figures. So auto_tile has no say here; --tile N is for those who lack the memory.
    scores = score_sets(files, model, prompt, device, args.tile or 0)
    counts = {name: len(pairs) for name, pairs in files.items()}
    paper = comparable_figures(args, info, counts)
    told = "named by the classifier" if prompt else "told"
    convention = (f"RGB, 8 bit, 4 border pixels cut, {args.weights} weights, "
                  f"prompt {model.prompt}, task {told}")
    print(score_table("set", scores, paper) + f"\n\n{convention}")
    saved = {"checkpoint": str(args.checkpoint), "convention": convention, "missing": missing,
             "images": counts, "paper": paper}
    for k, column in enumerate(("psnr_in", "psnr", "gain", "ssim_in", "ssim", "ssim_gain")):
        saved[column] = {name: numbers[k] for name, numbers in scores.items()}
    report.write_text(json.dumps(saved, indent=1))
    print(f"JSON: {report}")
    if args.expect is not None:
        got = scores["In-Dis"][1] if "In-Dis" in scores else math.nan
        if not abs(got - args.expect) <= args.tolerance:               # so that NaN fails, too
            raise ValueError(f"expected an In-Dis average of {args.expect:g} dB, got {got:.2f}")


# ==================================================================================================
# Plumbing. Nothing below this line is in the paper: commands on images that we degrade ourselves,
# restoring one's own pictures, memory and progress, tables and pictures, files, the command line.
# ==================================================================================================

# ---- Commands on images that we degrade ourselves ------------------------------------------------
# Most print a table on stdout, say below it how it was measured, and write a picture.

def load_images(args):
    """[(image (1,3,H,W), depth (1,1,h,w) or None), ...]: built in, or those of --images. A file
    that cannot be read is named and skipped. Without a depth map haze gets degrade's prior, far at
    the top and near at the bottom."""
    if not args.images:
        return builtin_images()
    images = []
    for files in find_depths([args.images], args.depth).items():
        try:
            image, depth = read_photo(*files)                                # (H,W,3), (h,w) or None
            depth = None if depth is None else torch.from_numpy(depth)[None, None]
            images.append((to_tensor(image), depth))
        except ValueError as error:
            progress(f"skipped {error}")
    if not images:
        raise ValueError(f"{args.images}: no readable image")
    return images


def label(row, info):
    """What a table calls a task, or its row "mean". A poor figure on a task that was never trained
    is no fault of the model's, and the reader should see which is which."""
    return row if row in (*learned(info), "mean") else f"{row} (not trained)"


def table(args, model, info, device):
    """PSNR and SSIM of each task before and after, In-Dis and Out-Dis, and a strip picture; of a
    task classifier how often it names each task, and knows clean pictures. Tasks that the model has
    not learned are marked; they are in the mean all the same.

    Not to be compared with the paper's table: other images, and other draws from the same ranges.
    """
    names_tasks = isinstance(model, TaskClassifier)
    strips = None if names_tasks else result_path(args, "strips.png")
    images = load_images(args)
    for split, name in (("in", "In-Dis"), ("out", "Out-Dis (sr: ranges not published)")):
        print(f"\n{name}, {len(images)} images, seed {args.seed}\n")
        pairs = validation_pairs(images, split, args.seed)
        if names_tasks:
            if "none" in model.answers:
                pairs["none"] = clean_pairs(images, args.seed)
            print(confusion_text(*confusion(model, pairs, device)))
            continue
        rows = evaluate(model, pairs, device, progress)
        print(score_table("task", {label(name, info): row for name, *row in rows}))
        if split == "in":
            task_strips(strips, model, pairs, device)
    if not names_tasks:
        print(f"\nPSNR in dB and SSIM on 8-bit RGB, 4 border pixels cut, {args.weights} weights, "
              f"true task told. Picture: {strips}")


def own_pairs(args, model, info, device):
    """score's six over --pairs LQ GT, matched as the test sets' pictures are. An "ep" model is told
    --task, or else what the classifier names."""
    pairs = match_pairs(Path(args.pairs[0]), Path(args.pairs[1]))
    prompt = chosen_prompt(args, model, info, device)
    numbers = score(model, read_pairs(pairs), prompt, device, args.tile)
    print(score_table("pairs", {f"{len(pairs)} of {args.pairs[0]}": numbers}))


def prompt_matrix(args, model, info, device):
    """Each task's images restored with each of the seven prompts: what a wrong prompt costs.

    Row: what was done to the images. Column: what the model is told. A model that has learned to
    use its prompts is best on the diagonal. Where it is as good off it, it ignores the prompt.
    """
    if model.prompt != "ep":
        raise ValueError("--prompt-matrix needs a model with explicit prompts (train.py --prompt)")
    path = result_path(args, "prompts.png")
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
    title = "PSNR in dB: images of a task (row) restored with each prompt (column)"
    diagonal = {(i, i) for i in range(len(TASKS))}
    matrix_picture(path, title, header, rows, diagonal, reference="last")
    print(f"\nPSNR in dB, {len(images)} images, seed {args.seed}, {args.weights} weights. "
          f"Picture: {path}")


def confusion_text(accuracy, matrix):
    """confusion's two results as a table, and the mean of the tasks' accuracies."""
    answers = ANSWERS[:len(matrix)]                                    # with or without "none"
    rows = [[task, *counts] for task, counts in zip(answers, matrix)]
    text = markdown(["true task \\ named as, images", *answers], rows)
    return f"{text}\n\naccuracy {np.mean(list(accuracy.values())):.1f} % on held-out images"


def interpolate(args, model, info, device):
    """A strip from one task's prompt to another's: --interpolate noise,jpeg --steps 5.

    One input, restored with (1 - s) P_noise + s P_jpeg for s = 0, 1/4, 2/4, 3/4, 1.
    """
    if model.prompt != "ep" or not args.input or args.steps < 2:
        raise ValueError("--interpolate A,B needs an 'ep' model, --input PATH, --steps > 1")
    names = args.interpolate.split(",")
    first, second = parse_task(names[0]), parse_task(names[1])         # (1,7) each
    path = result_path(args, "interpolation.png")
    x = to_tensor(read_image(args.input))
    header, pictures = ["input"], [to_image(x)]
    for share in np.linspace(0, 1, args.steps).tolist():
        mixture = (1 - share) * first + share * second
        header.append(f"{names[0]} {1 - share:.2f} {names[1]} {share:.2f}")
        pictures.append(restored(model, x, mixture, device, args.tile))
    strip_picture(path, header, [("", pictures)])
    print(f"picture: {path}")


# ---- Restoring one's own pictures ----------------------------------------------------------------

# What can be written. The ending decides; PNG, TIFF and BMP keep every pixel as it was restored.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}


def process_input(args, model, info, device):
    """--input FILE or DIR: restores a picture, or all pictures of a folder. What goes into a folder
    keeps its name."""
    source = Path(args.input)
    if not source.exists():
        raise ValueError(f"--input {source}: No such file or folder")
    prompt = chosen_prompt(args, model, info, device)
    if source.is_dir():
        process_folder(source, args, model, info, prompt, device)
        return
    target = Path(args.output or f"{source.stem}_restored.png")        # in the working folder
    if target.is_dir() or (args.output or "").endswith(("/", "\\")):   # a folder, perhaps a new one
        target = target / source.name
    print(process_file(source, target, args, model, info, prompt, device))


def process_folder(source, args, model, info, prompt, device):
    """All pictures below a folder, to the same names below --output. Goes on after a bad file; then
    names all bad ones at the end, and the exit code is 1."""
    out = Path(args.output or "")
    if not args.output or out.is_file() or out.suffix.lower() in FORMATS:
        raise ValueError("--input is a folder: name another one with --output")
    if out.resolve() == source.resolve():
        raise ValueError(f"--output {out} is the folder of --input: name another one")
    files = list_images([source])
    if source.resolve() in out.resolve().parents:           # its own results are not restored again
        files = [path for path in files if out.resolve() not in path.resolve().parents]
    bad, taken, start = [], {}, time.monotonic()
    for count, path in enumerate(files, 1):
        target = out / path.relative_to(source)
        if target.suffix.lower() not in FORMATS:                       # a.gif becomes a.gif.png
            target = target.with_name(target.name + ".png")
        try:
            for name in (target, beside(target))[:1 + args.compare]:
                if taken.setdefault(name, path) != path:
                    raise ValueError(f"{taken[name]} takes the name {name}; rename one of the two")
            said = process_file(path, target, args, model, info, prompt, device)
            left = time_left(start, count, len(files))
            print(f"{count}/{len(files)} {said} | {left}", flush=True)
        except (ValueError, OSError) as error:              # this file's fault: the next one
            named = str(error).startswith(str(path))        # as open_image's are
            bad.append(error if named else f"{path}: {error}")
    for error in bad:
        print(f"failed: {error}", file=sys.stderr)
    print(f"{len(files) - len(bad)} of {len(files)} pictures are in {out}")
    if bad:
        sys.exit(1)


def beside(target):
    """Where the before/after picture of a result goes."""
    return target.with_name(target.stem + "_compare.png")


def process_file(source, target, args, model, info, prompt, device):
    """One file to one file of the same size; returns what is worth saying about it, in a line.

    What takes memory that grows with the picture stands inside a guard, open_image's or this one's,
    so that one picture too large for this machine can't end a folder.
    """
    # Both names are asked for before minutes of work, not after.
    comparison = beside(target)
    claim(target, FORMATS, args, source)
    if args.compare:
        claim(comparison, FORMATS, args, source)
    # open_image turns the picture upright, takes the first of several frames, and notes it.
    original, notes = open_image(source)
    w, h = original.size
    tile = auto_tile(model, h, w) if args.tile is None else args.tile
    with memory_errors_explained(h, w, tile):
        picture = to_rgb(original)                                     # (H,W,3) uint8
        x = to_tensor(picture)                                         # (1,3,H,W)
        task, untouched = prompt, False
        if isinstance(prompt, TaskClassifier):
            task, note = ask_classifier(prompt, x, info)       # a name; None: let it be
            untouched = task is None
            notes.append(note)
        if not untouched and tile > 0:
            notes.append(f"in tiles of {tile}")
        y = picture if untouched else restored(model, x, task, device, tile)       # (H,W,3) uint8
        save_picture(target, y, original, source if untouched else None)
        if args.compare:
            compare_picture(comparison, picture, y)
    return ", ".join([f"{source} -> {target}", f"{w} x {h}", *notes])


def ask_classifier(classifier, x, info):
    """(task, or None where the picture is better left as it is; what to say about it).

    A picture that is fine must stay so. A classifier that can answer "none" is believed when it
    does, and where it is in doubt nothing is touched either: a picture left as it was can be
    restored later. The published classifier has to name a damage; there a doubt is only said.
    """
    task, name, sure = choose_task(classifier, x)
    note = f"task {name}, {100 * sure:.0f} % sure"
    if task is None:
        found = "nothing found" if name == "none" else f"{note}, too little"
        return None, f"{found}: left as it is; --task NAME forces one"
    if sure < DOUBT.get(name, 0.75):
        note += " - low: look at it, or name the task with --task"
    if name not in learned(info):
        note += "; warning: this model has not learned it"
    return name, note


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
    if bands[0] in ("1", "L", "I", "F"):
        out = out.convert("L")
    if "A" in bands and kind not in ("JPEG", "BMP"):                   # those two hold no alpha
        out.putalpha(original.getchannel("A"))
    # CMYK's profile fits no RGB. (None: no profile; quality is for JPEG and WebP to read.)
    profile = None if "C" in bands else original.info.get("icc_profile")
    with picture_file(target) as unfinished:
        if untouched and FORMATS.get(untouched.suffix.lower()) == kind:
            unfinished.write(untouched.read_bytes())
        else:
            out.save(unfinished, format=kind, quality=95, icc_profile=profile)


@contextlib.contextmanager
def picture_file(path):
    """whole_file, for a picture: what was there is kept if it can't be written, which is said."""
    try:
        with whole_file(path) as unfinished:
            yield unfinished
    except (OSError, ValueError) as error:             # ValueError: too large for this format
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not written ({reason})") from None


# ---- Memory and progress -------------------------------------------------------------------------
# A photo of 24 megapixels has 1,465 times as many pixels as a training crop of 128 x 128. It takes
# minutes on a CPU, and more memory than there is: it is restored in tiles, and somebody waits.

def lacks_memory(error):
    """Whether an exception says that memory ran out. numpy raises MemoryError; torch RuntimeError,
    which only its words tell from others: CUDA's "an illegal memory access" is a fault."""
    words = repr(error).lower()
    return "memory" in words and "illegal" not in words


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
    """A function report(done, tiles) that says how far a large picture is: to a person at a
    terminal after each tile, to a log file every 30 s, so that who reads it later can tell a slow
    run from a dead one, and is not told of ten thousand tiles."""
    start = said = time.monotonic()                            # said: when it last spoke

    def report(done, tiles):
        nonlocal said
        text = f"  tile {done} of {tiles}, {time_left(start, done, tiles)} "
        if sys.stderr.isatty():
            end = "\n" if done == tiles else ""                        # \r: over the last one
            print(f"\r{text}", end=end, file=sys.stderr, flush=True)
        elif time.monotonic() - said >= 30:
            said = time.monotonic()
            print(text, file=sys.stderr, flush=True)
    return report


def progress(text):
    """A line for whoever waits; on stderr, so that a table can be redirected to a file."""
    print(f"  {text}", file=sys.stderr)


# ---- Tables and pictures -------------------------------------------------------------------------

def markdown(header, rows):
    """A Markdown table that also reads well where nothing renders it: columns are aligned, the
    first to the left, the others to the right. Floats are given two decimals; whatever needs more
    comes as text.

        | task |  PSNR |
        |------|------:|
        | rain | 26.46 |
    """
    lines = []
    for row in (header, *rows):
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row])
    first, *others = [max(map(len, column)) for column in zip(*lines)]             # widths
    text = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, others)]
        text.append("| " + " | ".join([name.ljust(first), *padded]) + " |")
    rule = ["-" * (first + 2)] + ["-" * (width + 1) + ":" for width in others]     # ":" is: right
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def gain_colour(gain, reach):
    """(R,G,B): white for no gain, towards green above, towards red below, most at +-reach."""
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
    pen.text((12, 10), title, "black", ImageFont.load_default(18))
    font = ImageFont.load_default(15)
    for j, name in enumerate(columns):
        pen.text((left + (j + 0.5) * w, top - 14), name, "black", font, "mm")    # middle, middle
    for i, name in enumerate(rows):
        pen.text((left - 10, top + (i + 0.5) * h), name, "black", font, "rm")    # right, middle
    return sheet, pen


def save_sheet(sheet, path):
    """Writes a picture of this file's own making, in the format that its ending names."""
    with picture_file(path) as unfinished:
        sheet.save(unfinished, format=FORMATS[Path(path).suffix.lower()])


def matrix_picture(path, title, columns, rows, outlined=(), reference="first"):
    """Draws a table of numbers: each cell green by its gain on its reference, red by its loss.

    rows: [(name, [number, ...]), ...]. reference: what a cell is compared with; "first": the first
    row, same column, as stages are with the input; "last": the last column, same row, as prompts
    are with the input. outlined: {(row, column), ...} to frame, such as the tasks of a stage.
    """
    left, top, w, h = 190, 66, 78, 34
    sheet, pen = grid(columns, [name for name, _ in rows], (w, h), (left, top), title)
    numbers = np.array([values for _, values in rows])
    gains = numbers - (numbers[:1] if reference == "first" else numbers[:, -1:])
    reach = max(np.abs(gains).max(), 1e-6)
    for (i, j), number in np.ndenumerate(numbers):
        x, y = left + j * w, top + i * h
        frame = "black" if (i, j) in outlined else None
        box = (x + 1, y + 1, x + w - 2, y + h - 2)
        pen.rectangle(box, gain_colour(gains[i, j], reach), frame, 2)
        middle = (x + w / 2, y + h / 2)
        pen.text(middle, f"{number:.2f}", "black", ImageFont.load_default(15), "mm")
    save_sheet(sheet, path)


def strip_picture(path, header, rows, edge=192):
    """Draws rows of pictures: [(name, [(H,W,3) uint8, ...]), ...], their central edge x edge.
    The middle is cut out, not shrunk to: shrinking would hide noise, blocks and blur.

                degraded   restored   truth        the header
        blur    [      ]   [      ]   [      ]     a row: its name, then its pictures
        noise   [      ]   [      ]   [      ]
    """
    left, top, step = 76, 30, edge + 6
    sheet, _ = grid(header, [name for name, _ in rows], (step, step), (left, top))
    for i, (_, pictures) in enumerate(rows):
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

    A person compares pictures; what a task does to pixels is for strip_picture to show.
    """
    left, right = Image.fromarray(before), Image.fromarray(after)
    for image in (left, right):
        image.thumbnail((1200, 1200))                          # keeps the shape, never enlarges
    sheet = Image.new("RGB", (2 * left.width + 6, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 6, 0))
    save_sheet(sheet, path)


def task_strips(path, model, pairs, device):
    """degraded | restored | truth for the first image of each task; an "ep" model is told which
    task it is."""
    rows = []
    for task, examples in pairs.items():
        lq, gt = examples[0]
        rows.append((task, [to_image(lq), restored(model, lq, task, device), to_image(gt)]))
    strip_picture(path, ["degraded", "restored", "truth"], rows)


# ---- Curves: the loss and the learning rate of a training run ------------------------------------
# A plotter of some forty lines, since the repository needs torch, numpy and pillow alone.

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")
_LEFT, _RIGHT = 80, 980                                      # of both panels, in pixels


def curves_panel(pen, top, bottom, curves, end, ticks):
    """Draws {name: [(iteration, y), ...]} between the pixel rows top and bottom; the names stand to
    the right, each in its curve's colour. end: the last iteration. ticks: {text: y} of the numbers
    on the y axis, from its lower to its upper end."""
    font = ImageFont.load_default(14)
    low, *_, high = ticks.values()

    def place(x, y):                                         # in pictures y grows downwards
        return np.interp(x, (0, end), (_LEFT, _RIGHT)), np.interp(y, (low, high), (bottom, top))
    for text, y in ticks.items():
        _, row = place(0, y)
        pen.line((_LEFT, row, _RIGHT, row), "#dddddd")
        pen.text((_LEFT - 8, row), text, "black", font, "rm")
    for x in range(0, end + 1, max(end // 5, 1)):            # there is no half iteration
        column, _ = place(x, low)
        pen.line((column, top, column, bottom), "#dddddd")
        pen.text((column, bottom + 13), f"{x:,}", "black", font, "mm")
    for k, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        pen.line([place(x, y) for x, y in points], colour, 2)
        pen.text((_RIGHT + 8, top + 16 * k), name, colour, font)


def read_curves(log):
    """A log.jsonl -> ({task: [(iteration, log10 of the loss), ...]}, [(iteration, learning rate),
    ...]). The log counts each stage's iterations from 1; here they are counted over all stages."""
    losses, rates = {}, []
    reached = {}                                             # {stage: its last iteration so far}
    for line in Path(log).read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:                                  # other lines are of other kinds
            reached[entry["stage"]] = entry["iteration"]
            x = sum(reached.values())
            rates.append((x, entry["lr"]))
            for task, loss in entry["loss"].items():         # 0 has no logarithm
                losses.setdefault(task, []).append((x, math.log10(max(loss, 1e-12))))
    return losses, rates


def curves_picture(path, title, log):
    """Draws a log.jsonl: the loss of each task on a logarithmic axis, the learning rate below.

    Logarithmic, since what counts late in training are a few per cent of a loss that may differ
    from task to task by a factor of ten. One above the other with the same x, so that one sees a
    sequential run's stages: the rate restarts, and a task more begins its curve.
    """
    losses, rates = read_curves(log)
    end = rates[-1][0]
    sheet = Image.new("RGB", (_RIGHT + 80, 570), "white")
    pen = ImageDraw.Draw(sheet)
    text = f"{title}: loss per task, and learning rate, by iteration"
    pen.text((12, 10), text, "black", ImageFont.load_default(18))
    powers = [power for points in losses.values() for _, power in points]
    powers = range(math.floor(min(powers)), math.floor(max(powers)) + 2)
    curves_panel(pen, 56, 376, losses, end, {f"{10.0 ** power:g}": power for power in powers})
    highest = max(rate for _, rate in rates)
    curves_panel(pen, 426, 536, {"lr": rates}, end, {"0": 0, f"{highest:.1e}": highest})
    save_sheet(sheet, path)


# ---- Files ---------------------------------------------------------------------------------------
# What cannot be read or written is said in one line that names the file, before any work is done
# where that can be known.

def claim(path, endings, args, source=None):
    """Asked of every file that a command writes for its user, before the work begins: makes its
    folder. Raises ValueError for an ending of another kind, and where a file would be overwritten:
    none is without --overwrite, and never `source`, the picture that it is made of."""
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


def result_path(args, name):
    """--output, or `name` beside the checkpoint; for the shipped one, in the working folder, so
    that assets/ stays as it is. Where an earlier result lies, strips.png becomes strips-2.png."""
    shipped = args.checkpoint.resolve() == MODEL.resolve()
    folder = Path() if shipped else args.checkpoint.parent
    path, number = Path(args.output or folder / name), 2     # the first was without a number
    while path.exists() and not args.output and not args.overwrite:
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    claim(path, [".json"] if name.endswith(".json") else FORMATS, args, args.input)
    return path


def checkpoint_file(path):
    """The file meant by CKPT, for which people also type a run's folder, or a picture's name alone.
    Raises ValueError for the latter, with the command that was meant; and for no file at all."""
    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{path} is a picture, not a checkpoint; to restore it: --input {path}")
    if path.is_dir():
        path = path / "last.pt"
        progress(f"a folder: takes its {path}")
    if not path.exists():
        runs = ", ".join(str(run.parent) for run in sorted(Path("runs").glob("*/last.pt")))
        raise ValueError(f"{path}: No such file; runs there are: {runs or 'none yet'}")
    return path


def export(args, model, info, device):
    """The weights alone, in half precision: an eighth of train.py's file; loads as that does.

    train.py's file holds four float32 copies (raw, EMA, Adam's two moments). Here raw and EMA are
    the same tensors, which torch.save stores once, and half precision halves them.
    """
    path = Path(args.export)
    if info["published"]:
        raise ValueError("--export takes a checkpoint of train.py")
    if re.fullmatch(r"(last|previous|stage\d+)\.pt", path.name.lower()):
        raise ValueError(f"--export {path}: a run calls so what --resume needs; choose another")
    claim(path, (".pt", ".pth"), args)
    half = model.half().state_dict()                         # whole numbers stay as they are
    with whole_file(path) as file:
        torch.save({**info, "raw": half, "ema": half}, file)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def read_prompts(path):
    """The (7,128,128) prompt images of a published "ep" checkpoint, from their .npy file."""
    try:
        return np.load(path, allow_pickle=False)             # a pickle could run code
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--prompts {path}: not a .npy file of numbers ({error})") from None


# ---- The command line ----------------------------------------------------------------------------

# {flag: (its command, the other flags that it reads)}. The first of these that is given decides;
# without any it is the table. A flag that the command does not read is refused, not ignored.
COMMANDS = {
    "export": (export, ()),                                            # weights to a small file
    "interpolate": (interpolate, ("input", "steps", "tile", "output")),
    "input": (process_input, ("task", "classifier", "compare", "tile", "output")),
    "testsets": (testsets, ("oracle", "expect", "tolerance", "classifier", "tile", "output")),
    "pairs": (own_pairs, ("task", "classifier", "tile")),              # one's own, LQ and GT
    "prompt_matrix": (prompt_matrix, ("images", "depth", "seed", "output")),
    "table": (table, ("images", "depth", "seed", "output")),           # in, out, gain of each task
}
READ_BY_ALL = ("checkpoint", "weights", "prompts", "overwrite", "max_pixels")


def check_flags(parser, argv, args):
    """Sets args.mode; ends the command where a flag is given that this mode does not read.

    Who adds --expect 30 and forgets --testsets would believe a check that never ran.
    """
    args.mode = next(mode for mode in COMMANDS if mode == "table" or getattr(args, mode))
    read = (args.mode, *COMMANDS[args.mode][1], *READ_BY_ALL)
    # argparse sets no default where something is: what is still None was not given.
    # (A comparison with the defaults would not tell --seed 0 from no --seed.)
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    for name, value in vars(given).items():
        if value not in (None, "") and name not in read:
            readers = [f"--{mode}" for mode, (_, flags) in COMMANDS.items() if name in flags]
            hint = f": it goes with {' or '.join(readers)}" if readers else ""
            text = f"--{name} is of no use for --{args.mode}{hint}".replace("_", "-")
            parser.error(text.replace("--table", "the table"))
        if name in ("images", "depth", "testsets") and value and Path(value).is_file():
            parser.error(f"--{name} {value} is a file; give the folder it is in")
    if args.interpolate and args.interpolate.count(",") != 1:
        parser.error(f"--interpolate {args.interpolate}: two tasks with a comma between them, such "
                     "as noise,jpeg")
    if args.depth and not args.images:
        parser.error("--depth goes with --images: it is the folder of their depth maps")
    if args.classifier and (args.oracle or args.task not in (None, "", "auto")):
        parser.error("--classifier is for --task auto; leave it out with --oracle or another task")


def arguments(argv):
    """The command line, parsed; exits with one line where flags are unknown or of no use."""
    parser = OneLineParser("eval.py", description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", default=MODEL, help="of train.py, or published (default: shipped)")
    # The table, over images that are degraded here.
    add("--images", metavar="DIR", help="evaluate on these, not on the built-in images")
    add("--depth", metavar="DIR", help="depth maps of --images, for haze")
    add("--seed", type=int, default=0, help="of the degradations")
    # The paper's table, over images that come degraded.
    add("--testsets", metavar="DIR", help="evaluate on the published test sets in this folder")
    add("--oracle", action="store_true", help="with --testsets: tell the true task")
    add("--expect", type=float, metavar="DB", help="with --testsets: fail unless In-Dis gives this")
    add("--tolerance", type=float, default=0.05, metavar="DB")
    add("--pairs", nargs=2, metavar=("LQ", "GT"), help="evaluate on these two folders' pictures")
    # What prompts do.
    add("--prompt-matrix", action="store_true", help="each task's images with each prompt")
    add("--interpolate", metavar="A,B", help="with --input: a strip from prompt A to B")
    add("--steps", type=int, default=5, help="pictures in that strip")
    # One's own pictures.
    add("--input", metavar="PATH", help="a picture, or a folder of pictures, to restore")
    add("--output", metavar="PATH", help="where the result goes")
    add("--task", type=str.lower, help="auto (the classifier), or a task, or noise:0.7,jpeg:0.3")
    add("--classifier", metavar="FILE", help="for auto (default: the one in assets/)")
    add("--compare", action="store_true", help="also write before/after pictures")
    add("--tile", type=int, metavar="N", help="edge of tiles; 0: whole (default: auto_tile's)")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--max-pixels", type=int, metavar="N", help="accept larger pictures than pillow would")
    # The model itself.
    add("--weights", choices=("raw", "ema"), default="raw", help="raw: as the paper does")
    add("--export", metavar="FILE", help="write these weights alone, in half precision")
    add("--prompts", metavar="NPY", help="type7.npy, for a published 'ep' checkpoint")
    args, rest = parser.parse_known_args(argv)
    words = [Path(word) for word in (args.checkpoint, *rest)]
    if args.input and any(word.suffix.lower() in SUFFIXES for word in words):    # of a shell's *.png
        parser.error("--input takes one picture or a folder: DIR, not DIR/*.png")
    args = parser.parse_args(argv)
    check_flags(parser, argv, args)
    return args


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


def run(args):
    """Does what the flags ask for. Raises ValueError or OSError with one line on what is wrong.

    "ep" at run time: the classifier, or --task, or (in tables that know it) the true task gives the
    prompt. "ap" and None: nothing has to be given.
    """
    Image.MAX_IMAGE_PIXELS = args.max_pixels or Image.MAX_IMAGE_PIXELS
    args.checkpoint = checkpoint_file(Path(args.checkpoint))
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
    """The command. Whatever the user can mend ends in one line and a non-zero exit; a traceback
    means a fault in this program."""
    tune_cpu()
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
