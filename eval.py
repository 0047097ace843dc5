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
  - a set's score is the plain mean over its images (score_set), and an average over sets is the
    plain mean over the sets, however many images each holds (score_sets);
  - the weights are the raw ones, not their moving average (--weights raw, the default);
  - a picture runs through the network whole, not in tiles (testsets);
  - a model with explicit prompts gets the prompt that the task classifier names (prompt_chooser).

Words used throughout
  lq, gt      a degraded ("low-quality") image and its ground truth: (1,3,H,W) floats in [0,1]
  picture     the same as (H,W,3) uint8, red green blue: what a file holds and what metrics compare
  pairs       {task: [(lq, gt), ...]}
  task        one of mioir.TASKS by name; or (1,7) weights, a mixture of the seven prompt images
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
import itertools
import io
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

# The four files depend on each other in one direction: mioir <- degrade <- eval <- train.
from degrade import (RANGES, SUFFIXES, OneLineParser, dead_leaves, degrade, find_depths,
                     gaussian_taps, list_images, open_image, read_depth, read_image, seeded,
                     time_left, to_image, to_rgb, to_tensor, whole_file)
from mioir import ANSWERS, TASKS, TaskClassifier, load_model, restore


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
        raise ValueError(f"an image of {w} x {h} has nothing left after cutting "
                         f"{crop} pixels off each side")
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
        raise ValueError("SSIM needs 11 pixels in height and width after the cut, "
                         f"not {tuple(a.shape[2:])}")
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
    how its harder sr set was made. Each pair's seed names its task and image, so a pair stays as it
    is when other images are added or tasks are left out.
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
            smaller = round(image.width * factor), round(image.height * factor)
            image = image.resize(smaller, Image.Resampling.LANCZOS)
        pairs.append((to_tensor(to_rgb(image)),) * 2)      # (1,3,H,W), twice the same
    return pairs


def restored(model, lq, task, device, tile=None):
    """What a model makes of one image, as a picture: (1,3,H,W) in [0,1] -> (H,W,3) uint8.

    The step from the network to what is compared and stored. Rounding is part of the protocol. Its
    error is spread evenly over one grey level, with a mean square of 1/12: alone it would give
    10 log10(255^2 * 12) = 58.9 dB, so next to a model's error it hardly counts.

    task: a name or (1,7) weights; "ep" models alone read it, others may get None.
    tile: edge of the tiles in pixels; 0: the image is run whole; None: as auto_tile says.
    """
    if tile is None:
        tile = auto_tile(*lq.shape[2:])                    # 0 or 512
    with memory_errors_explained(*lq.shape[2:], tile):
        y = restore(model, lq.to(device), task, tile or None,     # restore says None for whole
                    report=tile_reporter())
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


def evaluate(model, pairs, device, say):
    """Rows [task, PSNR in, out, gain, SSIM in, out, gain], and their mean as the last row.

    "in" is the degraded image, "out" the restored one, both against the truth. An "ep" model is
    told the true task, so this measures restoration alone, without the classifier's mistakes.
    say(text) is called after each task.
    """
    rows = []
    for task, examples in pairs.items():
        scores = []
        for lq, gt in examples:
            before = to_image(lq)
            after = restored(model, lq, task, device)
            truth = to_image(gt)
            scores.append([psnr(before, truth), psnr(after, truth),
                           ssim(before, truth), ssim(after, truth)])
        p_in, p_out, s_in, s_out = np.mean(scores, 0).tolist()
        rows.append([task, p_in, p_out, p_out - p_in, s_in, s_out, s_out - s_in])
        say(f"{task}: {p_in:.2f} -> {p_out:.2f} dB over {len(examples)} images")
    means = np.mean([row[1:] for row in rows], 0).tolist()
    return [*rows, ["mean", *means]]


# ---- Which prompt: the user's word, or the classifier's ------------------------------------------
# An "ep" model restores what its prompt names. In all of the paper's tables the prompt is chosen by
# a small classifier that looks at the degraded image: nothing about the image has to be known.

MODEL = Path(__file__).parent / "assets" / "srresnet.pt"                  # these two are shipped
CLASSIFIER = MODEL.with_name("classifier.pt")


def parse_task(text):
    """"noise" or "noise:0.7, jpeg:0.3" -> (1,7) weights in the order of TASKS, with a sum of 1.

    The prompt is then w_1 P_1 + ... + w_7 P_7: the prompt IMAGES are mixed, before F_ext encodes
    them; F_ext is not linear, so mixing the encoded prompts would give something else. Training saw
    single prompts alone, a sum of 1; so weights are divided by theirs, and "noise,jpeg" is half and
    half. Raises ValueError with the mend.
    """
    weights = torch.zeros(1, len(TASKS))
    for part in text.lower().split(","):
        name, _, weight = part.replace(" ", "").partition(":")
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: choose auto, one of {', '.join(TASKS)}, or a "
                             "mixture such as noise:0.7,jpeg:0.3")
        try:
            weights[0, TASKS.index(name)] += float(weight or 1)        # "noise" alone has weight 1
        except ValueError:
            raise ValueError(f"--task {text}: {weight!r} is not a number") from None
    total = weights.sum().item()
    if weights.min() < 0 or not 0 < total < math.inf:                  # NaN fails, too
        raise ValueError(f"--task {text}: weights can't be negative, infinite or all zero")
    return weights / total


@torch.no_grad()
def classify(classifier, x, device, damaged=False):
    """(name of the task, its probability) for one image (1,3,H,W), seen from border to border. The
    name may be "none" where the classifier knows that answer, unless the image is known as damaged.

    The classifier is a function of blocks: two convolutions of 3 x 3 with stride 3 turn each block
    of 9 x 9 pixels into 32 numbers, and no two blocks overlap. So a large picture can be read in
    strips of whole blocks, in little memory. (Up to 8 pixels at the right and the bottom make no
    whole block and are not seen.)
    """
    h, w = x.shape[2:]
    x = F.pad(x, (0, max(9 - w, 0), 0, max(9 - h, 0)), mode="replicate")       # at least one block
    found = []
    for strip in x.split(9 * 64, 2):                                           # (1,3,576,W)
        if strip.shape[2] >= 9:                           # a rest below 9 pixels makes no block
            found.append(classifier.blocks(strip.to(device)))                  # (1,32,64 (W // 9))
    logits = classifier.decide(torch.cat(found, 2))[0]                         # (7,) or (8,)
    if damaged:
        logits = logits[:len(TASKS)]                      # "none" comes last
    probability = logits.softmax(0)                                            # sum 1
    return ANSWERS[probability.argmax().item()], probability.max().item()


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
            name, _ = classify(classifier, lq, device)
            matrix[row, answers.index(name)] += 1
        accuracy[task] = 100 * matrix[row, row].item() / len(examples)
    return accuracy, matrix.tolist()


def load_classifier(path, device):
    """The classifier of --classifier, or, for None, the one that ships in assets/.

    Raises ValueError where there is none, or where the file holds a restoration model, with what to
    do about it. (Files that are no checkpoint at all are load_model's to refuse.)
    """
    path = path or CLASSIFIER
    if not Path(path).exists():
        raise ValueError(f"there is no classifier {path} to tell the task: name it with --task "
                         f"(one of {', '.join(TASKS)}), or train one (train.py --arch classifier) "
                         "and give --classifier FILE")
    classifier, _ = load_model(path, device=device)
    if not isinstance(classifier, TaskClassifier):
        raise ValueError(f"--classifier {path} is a restoration model, not a task classifier")
    return classifier


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


def paper_figures(arch, schedule, prompt):
    """{name of a set or group: the paper's PSNR in dB}, as far as PAPER has it: nothing for
    Restormer, Uformer and PromptIR."""
    figures = zip((*ORDER, *GROUPS), PAPER.get((arch, schedule, prompt), ()))
    return {name: figure for name, figure in figures if figure is not None}


def schedule_of(args, info):
    """"M" or "S": from the stages of a checkpoint of train.py (more than one is sequential), or
    from a published file's name, as SRResNet_S_EP.pth; None if that says nothing. A published file
    holds weights alone, and mixed and sequential training give weights of the same shapes."""
    if "facts" in info:
        return "S" if len(info["facts"]["periods"]) > 1 else "M"
    found = re.search(r"[_-]([MS])(?=[_.-])", Path(args.checkpoint).name)
    return found[1] if found else None


# ---- The paper's 19 test sets --------------------------------------------------------------------

def published_sets():
    """{name: (group, true task, folder of the degraded images, folder of the true ones)}.

    The folders are those of the published archive, its spelling "unknow" included:

        original/GT/*.png                          the truth of In-Dis and Out-Dis
        single_indis/rain/*                        In-Dis: seven folders
        single_outbig/rain_outbig/*                Out-Dis: seven folders
        unknow/DIV2K_valid_HR_toLR/*               the truth of four of the Unknown sets
        unknow/LQ_LR/valid-input-noisy/*           these four
        unknow/Toled_val/HQ/*  .../LQ/*            the fifth has a truth of its own

    An Unknown set has no true task: difficult, mild and wild are NTIRE 2018's, valid-input-noisy is
    NTIRE 2020's, and Toled_val was taken by a camera under a display.
    """
    sets = {}
    for task in ORDER:
        sets[task] = ("In-Dis", task, f"single_indis/{task}", "original/GT")
    for task in ORDER:
        sets[f"{task}_outbig"] = ("Out-Dis", task, f"single_outbig/{task}_outbig", "original/GT")
    for name in ("DIV2K_valid_LR_difficult", "DIV2K_valid_LR_mild", "DIV2K_valid_LR_wild",
                 "valid-input-noisy"):
        sets[name] = ("Unknown", None, f"unknow/LQ_LR/{name}", "unknow/DIV2K_valid_HR_toLR")
    sets["Toled_val"] = ("Unknown", None, "unknow/Toled_val/LQ", "unknow/Toled_val/HQ")
    return sets


TESTSETS = published_sets()


def match_pairs(lq_folder, gt_folder):
    """[(LQ file, GT file), ...] of two folders. By stem, if that gives every LQ file a partner;
    else in sorted order, if there are as many of one as of the other; else ValueError: a wrong
    pair would not stop the run, it would only spoil the average."""
    lqs = list_images([lq_folder])
    gts = list_images([gt_folder])
    partners = [partner(lq.stem, gts) for lq in lqs]
    if None not in partners:
        return list(zip(lqs, partners))
    if len(lqs) == len(gts):
        return list(zip(lqs, gts))
    raise ValueError(f"{lq_folder}: {len(lqs)} images can't be paired with the {len(gts)} of "
                     f"{gt_folder}, by name or by order")


def partner(stem, gts):
    """The GT file with the longest stem that an LQ's stem begins with, or None.

    LQ stems may go on after it ("0801_rain", "0801x4m"), but not with a digit: "10" is not of "1".
    """
    found = None
    for gt in sorted(gts, key=lambda path: len(path.stem)):            # so the longest comes last
        rest = stem[len(gt.stem):]
        if stem.startswith(gt.stem) and not rest[:1].isdigit():
            found = gt
    return found


def score_set(pairs, model, task, classifier, device, tile):
    """[PSNR, SSIM, the input's PSNR, gain], plain means over [(LQ file, GT file), ...].

    With a classifier each image gets the prompt it names, whatever the set's true task is.
    """
    scores = []
    for lq_path, gt_path in pairs:
        lq = to_tensor(read_image(lq_path))                            # (1,3,H,W)
        gt = read_image(gt_path)                                       # (H,W,3) uint8
        if classifier is not None:
            task, _ = classify(classifier, lq, device, damaged=True)
        y = restored(model, lq, task, device, tile)
        # An LQ may lack its GT's last rows or columns, where H or W is no multiple of the scale.
        if max(abs(gt.shape[0] - y.shape[0]), abs(gt.shape[1] - y.shape[1])) > 8:
            raise ValueError(f"{lq_path} and {gt_path} are not of one size: not a pair")
        h = min(gt.shape[0], y.shape[0])
        w = min(gt.shape[1], y.shape[1])
        before, y, gt = to_image(lq)[:h, :w], y[:h, :w], gt[:h, :w]    # (h,w,3) uint8 each
        db, db_in = psnr(y, gt), psnr(before, gt)
        scores.append([db, ssim(y, gt), db_in, db - db_in])
    return np.mean(scores, 0).tolist()


def score_sets(root, present, model, classifier, device, tile):
    """({name: score_set's four}, {name: number of images}) of the sets `present` in folder `root`;
    the four also of the groups In-Dis, Out-Dis and Unknown: the plain mean over a group's sets.

    classifier None: the true task is told, which Unknown sets do not have, so that an "ep" model
    cannot be scored on them.
    """
    scores, counts = {}, {}
    start = time.monotonic()
    for done, name in enumerate(present, 1):
        _, task, lq_folder, gt_folder = TESTSETS[name]
        if task is None and model.prompt == "ep" and classifier is None:
            raise ValueError(f"{name}: nobody knows this set's degradation; "
                             "leave --oracle out, so that the classifier chooses the prompt")
        pairs = match_pairs(root / lq_folder, root / gt_folder)
        counts[name] = len(pairs)
        scores[name] = score_set(pairs, model, task, classifier, device, tile)
        progress(f"{name}: {scores[name][0]:.2f} dB over {len(pairs)} images, "
                 f"{time_left(start, done, len(present))}")
    for group in GROUPS:
        members = [scores[name] for name in present if TESTSETS[name][0] == group]
        if members:
            scores[group] = np.mean(members, 0).tolist()
    return scores, counts


def prompt_chooser(args, model, info, device):
    """(classifier or None, in words how the prompt is chosen) for the test sets.

    Raises ValueError for a published "ep" model without a published classifier: the paper's
    figures contain that classifier's mistakes, and ours makes others.
    """
    if model.prompt is None:
        return None, "no prompt"
    if model.prompt == "ap":
        return None, "adaptive prompt"
    if args.oracle:
        return None, "true task told (--oracle)"
    if info["published"] and not args.classifier:
        raise ValueError("the paper's figures had the published classifier choose the prompts: add "
                         "--classifier Classifier.pth, or --oracle to tell the true tasks")
    return load_classifier(args.classifier, device), "prompts chosen by the classifier"


def comparable_figures(args, info, counts):
    """paper_figures, as far as they may stand beside ours: for a model of the paper's size, and for
    sets and groups that are here as published. A difference from other images, or of another
    network, looks like a result and is none.

    A set of In-Dis or Out-Dis has 100 images; of the Unknown ones we only know that they are five.
    counts: {set: number of images here}.
    """
    incomplete = set()
    for name, (group, *_) in TESTSETS.items():
        if name not in counts or group != "Unknown" and counts[name] != 100:
            incomplete |= {name, group}                                # and so is the group's mean
    figures = paper_figures(info["arch"], schedule_of(args, info), info["prompt"])
    if info["sizes"]:                  # what differs from the paper's network: a smaller one
        return {}
    return {name: figure for name, figure in figures.items() if name not in incomplete}


def testset_rows(scores, paper):
    """Rows [set, PSNR in, out, gain, SSIM] of score_sets' result; and, where the paper has figures
    to compare with, the paper's PSNR and the difference. Out-Dis and Unknown sets have no figures
    of their own in the paper, only their groups' averages."""
    rows = []
    for name, (db, similarity, db_in, gain) in scores.items():
        title = f"{name} average" if name in GROUPS else name
        row = [title, db_in, db, gain, f"{similarity:.4f}"]
        if paper:
            row += [paper[name], f"{db - paper[name]:+.2f}"] if name in paper else ["", ""]
        rows.append(row)
    return rows


def testsets(args, model, info, device):
    """The table over whichever of the 19 sets are in the folder; the same as JSON beside it."""
    root = Path(args.testsets)
    report = result_path(args, f"{Path(args.checkpoint).stem}.testsets.json")
    present = [name for name, (_, _, lq, _) in TESTSETS.items() if (root / lq).is_dir()]
    missing = [name for name in TESTSETS if name not in present]
    if not present:
        raise ValueError(f"--testsets {root}: no such folder, or none of the published ones in "
                         "it, such as single_indis/rain and original/GT")
    print(f"not there, left out: {', '.join(missing) or 'none'}", file=sys.stderr)
    classifier, told = prompt_chooser(args, model, info, device)
    # Whole, however large: in tiles a network sees less than the whole picture, so tiles could
    # change the figures. So auto_tile has no say here; --tile N is for those who lack the memory.
    scores, counts = score_sets(root, present, model, classifier, device, args.tile or 0)
    paper = comparable_figures(args, info, counts)
    convention = f"RGB, 8 bit, 4 border pixels cut, {args.weights} weights, {told}"
    header = ["set", "PSNR in", "out", "gain", "SSIM", *(["paper", "difference"] if paper else [])]
    print(markdown(header, testset_rows(scores, paper)) + f"\n\n{convention}")
    columns = {}                                                       # {column: {set: number}}
    for k, column in enumerate(("psnr", "ssim", "psnr_in", "gain")):
        columns[column] = {name: score[k] for name, score in scores.items()}
    report.write_text(json.dumps({"checkpoint": str(args.checkpoint), "convention": convention,
                                  "missing": missing, "images": counts, **columns,
                                  "paper": paper}, indent=1))
    print(f"JSON: {report}")
    if args.expect is not None:
        check_expected(scores, args.expect, args.tolerance)


def check_expected(scores, expected, tolerance):
    """Ends the command with an error unless the In-Dis average is what was promised: the README's
    figures can be checked by a command, --expect 30.36, that fails when they are missed."""
    got, *_ = scores.get("In-Dis", [math.nan])
    if not abs(got - expected) <= tolerance:                           # so that NaN fails, too
        sys.exit(f"eval.py: expected an In-Dis average of {expected:g} "
                 f"+- {tolerance:g} dB, got {got:.2f}")
    print(f"In-Dis average {got:.2f} dB: as expected")


# ==================================================================================================
# Plumbing. Nothing below this line is in the paper: commands on images that we degrade ourselves,
# restoring one's own pictures, memory and progress, tables and pictures, files, the command line.
# ==================================================================================================

# ---- Commands on images that we degrade ourselves ------------------------------------------------
# Each prints its table on stdout, says below it how it was measured, and writes its picture.

def load_images(args):
    """[(image (1,3,H,W), depth (1,1,h,w) or None), ...]: built in, or those of --images. A file
    that cannot be read is named and skipped. Without a depth map haze gets degrade's prior, far at
    the top and near at the bottom."""
    if not args.images:
        return builtin_images()
    images = []
    for path, depth_path in find_depths([args.images], args.depth).items():
        try:
            depth = None
            if depth_path is not None:
                depth = torch.from_numpy(read_depth(depth_path))[None, None]
            images.append((to_tensor(read_image(path)), depth))
        except ValueError as error:
            print(f"skipped {error}", file=sys.stderr)
    if not images:
        raise ValueError(f"{args.images}: no readable image")
    return images


def learned(info):
    """The set of tasks that a checkpoint of train.py has met; all, where a file does not say so.

    Its facts list each stage's tasks, the stages to come included; "stage" counts those that are
    over, so that order[stage] is the one in training, if any.
    """
    stages = info.get("facts", {}).get("order") or [TASKS]
    return {task for stage in stages[:info.get("stage", len(stages)) + 1] for task in stage}


def titles(info):
    """{task: what a table calls it}. A poor figure on a task that was never trained is no fault of
    the model's, and the reader should see which is which."""
    known = learned(info)
    return {task: task if task in known else f"{task} (not trained)" for task in TASKS}


def table(args, model, info, device):
    """PSNR and SSIM of each task before and after, In-Dis and Out-Dis, and a strip picture. Tasks
    that the model has not learned are marked; they are in the mean all the same.

    Not to be compared with the paper's table: other images, and other draws from the same ranges.
    """
    strips = result_path(args, "strips.png")
    images = load_images(args)
    header = ["task", "PSNR in", "out", "gain", "SSIM in", "out", "gain"]
    for split, title, note in (("in", "In-Dis", ""),
                               ("out", "Out-Dis", " (sr: ranges not published)")):
        pairs = validation_pairs(images, split, args.seed)
        rows = []
        for name, *db, s_in, s_out, s_gain in evaluate(model, pairs, device, progress):
            name = titles(info).get(name, name)                        # the last is "mean"
            rows.append([name, *db, f"{s_in:.4f}", f"{s_out:.4f}", f"{s_gain:+.4f}"])
        print(f"\n{title}, {len(images)} images, seed {args.seed}{note}\n")
        print(markdown(header, rows))
        if split == "in":
            task_strips(strips, model, pairs, device)
    print(f"\nPSNR in dB and SSIM on 8-bit RGB, 4 border pixels cut, {args.weights} weights, "
          f"true task told. Picture: {strips}")


def own_pairs(args, model, device):
    """PSNR in, out, gain and SSIM over --pairs LQ GT, matched as the test sets' pictures are. An
    "ep" model is told --task, or else what the classifier names."""
    pairs = match_pairs(Path(args.pairs[0]), Path(args.pairs[1]))
    task, classifier = None, None
    if args.task not in (None, "auto"):
        task = parse_task(args.task)
    elif model.prompt == "ep":
        classifier = load_classifier(args.classifier, device)
    db, similarity, db_in, gain = score_set(pairs, model, task, classifier, device, args.tile)
    print(markdown(["pairs", "PSNR in", "out", "gain", "SSIM"],
                   [[f"{len(pairs)} of {args.pairs[0]}", db_in, db, gain, f"{similarity:.4f}"]]))


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
        rows.append((titles(info)[task], [*scores.values(), before[task]]))
    header = [*TASKS, "input"]
    print(markdown(["images \\ prompt", *header], [[task, *values] for task, values in rows]))
    diagonal = {(i, i) for i in range(len(TASKS))}
    matrix_picture(path, "PSNR in dB: images of a task (row) restored with each prompt (column)",
                   header, rows, diagonal, reference="last")
    print(f"\nPSNR in dB, {len(images)} images, seed {args.seed}, {args.weights} weights. "
          f"Picture: {path}")


def confusion_text(accuracy, matrix):
    """confusion's two results as a table, and the mean of the tasks' accuracies."""
    answers = ANSWERS[:len(matrix)]                                    # with or without "none"
    rows = [[task, *counts] for task, counts in zip(answers, matrix)]
    text = markdown(["true task \\ named as, images", *answers], rows)
    return f"{text}\n\naccuracy {np.mean(list(accuracy.values())):.1f} % on held-out images"


def classifier_table(args, classifier, device):
    """How often a task classifier names the task of degraded images, and knows clean ones."""
    if args.mode != "table" or args.output:
        raise ValueError(f"{args.checkpoint} is a task classifier, which restores nothing; "
                         "give it as --classifier")
    images = load_images(args)
    for split, title in (("in", "In-Dis"), ("out", "Out-Dis")):
        pairs = validation_pairs(images, split, args.seed)
        if "none" in classifier.answers:
            pairs["none"] = clean_pairs(images, args.seed)
        print(f"\n{title}, {len(images)} images, seed {args.seed}\n")
        print(confusion_text(*confusion(classifier, pairs, device)))


def interpolate(args, model, device):
    """A strip from one task's prompt to another's: --interpolate noise,jpeg --steps 5.

    One input, restored with (1 - s) P_noise + s P_jpeg for s = 0, 1/4, 2/4, 3/4, 1.
    """
    names = args.interpolate.split(",")
    if model.prompt != "ep" or len(names) != 2 or not args.input or args.steps < 2:
        raise ValueError("--interpolate A,B needs an 'ep' model, two tasks, --input FILE "
                         "and --steps of at least 2")
    first, second = parse_task(names[0]), parse_task(names[1])         # (1,7) each
    path = result_path(args, "interpolation.png")
    x = to_tensor(read_image(args.input))
    header, pictures = ["input"], [to_image(x)]
    for k in range(args.steps):
        share = k / (args.steps - 1)                                   # from 0 to 1
        mixture = (1 - share) * first + share * second
        header.append(f"{names[0]} {1 - share:.2f} {names[1]} {share:.2f}")
        pictures.append(restored(model, x, mixture, device, args.tile))
    strip_picture(path, header, [("", pictures)])
    print(f"picture: {path}")


# ---- Restoring one's own pictures ----------------------------------------------------------------

# What can be written. The ending decides; PNG, TIFF and BMP keep every pixel as it was restored.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
# Below this probability the classifier's answer is doubtful, and a wrong prompt harms a picture.
# A blind guess among seven tasks has 0.14, among eight answers 0.125.
DOUBT = 0.6


def process_input(args, model, info, device):
    """--input FILE or DIR: restores a picture, or all pictures of a folder. An "ep" model without
    --task asks the classifier about each picture."""
    source = Path(args.input)
    if not source.exists():
        raise ValueError(f"--input {source}: No such file or folder")
    classifier = None
    args.task = (args.task or "auto").strip().lower()
    if args.task != "auto":
        parse_task(args.task)                               # complain before any work is done
        if args.classifier:
            raise ValueError("--classifier is for --task auto; leave one of them out")
    elif model.prompt == "ep":
        classifier = load_classifier(args.classifier, device)
    if source.is_dir():
        process_folder(source, args, model, info, classifier, device)
        return
    target = Path(args.output or f"{source.stem}_restored.png")        # in the working folder
    if target.is_dir():
        target = target / source.name
    check_ending(target, FORMATS)
    print(process_file(source, target, args, model, info, classifier, device))


def process_folder(source, args, model, info, classifier, device):
    """All pictures below a folder, to the same names below --output. Goes on after a bad file; then
    names all bad ones at the end, and the exit code is 1."""
    if not args.output or Path(args.output).is_file():
        raise ValueError("--input is a folder: name another one with --output")
    files = list_images([source])
    out = Path(args.output).resolve()
    if source.resolve() in out.parents:                     # its own results are not restored again
        files = [path for path in files if out not in path.resolve().parents]
    bad = []
    start = time.monotonic()
    for count, path in enumerate(files, 1):
        target = Path(args.output) / path.relative_to(source)
        if target.suffix.lower() not in FORMATS:                       # a.gif becomes a.gif.png
            target = target.with_name(target.name + ".png")
        try:
            said = process_file(path, target, args, model, info, classifier, device)
            left = time_left(start, count, len(files))
            print(f"{count}/{len(files)} {said} | {left}", flush=True)
        except (ValueError, OSError) as error:              # this file's fault: the next one
            named = str(error).startswith(str(path))        # as open_image's are
            bad.append(error if named else f"{path}: {error}")
    for error in bad:
        print(f"failed: {error}", file=sys.stderr)
    print(f"{len(files) - len(bad)} of {len(files)} pictures restored to {args.output}")
    if bad:
        sys.exit(1)


def process_file(source, target, args, model, info, classifier, device):
    """One file to one file of the same size; returns what is worth saying about it, in a line.

    Whatever takes memory that grows with the picture stands inside the guard, so that one picture
    too large for this machine can't end a folder.
    """
    # Both names are asked for before minutes of work, not after.
    comparison = target.with_name(target.stem + "_compare.png")
    for path in (target, comparison) if args.compare else (target,):
        check_free(path, args)
    # open_image turns the picture upright, takes the first of several frames, and notes it.
    original, notes = open_image(source)
    w, h = original.size
    tile = auto_tile(h, w) if args.tile is None else args.tile
    with memory_errors_explained(h, w, tile):
        picture = to_rgb(original)                                     # (H,W,3) uint8
        x = to_tensor(picture)                                         # (1,3,H,W)
        name, alone = args.task, False
        if classifier is not None:
            name, alone, note = ask_classifier(classifier, x, device)
            notes.append(note)
        if alone:
            leave_alone(source, target, picture, original)
        else:
            task, more = choose_prompt(name, model, info)              # (1,7) or None
            notes += more
            if tile > 0:
                notes.append(f"in tiles of {tile}")
            y = restored(model, x, task, device, tile)                 # (H,W,3) uint8
            save_picture(target, y, original)
            if args.compare:
                compare_picture(comparison, picture, y)
    return ", ".join([f"{source} -> {target}", f"{w} x {h}", *notes])


def ask_classifier(classifier, x, device):
    """(task, whether the picture is better left as it is, what to say about both).

    A picture that is fine must stay so. A classifier that can answer "none" is believed when it
    does, and where it is in doubt nothing is touched either: a picture left as it was can be
    restored later. The published classifier has to name a damage; there a doubt is only said.
    """
    name, sure = classify(classifier, x, device)
    note = f"task {name}, {100 * sure:.0f} % sure"
    if "none" in classifier.answers and (name == "none" or sure < DOUBT):
        found = "nothing found" if name == "none" else f"{note}, too little"
        return name, True, f"{found}: left as it is; --task NAME forces one"
    if sure < DOUBT:
        note += " - low: look at it, or name the task with --task"
    return name, False, note


def choose_prompt(name, model, info):
    """((1,7) weights or None, [what to say about them]) for the name of a task or a mixture, or
    "auto" for a model that takes no prompt. What has no effect, or no good one, is said."""
    if model.prompt != "ep":
        return None, [] if name == "auto" else ["--task ignored: this model takes no prompt"]
    task = parse_task(name)                                            # (1,7)
    # A prompt that training never used is an image like any other: what it does is not known.
    strange = [TASKS[k] for k in task[0].nonzero()[:, 0] if TASKS[k] not in learned(info)]
    return task, [f"warning: this model has not learned {', '.join(strange)}"] if strange else []


def leave_alone(source, target, picture, original):
    """The picture as it was: a copy of its file, with all that save_picture would drop; or its
    pixels, where another format is asked for."""
    if FORMATS.get(source.suffix.lower()) != FORMATS[target.suffix.lower()]:
        save_picture(target, picture, original)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as unfinished:
        shutil.copyfile(source, unfinished)


def save_picture(target, picture, original):
    """Writes an (H,W,3) uint8 picture as what the PIL image `original` was.

    The network knows red, green and blue alone. So grey is restored as three equal channels and
    stored as one again; alpha passes by the network unchanged; a colour profile is copied, since it
    says what the numbers mean. EXIF data, GPS place and DPI are dropped: they may say what is no
    longer so, as a thumbnail does. The file appears whole or not at all, on a full disk, too.
    """
    out = Image.fromarray(picture)
    bands = original.getbands()                                        # as ("R","G","B","A")
    kind = FORMATS[target.suffix.lower()]
    if bands[0] in ("1", "L", "I", "F"):
        out = out.convert("L")
    if "A" in bands and kind not in ("JPEG", "BMP"):                   # those two hold no alpha
        out.putalpha(original.getchannel("A"))
    options = {}
    if original.info.get("icc_profile") and "C" not in bands:          # CMYK's profile fits no RGB
        options["icc_profile"] = original.info["icc_profile"]
    if kind in ("JPEG", "WEBP"):
        options["quality"] = 95
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            out.save(unfinished, format=kind, **options)
    except OSError as error:
        raise ValueError(f"{target}: not written ({error.strerror or error})") from None


# ---- Memory and progress -------------------------------------------------------------------------
# A photo of 24 megapixels has 1,465 times as many pixels as a training crop of 128 x 128. It takes
# minutes on a CPU, and more memory than there is: it is restored in tiles, and somebody waits.

def auto_tile(h, w):
    """0, which is whole, up to a megapixel; above it tiles of 512, so that memory stays bounded:
    the features of a tile take the same room in a picture of any size."""
    return 512 if h * w > 2 ** 20 else 0


def check_tile(args, model):
    """Raises ValueError before any work for a --tile no larger than what neighbouring tiles share:
    no pixel of it would be its own, so the tiles would never come to the end of a picture."""
    least = model.overlap // model.multiple * model.multiple + 1       # restore rounds it up
    if args.tile and args.tile < least:
        raise ValueError(f"--tile {args.tile} is too small for this model: at least {least}, or 0 "
                         "for the picture whole")


@contextlib.contextmanager
def memory_errors_explained(h, w, tile):
    """Around code for H x W pixels: where memory runs out, a ValueError says which tiles to try.

    The memory a network takes grows with the pixels it sees at once, tile * tile of them: tiles of
    half the edge take a quarter. Other errors pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch's error on a GPU is a kind of RuntimeError; on a CPU it is a plain one, which only
        # its words tell from others. MemoryError comes from Python and numpy.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        how, smaller = "whole", 512
        if tile:
            how, smaller = f"in tiles of {tile}", tile // 2
        raise ValueError(f"not enough memory to restore {w} x {h} pixels {how}; "
                         f"try it in tiles (--tile {smaller})") from None


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
    """(R,G,B): white for no gain, towards green above, towards red below, full at +-reach."""
    full = (46, 160, 90) if gain > 0 else (214, 69, 65)
    strength = 0.85 * min((abs(gain) / reach) ** 0.5, 1)       # the root lets small gains be seen
    return tuple(int(255 + (channel - 255) * strength) for channel in full)


def matrix_picture(path, title, columns, rows, outlined=(), reference="first"):
    """Draws a table of numbers: each cell green by its gain on its reference, red by its loss.

    rows: [(name, [number, ...]), ...]. reference: what a cell is compared with; "first": the first
    row, same column, as stages are with the input; "last": the last column, same row, as prompts
    are with the input. outlined: {(row, column), ...} to frame, such as the tasks of a stage.
    """
    cell_w, cell_h, left, top = 78, 34, 190, 66
    font = ImageFont.load_default(15)
    size = (left + cell_w * len(columns) + 16, top + cell_h * len(rows) + 16)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 10), title, "black", ImageFont.load_default(18))
    for j, column in enumerate(columns):
        pen.text((left + (j + 0.5) * cell_w, top - 14), column, "black", font, anchor="mm")
    numbers = np.array([values for _, values in rows])
    gains = numbers - (numbers[:1] if reference == "first" else numbers[:, -1:])
    reach = max(np.abs(gains).max(), 1e-6)
    for i, (name, values) in enumerate(rows):
        pen.text((left - 10, top + (i + 0.5) * cell_h), name, "black", font, anchor="rm")
        for j, value in enumerate(values):
            x, y = left + j * cell_w, top + i * cell_h
            frame = "black" if (i, j) in outlined else None
            pen.rectangle((x + 1, y + 1, x + cell_w - 2, y + cell_h - 2),
                          gain_colour(gains[i, j], reach), frame, 2)
            pen.text((x + cell_w / 2, y + cell_h / 2), f"{value:.2f}", "black", font, anchor="mm")
    picture.save(path)


def strip_picture(path, header, rows, edge=192):
    """Draws rows of pictures: [(name, [(H,W,3) uint8, ...]), ...], their central edge x edge.
    The middle is cut out, not shrunk to: shrinking would hide noise, blocks and blur.

                degraded   restored   truth        the header
        blur    [      ]   [      ]   [      ]     a row: its name, then its pictures
        noise   [      ]   [      ]   [      ]
    """
    left, top, step, font = 76, 30, edge + 6, ImageFont.load_default(16)
    sheet = Image.new("RGB", (left + step * len(header), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, text in enumerate(header):
        pen.text((left + j * step + edge / 2, top / 2), text, "black", font, anchor="mm")
    for i, (name, pictures) in enumerate(rows):
        pen.text((left - 10, top + i * step + edge / 2), name, "black", font, anchor="rm")
        for j, picture in enumerate(pictures):
            y = max(picture.shape[0] - edge, 0) // 2
            x = max(picture.shape[1] - edge, 0) // 2
            cut = Image.fromarray(picture[y:y + edge, x:x + edge])
            if max(cut.size) < edge:                 # small images are shown larger, pixel by pixel
                cut = cut.resize((edge, edge), Image.Resampling.NEAREST)
            sheet.paste(cut, (left + j * step, top + i * step))
    sheet.save(path)


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
    sheet.save(path)


def task_strips(path, model, pairs, device):
    """degraded | restored | truth for the first image of each task; an "ep" model is told which
    task it is."""
    rows = []
    for task, examples in pairs.items():
        lq, gt = examples[0]
        rows.append((task, [to_image(lq), restored(model, lq, task, device), to_image(gt)]))
    strip_picture(path, ["degraded", "restored", "truth"], rows)


# ---- Curves: the loss and the learning rate of a training run ------------------------------------
# A plotter of some fifty lines, since the repository needs torch, numpy and pillow alone.

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")
_LEFT, _RIGHT = 80, 980                                      # of both panels, in pixels


def log_ticks(low, high):
    """Round numbers for a logarithmic axis, from the last one <= low to the first one >= high.

    Round are the powers of ten; and 2 and 5 times them, where the values span less than a factor of
    100. log_ticks(0.03, 0.221) is [0.02, 0.05, 0.1, 0.2, 0.5].
    """
    factors = (1, 2, 5) if high / low < 100 else (1,)
    ticks = []
    for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2):
        for factor in factors:
            tick = float(f"{factor}e{power}")                # exact, where 5 * 10.0 ** -5 is not
            if tick <= low:
                ticks = [tick]                               # a later one may come nearer
            elif ticks[-1] < high or len(ticks) < 2:         # two at least: an axis has a length
                ticks.append(tick)
    return ticks


def linear_ticks(high, least=0.0):
    """Round numbers 0, step, 2 step, ... to the first one >= high. The step is 1, 2 or 5 times a
    power of ten, the smallest that needs at most six steps and is no less than `least`.

    linear_ticks(1100) is [0, 200, 400, 600, 800, 1000, 1200].
    """
    power = math.floor(math.log10(high)) - 1                 # high is 10 to 100 times 10 ** power
    for factor in ("1", "2", "5", "10", "20"):               # 20 always does: 100 / 20 is 5
        step = float(f"{factor}e{power}")
        count = math.ceil(high / step - 1e-6)                # 0.0003 / 0.0001 is 2.9999999999999996
        if count <= 6 and step >= least:
            return [k * step for k in range(count + 1)]


def tick_text(value):
    """A tick's number as one reads it: 0.00005 -> "0.00005", 250000 -> "250,000", 0.02 -> "0.02".
    "g" alone would write the first as 5e-05 and a million as 1e+06; it may, below a hundred
    thousandth, where zeros can no longer be counted at a glance."""
    if 1e-5 <= value < 1e-3:
        return f"{value:.5f}".rstrip("0")
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}"


def draw_axes(pen, place, x_ticks, y_ticks):
    """A frame from the first ticks to the last, their numbers below it and to its left, and a grey
    line at each y tick. place(x, y): a point's pixels, as curves_panel makes them."""
    font = ImageFont.load_default(14)
    corners = [place(x_ticks[0], y_ticks[-1]), place(x_ticks[-1], y_ticks[0])]
    for y in y_ticks:
        _, row = place(0, y)
        pen.line((_LEFT, row, _RIGHT, row), "#dddddd")
        pen.text((_LEFT - 8, row), tick_text(y), "black", font, "rm")
    for x in x_ticks:
        column, row = place(x, y_ticks[0])
        pen.line((column, row, column, row + 4), "black")
        pen.text((column, row + 13), tick_text(x), "black", font, "mm")
    pen.rectangle(corners, None, "black")


def draw_curves(pen, place, curves, lowest):
    """{name: [(x, y), ...]}: each curve in its colour, its name to the right at the height of its
    end. Names are set from the bottom up, the first no lower than pixel `lowest`, each at least 16
    pixels above the last, so that curves that end together have their names one above another."""
    ends = []
    for (name, points), colour in zip(curves.items(), itertools.cycle(_COLOURS)):
        if points:                                           # a task may not be in training yet
            pixels = [place(x, y) for x, y in points]
            pen.line(pixels, colour, 2)
            ends.append((pixels[-1][1], name, colour))
    for y, name, colour in sorted(ends, reverse=True):       # the largest y is the lowest
        lowest = min(y, lowest)
        pen.text((_RIGHT + 8, lowest), name, colour, ImageFont.load_default(14), "lm")
        lowest -= 16


def curves_panel(pen, top, bottom, curves, x_ticks, y_ticks, scale):
    """One pair of axes with curves. scale: math.log10 for a logarithmic y axis, float for a linear
    one. The axes end at the first and last ticks."""
    low, high = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(x, y):                                         # in pictures y grows downwards
        return (_LEFT + (_RIGHT - _LEFT) * x / x_ticks[-1],
                top + (bottom - top) * (high - scale(y)) / (high - low))
    draw_axes(pen, place, x_ticks, y_ticks)
    draw_curves(pen, place, curves, bottom)


def read_curves(log):
    """A log.jsonl -> ({task: [(iteration, loss), ...]}, [(iteration, learning rate), ...]).

    The log counts each stage's iterations from 1; here they are counted over all stages.
    """
    losses, rates = {name: [] for name in ANSWERS}, []
    stage, iteration, before = 1, 0, 0
    for line in Path(log).read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:                                  # other lines are of other kinds
            if entry["stage"] > stage:
                before += iteration                          # as far as the last stage came
            stage, iteration = entry["stage"], entry["iteration"]
            rates.append((before + iteration, entry["lr"]))
            for task, loss in entry["loss"].items():
                losses[task].append((before + iteration, max(loss, 1e-12)))   # 0 has no logarithm
    return losses, rates


def curves_picture(path, title, log):
    """Draws a log.jsonl: the loss of each task on a logarithmic axis, the learning rate below.

    Logarithmic, since what counts late in training are a few per cent of a loss that may differ
    from task to task by a factor of ten. One above the other with the same x, so that one sees a
    sequential run's stages: the rate restarts, and a task more begins its curve.
    """
    losses, rates = read_curves(log)
    values = [loss for points in losses.values() for _, loss in points]
    iterations = linear_ticks(rates[-1][0], least=1)         # there is no half iteration
    picture = Image.new("RGB", (_RIGHT + 80, 570), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 10), f"{title}: loss per task, and learning rate, by iteration", "black",
             ImageFont.load_default(18))
    curves_panel(pen, 56, 376, losses, iterations, log_ticks(min(values), max(values)), math.log10)
    rate_ticks = linear_ticks(max(rate for _, rate in rates))
    curves_panel(pen, 426, 536, {"lr": rates}, iterations, rate_ticks, float)
    picture.save(path)


# ---- Files ---------------------------------------------------------------------------------------
# What cannot be read or written is said in one line that names the file, before any work is done
# where that can be known.

def check_free(path, args):
    """Raises ValueError where a file would be overwritten. Whatever a command writes for its user
    is asked for here before the work begins: nothing is overwritten without --overwrite."""
    if path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists; choose another name or add --overwrite")


def result_path(args, name):
    """--output, or `name` beside the checkpoint; for the shipped one, in the working folder, so
    that assets/ stays as it is. Where an earlier result lies, strips.png becomes strips-2.png."""
    folder = Path() if args.checkpoint == MODEL else Path(args.checkpoint).parent
    path = Path(args.output or folder / name)
    check_ending(path, [".json"] if name.endswith(".json") else FORMATS)
    number = 2                                               # the first was without a number
    while not args.output and path.exists() and not args.overwrite:
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    check_free(path, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_ending(path, kinds):
    """Raises ValueError before any work is done, where the result could not be written."""
    if path.suffix.lower() not in kinds:
        raise ValueError(f"--output {path}: the ending must be one of {' '.join(kinds)}")


def checkpoint_file(path):
    """The file meant by CKPT, for which people also type a run's folder, or a picture's name alone.
    Raises ValueError for the latter, with the command that was meant."""
    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{path} is a picture, not a checkpoint; to restore it: "
                         f"python eval.py --input {path}")
    if path.is_dir():
        path = path / "last.pt"
        progress(f"a folder: takes its {path}")
    return path


def check_export(args):
    """Raises ValueError before anything is written, and makes the folder. A run's own last.pt holds
    what --resume needs: nothing may replace it, --overwrite or not."""
    path = Path(args.export)
    try:
        needed = "optimizer" in torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception:              # not there, or torn or foreign: no training goes on from it
        needed = False
    if needed:
        raise ValueError(f"--export {path} is a run's checkpoint, which --resume needs; "
                         "choose another name")
    check_free(path, args)
    path.parent.mkdir(parents=True, exist_ok=True)


def export(path, model, info):
    """The weights alone, in half precision: a seventh of train.py's file; loads as that does.

    train.py's file holds four float32 copies (raw, EMA, Adam's two moments). Here raw and EMA are
    the same tensors, which torch.save stores once, and half precision halves them.
    """
    if info["published"]:
        raise ValueError("--export takes a checkpoint of train.py")
    half = {}
    for name, tensor in model.state_dict().items():
        half[name] = tensor.half() if tensor.is_floating_point() else tensor
    with whole_file(path) as unfinished:
        torch.save({**info, "raw": half, "ema": half}, unfinished)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")


def read_prompts(path):
    """The (7,128,128) prompt images of a published "ep" checkpoint, from their .npy file."""
    try:
        return np.load(path, allow_pickle=False)             # a pickle could run code
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--prompts {path}: not a .npy file of numbers ({error})") from None


# ---- The command line ----------------------------------------------------------------------------

# What a command does is the first of these that is given, with none of them the table; and what
# other flags that reads. Any other flag would be passed over in silence: it is refused.
READS = {
    "export": (),                                                      # weights to a small file
    "interpolate": ("input", "steps", "tile", "output"),               # one picture, many prompts
    "input": ("task", "classifier", "compare", "tile", "output"),      # one's own pictures
    "testsets": ("oracle", "expect", "tolerance", "classifier", "tile", "output"),
    "pairs": ("task", "classifier", "tile"),                           # one's own, LQ and GT
    "prompt_matrix": ("images", "depth", "seed", "output"),            # every prompt on every task
    "table": ("images", "depth", "seed", "output"),                    # in, out, gain of each task
}
READ_BY_ALL = ("checkpoint", "weights", "prompts", "overwrite", "max_pixels")


def check_flags(parser, argv, args):
    """Sets args.mode; ends the command where a flag is given that this mode does not read.

    Who adds --expect 30 and forgets --testsets would believe a check that never ran.
    """
    args.mode = next(mode for mode in READS if mode == "table" or getattr(args, mode))
    # argparse sets no default where something is: what is still None was not given.
    # (A comparison with the defaults would not tell --seed 0 from no --seed.)
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    for name, value in vars(given).items():
        if value not in (None, "") and name not in (args.mode, *READS[args.mode], *READ_BY_ALL):
            readers = [f"--{mode}" for mode, flags in READS.items() if name in flags]
            hint = f": it goes with {' or '.join(readers)}" if readers else ""
            parser.error(f"--{name} is of no use for --{args.mode}{hint}".replace("_", "-")
                         .replace("--table", "the table"))
        if name in ("images", "depth", "testsets") and value and Path(value).is_file():
            parser.error(f"--{name} {value} is a file; give the folder it is in")
    if args.depth and not args.images:
        parser.error("--depth goes with --images: it is the folder of their depth maps")
    if args.oracle and args.classifier:
        parser.error("--oracle tells the true task: --classifier has no say; leave one out")


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
    add("--task", help="auto (the classifier decides), a task, or a mixture noise:0.7,jpeg:0.3")
    add("--classifier", metavar="FILE", help="for auto (default: the one in assets/)")
    add("--compare", action="store_true", help="also write before/after pictures")
    add("--tile", type=int, metavar="N", help="edge of tiles in pixels; 0: whole "
        "(default: whole up to a megapixel, then 512; whole with --testsets)")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--max-pixels", type=int, metavar="N", help="accept larger pictures than pillow would")
    # The model itself.
    add("--weights", choices=("raw", "ema"), default="raw", help="raw: as the paper does")
    add("--export", metavar="FILE", help="write these weights alone, in half precision")
    add("--prompts", metavar="NPY", help="type7.npy, for a published 'ep' checkpoint")
    args = parser.parse_args(argv)
    if args.tile is not None and args.tile < 0:
        parser.error(f"--tile must be positive, or 0 for the picture whole, not {args.tile}")
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
    if args.max_pixels:
        Image.MAX_IMAGE_PIXELS = args.max_pixels
    args.checkpoint = checkpoint_file(Path(args.checkpoint))
    if args.export:
        check_export(args)                                   # before anything is loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = read_prompts(args.prompts) if args.prompts else None
    model, info = load_model(args.checkpoint, args.weights, device, prompts)
    if args.export:
        return export(args.export, model, info)
    if isinstance(model, TaskClassifier):
        return classifier_table(args, model, device)
    name = info["arch"]
    if info["prompt"]:
        name += f"-{info['prompt'].upper()}"
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}, {size:,} parameters, {args.weights} weights, on {device}")
    check_tile(args, model)
    if args.interpolate:
        interpolate(args, model, device)
    elif args.input:
        process_input(args, model, info, device)
    elif args.testsets:
        testsets(args, model, info, device)
    elif args.pairs:
        own_pairs(args, model, device)
    elif args.prompt_matrix:
        prompt_matrix(args, model, info, device)
    else:
        table(args, model, info, device)


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit; a traceback
    means a fault in this program."""
    tune_cpu()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):       # a name that this terminal can't show: as \xe9
            stream.reconfigure(errors="backslashreplace")
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
