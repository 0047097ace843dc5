"""Train one network for seven restoration tasks: mixed or sequential, with or without a prompt.

    python train.py --arch restormer --seq --prompt --preset demo     # minutes on two CPU cores
    python train.py --arch restormer --seq --prompt --data DF2K       # the paper's recipe, on a GPU
    python train.py --arch restormer --seq --prompt --data DF2K --resume    # go on where it stopped
    torchrun --nproc_per_node 2 train.py --arch swinir --data DF2K  # on two GPUs
    python train.py --arch classifier --data DF2K                   # names the task for "ep" models

One command runs the whole schedule. OUT receives last.pt (the newest state), previous.pt, one file
per stage, log.jsonl, table.md and .png (PSNR by stage and task), curves.png and strips.png.
The same seed on the same machine gives the same bits, also to a run that was killed and resumed.

Glossary
    iteration t    one step of the optimiser on one batch; counted from 0 within its stage
    period         iterations of one cosine of the learning rate
    stage          a set of tasks and the periods it is trained for; a mixed run has one stage
    batch          samples of one iteration over all processes; a part of it: --accumulate
    raw, EMA       the weights as the optimiser leaves them, and their running average
    lq, gt         degraded and true crops, (N,3,crop,crop) in [0,1]; task: rows of TASKS, (N,)

Details that are easily missed, each explained where it is done
    1. the learning rate restarts one iteration late, as published              lr_at
    2. at a new stage Adam starts anew; the average of the weights does not     run_stages
    3. large canvases are degraded, then cropped; JPEG's grid may lie anywhere  sample, make_batch
    4. the loss is divided by the whole batch, however it is split              run_stages
    5. drop path draws image by image, each from a seed of its own              draw_drop_paths
    6. the weights that are scored are the raw ones, as in the paper            validate
    7. whatever can be drawn again is not saved: position and seed suffice      Run

Reading order: the recipes; the schedule (Section 3.2) and its learning rate; which task and which
crop a sample gets; the loop, `run_stages`, on one page. What comes after the banner "not in the
paper" is the command line, checkpoints, processes, and what is said on the screen.
Source: paper, Sections 3.2 and 4.1; the published options/*.yml; BasicSR's training loop.
"""
import copy
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from degrade import (ImageCache, OneLineParser, apply, clock, draw, item_name, jpeg, leaf_items,
                     photo_items, read_image, require_folder, seeded, whole_file)
from eval import (builtin_images, clean_pairs, confusion, confusion_text, curves_picture,
                  input_psnr, lacks_memory, markdown, match_pairs, matrix_picture, mean_psnr,
                  read_prompts, task_strips, tune_cpu, validation_pairs)
from mioir import (ANSWERS, TASKS, DropPath, ResidualBlock, RestormerBlock, SRResNet,
                   WindowBlock, build_classifier, build_model, load_model, reflect_pad)

# ---- Recipes (paper, Section 4.1; the published options/train/*.yml) -----------------------------
#
# The loss is L1, the mean of |y - gt|: unlike the squared error it does not let the few largest
# errors, edges mostly, rule the gradient. batch is the total over all GPUs; crop is the edge of a
# training crop in pixels; period is one cosine period of the learning rate in iterations; order is
# the sequential order, in letters. k tasks have k - 1 + 4 periods, in sequence or mixed: all seven
# have ten. (The classifier has four.)
#
# What to compare when a run goes other than the paper's: Adam's beta2 is .99, not torch's .999, so
# that its memory of squared gradients is 100 iterations long; the batch is small; the rate is never
# warmed up; gradients are not clipped; only Uformer's weights decay.

LETTERS = {"s": "sr", "b": "blur", "n": "noise", "j": "jpeg", "r": "rain", "h": "haze", "d": "dark"}

_COMMON = dict(optimizer="AdamW", weight_decay=0.0, lr=2e-4, betas=(0.9, 0.99), eta_min=1e-7,
               ema=0.999, crop=128, sizes={})
RECIPES = {
    # 2 GPUs x 8 crops; 250k + ... = 2.5M iterations in all, 40M crops.
    "srresnet": dict(_COMMON, optimizer="Adam", batch=16, period=250_000, order="sbnjrhd"),
    # 8 GPUs x 1 crop, for the memory that its attention takes; 1M iterations, as those below.
    "swinir": dict(_COMMON, optimizer="Adam", batch=8, period=100_000, order="sbnjrhd"),
    # 2 GPUs x 4 crops each.
    "restormer": dict(_COMMON, batch=8, period=100_000, order="rjbsnhd"),
    "uformer": dict(_COMMON, batch=8, period=100_000, order="rjbsnhd", weight_decay=0.02,
                    eta_min=1e-6),
    "promptir": dict(_COMMON, batch=8, period=100_000, order="rjbsnhd"),
    # 2 GPUs x 16 crops, and larger ones.
    "classifier": dict(_COMMON, optimizer="Adam", batch=32, crop=256, period=250_000,
                       order="bnjrhds"),
}


def striped_prompts():
    """Seven prompt images that a new F_ext tells apart at once, for runs of minutes: six kinds of
    black and white stripes, and a white one. (7,128,128). Averaged, as F_ext does, the paper's
    random images differ by 2 to 3 % of a feature's length; these by 25 to 38 %. A task of one's
    own gets wider and wider stripes."""
    steps = torch.arange(128, device="cpu")
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    stripes = [x // 2, y // 2, x // 4, y // 4, (x + y) // 6, (x - y) // 6, torch.ones_like(x)]
    stripes += [(x + 2 * y) // (8 * k) for k in range(1, len(TASKS) - 6)]
    return (torch.stack(stripes) % 2).float()


# What a crop's edge must divide by: windows of 8 x 8; three halvings; four, and then a window.
CROP_MULTIPLE = {"swinir": 8, "restormer": 8, "promptir": 8, "uformer": 128}


# The paper's recipe is made for GPUs. So that a run fits two CPU cores, a preset changes it: a
# smaller model, smaller crops, a schedule hundreds of times shorter; in return, mostly, a higher
# rate and an EMA that forgets faster. A recipe has five layers, of which a later one wins, and
# recipe_of lays them one on another. To the right, what --arch restormer --preset demo gets:
#
#     1  RECIPES[arch]            the paper's numbers       batch 8, crop 128, period 100k, lr 2e-4
#     2  SMALL[arch]              a smaller model           dim 12            (not in preset paper)
#     3  PRESETS[preset]          a shorter run             batch 14, crop 32, period 200, lr 1e-3
#     4  SPECIAL[preset, arch]    where 3 suits 1 badly     lr 1.5e-3
#     5  --lr --batch ...         the user's own            -
#
# leaves, validate: (how many, edge in pixels) of the training images if there is no --data, and of
# the validation images. prompts: what makes the "ep" prompts; the paper's random ones where nothing
# is said. channels_last: convolutions of a CPU are faster so.

# Layer 2, in all presets but the paper's: a half (SRResNet) to an eighth (SwinIR) of the paper's
# width, and fewer blocks. (The classifier is ours, which may also answer "none": the paper's knows
# seven answers.)
SMALL = {
    "srresnet": dict(width=32, blocks=8),
    "swinir": dict(dim=24, depths=(2, 2), heads=2, width=24),
    "restormer": dict(dim=12, blocks=(1, 1, 1, 1), refinement=0, expansion=1.5, prompt_width=16),
    "uformer": dict(dim=8, depths=(1,) * 9),
    "promptir": dict(dim=16, blocks=(1, 1, 1, 2), refinement=1, prompt_dims=(16, 16, 32)),
    "classifier": dict(none=True),
}
# Layer 3.
_SHORT = dict(log_every=20, save_every=100, validate=(8, 128), lr=1e-3, eta_min=1e-5, batch=14,
              crop=32, ema=0.99, channels_last=True, prompts=striped_prompts)
PRESETS = {
    # The paper's numbers as they stand; 800 dead leaves of 512 x 512 stand in for DIV2K.
    "paper": dict(leaves=(800, 512), log_every=100, save_every=1000, validate=(8, 128)),
    # Hours on one core: what the model in assets/ was trained with, at a --period of its own.
    "hours": dict(_SHORT, leaves=(256, 256), batch=7, crop=48, period=600, ema=0.999),
    # Half an hour a training on one core: tests/study.py compares dozens of them.
    "study": dict(_SHORT, leaves=(64, 256), period=600),
    # Minutes: the README's first command. With all seven tasks, a batch of 14 holds each twice.
    "demo": dict(_SHORT, leaves=(64, 256), period=200),
    # Seconds: every part of the loop once, for tests. Nothing is learned.
    "smoke": dict(leaves=(4, 192), log_every=2, save_every=4, validate=(2, 96), batch=8, crop=48,
                  period=1, ema=0.9),
}
# Layer 4, where a preset suits an arch badly: Uformer needs crops of 128, the classifier more to
# look at.
SPECIAL = {
    ("smoke", "uformer"): dict(crop=128),
    ("demo", "restormer"): dict(lr=1.5e-3),
    ("demo", "uformer"): dict(crop=128, batch=7, period=40),
    ("demo", "classifier"): dict(crop=64, batch=28, lr=3e-3, period=1400),
    ("study", "uformer"): dict(crop=128, batch=7),
    ("hours", "srresnet"): dict(sizes=dict(width=64, blocks=8), batch=14, lr=5e-4, period=1500),
    ("hours", "uformer"): dict(crop=128, batch=7),
    # Twice as wide and deeper than the demo's, and crops that show more of haze and darkness.
    ("hours", "restormer"): dict(crop=64, sizes=dict(dim=24, blocks=(1, 1, 2, 3), refinement=0,
                                                     expansion=1.5, prompt_width=16)),
    ("hours", "classifier"): dict(crop=128, batch=16, lr=2e-3, period=2500),
}


def recipe_of(args):
    """The recipe that a run follows, one flat dict: the five layers above, the last one on top.
    args: see Args. (The user's own numbers are None where nothing is said.)"""
    recipe = dict(RECIPES[args.arch])                                           # 1
    if args.preset != "paper":
        recipe["sizes"] = SMALL[args.arch]                                      # 2
    recipe.update(PRESETS[args.preset])                                         # 3
    recipe.update(SPECIAL.get((args.preset, args.arch), {}))                    # 4
    for key in ("period", "lr", "batch", "crop", "save_every"):                 # 5
        if getattr(args, key) is not None:
            recipe[key] = getattr(args, key)
    return recipe


# ---- Sequential learning (paper, Section 3.2) ----------------------------------------------------
#
# Tasks are added one after another, and the earlier ones stay in the mix: rehearsal, not
# fine-tuning. For Restormer, in iterations:
#
#     stage 1   rain                                     100k
#     stage 2   rain, jpeg                               100k
#     stage 3   rain, jpeg, blur                         100k
#       ...     one more each time
#     stage 6   rain, jpeg, blur, sr, noise, haze        100k
#     stage 7   all seven                            4 x 100k       in all 1M, as the mixed run has
#
# So a task counts the more, the earlier it comes: rain is seen in 1 + 1/2 + ... + 1/6 + 4/7 = 3.0
# periods' worth of crops, jpeg in 2.0, dark, the last, in 4/7 = 0.6; in the mixed run each of them
# in 10/7 = 1.4. That is why the order matters, and why the last stage lasts four periods.
#
# Each stage starts from the last weights of the one before (raw into raw, EMA into EMA), with a
# fresh optimiser and a fresh learning rate: Adam's moments, averages over gradients of another mix
# of tasks, are forgotten. The authors launched this as seven runs; here it is one loop,
# `run_stages` below.

class Stage(NamedTuple):
    """What a stage of the schedule trains, and for how long. Stage 7 of the above:
    Stage(("rain", "jpeg", "blur", "sr", "noise", "haze", "dark"), (100_000,) * 4)."""
    tasks: tuple        # trained together, every one equally often
    periods: tuple      # iterations of each cosine period; the learning rate restarts at each

    @property
    def iterations(self):
        return sum(self.periods)


def stages(arch, seq=False, order=None, period=None, none=False):
    """The schedule, a list. Mixed: one stage, all tasks. Sequential: stage k trains the first k.
    Either has k - 1 + 4 periods for k tasks, so that what is compared is the order, not the effort.

    order: letters of LETTERS, each at most once; the default is the paper's. period: iterations.
    none: undamaged images are one more "task", for a classifier that can say so.
    Raises ValueError for letters that are unknown or repeated.
    """
    order = order or RECIPES[arch]["order"]
    period = period or RECIPES[arch]["period"]
    for k, letter in enumerate(order):
        if letter not in LETTERS or letter in order[:k]:
            known = ", ".join(f"{key} ({task})" for key, task in LETTERS.items())
            raise ValueError(f"--order {order}: {letter!r} is unknown or repeated; use {known}")
    tasks = tuple(LETTERS[letter] for letter in order)
    if none:
        tasks += ("none",)
    if arch == "classifier":
        return [Stage(tasks, (period,) * 4)]
    if not seq:                                    # mixed: as long as the same tasks in sequence
        return [Stage(tasks, (period,) * (len(tasks) - 1 + 4))]
    # {rain} {rain, jpeg} ...: all stages but the last have one period; the last, all tasks, four.
    growing = [Stage(tasks[:k], (period,)) for k in range(1, len(tasks))]
    return [*growing, Stage(tasks, (period,) * 4)]


def lr_at(iteration, periods, base_lr, eta_min):
    """Learning rate of the 1-based iteration: a cosine from base to eta_min, anew in each period,

        eta_min + (base - eta_min) / 2 * (1 + cos(pi * (done - start) / period)).

    As published, the restart comes one iteration late: the first iteration of a later period still
    has eta_min, and the second is on its way down already (BasicSR's CosineAnnealingRestartLR
    counts a period's end to the period itself). Periods (4, 4): 1 .85 .5 .15 0 .85 .5 .15 of base.
    Restarts are of Loshchilov and Hutter, "SGDR", 2017: a high rate leaves the valley that the
    falling one has settled in.
    """
    done = iteration - 1                           # iterations behind us: 0 at the first
    start, end = 0, 0                              # of the period that `done` falls into
    for period in periods:
        start, end = end, end + period
        if done <= end:                            # not <: the late restart
            break
    return eta_min + 0.5 * (base_lr - eta_min) * (1 + math.cos(math.pi * (done - start) / period))


# ---- Which task, which crop ----------------------------------------------------------------------
#
# A sample is what the processor prepares, a crop and the random numbers for its degradation; the
# degrading itself happens a batch at a time on the training device. A sample depends on (seed,
# stage, t, i) and the images alone, t the iteration and i its place, whoever computes it: so a
# resumed run, or one on more GPUs, sees what the undisturbed run sees.
#
# The published data degrade whole images and crop afterwards. A crop degraded alone would differ:
# JPEG's grid would start at its corner, blur and rain would see its border, haze its own depth. So
# a crop is cut from inside a larger canvas that has been degraded:
#
#     +----------------------- crop + 48 -----+      16 to 31 pixels of margin at the top and left,
#     |  offset                               |      so that all 16 phases of JPEG's chroma grid
#     |     +--------- crop ---------+        |      occur equally often; 17 to 32 at the others.
#     |     |                        |        |

MARGIN = 48
RAIN_FIELD = 512       # edge of the field from which a training crop's rain is cut
RAIN_PEAK = 0.88       # brightness of that field's brightest spot: in a whole 2040 x 1356 image it
                       # is 1, and a smaller field has a fainter one (measured)


def task_of(tasks, t, i, batch):
    """Tasks take turns over all samples of all iterations, so that each is seen equally often.
    With 7 tasks and a batch of 8 each occurs once and one twice: 8 times in 7 iterations."""
    return tasks[(t * batch + i) % len(tasks)]


def sample(source, tasks, crop, batch, key):
    """Sample i of an iteration's batch, before degradation: a dict of CPU tensors and numbers.

    source: {"photos": ImageCache; a task: the images of --pairs}, one or both.
    crop: edge in pixels. key: (seed, stage, t, i).
    """
    seed, stage, t, i = key
    g = seeded(*key)                               # for all but the choice of the image

    def below(n):                                  # a random integer, 0 .. n - 1
        return int(torch.randint(n, (1,), generator=g))

    task = task_of(tasks, t, i, batch)
    images = source[task if task in source else "photos"]
    chooser = seeded(seed, stage, "image", t * batch + i)
    k = int(torch.randint(len(images), (1,), generator=chooser))
    h, w = images.size(k)
    edge = crop + MARGIN
    if task == "none":
        return as_kept(clean_sample(images, k, edge, below), below)
    top, left = below(max(h - edge, 0) + 1), below(max(w - edge, 0) + 1)
    item = {"task": task,
            "canvas": torch.from_numpy(images.crop(k, top, left, edge)),                  # (3,edge,edge) of uint8
            "offset": (16 + below(16), 16 + below(16)),
            "turn": below(8)}                                           # of flips and rotations
    if len(item["canvas"]) == 6:                                        # one of --pairs: GT, LQ
        item["canvas"], item["lq"] = item["canvas"].split(3)
        return item
    item["drawn"] = draw(task, (edge, edge), "in", g, rain_field=(RAIN_FIELD, RAIN_FIELD))
    if task == "haze":
        item.update(crop_of_depth(images, k, top, left, edge, g))
    return as_kept(item, below) if "none" in tasks else item


def crop_of_depth(images, k, top, left, edge, g):
    """{"depth": (1,1,edge,edge), "depth_max": (1,)} of a haze sample: its part of the image's depth
    map, or, where there is none, of a smooth prior drawn from g; and the maximum of the whole."""
    depth = torch.from_numpy(images.depth_crop(k, top, left, edge, g))[None]
    return {"depth": depth, "depth_max": torch.ones(1)}


def clean_sample(source, k, edge, below):
    """A sample of an image that nobody damaged, for a classifier that must not see damage in it: as
    it is, or reduced in size (to 0.5 to 1). below(n): a random integer, 0 .. n - 1. Not in the
    paper, whose classifier knows no "none"."""
    large = edge + below(edge + 1) if below(3) == 0 else edge
    h, w = source.size(k)
    large = max(min(large, h, w), edge)            # no larger than the image, if possible
    top, left = below(max(h - large, 0) + 1), below(max(w - large, 0) + 1)
    canvas = torch.from_numpy(source.crop(k, top, left, large))
    if large > edge:
        canvas = F.interpolate(canvas[None].float(), (edge, edge), mode="bicubic", antialias=True)
        canvas = canvas[0].round().clamp(0, 255).byte()
    return {"task": "none", "canvas": canvas, "offset": (16 + below(16), 16 + below(16)),
            "turn": below(8)}


def as_kept(item, below):
    """A sample as people keep their pictures: a fourth of them is grey, a third saved as a good
    JPEG (quality 85 to 98; not of the task jpeg). For a classifier that is asked about any file:
    one that saw coloured noise alone, never saved, takes the noise of a grey photo for haze."""
    item["grey"] = below(4) == 0
    item["saved"] = 85 + below(14) if below(3) == 0 and item["task"] != "jpeg" else 0
    if item["grey"]:
        r, g, b = item["canvas"].float()
        grey = (0.299 * r + 0.587 * g + 0.114 * b).round().byte()               # as pillow's "L"
        item["canvas"] = grey.expand_as(item["canvas"])
    return item


def kept(y, samples):
    """What as_kept asked for, after the degradation of (n,3,edge,edge). A grey file has one channel
    of noise, not three."""
    grey = torch.tensor([s["grey"] for s in samples], device=y.device)[:, None, None, None]
    y = torch.where(grey, y[:, :1], y)
    quality = torch.tensor([float(s["saved"]) for s in samples], device=y.device)
    return torch.where(quality[:, None, None, None] > 0, jpeg(y, quality.clamp_min(1)), y)


def make_batch(samples, crop, device):
    """Degrades samples on the device. Returns lq, gt: (N,3,crop,crop); task: (N,) rows of TASKS,
    len(TASKS) for "none"."""
    canvas = torch.stack([s["canvas"] for s in samples])            # (N,3,edge,edge) of uint8
    canvas = canvas.to(device, non_blocking=True)
    lq, gt = [None] * len(samples), [None] * len(samples)
    for task in ANSWERS:                              # all images of a task at once
        rows = [i for i, s in enumerate(samples) if s["task"] == task]
        if rows:
            x = canvas[rows].float() / 255                                      # (n,3,edge,edge)
            group = [samples[i] for i in rows]
            y = degrade_group(x, task, group)
            if "saved" in group[0]:
                y = kept(y, group)
            for i, degraded in zip(rows, y):
                top, left = samples[i]["offset"]
                inside = slice(top, top + crop), slice(left, left + crop)
                lq[i] = turned(degraded[:, *inside], samples[i]["turn"])        # (3,crop,crop)
                gt[i] = turned(canvas[i][:, *inside], samples[i]["turn"])
    task = torch.tensor([ANSWERS.index(s["task"]) for s in samples], device=device)
    return torch.stack(lq), torch.stack(gt).float() / 255, task


# Degrading is done a task at a time, a call over all the batch's images of that task: every
# degradation takes one parameter per image.

def degrade_group(canvas, task, samples):
    """Degrades (n,3,edge,edge), canvases of samples that share a task, each by its own numbers.
    Rain is cut from a larger field, whose brightest spot gets RAIN_PEAK, not 1: a whole image is
    larger still, and its one brightest spot makes all others darker."""
    if "lq" in samples[0]:                         # --pairs: somebody else has degraded them
        return torch.stack([s["lq"] for s in samples]).to(canvas.device).float() / 255
    if task == "none":
        return canvas
    drawn = {}
    for name in samples[0]["drawn"]:
        drawn[name] = torch.cat([s["drawn"][name] for s in samples])            # (n,...)
    if task != "haze":
        return apply(canvas, task, drawn, peak=RAIN_PEAK)
    depth = torch.cat([s["depth"] for s in samples]).to(canvas.device)          # (n,1,edge,edge)
    depth_max = torch.cat([s["depth_max"] for s in samples]).to(canvas.device)  # (n,)
    return apply(canvas, task, drawn, depth, depth_max)


def turned(x, turn):
    """One of the eight flips and quarter turns of (C,H,H); turn: 0..7, three bits."""
    if turn & 1:
        x = x.mT                                   # transposed; with one flip, a quarter turn
    if turn & 2:
        x = x.flip(1)
    if turn & 4:
        x = x.flip(2)
    return x


class Stream(torch.utils.data.Dataset):
    """Iteration t -> this process's parts of the batch, each a list of samples. Unlike with the
    published shuffled list of files, what comes at t can be told without what came before. It does
    not keep the run, since loader processes get a copy of it."""

    def __init__(self, run, source, machine):
        tasks, batch = run.stages[run.stage].tasks, run.recipe["batch"]
        self.sample = partial(sample, source, tasks, run.recipe["crop"], batch)
        self.key, self.shares = (run.args.seed, run.stage), machine.share(batch)

    def __getitem__(self, t):
        return [[self.sample((*self.key, t, i)) for i in rows] for rows in self.shares]


def batches(run, source, machine):
    """Yields (t, parts) for the rest of run.stage: parts is [(rows of the batch, samples), ...],
    one part unless --accumulate asks for more. Raises ValueError that names a file gone bad."""
    on_gpu, workers = machine.device.type == "cuda", run.args.workers
    if workers is None:
        workers = 8 if on_gpu else 0
    # A stage that was begun goes on at run.iteration: nothing before it has to be drawn again.
    ahead = range(run.iteration, run.stages[run.stage].iterations)
    # batch_size=None: an item of Stream is a batch already. From pinned memory a GPU copies faster.
    loader = iter(torch.utils.data.DataLoader(
        Stream(run, source, machine), batch_size=None, sampler=ahead, num_workers=workers,
        pin_memory=on_gpu))
    for t in ahead:
        try:
            parts = next(loader)
        except (ValueError, OSError, RuntimeError) as error:
            # A worker's error comes with its traceback, of which the last line says what happened;
            # a worker that was killed (out of memory, often) is a RuntimeError of the loader.
            raise run.failed(str(error).splitlines()[-1]) from None
        yield t, list(zip(machine.share(run.recipe["batch"]), parts))


def prepare_batch(samples, crop, machine, args):
    """make_batch, laid out for the network. The classifier sees degraded images alone."""
    lq, gt, task = make_batch(samples, crop, machine.device)
    if machine.channels_last:
        lq = lq.contiguous(memory_format=torch.channels_last)
    if args.arch == "classifier":
        gt = None
    return lq, gt, task


def draw_drop_paths(model, key, rows, device):
    """Draws which images of a part leave out which branch (SwinIR, Uformer): uniform numbers that
    depend on (seed, stage, t, i) and the branch alone. key: (seed, stage, t); rows: the i's.

    Torch's own generator would give image i other numbers when it stands in another part or
    process; then --accumulate and the number of GPUs would change what is learned.
    """
    drops = [m for m in model.modules() if isinstance(m, DropPath) and m.probability > 0]
    if drops:
        draws = torch.stack([torch.rand(len(drops), generator=seeded(*key, i, "drop path"))
                             for i in rows], 1).to(device)                      # (branches,n)
        for module, of_module in zip(drops, draws):
            module.draws = of_module                                            # (n,)


# ---- The loop ------------------------------------------------------------------------------------
#
# An iteration of the paper's Restormer on two GPUs, as one of the two processes sees it:
#
#     batches           4 of the batch's 8 samples: crops of uint8 and numbers, from the processor
#     prepare_batch     degraded on the GPU: lq, gt (4,3,128,128), task (4,)
#     net               y (4,3,128,128), and the mean of |y - gt| of each image: (4,)
#     backward          the gradient of this half; DDP exchanges it, all get the whole batch's
#     step              Adam's, the same in both processes, at the rate that lr_at gives
#     update_ema        the average follows the weights
#
# The same 8 samples can be computed in three ways, and what is learned must not depend on it:
#
#     at once           backward of sum(loss) / 8
#     --accumulate 2    two backwards of sum(loss) / 8 over 4 samples each; gradients add up
#     two processes     backward of 2 * sum(loss) / 8 in each; DDP's average halves the sum
#
# Hence no mean over a part is taken anywhere, and no random number depends on how parts are cut.

def loss_per_image(net, lq, gt, task):
    """(N,): L1, mean |y - gt| of each image: the paper's only loss. The classifier, for which there
    is no gt, has a cross-entropy of its logits and the true task."""
    if gt is None:
        return F.cross_entropy(net(lq), task, reduction="none")
    return (net(lq, task) - gt).abs().mean((1, 2, 3))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter. Weights of k iterations ago
    count decay^k: with .999, half of it all stems from the last 700. It starts as a copy of the
    model, so needs no correction for a start at zero, as Adam's moments do. The average is less
    noisy than the raw weights while the rate is high; the paper's tables are of the raw ones."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def run_stages(run, net, source, machine, log):
    """The whole schedule of Section 3.2, from where the run stands (its start, or where it was
    stopped) to its end. net is run.model as it is called: perhaps compiled, or in DDP."""
    recipe, args, batch = run.recipe, run.args, run.recipe["batch"]
    images = builtin_images(*recipe["validate"])
    pairs = validation_pairs(images)                        # {task: [(lq, gt), ...]}
    if "none" in run.stages[-1].tasks:
        pairs["none"] = clean_pairs(images)                 # a classifier that may find nothing
    run.table = run.table or [before_training(args, pairs)]

    if run.stage == len(run.stages) and run.leads:          # finished, perhaps killed before this
        show_table(run, log)
    # Stage by stage; a resumed run enters in the middle, at run.stage and run.iteration.
    while run.stage < len(run.stages):
        stage = run.stages[run.stage]                       # with --seq one task more each time
        if run.iteration == 0:
            run.new_optimizer()                             # weights and EMA go on, Adam does not
        log.say(f"stage {run.stage + 1}/{len(run.stages)}: {', '.join(stage.tasks)}")

        for t, parts in batches(run, source, machine):
            # The rate is set before each step: schedule and optimiser know nothing of each other.
            lr = lr_at(t + 1, stage.periods, recipe["lr"], recipe["eta_min"])
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.zero_grad()
            net.train()                                     # drop path is on
            losses = torch.zeros(batch, device=machine.device)
            for rows, samples in parts:                     # one part, unless --accumulate
                lq, gt, task = prepare_batch(samples, recipe["crop"], machine, args)
                draw_drop_paths(run.model, (args.seed, run.stage, t), rows, machine.device)
                with machine.autocast():                    # bf16, if asked for, going forward
                    loss = loss_per_image(net, lq, gt, task)                    # (n,)
                # The mean over the batch: parts add up. Times world, as DDP averages processes.
                (loss.sum() * machine.world / batch).backward()
                losses[rows.start:rows.stop] = loss.detach()

            # Each process filled its own rows, the others' are 0: the sum is the whole batch's.
            losses = machine.sum_of_all(losses)                                 # (batch,)
            tasks = [task_of(stage.tasks, t, i, batch) for i in range(batch)]
            norm = torch.nn.utils.get_total_norm(           # logged, but not clipped, as published
                [p.grad for p in run.model.parameters() if p.grad is not None])
            refuse_what_is_not_finite(run, losses, norm, tasks)       # before the weights change
            run.optimizer.step()
            update_ema(run.ema, run.model, recipe["ema"])
            run.iteration = t + 1

            # The step is done; what follows says it, saves it, and asks whether to go on.
            log.add(run, losses, tasks, norm, lr)
            if run.iteration % recipe["save_every"] == 0:
                run.save()
            due = args.val_every and run.iteration % args.val_every == 0
            if due and run.iteration < stage.iterations:    # a stage's end is validated below
                validate(run, pairs, machine, log)
            if machine.any_of_all(log.stop is not None):
                stopped(run, log)

        # A row of the forgetting matrix: all seven tasks, those not trained yet, too.
        name = f"stage {run.stage + 1} (+{stage.tasks[-1]})" if args.seq else "mixed"
        run.table.append((name, validate(run, pairs, machine, log)))
        run.stage, run.iteration = run.stage + 1, 0
        run.save(keep=f"stage{run.stage}.pt")
        if run.leads:
            show_table(run, log)
    if run.leads:
        finish(run, pairs, log, machine)


# ==================================================================================================
# Not in the paper: the command line, checkpoints, processes, and what a run says.
# ==================================================================================================

# ---- The command line ----------------------------------------------------------------------------
# One dataclass holds it, from which the parser is built: a flag is written down once, with its
# type, its default and its line in --help. None mostly means: as the recipe says.

def option(default, text, **more):
    """A field of Args: its default, its line in --help, and what else argparse should know."""
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


@dataclasses.dataclass
class Args:
    """The command line, one field a flag, and what follows from it: name, recipe, stages."""
    # What the paper varies.
    arch: str = option("restormer", "a backbone, or classifier", choices=tuple(RECIPES))
    seq: bool = option(False, "sequential: one task more per stage (default: mixed, all at once)")
    prompt: str = option(None, "tell the task: ep (explicit; also --prompt alone) or ap (adaptive)",
                         nargs="?", const="ep", choices=("ep", "ap"))
    # How long, on what images. Only --data DF2K and the preset "paper" are the paper's.
    preset: str = option("paper", "demo takes minutes, smoke seconds", choices=tuple(PRESETS))
    data: list = option(None, "folders of photos (default: dead leaves)", nargs="+", metavar="DIR")
    depth: str = option(None, "depth maps of the photos, matched by name, for haze", metavar="DIR")
    leaves: int = option(None, "how many dead leaves (default: by preset; with --data, none)")
    order: str = option(None, "sequential order, letters of s b n j r h d (default: the paper's)")
    pairs: list = option(None, "train on these folders' degraded and true photos, matched by name",
                         nargs=2, metavar=("LQ", "GT"))
    pairs_as: str = option(None, "task of --pairs (default: --order's only one)", choices=TASKS)
    # Numbers of the recipe, for a run of one's own.
    period: int = option(None, "iterations of a cosine period (default: by preset)")
    lr: float = option(None, "learning rate at a period's start (default: by preset)")
    batch: int = option(None, "crops of an iteration, over all processes (default: by preset)")
    crop: int = option(None, "edge of a crop in pixels (default: by preset)")
    init: str = option(None, "fine-tune these weights, of train.py or published", metavar="CKPT")
    init_weights: str = option("raw", "which of them: raw or ema", choices=("raw", "ema"))
    prompts: str = option(None, "type7.npy, where --init is a published 'ep' model", metavar="NPY")
    # Where results go, and going on.
    seed: int = option(0, "of weights, images, crops and degradations")
    out: str = option(None, "where results go (default: runs/ARCH-SCHEDULE-PROMPT-PRESET)")
    resume: bool = option(False, "go on from OUT/last.pt")
    print_plan: bool = option(False, "print the schedule and stop")
    # How it is computed: faster or in less memory. What is computed stays the same but for rounding
    # (bf16: 7 bits of mantissa in convolutions and matrix products; weights and Adam stay float32),
    precision: str = option("fp32", "fp32, tf32 or bf16: numbers to compute in; tf32conv: TF32 for "
                            "convolutions alone, as the paper's torch 1.12 did on newer GPUs")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "channels-last memory format")
    checkpointing: bool = option(False, "recompute activations going back: less memory, more time")
    accumulate: int = option(1, "split each batch into N parts, one after another: less memory")
    workers: int = option(None, "processes that prepare samples (default: 8 with a GPU, else 0)")
    cache: str = option(None, "where decoded images go (default: OUT/cache)")
    save_every: int = option(None, "iterations between checkpoints (default: by preset)")
    val_every: int = option(0, "iterations between validations (default: at a stage's end only)")
    device: str = option(None, "default: cuda if there is one", choices=("cuda", "cpu"))

    # Laid together once, when first asked for: a Run may then put its own sizes in (--init).
    recipe = cached_property(recipe_of)

    @property
    def stages(self):
        """The schedule, by the rules of the function of that name."""
        none = self.recipe["sizes"].get("none", False)
        return stages(self.arch, self.seq, self.order, self.recipe["period"], none)

    @property
    def name(self):
        """Of the run, and of its folder where --out does not say otherwise."""
        words = [self.arch, "seq" if self.seq else "mixed", self.order, self.prompt or "plain"]
        if self.arch == "classifier":
            words = [self.arch]
        return "-".join(word for word in [*words, self.preset] if word)


def parse(argv):
    """The command line as Args. Exits with one line where flags are unknown or contradict."""
    parser = OneLineParser("train.py", description=__doc__)
    for f in dataclasses.fields(Args):
        # A field `pairs_as` becomes the flag --pairs-as. A bool's takes no value; a list's nargs
        # says how many it takes; of any other the type of the field makes a value of the text.
        special = {bool: dict(action="store_true"), list: {}}         # a list: of str, by nargs
        kind = special.get(f.type, dict(type=f.type, default=f.default))
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind, **f.metadata)
    args = Args(**vars(parser.parse_args(argv)))
    # What argparse can't know: flags that contradict each other, and numbers out of range.
    if args.arch == "classifier" and (args.prompt or args.seq or args.order):
        parser.error("--arch classifier sees all tasks; leave --seq, --order and --prompt out")
    if args.precision not in ("fp32", "tf32conv", "tf32", "bf16"):
        parser.error(f"--precision {args.precision}: choose fp32, tf32conv, tf32 or bf16; fp16 is "
                     "not offered, as SwinIR's activations overflow it")
    if args.pairs and len(args.order or "") == 1:
        args.pairs_as = args.pairs_as or LETTERS.get(args.order)
    if args.pairs_as and not args.pairs:
        parser.error(f"--pairs-as {args.pairs_as} says what --pairs LQ GT are; add these")
    for name, goes_with in (("depth", "data"), ("prompts", "init")):    # else never looked at
        if getattr(args, name) and not getattr(args, goes_with):
            parser.error(f"--{name} {getattr(args, name)}: it goes with --{goes_with}")
    if args.pairs and not args.pairs_as:
        parser.error("what are --pairs? Add --pairs-as TASK, or an --order of its letter alone")
    if args.pairs_as and args.pairs_as not in map(LETTERS.get, args.order or LETTERS):
        parser.error(f"--pairs-as {args.pairs_as}: --order {args.order} does not train it")
    edge, multiple = args.recipe["crop"], CROP_MULTIPLE.get(args.arch, 1)
    if edge % multiple:
        parser.error(f"--crop {edge}: {args.arch} needs a multiple of {multiple}")
    for name, least in dict(accumulate=1, leaves=1, period=1, workers=0, save_every=1, val_every=0,
                            batch=1, crop=16, lr=1e-9).items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    args.out = args.out or f"runs/{args.name}"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


# Seconds that a crop of 128 x 128 takes in training with the paper's sizes on two cores of a Xeon
# (tests/bench.py networks, 25 November 2026): for a warning, so rough numbers do.
_CPU_SECONDS = {"srresnet": 0.5, "swinir": 7, "restormer": 2.2, "uformer": 0.9, "promptir": 2.6}


def plan(args):
    """The recipe in a line and the schedule as a table: what --print-plan shows. And what somebody
    should know who starts the paper's recipe on a CPU, perhaps unaware: how long it takes."""
    r, loss = args.recipe, "cross-entropy" if args.arch == "classifier" else "L1 loss"
    rows, total = [], sum(stage.iterations for stage in args.stages)
    for k, stage in enumerate(args.stages, 1):
        # Three rates show the cosine; the middle of four periods is the end of the second: eta_min.
        rates = [f"{lr_at(t, stage.periods, r['lr'], r['eta_min']):.3e}"
                 for t in (1, max(stage.iterations // 2, 1), stage.iterations)]
        periods = f"{len(stage.periods)} x {stage.periods[0]}"
        rows.append([k, " ".join(stage.tasks), stage.iterations, periods, *rates])
    header = ["stage", "tasks", "iterations", "periods", "lr first", "lr middle", "lr last"]
    text = (f"{args.name}: {r['optimizer']}, lr {r['lr']:g}, betas {r['betas']}, "
            f"weight decay {r['weight_decay']:g}, eta_min {r['eta_min']:g}, {loss}, "
            f"EMA {r['ema']:g}, total batch {r['batch']}, crop {r['crop']}, seed {args.seed}\n\n"
            f"{markdown(header, rows)}\n\n"
            f"total: {total} iterations; each stage has a fresh optimiser")
    if args.device == "cpu" and args.preset == "paper" and args.arch in _CPU_SECONDS:
        days = total * r["batch"] * _CPU_SECONDS[args.arch] / 86400
        text += (f"\n\non this CPU that takes about {days:,.0f} days; --preset demo takes minutes, "
                 "--preset hours some hours, --preset smoke seconds")
    return text


# ---- The state of a run, and its files -----------------------------------------------------------
# OUT/last.pt is all that a run needs to go on to the same bits: raw and EMA weights, Adam's
# moments, and where it stands. No generator's state is in it: every random number is drawn from one
# seeded by (seed, stage, t, i), so the position alone says what comes next.
#
# Were it otherwise, going on would need the state of each generator in each loader process, which
# have drawn ahead of the iteration that is being computed; of cuDNN's choice of algorithms, too,
# which is why that is fixed (Machine). Sums of floats depend on their order: the same bits come
# with the same machine and the same split of the batch, otherwise the same numbers but for
# rounding.
#
#     OUT/last.pt        the newest state, replaced in one step
#     OUT/previous.pt    the one before it
#     OUT/stage3.pt      the end of stage 3, to compare stages, or to start from (--init)

class Run:
    """Everything that a checkpoint holds: the weights, where the run stands, and what it is.

    model, ema:         raw weights and their average; ema is never trained, only updated
    stage, iteration:   where it stands: stages done, and iterations done in the present one
    stages, recipe:     the schedule and the numbers it follows
    table:              [(name of a row, {task: PSNR in dB}), ...]: the input, then a row a stage;
                        a classifier's: accuracy in %, and chance
    facts:              what must be the same when a stopped run goes on
    leads:              this process writes the files, one of all that train together
    """

    def __init__(self, args, device, leads=True):
        self.args, self.recipe, self.out, self.leads = args, args.recipe, Path(args.out), leads
        if args.init:
            model, self.recipe["sizes"] = read_init(args)  # the model is what the file holds
        else:
            model = new_model(args)
        self.model = model.to(device)
        # A copy: the average begins at the first weights, of --init, too.
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.stages, self.table, self.stage, self.iteration = args.stages, [], 0, 0
        self.new_optimizer()

    def new_optimizer(self):
        """Fresh for each stage: what Adam has learned about earlier gradients is forgotten. Adam
        adds weight decay to the gradient, AdamW takes it off the weights (Uformer's .02)."""
        recipe, parameters = self.recipe, list(self.model.parameters())
        self.optimizer = getattr(torch.optim, recipe["optimizer"])(
            parameters, recipe["lr"], recipe["betas"], weight_decay=recipe["weight_decay"],
            fused=not parameters[0].is_meta)                     # one kernel for all parameters

    def identify(self, data):
        """Notes what must stay the same when the run goes on; data: ImageCache.identity. Flags that
        only change how it is computed (--workers, --accumulate, --precision ...) may differ."""
        # The recipe's numbers that shape the trajectory; period and order are in the stages.
        kept = ("optimizer", "weight_decay", "lr", "eta_min", "ema", "crop", "batch")
        args, order = self.args, [list(stage.tasks) for stage in self.stages]
        self.facts = dict(arch=args.arch, prompt=args.prompt, seed=args.seed, pairs=args.pairs_as,
                          order=order, periods=[list(stage.periods) for stage in self.stages],
                          data=data, **{key: self.recipe[key] for key in kept})

    def save(self, keep=None):
        """Writes last.pt whole or not at all; the one before becomes previous.pt. keep: a name for
        one more file, that stays. A new file is written beside the old one and only then takes its
        name (whole_file): a run killed at any moment has a whole last.pt. previous.pt is for what
        no program sees coming: the power fails before the disk has it all, half a file is copied.
        """
        if not self.leads:
            return
        # Gradients were finite, but a rate that is too high can still have driven weights away.
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise self.failed("the weights are no longer finite; not saved")
        # Plain numbers, strings, lists and tensors alone, so that torch.load(weights_only=True),
        # which can't run code, reads it: eval.py rebuilds the model from arch, prompt and sizes.
        state = {"mioir": 1, "arch": self.args.arch, "prompt": self.args.prompt,
                 "sizes": self.recipe["sizes"], "facts": self.facts, "table": self.table,
                 "raw": self.model.state_dict(), "ema": self.ema.state_dict(),
                 "optimizer": self.optimizer.state_dict(),
                 "stage": self.stage, "iteration": self.iteration}
        last = self.out / "last.pt"
        try:
            with whole_file(last) as file:
                torch.save(state, file)
                file.flush()
                # Copied, not renamed: last.pt must not be lacking for a moment.
                if last.exists():
                    copy_whole(last, self.out / "previous.pt")
                if keep:
                    copy_whole(file.name, self.out / keep)
        except (OSError, RuntimeError) as error:       # torch reports a full disk as RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise self.failed(f"{last}: not saved ({reason})") from None

    def failed(self, what):
        """A ValueError that says where the run stands, what is wrong, and what is safe."""
        good, safe = checkpoints(self.out), "no checkpoint was written yet"
        if good:
            safe = f"{good[0]} is unharmed; when the cause is mended, add --resume"
        place = f"stage {self.stage + 1}, iteration {self.iteration + 1}"
        return ValueError(f"{place}: {what}; {safe}")

    def load(self, say):
        """Goes on from last.pt, or from what was saved before where that is torn or not finite.
        Refuses another recipe: half a run by one and half by another would be neither."""
        for path in checkpoints(self.out):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if not all(value.isfinite().all() for value in saved["raw"].values()):
                    raise ValueError("numbers that are not finite")
                break
            except Exception as error:                 # torch raises a dozen kinds for torn files
                reason = str(error).splitlines()[0][:80]
                say(f"{path} can't be used ({reason}); trying the one before")
        else:                                          # no break: none of them will do
            raise ValueError(f"--resume: there is no readable {self.out / 'last.pt'} to go on from")
        # Every difference is named, with both values, so that the right flag can be found.
        changed = [f"{key}: {saved['facts'].get(key)} then, {value} now"
                   for key, value in self.facts.items() if saved["facts"].get(key) != value]
        if changed:
            raise ValueError(f"--resume: {path} is of another run; {'; '.join(changed)}")
        for name, part in (("raw", self.model), ("ema", self.ema), ("optimizer", self.optimizer)):
            part.load_state_dict(saved[name])
        self.stage, self.iteration = saved["stage"], saved["iteration"]
        self.table = [tuple(row) for row in saved["table"]]
        if self.stage == len(self.stages):
            say(f"{path}: this run is finished; only its table and pictures are made anew")
        else:
            say(f"goes on from {path}: stage {self.stage + 1}, iteration {self.iteration}")


def copy_whole(source, target):
    """A copy of a file that is there whole or not at all."""
    with whole_file(target) as file, open(source, "rb") as old:
        shutil.copyfileobj(old, file)


def new_model(args):
    """Weights as they are before training: they depend on the seed alone, whatever was drawn
    before. fork_rng gives torch's own generator back as it was, to a notebook, say, that calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        if args.arch == "classifier":
            return build_classifier(**args.recipe["sizes"])
        model = build_model(args.arch, args.prompt, **args.recipe["sizes"])
    if args.prompt == "ep" and "prompts" in args.recipe:
        model.prompts.copy_(args.recipe["prompts"]())
    return model


def read_init(args):
    """(model, sizes) of --init. Refuses another arch or prompt: their weights would not fit."""
    prompts = read_prompts(args.prompts) if args.prompts else None
    model, info = load_model(args.init, args.init_weights, prompts=prompts)
    if (info["arch"], info["prompt"]) != (args.arch, args.prompt):
        flags = f"--arch {info['arch']}" + (f" --prompt {info['prompt']}" if info["prompt"] else "")
        raise ValueError(f"--init {args.init} holds another model; train it with {flags}")
    return model, info["sizes"]


def checkpoints(out):
    """What a run can go on from, in the order to try: previous.pt, then the stages' ends, are for a
    last.pt that is torn or not finite."""
    ends = sorted(out.glob("stage*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in (out / "last.pt", out / "previous.pt", *ends) if path.exists()]


def open_images(args, say):
    """The images to train on, {"photos": ImageCache of --data, dead leaves or both; a task: that
    of --pairs}. They are decoded once into a cache beside the run."""
    out, recipe = Path(args.out), args.recipe
    # A run's folder is its memory: nothing is begun on top of it, and nothing goes on without it.
    begun = checkpoints(out)
    if begun and not args.resume:
        raise ValueError(f"--out {out} holds a run; add --resume to go on, or choose another --out")
    if args.resume and not begun:
        raise ValueError(f"--resume: there is no {out / 'last.pt'} to go on from")
    items = photo_items(args.data, args.depth, say) if args.data else []
    if args.leaves or not args.data:
        count, edge = recipe["leaves"]
        items += leaf_items(args.leaves or count, edge, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    for torn in out.glob(".*.tmp"):                    # whole_file's, where a save was killed
        torn.unlink()
    folder, kind = args.cache or out / "cache", ImageCache
    source = {}
    if args.pairs:
        pairs = pair_items(match_pairs(Path(args.pairs[0]), Path(args.pairs[1])))
        source[args.pairs_as] = kind(folder, pairs, recipe["crop"], say)
    if args.stages[-1].tasks != (args.pairs_as,):      # there are tasks besides that of --pairs
        source["photos"] = kind(folder, items, recipe["crop"], say)
    return source


def pair_items(pairs):
    """Items of an ImageCache for [(LQ file, GT file), ...]: images of six channels, GT then LQ, so
    that a crop of both is one crop."""
    return [(f"pair-{item_name(lq.stem, lq, gt)}", _make_pair, (lq, gt)) for lq, gt in pairs]


def _make_pair(lq, gt):
    pair = read_image(gt), read_image(lq)
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"{lq} and {gt} are not of one size")
    return np.concatenate(pair, 2), None                                        # (H,W,6) of uint8


# ---- Where it runs -------------------------------------------------------------------------------
# The recipe's batch is the total over all processes and parts; how it is divided is this machine's
# business. A sample's random numbers hang on its place in the whole batch, never on who draws them.
# (Often the batch is given per GPU, and who trains on four GPUs instead of two must then change
# rate and length, too, or compares two different trainings.)

class Machine:
    """Where a run computes: the device, this process's rank among `world`, and how fast a way it
    takes. None of it changes what is computed, but for rounding.

    torchrun starts `world` processes, one a GPU, and tells each its rank by environment variables.
    Every process holds the whole model, takes its share of each batch, and DDP averages their
    gradients, so that all make the same step.
    """

    def __init__(self, args):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU on this machine")
        self.device, self.parts, self.args = torch.device(args.device), args.accumulate, args
        if args.device == "cuda":                               # under torchrun, a GPU a process
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        self.channels_last = args.channels_last or args.recipe.get("channels_last", False)
        # In bf16, torch decides operation by operation, by its own lists, what keeps float32. bf16
        # has float32's range of exponents: small gradients do not vanish, so the loss needs no
        # scaling, which fp16 would.
        self.autocast = partial(torch.autocast, args.device, torch.bfloat16,
                                enabled=args.precision == "bf16")
        # Equal parts, so that each process has the same work, and share leaves no sample out.
        batch, ways = args.recipe["batch"], f"{self.world} processes x --accumulate {self.parts}"
        if batch % (self.world * self.parts):
            raise ValueError(f"a batch of {batch} can't be split among {ways}; choose numbers "
                             "that divide it")
        if self.world > 1:
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        # TF32 keeps 10 bits of a product's mantissa: faster on GPUs from 2020 on. The paper's torch
        # 1.12 had it on for convolutions and off for matrix products; fp32 here means neither.
        torch.backends.cudnn.allow_tf32 = args.precision in ("tf32", "tf32conv")
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
        torch.backends.cudnn.deterministic = True               # the same bits every time

    def share(self, batch):
        """Which samples of a batch are this process's: a list of parts, each a range. Batch 8, two
        processes, --accumulate 2: rank 0 has [0..1, 2..3], rank 1 has [4..5, 6..7]."""
        size = batch // (self.world * self.parts)
        first = self.rank * self.parts
        return [range(size * k, size * (k + 1)) for k in range(first, first + self.parts)]

    def wrap(self, model):
        """The model as it is called in training. The same weights: run.model sees every step."""
        if self.args.checkpointing:
            recompute_blocks(model)
        if self.channels_last:
            lay_channels_last(model)
        if self.world > 1:
            # Each backward ends with the mean of p.grad over all processes. With several parts,
            # that holds the earlier parts' mean, the same everywhere, which a mean leaves alone.
            model = torch.nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if self.args.compile else model

    def sum_of_all(self, x):
        """The tensor, added up over all processes; whoever comes first waits for the others."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any_of_all(self, flag):
        """Whether any process says so, so that all of them stop after the same iteration."""
        return self.sum_of_all(torch.tensor(float(flag), device=self.device)).item() > 0


def recompute_blocks(model):
    """Activation checkpointing (Chen et al. 2016): a block keeps its input alone, and is run again
    when its gradient is due: about a third more time for a tenth to a quarter of the memory.
    SRResNet's blocks are small: of three, the first one's input alone is kept."""
    for module in model.modules():
        if isinstance(module, (ResidualBlock, WindowBlock, RestormerBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if isinstance(module, SRResNet):
            module.three_blocks = partial(checkpoint, module.three_blocks, use_reentrant=False)


def lay_channels_last(model):
    """Convolutions' weights in torch.channels_last, (N,H,W,C) in memory: what convolution kernels
    want, and the order that layer norm needs. (`model.to` refuses PromptIR's 5-D prompts.)"""
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


# ---- What a run says -----------------------------------------------------------------------------
# On the screen: the plan, a line every log_every iterations, the stage x task table after each
# stage, where the results lie. In the files the same: log.jsonl, table.md, and as pictures.
#
#     stage 2/7 140/200 | loss jpeg 0.0301 rain 0.0442 | lr 3.3e-04 | 95.2 images/s | 3 min left
#     validation: blur 28.42 noise 19.76 jpeg 32.30 rain 23.60 haze 12.20 dark 16.16 sr 27.40

def before_training(args, pairs):
    """The first row of a run's table, (name, {task: number}): what training has to beat."""
    if args.arch == "classifier":
        return "chance", dict.fromkeys(pairs, 100 / len(pairs))    # of seven answers, or eight
    return "input", input_psnr(pairs)


def validate(run, pairs, machine, log):
    """{task: PSNR in dB, or the classifier's accuracy in %} of the raw weights on images that no
    run trains on, each on the screen as it comes; one process computes, the others wait.

    An "ep" model is told the true task. Tasks that were not trained yet are scored, too: that
    shows what the ones before them have done to them, for good or ill.
    """
    started, scores = time.monotonic(), {}
    if run.leads:
        log.say("validation:", end="")
        for task, examples in pairs.items():
            if run.args.arch == "classifier":
                scores.update(confusion(run.model, {task: examples})[0])
            else:
                scores.update(mean_psnr(run.model, {task: examples}, machine.device))
            log.say(f" {task} {scores[task]:.2f}", end="")
        log.say("")
        log.write(stage=run.stage + 1, iteration=run.iteration, psnr=scores)
    machine.any_of_all(False)                      # here the others wait
    log.validation = time.monotonic() - started
    log.idle += log.validation
    return scores


def refuse_what_is_not_finite(run, losses, norm, tasks):
    """Raises ValueError that names the task whose loss is not a number, or the gradient: a finite
    loss can have an infinite one, and a single step with it would poison every weight."""
    numbers = [(f"the loss of {task}", loss) for task, loss in zip(tasks, losses.tolist())]
    for what, number in [*numbers, ("the gradient", norm.item())]:
        if not math.isfinite(number):
            raise run.failed(f"{what} is not finite; the weights were left as they were before")


class Log:
    """Progress on the screen and in log.jsonl, one JSON object a line; one process of many speaks.

    Between two reports the losses of every task are collected, so that each report has means over
    all images of a task since the one before, not the last batch's.
    """

    def __init__(self, run):
        self.speaks = run.leads
        # Line-buffered, so a killed run's log is whole.
        self.file = open(run.out / "log.jsonl" if run.leads else os.devnull, "a", buffering=1)
        self.losses = {task: [] for task in ANSWERS}
        self.iterations = 0                        # of this session: a resumed run counts anew
        # Seconds: when it began; how long validations took, all of them, and the last one.
        self.start, self.idle, self.validation = time.monotonic(), 0.0, 0.0
        # Ctrl-C and `kill` ask: the loop ends its iteration, saves and says how to go on. A handler
        # may run between any two instructions, so it does no more than note that it was called.
        self.stop = None
        self.handlers = {number: signal.signal(number, self.ask_to_stop)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(self, number, frame):
        """A signal's handler; notes which, as the exit code of a stopped run is 128 + number."""
        self.stop = number

    def close(self):
        """Gives the signals back to whom they belonged."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def say(self, text, end="\n"):
        """A line on the screen."""
        if self.speaks:
            print(text, end=end, flush=True)

    def write(self, **fields):
        """A line in log.jsonl."""
        self.file.write(json.dumps(fields) + "\n")

    def rate(self):
        """Iterations per second of training in this session, validations not counted."""
        return self.iterations / max(time.monotonic() - self.start - self.idle, 1e-9)

    def left(self, run):
        """Seconds to the end of the run at this rate, with as many validations as are to come, each
        as long as the last one; before the first, of training alone."""
        seconds, done = 0.0, run.iteration         # done: iterations, of the stage looked at
        for stage in run.stages[run.stage:]:
            every = run.args.val_every or stage.iterations
            planned = math.ceil(stage.iterations / every)          # the one at the end included
            over = max(done - 1, 0) // every                       # one that is due now is not
            seconds += (stage.iterations - done) / self.rate() + (planned - over) * self.validation
            done = 0
        return seconds

    def add(self, run, losses, tasks, norm, lr):
        """Counts an iteration; speaks every log_every iterations, at a stage's end, and at the
        20th of a session, when one can tell how long it will take, though the first are slow.
        losses: (batch,), tasks: their names, norm: the gradient's, lr: the rate that was used."""
        for task, loss in zip(tasks, losses.tolist()):
            self.losses[task].append(loss)
        self.iterations += 1
        t, total = run.iteration, run.stages[run.stage].iterations
        if t % run.recipe["log_every"] != 0 and t != total and self.iterations != 20:
            return
        # Means since the last report. Five decimals: a loss of .00001 is a 400th of a grey level.
        means = {task: round(float(np.mean(seen)), 5) for task, seen in self.losses.items() if seen}
        self.losses = {task: [] for task in ANSWERS}
        losses = " ".join(f"{task} {loss:.4f}" for task, loss in means.items())
        images, left = self.rate() * run.recipe["batch"], self.left(run)
        self.say(f"stage {run.stage + 1}/{len(run.stages)} {t}/{total} | loss {losses} | "
                 f"lr {lr:.1e} | {images:.1f} images/s | {clock(left)} left")
        self.write(stage=run.stage + 1, iteration=t, tasks=run.stages[run.stage].tasks, loss=means,
                   lr=lr, gradient_norm=round(norm.item(), 5), images_per_second=round(images, 2),
                   seconds_left=round(left))


def show_table(run, log):
    """The stage x task table, or forgetting matrix: how well each task is done after each stage,
    those already trained framed. Printed, and written as table.md, table.png; curves.png too.

    Read down a column: where a frame begins, a task is trained for the first time and should rise;
    below, where later tasks join it, it should not fall: that is what rehearsal is for.
    """
    unit = "accuracy (%)" if run.args.arch == "classifier" else "PSNR (dB)"
    columns = [*run.table[0][1], "mean"]                   # TASKS, perhaps "none" of a classifier
    rows = []
    for name, scores in run.table:
        rows.append((name, [*scores.values(), float(np.mean(list(scores.values())))]))
    text = markdown([f"{unit} after", *columns], [[name, *cells] for name, cells in rows])
    (run.out / "table.md").write_text(text + "\n")
    # Row 0 is the input; row i is after stage i, which trained these columns.
    trained = {(i, columns.index(task)) for i, stage in enumerate(run.stages, 1)
               for task in stage.tasks}
    title = f"{run.args.name}: {unit} after each stage (framed: trained in it)"
    matrix_picture(run.out / "table.png", title, columns, rows, trained)
    begins, rates, done = {}, [], 0
    for k, stage in enumerate(run.stages, 1):
        begins[f"stage {k}"] = done
        rates += [(done + t, lr_at(t, stage.periods, run.recipe["lr"], run.recipe["eta_min"]))
                  for t in range(1, stage.iterations + 1, max(stage.iterations // 200, 1))]
        done += stage.iterations
    curves_picture(run.out / "curves.png", run.args.name, run.out / "log.jsonl", rates, begins)
    log.say(text)


def announce(run, source, machine, say):
    """After the plan: where, on what, and what fine-tuning does to tasks that it leaves out."""
    # The machine, since the same seed gives the same bits on the same kind of machine only.
    where = f"cpu, {torch.get_num_threads()} threads"
    if machine.device.type == "cuda":
        where = torch.cuda.get_device_name(machine.device)
    size = f"{sum(p.numel() for p in run.model.parameters()):,} parameters"
    crops = f"crops from {sum(len(images) for images in source.values())} images"
    say(f"on {where}, {machine.world} process(es), {run.args.precision}: {size}, {crops}")
    others = ", ".join(task for task in TASKS if task not in run.stages[-1].tasks)
    if run.args.init and others:
        say(f"fine-tuning: {others} are not rehearsed and get worse; --order keeps them")


def stopped(run, log):
    """After SIGINT or SIGTERM: everything is saved, and the command that goes on is shown. Exits
    with 128 + the signal's number, as shells expect."""
    run.save()
    start = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:        # torchrun started this process
        start = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    # The command as it was typed, quoted for a shell, with one --resume.
    again = shlex.join([arg for arg in sys.argv if arg != "--resume"] + ["--resume"])
    log.say(f"stopped by signal at stage {run.stage + 1}, iteration {run.iteration}; saved. "
            f"To go on:\n  {start} {again}")
    sys.exit(128 + (log.stop or signal.SIGTERM))   # None: it was another process that was asked


def finish(run, pairs, log, machine):
    """The last words: a classifier's confusion matrix or the strips, and what the run took: time,
    the GPU's memory at its peak, and images a second of training (validations not counted)."""
    if run.args.arch == "classifier":
        log.say(f"\n{confusion_text(*confusion(run.model, pairs))}")
    else:
        task_strips(run.out / "strips.png", run.model, pairs, machine.device)
    script = "eval.py" if len(TASKS) == 7 else sys.argv[0]         # a task more: who added it
    command = f"python {script} {shlex.quote(f'{run.out}/last.pt')}"
    if run.args.pairs:                             # the table above is of other images than these
        command += f" --pairs {shlex.join(run.args.pairs)}"
        command += f" --task {run.args.pairs_as}" if run.args.prompt == "ep" else ""
    if run.args.data or run.args.pairs:
        log.say("(The table is of the built-in images, held out; not of yours.)")
    took, speed = clock(time.monotonic() - log.start), f"{log.rate() * run.recipe['batch']:.1f}"
    if machine.device.type == "cuda":
        took += f", {torch.cuda.max_memory_allocated(machine.device) / 1e9:.1f} GB at most"
    log.say(f"done in {took}, {speed} images/s; {run.out} holds last.pt, log and pictures\n"
            f"next: {command}")


def train(args):
    """A whole run, from Args to the last picture. Under torchrun, each process calls it."""
    if args.print_plan:
        return print(plan(args))
    # The plan comes first, but for what is refused at once; images may take a while.
    for folder in (*(args.data or ()), *(args.pairs or ()), *filter(None, [args.depth])):
        require_folder(folder)
    machine = Machine(args)
    leads = machine.rank == 0
    if leads:
        print(plan(args), flush=True)
    # Every process builds the same model from the same seed; DDP also copies rank 0's weights.
    run = Run(args, machine.device, leads)
    source = open_images(args, print) if leads else None            # one decodes, others wait
    machine.any_of_all(False)                                       # here
    source = source or open_images(args, lambda text: None)
    run.identify("; ".join(images.identity for images in source.values()))
    net = machine.wrap(run.model)
    log = Log(run)
    try:
        announce(run, source, machine, log.say)
        if args.resume:
            run.load(log.say)
        run_stages(run, net, source, machine, log)
    finally:
        log.close()


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit.

    Where torchrun started it, the line would be followed, and hidden, by torchrun's own report,
    some thirty lines on which process failed. What a process writes to TORCHELASTIC_ERROR_FILE ends
    that report; of several processes, what has the earliest time.
    """
    try:
        command(argv)
    except SystemExit as end:
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file and isinstance(end.code, str):
            line = {"message": end.code, "timestamp": int(time.time())}
            Path(file).write_text(json.dumps(line))
        raise
    finally:                                       # now the others learn that this one is gone
        if dist.is_initialized():
            dist.destroy_process_group()


def command(argv):
    """Parses the command line and trains; what the user can mend becomes one line."""
    args = parse(argv)
    tune_cpu()
    try:
        train(args)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except (RuntimeError, MemoryError) as error:
        # What the machine lacks: torch says RuntimeError of memory, of a process gone and of a
        # compiler alike, so words and flags must tell them apart. The rest is a fault of ours, of
        # which the traceback helps.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if lacks_memory(error):
            sys.exit(f"train.py: not enough memory ({reason}); try --accumulate 2, 4 ..., "
                     "--checkpointing, --batch or --crop")
        if isinstance(error, dist.DistError) or "by peer" in str(error):
            time.sleep(1)                          # let the cause be the earlier one
            sys.exit("train.py: another process has ended, and said why")
        if args.compile:
            sys.exit(f"train.py: --compile failed ({reason}); it needs a C++ compiler on a CPU, "
                     "Triton on a GPU; leave it out")
        raise


if __name__ == "__main__":
    main()
