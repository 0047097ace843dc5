"""Train one network for seven restoration tasks: mixed or sequential, with or without a prompt.

    python train.py --arch restormer --seq --prompt                   # small: minutes on a CPU
    python train.py --arch restormer --seq --prompt --data DF2K       # the paper's recipe: a GPU
    python train.py --arch restormer --seq --prompt --data DF2K --resume    # go on where it stopped
    torchrun --nproc_per_node 2 train.py --arch swinir --data DF2K    # on two GPUs
    python train.py --arch classifier --data DF2K                     # names the task for "ep"

One command runs the whole schedule. OUT receives last.pt (the newest state), one file per stage,
log.jsonl, table.md and .png (PSNR by stage and task), curves.png and strips.png. On a CPU the same
seed gives the same bits, also to a run that was killed and resumed; on a GPU, whose sums come in
any order, the same numbers but for rounding.

Glossary
    iteration t    one step of the optimiser on one batch; counted from 0 within its stage
    period         iterations of one cosine of the learning rate
    stage          a set of tasks and the periods it is trained for
    schedule       the list of stages; a mixed run has one stage
    run            one training, from the first stage to the last, however often it is interrupted
    batch          the samples of one iteration, over all processes; --accumulate cuts it into parts
    raw, EMA       the weights as the optimiser leaves them, and their running average
    lq, gt         degraded and true crops, (N,3,crop,crop) in [0,1]; task: rows of TASKS, (N,)

Details that are easily missed, each explained where it is done
    1. the learning rate restarts one iteration late, as published              lr_at
    2. at a new stage Adam starts anew; the average of the weights does not     run_stages
    3. large canvases are degraded, then cropped; JPEG's grid may lie anywhere  sample, make_batch
    4. the loss is divided by the whole batch, however it is split              iterate
    5. drop path draws image by image, each from a seed of its own              drop_path_draws
    6. the weights that are scored are the raw ones, as in the paper            validate
    7. whatever can be drawn again is not saved: position and seed suffice      Run

Reading order: the recipes; the schedule (Section 3.2) and its learning rate; which task and which
crop a sample gets; the loop, `iterate` and `run_stages`, on two pages. What comes after the banner
"not in the paper" is smaller recipes for a CPU, the classifier's eighth answer, pairs of one's own,
the command line, checkpoints, processes, and what is said on the screen.
Source: paper, Sections 3.2 and 4.1; the published options/*.yml; BasicSR's training loop.
"""
import argparse
import contextlib
import copy
import datetime
import json
import math
import multiprocessing
import os
import shlex
import signal
import sqlite3
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from degrade import (ImageCache, OneLineParser, apply, clock, draw, ends_in_one_line, item_name,
                     jpeg, lacks_memory, leaf_items, photo_items, read_image, require_folder,
                     seeded, usable_cores, whole_file)
from eval import (builtin_images, clean_pairs, confusion, confusion_text, curves_picture, figure,
                  input_psnr, markdown, match_pairs, matrix_picture, mean_psnr, plain_mean,
                  read_prompts, set_precision, task_strips, tune_cpu, validation_pairs)
from mioir import (ANSWERS, TASKS, DropPath, ResidualBlock, RestormerBlock, SRResNet,
                   WindowBlock, build_classifier, build_model, load_model, read_checkpoint)

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

# What a crop's edge must divide by: windows of 8 x 8; three halvings; four, and then a window.
CROP_MULTIPLE = {"swinir": 8, "restormer": 8, "promptir": 8, "uformer": 128}


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


def stages(arch, seq=False, order=None, period=None):
    """The schedule, a list. Mixed: one stage, all tasks. Sequential: stage k trains the first k.
    Either has k - 1 + 4 periods for k tasks, so that what is compared is the order, not the effort.

    order: letters of LETTERS, each at most once; the default is the paper's. period: iterations.
    Raises ValueError for letters that are unknown or repeated.
    """
    order = order or RECIPES[arch]["order"]
    period = period or RECIPES[arch]["period"]
    for k, letter in enumerate(order):
        if letter not in LETTERS or letter in order[:k]:
            known = ", ".join(f"{key} ({task})" for key, task in LETTERS.items())
            raise ValueError(f"--order {order}: {letter!r} is unknown or repeated; use {known}")
    tasks = tuple(LETTERS[letter] for letter in order)
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
# degrading itself happens a batch at a time on the training device. With the same images, tasks,
# batch and crop, a sample depends on (seed, stage, t, i) alone, t the iteration and i its place,
# whoever computes it: so a resumed run, or one on more GPUs, sees what the undisturbed run sees.
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


def below(n, g):
    """A random integer, 0 .. n - 1, from the generator g."""
    return int(torch.randint(n, (1,), generator=g))


def sample(source, tasks, crop, batch, key):
    """Sample i of an iteration's batch, before degradation: a dict of numpy arrays and numbers.

    source: {"photos": ImageCache; a task: the images of --pairs}, one or both. tasks: those of the
    stage. crop: edge in pixels. batch: the whole one. key: (seed, stage, t, i).

    The order in which numbers are drawn here is a contract: it decides the bits of every run. One
    more number is to be drawn last, or from a generator of its own.
    """
    seed, stage, t, i = key
    task = task_of(tasks, t, i, batch)
    images = source[task if task in source else "photos"]
    chooser = seeded(seed, stage, "image", t * batch + i)
    k = below(len(images), chooser)
    g = seeded(*key)                               # for all but the choice of the image
    h, w = images.size(k)
    edge = crop + MARGIN
    top, left = below(max(h - edge, 0) + 1, g), below(max(w - edge, 0) + 1, g)
    item = {"task": task,
            "canvas": images.crop(k, top, left, edge),                  # (3,edge,edge) of uint8
            "offset": (16 + below(16, g), 16 + below(16, g)),
            "turn": below(8, g)}                                        # of flips and rotations
    if len(item["canvas"]) == 6:                                        # one of --pairs: GT, LQ
        item["canvas"], item["lq"] = item["canvas"][:3], item["canvas"][3:]
        return item
    drawn = draw(task, (edge, edge), "in", g, rain_field=(RAIN_FIELD, RAIN_FIELD))
    item.update((name, value[0].numpy()) for name, value in drawn.items())
    if task == "haze":                             # relative to the whole image's farthest point
        item["depth"] = images.depth_crop(k, top, left, edge, g)                  # (1,edge,edge)
    return item


# Degrading is done a task at a time, a call over all the batch's images of that task: every
# degradation takes one parameter per image.

def make_batch(part, crop, device):
    """Degrades a part of a batch on the device. part: see Part. Returns lq, gt: (n,3,crop,crop);
    task: (n,) rows of ANSWERS; draws: (n,branches), drop path's (see drop_path_draws)."""
    groups = part.to(device)
    lq, gt = [None] * len(part.cuts), [None] * len(part.cuts)
    for name, places in part.places.items():
        canvas = groups[name].pop("canvas")                             # (k,3,edge,edge) of uint8
        degraded = degrade_group(canvas.float() / 255, name, groups[name])
        for i, true, damaged in zip(places, canvas, degraded):
            (top, left), turn = part.cuts[i]
            inside = slice(top, top + crop), slice(left, left + crop)
            lq[i] = turned(damaged[:, *inside], turn)                   # (3,crop,crop)
            gt[i] = turned(true[:, *inside], turn)
    return torch.stack(lq), torch.stack(gt).float() / 255, *groups["all"].values()


def degrade_group(x, task, group):
    """Degrades (k,3,edge,edge), crops of samples that share a task, each by its own numbers.

    group: what the samples hold, stacked: {name: (k,...)}. Rain is cut from a larger field, whose
    brightest spot gets RAIN_PEAK, not 1: a whole image is larger still, and its one brightest spot
    makes all others darker."""
    if "lq" in group:                              # --pairs: somebody else has degraded them
        return group["lq"].float() / 255
    if "grey" in group:                            # the classifier's (not in the paper)
        return degrade_as_kept(x, task, group)
    depth = group.pop("depth", None)               # the other numbers are those of `draw`
    return apply(x, task, group, depth, depth_max=1.0, peak=RAIN_PEAK)


def turned(x, turn):
    """One of the eight flips and quarter turns of (C,H,H); turn: 0..7, three bits."""
    if turn & 1:
        x = x.mT                                   # transposed; with one flip, a quarter turn
    if turn & 2:
        x = x.flip(1)
    if turn & 4:
        x = x.flip(2)
    return x


def drop_paths(model):
    """The branches that drop path may leave out, in order: SwinIR's and Uformer's; else none."""
    return [m for m in model.modules() if isinstance(m, DropPath) and m.probability > 0]


def drop_path_draws(branches, key):
    """Uniform numbers that decide which branches one image leaves out, (branches,) of float32; they
    depend on key, (seed, stage, t, i), alone.

    Torch's own generator would give image i other numbers when it stands in another part or
    process; then --accumulate and the number of GPUs would change what is learned.
    """
    return torch.rand(branches, generator=seeded(*key, "drop path")).numpy()


# ---- The loop ------------------------------------------------------------------------------------
#
# An iteration of the paper's Restormer on two GPUs, as one of the two processes sees it:
#
#     batches           4 of the batch's 8 samples: crops of uint8 and numbers, from the processor
#     make_batch        degraded on the GPU: lq, gt (4,3,128,128), task (4,)
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
#
# A GPU works through a queue that the processor fills ahead of it. Whoever reads a number off the
# GPU waits until the queue is empty, and the GPU then waits for new work. So an iteration reads
# once, all it wants to know, and the place is marked.

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


def iterate(run, net, parts, machine, lr, asked):
    """One iteration of run.stage, from parts of a batch to changed weights.

    net: run.model as it is called, perhaps compiled, or in DDP. parts: [(rows of the batch, Part),
    ...], this process's, one unless --accumulate asks for more. lr: this iteration's rate. asked:
    whether this process was asked to stop. Returns ([loss of each of the batch's samples], norm of
    the gradient, whether any process was asked to stop). Raises ValueError, the weights unchanged,
    where a loss or the gradient is not finite.
    """
    recipe, batch = run.recipe, run.recipe["batch"]
    for group in run.optimizer.param_groups:       # schedule and optimiser know nothing of each
        group["lr"] = lr                           # other: the rate is set before each step
    run.optimizer.zero_grad()
    losses = torch.zeros(batch, device=machine.device)
    for rows, part in parts:
        lq, gt, task, draws = make_batch(part, recipe["crop"], machine.device)
        if run.args.arch == "classifier":
            gt = None                              # it sees degraded images alone
        for branch, of_branch in zip(drop_paths(run.model), draws.unbind(1)):
            branch.draws = of_branch                                            # (n,)
        set_precision(run.args.precision)          # TF32, if asked for, going forward and back
        with machine.autocast():                   # bf16, if asked for, going forward
            loss = loss_per_image(net, lq, gt, task)                            # (n,)
        # The mean over the batch: parts add up. Times world, as DDP averages processes.
        (loss.sum() * machine.world / batch).backward()
        set_precision("fp32")                      # data and validation are in no other
        losses[rows.start:rows.stop] = loss.detach()
    norm = torch.nn.utils.get_total_norm(          # logged, but not clipped, as published
        [p.grad for p in run.model.parameters() if p.grad is not None])
    # All that is to be known of this iteration, in one tensor. Each process has filled its own rows
    # of losses, the others' are 0: the sum over processes is the whole batch's. The norm is the
    # same in all of them already.
    wish = torch.full((1,), float(asked), device=machine.device)
    told = torch.cat((losses, norm[None] / machine.world, wish))                # (batch + 2,)
    *losses, norm, wish = machine.sums(told)
    refuse_what_is_not_finite(run, losses, norm)   # before the weights change
    run.optimizer.step()
    update_ema(run.ema, run.model, recipe["ema"])
    return losses, norm, wish > 0


def run_stages(run, net, source, machine, log):
    """The whole schedule of Section 3.2, from where the run stands (its start, or where it was
    stopped) to its end. net: as in iterate; source: as in sample."""
    recipe, args = run.recipe, run.args
    pairs = scored_pairs(run)                               # {task: [(lq, gt), ...]}
    if not run.table:
        run.table = rows_before_training(run, pairs, machine, log)
    if run.stage == len(run.schedule) and run.leads:        # finished, perhaps killed before this
        show_table(run, log)
    # Stage by stage; a resumed run enters in the middle, at run.stage and run.iteration.
    while run.stage < len(run.schedule):
        stage = run.schedule[run.stage]                     # with --seq one task more each time
        if run.iteration == 0:
            run.new_optimizer()                             # weights and EMA go on, Adam does not
        log.say(f"stage {run.stage + 1}/{len(run.schedule)}: {', '.join(stage.tasks)}")
        net.train()                                         # drop path is on
        for t, parts in batches(run, source, machine):
            lr = lr_at(t + 1, stage.periods, recipe["lr"], recipe["eta_min"])
            losses, norm, stop = iterate(run, net, parts, machine, lr, log.stop is not None)
            run.iteration = t + 1
            # The step is done; what follows says it, saves it, and asks whether to go on.
            log.add(run, losses, norm, lr)
            if run.iteration % recipe["save_every"] == 0:
                run.save()
            if stop:
                stopped(run, log)

        # A row of the forgetting matrix: all seven tasks, those not trained yet, too.
        name = f"stage {run.stage + 1} (+{stage.tasks[-1]})" if args.seq else "mixed"
        run.table.append((name, validate(run, pairs, machine, log)))
        run.stage, run.iteration = run.stage + 1, 0
        run.save(keep=f"stage{run.stage}.pt")
        if run.leads:
            show_table(run, log)
    if run.leads:
        finish(run, pairs, log, machine.device)


# ==================================================================================================
# Not in the paper: smaller recipes, the classifier's eighth answer, one's own pairs, the way of
# samples to the device, the command line, checkpoints, processes, and what a run says.
# ==================================================================================================

# ---- Smaller recipes -----------------------------------------------------------------------------

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
# leaves, validate: (how many, edge in pixels) of the dead leaves to train on without --data, and of
# the validation images. prompts: what makes the "ep" prompts; the paper's random ones where nothing
# is said.

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
              crop=32, ema=0.99, prompts=striped_prompts)
PRESETS = {
    # The paper's numbers as they stand; 800 dead leaves of 512 x 512 stand in for DIV2K.
    "paper": dict(leaves=(800, 512), log_every=100, save_every=1000, validate=(8, 128)),
    # Hours on one core: what the model in assets/ was trained with, at a --period of its own.
    "hours": dict(_SHORT, leaves=(256, 256), batch=7, crop=48, period=600, ema=0.999),
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
    ("hours", "srresnet"): dict(sizes=dict(width=64, blocks=8), batch=14, lr=5e-4, period=1500),
    ("hours", "uformer"): dict(crop=128, batch=7),
    # Twice as wide and deeper than the demo's, and crops that show more of haze and darkness.
    ("hours", "restormer"): dict(crop=64, sizes=dict(dim=24, blocks=(1, 1, 2, 3), refinement=0,
                                                     expansion=1.5, prompt_width=16)),
    ("hours", "classifier"): dict(crop=128, batch=16, lr=2e-3, period=2500),
}


def recipe_of(args):
    """The recipe that a run follows, one flat dict: the five layers above, the last one on top.
    args: the flags; the numbers among them are None where the user said nothing."""
    recipe = dict(RECIPES[args.arch])                                           # 1
    if args.preset != "paper":
        recipe["sizes"] = SMALL[args.arch]                                      # 2
    recipe.update(PRESETS[args.preset])                                         # 3
    recipe.update(SPECIAL.get((args.preset, args.arch), {}))                    # 4
    for key in ("period", "lr", "batch", "crop", "save_every"):                 # 5
        if getattr(args, key) is not None:
            recipe[key] = getattr(args, key)
    return recipe


def schedule_of(args):
    """The schedule that the flags ask for, by the rules of `stages`. A classifier that may answer
    "none" gets undamaged images as one more task."""
    schedule = stages(args.arch, args.seq, args.order, args.recipe["period"])
    if args.recipe["sizes"].get("none"):
        schedule = [Stage((*stage.tasks, "none"), stage.periods) for stage in schedule]
    return schedule


def name_of(args):
    """The name of a run; its folder is called so, too, where --out does not say otherwise."""
    words = [args.arch, "seq" if args.seq else "mixed", args.order, args.prompt or "plain"]
    if args.arch == "classifier":
        words = [args.arch]
    return "-".join(word for word in [*words, args.preset] if word)


# ---- What a classifier is shown that may answer "none" -------------------------------------------
# The paper's classifier knows seven answers and sees degraded images alone. Ours is asked about any
# file, so it must also know pictures that nothing has happened to, and the ways of keeping them.

def sample_as_kept(source, tasks, crop, batch, key):
    """`sample`, or one of an undamaged image where it is the turn of "none"; kept as people keep
    their pictures: a fourth of them is grey, a third saved as a good JPEG (quality 85 to 98; not of
    the task jpeg). A classifier that saw coloured noise alone, never saved, takes the noise of a
    grey photo for haze."""
    *_, t, i = key
    g = seeded(*key, "kept")                       # sample's own numbers stay as they are
    if task_of(tasks, t, i, batch) == "none":
        item = clean_sample(source["photos"], crop + MARGIN, g)
    else:
        item = sample(source, tasks, crop, batch, key)
    if "lq" in item:                               # of --pairs: stays as somebody has made it
        return item
    item["grey"] = below(4, g) == 0
    item["saved"] = 85 + below(14, g) if below(3, g) == 0 and item["task"] != "jpeg" else 0
    if item["grey"]:
        r, g, b = item["canvas"].astype(np.float32)
        grey = (0.299 * r + 0.587 * g + 0.114 * b).round().astype(np.uint8)     # as pillow's "L"
        item["canvas"] = np.stack((grey, grey, grey))
    return item


def clean_sample(images, edge, g):
    """A sample of an image that nobody damaged: a canvas as it is, or, in a third of the cases,
    reduced in size (to 0.5 to 1)."""
    k = below(len(images), g)
    large = edge + below(edge + 1, g) if below(3, g) == 0 else edge
    h, w = images.size(k)
    large = max(min(large, h, w), edge)            # no larger than the image, if possible
    top, left = below(max(h - large, 0) + 1, g), below(max(w - large, 0) + 1, g)
    canvas = images.crop(k, top, left, large)
    if large > edge:
        canvas = torch.from_numpy(canvas)[None].float()
        canvas = F.interpolate(canvas, (edge, edge), mode="bicubic", antialias=True)
        canvas = canvas[0].round().clamp(0, 255).byte().numpy()
    return {"task": "none", "canvas": canvas, "offset": (16 + below(16, g), 16 + below(16, g)),
            "turn": below(8, g)}


def degrade_as_kept(x, task, group):
    """degrade_group, then what sample_as_kept drew: a grey file has one channel of noise, not
    three; a JPEG's grid lies over the damage."""
    grey, quality = group.pop("grey"), group.pop("saved").float()             # (k,) each
    y = x if task == "none" else degrade_group(x, task, group)
    y = torch.where(grey[:, None, None, None], y[:, :1], y)
    return torch.where(quality[:, None, None, None] > 0, jpeg(y, quality.clamp_min(1)), y)


# ---- The way of samples to the device ------------------------------------------------------------

class Part:
    """A part of a batch as a worker process hands it over: the samples' arrays, those of a task
    stacked, in ONE piece of memory, which goes to the device in one copy.

    A worker's tensors would travel by shared memory, one by one; where that is small (64 MB in a
    docker container) or TMPDIR's name long, workers hang for ever. Bytes go through a pipe.

    places: {task: [i, ...]}, which samples are of a task. cuts: each sample's ((top, left), turn).
    """

    def __init__(self, samples):
        self.cuts = [(s["offset"], s["turn"]) for s in samples]
        self.places = {}
        for i, s in enumerate(samples):
            self.places.setdefault(s["task"], []).append(i)
        none = np.zeros(0)                         # where no branch is ever left out
        arrays = {("all", "task"): np.array([ANSWERS.index(s["task"]) for s in samples]),
                  ("all", "draws"): np.stack([s.pop("draws", none) for s in samples])}
        for task, places in self.places.items():
            for name in samples[places[0]].keys() - {"task", "offset", "turn"}:
                arrays[task, name] = np.stack([samples[i][name] for i in places])
        self.layout, memory = {}, bytearray()
        for key, array in arrays.items():
            self.layout[key] = len(memory), array.shape, torch.from_numpy(array).dtype
            memory += array.tobytes()
            memory += bytes(-len(memory) % 8)      # a number must begin at a multiple of its size
        self.memory = np.frombuffer(memory, np.uint8)

    def pin_memory(self):
        """Called by torch's loader beside a GPU. From pinned memory, which the system never moves,
        a GPU copies by itself, while it computes and the processor goes on."""
        self.memory = torch.as_tensor(self.memory).pin_memory()
        return self

    def to(self, device):
        """{task: {name: tensor (k,...)}}, what the samples of a task hold, and {"all": {"task":
        (n,), "draws": (n,branches)}}, on the device."""
        memory, groups = torch.as_tensor(self.memory).to(device, non_blocking=True), {}     # once
        for (task, name), (start, shape, dtype) in self.layout.items():
            bytes_of_it = memory[start:start + math.prod(shape) * dtype.itemsize]
            groups.setdefault(task, {})[name] = bytes_of_it.view(dtype).view(shape)
        return groups


class Stream(torch.utils.data.Dataset):
    """Iteration t -> [Part, ...], this process's share of the batch. Unlike with the published
    shuffled list of files, what comes at t can be told without what came before. It does not keep
    the run, since loader processes get a copy of it."""

    def __init__(self, run, source, machine):
        tasks, batch = run.schedule[run.stage].tasks, run.recipe["batch"]
        draw_sample = sample_as_kept if "none" in tasks else sample
        self.sample = partial(draw_sample, source, tasks, run.recipe["crop"], batch)
        self.position, self.rows = (run.args.seed, run.stage), machine.rows_of(batch)
        self.branches = len(drop_paths(run.model))

    def __getitem__(self, t):
        parts = []
        for rows in self.rows:
            keys = [(*self.position, t, i) for i in rows]
            parts.append(Part([{**self.sample(key), "draws": drop_path_draws(self.branches, key)}
                               for key in keys]))
        return parts


def batches(run, source, machine):
    """Yields (t, [(rows of the batch, Part), ...]) for the rest of run.stage. Raises ValueError
    that says why a batch could not be prepared, as by a file gone bad or a worker killed."""
    on_gpu, workers = machine.device.type == "cuda", run.args.workers
    if workers is None:                            # up to 8, where there are cores for them
        workers = min(8, usable_cores() // machine.local_world) if on_gpu else 0
    # A stage that was begun goes on at run.iteration: nothing before it has to be drawn again.
    ahead = range(run.iteration, run.schedule[run.stage].iterations)
    # batch_size=None: an item of Stream is a batch already; collate_fn=list: leave it as it is.
    loader = iter(torch.utils.data.DataLoader(
        Stream(run, source, machine), batch_size=None, sampler=ahead, num_workers=workers,
        pin_memory=on_gpu, collate_fn=list, worker_init_fn=obey_the_parent))
    for t in ahead:
        try:
            parts = next(loader)
        except (ValueError, OSError, RuntimeError) as error:
            # A worker's error comes with its traceback, of which the last line says what happened;
            # a worker that was killed (out of memory, often) is a RuntimeError of the loader.
            raise run.failed(f"{run.place}: {str(error).splitlines()[-1]}") from None
        yield t, list(zip(machine.rows_of(run.recipe["batch"]), parts))


# The signals that end a program: Ctrl-C; `kill` and the end of a job; a terminal that closes; what
# SLURM sends some time before the end. (Windows has the first two.)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]


def obey_the_parent(worker):
    """In a loader process. A terminal or a job's end sends its signal to all processes alike, but
    it is the parent's to stop. Where the parent is killed, nobody takes what the worker hands over
    any more; it would wait for ever."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


# ---- Pairs of one's own --------------------------------------------------------------------------

def pair_items(pairs):
    """Items of an ImageCache for [(LQ file, GT file), ...]: images of six channels, GT then LQ, so
    that a crop of both is one crop."""
    return [(f"pair-{item_name(lq.stem, lq, gt)}", _make_pair, (lq, gt)) for lq, gt in pairs]


def _make_pair(lq, gt):
    pair = read_image(gt), read_image(lq)
    if pair[0].shape != pair[1].shape:
        (gt_height, gt_width, _), (height, width, _) = (image.shape for image in pair)
        raise ValueError(f"{lq} has {width} x {height} pixels, {gt} {gt_width} x {gt_height}; "
                         "enlarge the smaller one, as the paper does with low resolution (x4)")
    return np.concatenate(pair, 2), None                                        # (H,W,6) of uint8


def open_images(args, say):
    """The images to train on, {"photos": ImageCache of --data, dead leaves or both; a task: that
    of --pairs}. They are decoded once, into OUT/cache or --cache."""
    recipe, folder, source = args.recipe, args.cache or Path(args.out) / "cache", {}
    own = None
    if args.pairs:
        lq, gt, own = args.pairs
        items = pair_items(match_pairs(Path(lq), Path(gt)))
        source[own] = ImageCache(folder, items, recipe["crop"], say)
    if schedule_of(args)[-1].tasks != (own,):          # there are tasks besides that of --pairs
        items = photo_items(args.data, args.depth, say) if args.data else []
        if args.leaves or not args.data:
            count, edge = recipe["leaves"]
            items += leaf_items(args.leaves or count, edge, args.seed)
        source["photos"] = ImageCache(folder, items, recipe["crop"], say)
    return source


# ---- The command line ----------------------------------------------------------------------------

def parse(argv=None):
    """The command line: a namespace of the flags, with the recipe that follows from them. None
    mostly stands for what the recipe says. Exits with one line where flags are unknown, contradict
    each other, or are out of range."""
    parser = OneLineParser("train.py", description=__doc__.partition("\nGlossary")[0])
    add = parser.add_argument_group("what the paper varies").add_argument
    add("--arch", default="restormer", choices=RECIPES, help="a backbone, or classifier")
    add("--seq", action="store_true", help="one task more per stage (default: mixed, all at once)")
    add("--prompt", nargs="?", const="ep", choices=("ep", "ap"),
        help="tell the task: ep (explicit; also --prompt alone) or ap (adaptive)")
    add("--order", help="tasks to train, letters of s b n j r h d (default: the paper's order)")
    add = parser.add_argument_group("how long, on what").add_argument
    add("--preset", choices=PRESETS, help="default: paper with --data or --pairs, demo without")
    add("--data", nargs="+", metavar="DIR", help="folders of photos (default: dead leaves)")
    add("--depth", metavar="DIR", help="depth maps of the photos, matched by name, for haze")
    add("--leaves", type=int, metavar="N", help="train on N dead leaves, or add N to --data "
        "(default: the preset's number without --data, none with it)")
    add("--pairs", nargs=3, metavar=("LQ", "GT", "TASK"),
        help="train TASK on these folders' degraded and true photos, matched by name")
    add("--init", metavar="CKPT", help="fine-tune these weights, of train.py or published")
    add("--init-weights", default="raw", choices=("raw", "ema"), help="of CKPT (default: raw)")
    add("--prompts", metavar="NPY", help="type7.npy, where --init is a published 'ep' model")
    add("--period", type=int, help="iterations of a cosine period (default: by preset)")
    add("--lr", type=float, help="learning rate at a period's start (default: by preset)")
    add("--batch", type=int, help="crops of an iteration, over all processes (default: by preset)")
    add("--crop", type=int, help="edge of a crop in pixels (default: by preset)")
    add("--seed", type=int, default=0, help="decides first weights, images, crops, degradations")
    add("--out", metavar="DIR", help="where results go (default: runs/ and the run's name)")
    add("--resume", action="store_true", help="go on from OUT/last.pt")
    add("--print-plan", action="store_true", help="print the schedule and stop")
    # What is computed stays the same but for rounding. (bf16 keeps 8 bits of a number in
    # convolutions and matrix products; data, weights and Adam stay float32. fp16 is not offered,
    # as SwinIR's activations overflow it.)
    add = parser.add_argument_group("how it is computed").add_argument
    add("--precision", default="fp32", choices=("fp32", "tf32conv", "tf32", "bf16"),
        help="of the network; tf32conv: TF32 for convolutions alone, as the paper's torch 1.12")
    add("--compile", action="store_true", help="torch.compile the network; needs a C++ compiler")
    add("--checkpointing", action="store_true", help="less memory: activations are computed twice")
    add("--accumulate", type=int, default=1, metavar="N", help="less memory: a batch in N parts")
    add("--workers", type=int, metavar="N", help="processes that prepare samples (default: with a "
        "GPU one a core, 8 at most; else 0)")
    add("--cache", metavar="DIR", help="where decoded images go (default: OUT/cache)")
    add("--save-every", type=int, help="iterations between checkpoints (default: by preset)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    args = parser.parse_args(argv)
    # Without photographs there is no paper's recipe to repeat.
    args.preset = args.preset or ("paper" if args.data or args.pairs else "demo")
    args.recipe = recipe_of(args)
    args.out = args.out or f"runs/{name_of(args)}"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    refuse_contradictions(args, parser.error)
    return args


def refuse_contradictions(args, refuse):
    """Calls refuse(text) for what argparse can't know: flags that contradict each other, and
    numbers out of range. A text names the flag and the mend."""
    if args.arch == "classifier" and (args.prompt or args.seq or args.order):
        refuse("--arch classifier sees all tasks; leave --seq, --order and --prompt out")
    for name, goes_with in (("depth", "data"), ("prompts", "init")):    # else never looked at
        if getattr(args, name) and not getattr(args, goes_with):
            refuse(f"--{name} {getattr(args, name)}: it goes with --{goes_with}")
    trained = [LETTERS.get(letter) for letter in args.order or LETTERS]
    if args.pairs and args.pairs[2] not in trained:
        refuse(f"--pairs LQ GT {args.pairs[2]}: TASK must be one that is trained, "
               f"{', '.join(filter(None, trained))}")
    multiple = CROP_MULTIPLE.get(args.arch, 1)
    if args.recipe["crop"] % multiple:
        refuse(f"--crop {args.recipe['crop']}: {args.arch} needs a multiple of {multiple}")
    for name, least in dict(accumulate=1, leaves=1, period=1, workers=0, save_every=1, batch=1,
                            crop=16, lr=1e-9).items():
        value = getattr(args, name)
        if value is not None and not value >= least:                    # nor is NaN
            refuse(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def plan(args):
    """The recipe in a line and the schedule as a table: what each run begins by printing."""
    r, loss = args.recipe, "cross-entropy" if args.arch == "classifier" else "L1 loss"
    schedule = schedule_of(args)
    rows = [[k, " ".join(stage.tasks), stage.iterations, f"{len(stage.periods)} x {r['period']}"]
            for k, stage in enumerate(schedule, 1)]
    text = (f"{name_of(args)}: {r['optimizer']}, lr {r['lr']:g} to {r['eta_min']:g}, "
            f"betas {r['betas']}, weight decay {r['weight_decay']:g}, {loss}, "
            f"EMA {r['ema']:g}, total batch {r['batch']}, crop {r['crop']}, seed {args.seed}\n\n"
            f"{markdown(['stage', 'tasks', 'iterations', 'periods'], rows)}\n\n"
            f"total: {sum(stage.iterations for stage in schedule)} iterations")
    if args.device == "cpu" and args.preset == "paper":
        text += ("\n\nthe paper's recipe is made for GPUs: on a CPU it takes months; --preset demo "
                 "takes minutes, --preset hours some hours, --preset smoke seconds")
    return text


# ---- The state of a run, and its files -----------------------------------------------------------
# With the images and the flags that it began with, OUT/last.pt is all that a run needs to go on, on
# a CPU to the same bits: raw and EMA weights, Adam's moments, and where it stands. No generator's
# state is in it: every random number is drawn from one seeded by (seed, stage, t, i), so the
# position alone says what comes next.
#
# Were it otherwise, going on would need the state of each generator in each loader process, which
# have drawn ahead of the iteration that is being computed. Sums of floats depend on their order: a
# CPU gives the same bits where it is the same machine and the batch is split in the same way. In
# another split, and on a GPU, the numbers are the same but for rounding.
#
#     OUT/last.pt        the newest state, replaced in one step: a run that is killed at any moment
#                        has a whole one
#     OUT/stage3.pt      the end of stage 3, to compare stages, or to start from (--init)
#     OUT/lock           held by the run that writes here

class Run:
    """Everything that a checkpoint holds: the weights, where the run stands, and what it is.

    model, ema:         raw weights and their average; ema is never trained, only updated
    schedule, recipe:   the stages and the numbers that it follows
    stage, iteration:   where it stands: stages done, and iterations done in the present one
    table:              [(name of a row, {task: PSNR in dB}), ...]: the input, with --init the first
                        weights, then a row a stage; a classifier's: accuracy in %, and chance
    facts:              what must be the same when a stopped run goes on
    leads:              whether this process is the one that writes the files

    With --resume it stands where OUT/last.pt does. Raises ValueError where that can't be used.
    data: of the images, ImageCache.identity.
    """

    def __init__(self, args, device, leads=True, data=""):
        self.args, self.recipe, self.out, self.leads = args, args.recipe, Path(args.out), leads
        self.schedule, self.table, self.stage, self.iteration = schedule_of(args), [], 0, 0
        self.facts = {**facts_of(args), "data": data}
        saved = newest_state(self.out, self.facts) if args.resume else {}
        if args.init and not saved:
            model, self.sizes = read_init(args)            # the model is what the file holds
        else:                                              # last.pt's sizes may be those of --init
            self.sizes = saved.get("sizes", self.recipe["sizes"])
            model = new_model(args, self.sizes)
        self.model = model.to(device)
        # A copy: the average begins at the first weights, of --init, too.
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.new_optimizer()
        if saved:
            self.take_over(saved)

    def new_optimizer(self):
        """Fresh for each stage: what Adam has learned about earlier gradients is forgotten. Adam
        adds weight decay to the gradient, AdamW takes it off the weights (Uformer's .02)."""
        recipe, parameters = self.recipe, list(self.model.parameters())
        self.optimizer = getattr(torch.optim, recipe["optimizer"])(
            parameters, recipe["lr"], recipe["betas"], weight_decay=recipe["weight_decay"],
            fused=not parameters[0].is_meta)                     # one kernel for all parameters

    @property
    def place(self):
        """What comes next, in words: from an iteration's beginning until its step, that one."""
        return f"stage {self.stage + 1}, iteration {self.iteration + 1}"

    def take_over(self, saved):
        """Weights, moments and position of a checkpoint of this very run."""
        self.model.load_state_dict(saved["raw"])
        self.ema.load_state_dict(saved["ema"])
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            if any({moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {p.shape}
                   for p, moments in self.optimizer.state.items()):
                raise ValueError
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError):
            raise ValueError(f"--resume: {self.out / 'last.pt'}: the optimiser's numbers do not "
                             "fit the weights") from None
        self.stage, self.iteration = saved["stage"], saved["iteration"]
        self.table = [tuple(row) for row in saved["table"]]

    def tasks_at(self, t):
        """[task of each sample of the batch] in iteration t of the present stage."""
        tasks, batch = self.schedule[self.stage].tasks, self.recipe["batch"]
        return [task_of(tasks, t, i, batch) for i in range(batch)]

    def save(self, keep=None):
        """Writes last.pt, whole or not at all; keep: the name of one more file, that stays."""
        if not self.leads:
            return
        # Gradients were finite, but a rate that is too high can still have driven weights away.
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise self.failed("the weights are no longer finite; not saved")
        # Plain numbers, strings, lists and tensors alone, so that torch.load(weights_only=True),
        # which can't run code, reads it: eval.py rebuilds the model from arch, prompt and sizes.
        state = {"mioir": 1, "arch": self.args.arch, "prompt": self.args.prompt,
                 "sizes": self.sizes, "facts": self.facts, "table": self.table,
                 "raw": self.model.state_dict(), "ema": self.ema.state_dict(),
                 "optimizer": self.optimizer.state_dict(),
                 "stage": self.stage, "iteration": self.iteration}
        for name in filter(None, (keep, "last.pt")):       # in this order: where last.pt says
            try:                                           # that a stage is over, its file is there
                with whole_file(self.out / name) as file:
                    torch.save(state, file)
            except (OSError, RuntimeError) as error:       # torch says RuntimeError of a full disk
                cause = error.__context__ or error
                reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
                raise self.failed(f"{self.out / name}: not saved ({reason})") from None

    def failed(self, what):
        """A ValueError that says what is wrong, and what is safe."""
        return ValueError(f"{what}; {self.out / 'last.pt'}, if there is one, is unharmed: when the "
                          "cause is mended, add --resume")


def facts_of(args):
    """What must stay the same when a run goes on, besides its images. Flags that only change how it
    is computed (--workers, --accumulate, --precision ...) may differ."""
    # The recipe's numbers that shape the trajectory; period and order are in the stages.
    kept = ("optimizer", "weight_decay", "lr", "eta_min", "ema", "crop", "batch")
    schedule = schedule_of(args)
    return dict(arch=args.arch, prompt=args.prompt, seed=args.seed,
                pairs=args.pairs[2] if args.pairs else None,
                order=[list(stage.tasks) for stage in schedule],
                periods=[list(stage.periods) for stage in schedule],
                **{key: args.recipe[key] for key in kept})


def newest_state(out, facts):
    """What last.pt holds. Raises ValueError where it can't be read; that names the newest stage's
    file, which holds as much, so that the run can go on from there. Raises ValueError, too, where
    last.pt is of another run, with each difference: half a run by one recipe and half by another
    would be neither."""
    last = out / "last.pt"
    ends = sorted(out.glob("stage*.pt"), key=lambda path: (len(path.name), path.name))
    try:
        saved = read_checkpoint(last)
        if "optimizer" not in saved:
            raise ValueError(f"{last}: holds weights alone; to begin from them: --init")
    except ValueError as error:
        mend = "no stage is over yet: begin anew, in another --out"
        if ends:
            mend = f"copy {ends[-1]} to {last}, and --resume goes on from that stage's end"
        raise ValueError(f"--resume: {error}; {mend}") from None
    changed = [f"{key}: {saved['facts'].get(key)} then, {value} now" for key, value in facts.items()
               if str(saved["facts"].get(key)) != str(value)]
    if changed:
        raise ValueError(f"--resume: {last} is of another run; {'; '.join(changed)}")
    return saved


def new_model(args, sizes):
    """Weights as they are before training: they depend on the seed alone, whatever was drawn
    before. They come from torch's generator for the CPU, which stands afterwards where it stood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        if args.arch == "classifier":
            return build_classifier(**sizes)
        model = build_model(args.arch, args.prompt, **sizes)
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


@contextlib.contextmanager
def one_run_in(args):
    """Around a run, in its leading process: holds the folder --out for this run alone. Raises
    ValueError where a run would begin on top of another one, would go on where there is none, or
    where another one is writing.

    The lock is the operating system's: it ends with the process that holds it, however that ends.
    SQLite, which locks its files on all systems alike, is used for nothing but that.
    """
    out = Path(args.out)
    begun = [*out.glob("last.pt"), *out.glob("stage*.pt")]
    if begun and not args.resume:
        raise ValueError(f"--out {out} holds a run; add --resume to go on, or choose another --out")
    if args.resume and not begun:
        raise ValueError(f"--resume: there is no {out / 'last.pt'} to go on from")
    out.mkdir(parents=True, exist_ok=True)
    (out / "lock").touch()                             # an OSError where nothing can be written
    lock = sqlite3.connect(out / "lock", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:                     # another error: a disk that knows no locks
        if "locked" in str(error):
            raise ValueError(f"--out {out}: another run is writing there; wait for its end, or "
                             "choose another --out") from None
    try:
        for torn in out.glob(".*.tmp"):                # whole_file's, where a save was killed
            torn.unlink()
        yield
    finally:
        lock.close()


# ---- Where it runs -------------------------------------------------------------------------------
# The recipe's batch is the total over all processes and parts; how it is divided is this machine's
# business. A sample's random numbers depend on its place in the whole batch, never on who draws
# them. (Often the batch is given per GPU. Then four GPUs instead of two double it, and rate and
# length must change, too; or two different trainings are compared.)


class Machine:
    """Where and how a run computes: the device, this process's rank among `world`, the precision,
    the parts of a batch. None of it changes what is computed, but for rounding.

    torchrun starts `world` processes, one a GPU, `local_world` of them on this machine, and tells
    each its rank by environment variables. Every process holds the whole model, takes its share
    of each batch, and DDP averages their gradients, so that all make the same step.
    """

    def __init__(self, args):
        self.world, self.rank, self.local_world, local_rank = (
            int(os.environ.get(name, default)) for name, default in
            (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.device, self.parts, self.args = torch.device(args.device), args.accumulate, args
        # Equal parts, so that each process has the same work, and none leaves a sample out.
        batch, ways = args.recipe["batch"], f"{self.world} processes x --accumulate {self.parts}"
        if batch % (self.world * self.parts):
            raise ValueError(f"a batch of {batch} can't be split among {ways}; choose numbers "
                             "that divide it")
        if args.device == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(f"--device cuda: torch finds {torch.cuda.device_count()} GPUs, "
                                 f"and {self.local_world} are needed")
            self.device = torch.device("cuda", local_rank)      # under torchrun, a GPU a process
            torch.cuda.set_device(self.device)                  # its own alone
        # In bf16, torch decides operation by operation, by its own lists, what keeps float32. bf16
        # has float32's range of exponents: small gradients do not vanish, so the loss needs no
        # scaling, which fp16 would.
        self.autocast = partial(torch.autocast, args.device, torch.bfloat16,
                                enabled=args.precision == "bf16")
        if self.world > 1:
            # When a process fails, torchrun ends the others. So a long wait need not be a failure:
            # the first one may be decoding DF2K.
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                    timeout=datetime.timedelta(days=1),
                                    device_id=self.device if args.device == "cuda" else None)
        set_precision("fp32")                                   # outside of `iterate`
        torch.backends.cudnn.deterministic = True               # of two algorithms, the same one

    def rows_of(self, batch):
        """Which samples of a batch are this process's: a list of parts, each a range. Batch 8, two
        processes, --accumulate 2: rank 0 has [0..1, 2..3], rank 1 has [4..5, 6..7]."""
        size = batch // (self.world * self.parts)
        first = self.rank * self.parts
        return [range(size * k, size * (k + 1)) for k in range(first, first + self.parts)]

    def wrap(self, model):
        """The model as it is called in training. The same weights: run.model sees every step."""
        if self.args.checkpointing:
            recompute_blocks(model)
        if self.world > 1:
            # Each backward ends with the mean of p.grad over all processes. Without no_sync every
            # part's backward averages the ACCUMULATED p.grad. What earlier parts left is already
            # equal in all processes, so averaging it again changes nothing; it only costs traffic.
            # Buffers never change, so they need not be sent.
            model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return torch.compile(model) if self.args.compile else model

    def sums(self, x):
        """The numbers of a tensor (n,), each added up over all processes: [number, ...]. To ask is
        to wait for the other processes and for the GPU."""
        if self.world > 1:
            dist.all_reduce(x)
        return x.tolist()                          # waits for the GPU

    def wait_for_all(self):
        """Goes on when all processes have come here."""
        if self.world > 1:
            dist.barrier()


def recompute_blocks(model):
    """Activation checkpointing (Chen et al. 2016): a block keeps its input alone, and is run again
    when its gradient is due: about a third more time for a tenth to a quarter of the memory.
    SRResNet's blocks are small: of three, the first one's input alone is kept."""
    for module in model.modules():
        if isinstance(module, (ResidualBlock, WindowBlock, RestormerBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if isinstance(module, SRResNet):
            module.three_blocks = partial(checkpoint, module.three_blocks, use_reentrant=False)


# ---- What a run says -----------------------------------------------------------------------------
# On the screen: the plan, a line every log_every iterations, the stage x task table after each
# stage, where the results lie. In the files the same: log.jsonl, table.md, and as pictures.
#
#     stage 2/7 140/200 | loss jpeg 0.0301 rain 0.0442 | lr 3.3e-04 | 95.2 images/s | 3 min left
#     validation: blur 28.42 noise 19.76 jpeg 32.30 rain 23.60 haze 12.20 dark 16.16 sr 27.40

def scored_pairs(run):
    """{task: [(lq, gt), ...]} of the built-in images, which no run trains on: for validation."""
    images = builtin_images(*run.recipe["validate"])
    pairs = validation_pairs(images)
    if "none" in run.schedule[-1].tasks:
        pairs["none"] = clean_pairs(images)            # a classifier that may find nothing
    return pairs


def rows_before_training(run, pairs, machine, log):
    """The first rows of a run's table, [(name, {task: number}), ...]: what training has to beat,
    and with --init the weights that it starts from."""
    if run.args.arch == "classifier":
        rows = [("chance", dict.fromkeys(pairs, 100 / len(pairs)))]    # of seven answers, or eight
    else:
        rows = [("input", input_psnr(pairs))]
    if run.args.init:
        rows.append(("--init", validate(run, pairs, machine, log)))
    return rows


def validate(run, pairs, machine, log):
    """{task: PSNR in dB, or the classifier's accuracy in %} of the raw weights on images that no
    run trains on, each on the screen as it comes. The leading process computes; the others wait,
    and get {}.

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
            log.say(f" {task} {figure(scores[task])}", end="")
        log.say("")
        log.write(stage=run.stage + 1, iteration=run.iteration, scores=scores)
    machine.wait_for_all()
    log.idle += time.monotonic() - started
    return scores


def refuse_what_is_not_finite(run, losses, norm):
    """Raises ValueError that names the task whose loss is not a finite number, or the gradient:
    that of a finite loss can be infinite, and a single step with it would poison every weight."""
    for what, number in zip([*run.tasks_at(run.iteration), "gradient"], [*losses, norm]):
        if not math.isfinite(number):
            raise run.failed(f"{run.place}: {what} is not finite; this step was not made")


class Log:
    """Progress on the screen and in log.jsonl, one JSON object a line; after a kill a line may be
    torn or empty. One process of many speaks. A new run begins a new log, a resumed one goes on in
    its own.

    Between two reports the losses of every task are collected, so that each report has means over
    all images of a task since the one before, not the last batch's.
    """

    def __init__(self, run):
        self.speaks = run.leads
        path = run.out / "log.jsonl" if run.leads else Path(os.devnull)
        kept = path.read_bytes() if run.args.resume and path.exists() else b""
        # Line-buffered, so a killed run's log is whole; only a power cut can tear its last line,
        # which must not swallow the next.
        self.file = open(path, "a" if kept else "w", buffering=1, encoding="utf-8")
        self.file.write("\n" if kept and not kept.endswith(b"\n") else "")
        self.losses = {task: [] for task in ANSWERS}
        self.iterations = 0                        # of this session: a resumed run counts anew
        # Seconds: when it began, and how long validations took.
        self.start, self.idle = time.monotonic(), 0.0
        # The signals ask: the loop ends its iteration, saves and says how to go on. A handler may
        # run between any two instructions, so it does no more than note that it was called.
        self.stop, self.handlers = None, {}
        # Python lets the main thread alone have handlers; a run in another one, as behind a web
        # page's button, does without. And a hangup that nohup ignores stays ignored.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        """A signal's handler; notes which, as the exit code of a stopped run is 128 + number."""
        self.stop = number

    def close(self):
        """Gives the signals back to whom they belonged."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.file.close()

    def say(self, text, end="\n"):
        """A line on the screen; where that has gone, nobody hears it, and the run goes on."""
        if self.speaks:
            with contextlib.suppress(OSError, ValueError):
                print(text, end=end, flush=True)

    def write(self, **fields):
        """A line in log.jsonl."""
        self.file.write(json.dumps(fields) + "\n")

    def images_per_second(self, run):
        """Of training in this session, validations not counted."""
        seconds = time.monotonic() - self.start - self.idle
        return self.iterations * run.recipe["batch"] / max(seconds, 1e-9)

    def add(self, run, losses, norm, lr):
        """Counts an iteration; speaks every log_every iterations, at a stage's end, and at the
        20th of a session, when one can tell how long it will take, though the first are slow.
        losses: [number], of all samples of the batch, norm: the gradient's, lr: the rate used."""
        for task, loss in zip(run.tasks_at(run.iteration - 1), losses):
            self.losses[task].append(loss)
        self.iterations += 1
        stage = run.schedule[run.stage]
        t, total = run.iteration, stage.iterations
        if t % run.recipe["log_every"] != 0 and t != total and self.iterations != 20:
            return
        # Means since the last report. Five decimals: a loss of .00001 is a 400th of a grey level.
        means = {task: round(float(np.mean(seen)), 5) for task, seen in self.losses.items() if seen}
        self.losses = {task: [] for task in ANSWERS}
        losses = " ".join(f"{task} {loss:.4f}" for task, loss in means.items())
        # What is left of the run, at the rate so far.
        todo = sum(stage.iterations for stage in run.schedule[run.stage:]) - t
        rate = self.images_per_second(run)
        left = todo * run.recipe["batch"] / rate
        self.say(f"stage {run.stage + 1}/{len(run.schedule)} {t}/{total} | loss {losses} | "
                 f"lr {lr:.1e} | {rate:.1f} images/s | {clock(left)} left")
        self.write(stage=run.stage + 1, iteration=t, tasks=stage.tasks, loss=means, lr=lr,
                   gradient_norm=round(norm, 5), images_per_second=round(rate, 2),
                   seconds_left=round(left))


def show_table(run, log):
    """The stage x task table, or forgetting matrix: how well each task is done after each stage,
    those already trained framed. Printed, and written as table.md, table.png; curves.png too.

    Read down a column: where a frame begins, a task is trained for the first time and should rise;
    below, where later tasks join it, it should not fall: that is what rehearsal is for. Tasks that
    the run never trains stand in brackets, and do not count in the mean.
    """
    unit = "accuracy (%)" if run.args.arch == "classifier" else "PSNR (dB)"
    learned = run.schedule[-1].tasks
    tasks = list(run.table[0][1])                          # TASKS, perhaps "none" of a classifier
    columns = [task if task in learned else f"({task})" for task in tasks] + ["mean"]
    rows = []
    for name, scores in run.table:
        cells = [scores.get(task) for task in tasks]
        [mean] = plain_mean([[scores.get(task)] for task in learned])
        rows.append((name, [*cells, mean]))
    text = markdown([f"{unit} after", *columns], [[name, *cells] for name, cells in rows])
    draw_or_say_why(log, Path.write_text, run.out / "table.md", text + "\n", "utf-8")
    log.say(text)
    # The rows of stages come last; framed are the cells of the tasks that a stage has trained.
    first = len(rows) - run.stage
    framed = {(first + k, tasks.index(task)) for k, stage in enumerate(run.schedule[:run.stage])
              for task in stage.tasks}
    name = name_of(run.args)
    title = f"{name}: {unit} after each stage (framed: trained in it)"
    draw_or_say_why(log, matrix_picture, run.out / "table.png", title, columns, rows, framed)
    draw_or_say_why(log, curves_picture, run.out / "curves.png", name, run.out / "log.jsonl",
                    *rates_and_begins(run))


def rates_and_begins(run):
    """[(iteration, counted over all stages, its learning rate), ...], some 200 points a stage; and
    {name of a stage: the iterations before it}."""
    rates, begins, done = [], {}, 0
    for k, stage in enumerate(run.schedule, 1):
        begins[f"stage {k}"] = done
        step = max(stage.iterations // 200, 1)
        for t in (*range(1, stage.iterations, step), stage.iterations):
            lr = lr_at(t, stage.periods, run.recipe["lr"], run.recipe["eta_min"])
            rates.append((done + t, lr))
        done += stage.iterations
    return rates, begins


def draw_or_say_why(log, picture, path, *what):
    """Calls picture(path, *what), which writes a file. No fault in it may end a training."""
    try:
        picture(path, *what)
    except Exception as error:                             # a full disk, a Pillow without fonts ...
        log.say(f"{path}: not drawn ({' '.join(str(error).split())[:100]})")


def announce(run, source, machine, say):
    """After the plan: where, on what, and what fine-tuning does to tasks that it leaves out."""
    # The threads are named since they decide in which order sums are taken, and so the bits.
    say(f"on {machine.device}, {machine.world} process(es) of {torch.get_num_threads()} threads, "
        f"{run.args.precision}: {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"crops from {sum(len(images) for images in source.values())} images")
    others = ", ".join(task for task in TASKS if task not in run.schedule[-1].tasks)
    if run.args.init and others:
        say(f"fine-tuning: {others} are not rehearsed and get worse; --order keeps them")
    if run.stage == len(run.schedule):
        say(f"{run.out / 'last.pt'}: this run is finished; its pictures are made anew")
    elif run.args.resume:
        say(f"goes on from {run.out / 'last.pt'}: {run.place}")


def stopped(run, log):
    """After a signal: saves, and exits with 128 + the signal's number, as shells expect."""
    run.save()
    log.say(f"stopped by a signal before {run.place}; saved. To go on: the same command with "
            "--resume")
    sys.exit(128 + (log.stop or signal.SIGTERM))   # None: it was another process that was asked


def finish(run, pairs, log, device):
    """The last words: a classifier's confusion matrix, or the strips; how long the run took, and
    how many images a second it trained on (validations not counted)."""
    if run.args.arch == "classifier":
        log.say(f"\n{confusion_text(*confusion(run.model, pairs))}")
    else:
        learned = {task: pairs[task] for task in run.schedule[-1].tasks}
        draw_or_say_why(log, task_strips, run.out / "strips.png", run.model, learned, device)
    if run.args.data or run.args.pairs:
        log.say("(The table is of the built-in images, held out; not of yours.)")
    log.say(f"done in {clock(time.monotonic() - log.start)}, {log.images_per_second(run):.1f} "
            f"images/s; {run.out} holds last.pt, log and pictures")
    script = "eval.py" if len(TASKS) == 7 else sys.argv[0]     # the script that adds an eighth
    log.say(f"next: python {script} {shlex.quote(f'{run.out}/last.pt')}")


def train(args):
    """A whole run, from the flags to the last picture. Under torchrun, each process calls it."""
    if args.print_plan:
        return print(plan(args))
    for folder in (*(args.data or ()), *(args.pairs or ())[:2], *filter(None, [args.depth])):
        require_folder(folder)
    machine = Machine(args)
    leads = machine.rank == 0
    with one_run_in(args) if leads else contextlib.nullcontext():
        # Images may take hours to decode; files that are wrong are refused before.
        if args.resume:
            newest_state(Path(args.out), facts_of(args))
        elif args.init:
            read_init(args)
        if leads:
            print(plan(args), flush=True)
        source = open_images(args, print) if leads else None        # one decodes
        machine.wait_for_all()                                      # the others wait
        source = source or open_images(args, lambda text: None)
        data = "; ".join(images.identity for images in source.values())
        # Every process builds the same model from the same seed; DDP also copies rank 0's weights.
        run = Run(args, machine.device, leads, data)
        net, log = machine.wrap(run.model), Log(run)
        try:
            announce(run, source, machine, log.say)
            run_stages(run, net, source, machine, log)
        finally:
            log.close()
    if machine.world > 1:                          # not after a failure: then it can itself hang
        dist.destroy_process_group()


@contextlib.contextmanager
def errors_explained():
    """Around a run: lack of memory, and the end of another process, which torch reports as
    RuntimeError, become a ValueError of one line. Other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            raise ValueError("not enough memory; try --accumulate 2, 4 ..., --checkpointing, "
                             "--batch or --crop") from None
        if isinstance(error, dist.DistError) or "by peer" in str(error):
            raise ValueError("another process has ended, and said why") from None
        raise


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit; under torchrun,
    `record` also puts it into torchrun's report of which process failed first."""
    args = parse(argv)
    tune_cpu()
    work = record(train) if "TORCHELASTIC_ERROR_FILE" in os.environ else train
    with ends_in_one_line("train.py"), errors_explained():
        work(args)


if __name__ == "__main__":
    main()
