"""Train one network for seven restoration tasks: mixed or sequential, with or without a prompt.

    python train.py --arch restormer --seq --prompt --preset demo     # minutes on two CPU cores
    python train.py --arch restormer --seq --prompt --data DF2K       # the paper's recipe, on a GPU
    python train.py --arch restormer --seq --prompt --data DF2K --resume    # go on where it stopped
    torchrun --nproc_per_node 2 train.py --arch swinir --data DF2K  # two GPUs, the same run
    python train.py --arch classifier --data DF2K                   # names the task for "ep" models

One command runs the whole schedule. OUT receives last.pt (the newest state), previous.pt, one file
per stage, log.jsonl, table.md and .png (PSNR by stage and task), curves.png and strips.png.
Source: paper, Sections 3.2 and 4.1; the published options/*.yml; BasicSR's training loop.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F

from torch.utils.checkpoint import checkpoint

from degrade import (ImageCache, ImageFiles, apply, depth_prior, draw, leaf_items, photo_items,
                     seeded)
from eval import (builtin_images, confusion, confusion_text, curves_picture, input_psnr, markdown,
                  matrix_picture, mean_psnr, task_strips, tune_cpu, validation_pairs)
from mioir import (ARCHS, TASKS, ResidualBlock, RestormerBlock, SRResNet, TaskClassifier,
                   WindowBlock, build_model, random_prompts, reflect_pad)

# ---- Recipes (paper, Section 4.1) and presets ----------------------------------------------------

LETTERS = {"s": "sr", "b": "blur", "n": "noise", "j": "jpeg", "r": "rain", "h": "haze", "d": "dark"}
_ADAM = dict(optimizer="Adam", weight_decay=0.0, lr=2e-4, betas=(0.9, 0.99), eta_min=1e-7,
             ema=0.999, crop=128)
RECIPES = {
    "srresnet": dict(_ADAM, batch=16, period=250_000, order="sbnjrhd"),
    "swinir": dict(_ADAM, batch=8, period=100_000, order="sbnjrhd"),
    "restormer": dict(_ADAM, optimizer="AdamW", batch=8, period=100_000, order="rjbsnhd"),
    "uformer": dict(_ADAM, optimizer="AdamW", weight_decay=0.02, eta_min=1e-6, batch=8,
                    period=100_000, order="rjbsnhd"),
    "promptir": dict(_ADAM, optimizer="AdamW", batch=8, period=100_000, order="rjbsnhd"),
    "classifier": dict(_ADAM, batch=32, crop=256, period=250_000, order="bnjrhds"),
}
LAST_STAGE = 4      # periods of the last sequential stage, all tasks; earlier stages last one
MIXED = {"classifier": 4}  # periods of a mixed run; the others have 10, as sequential has, 6 + 4

def striped_prompts():
    """Seven prompt images that a new F_ext tells apart at once, for runs of minutes: six kinds of
    black and white stripes, and a white one. (7,128,128)."""
    steps = torch.arange(128, device="cpu")
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    stripes = [x // 2, y // 2, x // 4, y // 4, (x + y) // 6, (x - y) // 6, torch.ones_like(x)]
    return (torch.stack(stripes) % 2).float()


# Presets change the recipe; SMALL shrinks the model. leaves, validate: (how many, edge) of training
# images if there is no --data, and of validation images. prompts: what makes the "ep" prompts.
SMALL = {
    "srresnet": dict(width=32, blocks=8),
    "swinir": dict(dim=24, depths=(2, 2), heads=2, width=24),
    "restormer": dict(dim=12, blocks=(1, 1, 1, 1), refinement=0, expansion=1.5, prompt_width=16),
    "uformer": dict(dim=8, depths=(1,) * 9),
    "promptir": dict(dim=16, blocks=(1, 1, 1, 2), refinement=1, prompt_dims=(16, 16, 32)),
    "classifier": dict(high_pass=True),
}
_SHORT = dict(log_every=20, save_every=100, validate=(8, 128), lr=1e-3, eta_min=1e-5, batch=14,
              crop=32, ema=0.99, channels_last=True, prompts=striped_prompts)
PRESETS = {
    "paper": dict(leaves=(800, 512), log_every=100, save_every=1000, validate=(8, 128)),
    "hours": dict(_SHORT, leaves=(256, 256), batch=7, crop=48, period=600, ema=0.999),
    "study": dict(_SHORT, leaves=(64, 256), period=60),
    "demo": dict(_SHORT, leaves=(64, 256), period=200),
    "smoke": dict(leaves=(4, 192), log_every=2, save_every=4, validate=(2, 96), batch=8, crop=48,
                  period=1, ema=0.9),
}
_UFORMER, _CLASSIFIER = dict(crop=128, batch=7), dict(crop=64, batch=28, lr=3e-3)
SPECIAL = {  # where a preset suits an arch badly: Uformer needs 128, the classifier more to look at
    ("hours", "uformer"): _UFORMER, ("hours", "classifier"): dict(_CLASSIFIER, period=5000),
    ("demo", "uformer"): dict(_UFORMER, period=40), ("smoke", "uformer"): dict(crop=128),
    ("demo", "classifier"): dict(_CLASSIFIER, period=1400), ("demo", "restormer"): dict(lr=15e-4),
    ("study", "srresnet"): dict(sizes=dict(width=16, blocks=8)), ("study", "uformer"): _UFORMER,
    ("hours", "srresnet"): dict(sizes=dict(width=64, blocks=8), batch=14, lr=5e-4, period=1500),
}


class Stage(NamedTuple):
    """What a stage of the schedule trains, and for how long."""
    tasks: tuple        # trained together, every one equally often
    periods: tuple      # iterations of each cosine period; the learning rate restarts at each

    @property
    def iterations(self):
        return sum(self.periods)


def stages(arch, seq=False, order=None, period=None):
    """The schedule, a list. Mixed: one stage, all tasks. Sequential: stage k trains the first k.
    order: letters of LETTERS, each at most once; the default is the paper's. period: iterations.
    Raises ValueError for letters that are unknown or repeated.
    """
    order = order or RECIPES[arch]["order"]
    period = period or RECIPES[arch]["period"]
    unknown = [letter for letter in order if letter not in LETTERS]
    if unknown or len(set(order)) != len(order):
        fault = f"{unknown[0]!r} is no task" if unknown else "a task is repeated"
        letters = ", ".join(f"{letter} ({task})" for letter, task in LETTERS.items())
        raise ValueError(f"--order {order}: {fault}; use each of {letters} at most once")
    tasks = tuple(LETTERS[letter] for letter in order)
    if not seq:
        return [Stage(tasks, (period,) * MIXED.get(arch, 10))]
    growing = [Stage(tasks[:k], (period,)) for k in range(1, len(tasks))]
    return [*growing, Stage(tasks, (period,) * LAST_STAGE)]


def lr_at(iteration, periods, base_lr, eta_min):
    """Learning rate of the 1-based iteration: cosine from base_lr to eta_min, anew in each period.
    As published, the restart comes one iteration late: the first iteration of a later period still
    has eta_min (BasicSR's CosineAnnealingRestartLR counts a period's end to the period itself).
    """
    done, start = iteration - 1, 0
    for period in periods:
        if done <= start + period:
            break
        start += period
    return eta_min + 0.5 * (base_lr - eta_min) * (1 + math.cos(math.pi * (done - start) / period))


# ---- The command line ----------------------------------------------------------------------------

def option(default, text, **more):
    """A field of Args: its default, its line in --help, and what else argparse should know."""
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


@dataclasses.dataclass
class Args:
    """The command line, one field a flag."""
    arch: str = option("restormer", f"{', '.join(ARCHS)}, or classifier", choices=tuple(RECIPES))
    seq: bool = option(False, "sequential: one task more per stage (default: mixed, all at once)")
    prompt: str = option(None, "tell the task: ep (explicit; also --prompt alone) or ap (adaptive)",
                         nargs="?", const="ep", choices=("ep", "ap"))
    preset: str = option("paper", "paper; on 2 CPU cores: hours, study, demo, smoke (seconds)",
                         choices=tuple(PRESETS))
    data: list = option(None, "folders of photos (default: dead leaves, made from the seed)",
                        nargs="+", metavar="DIR")
    depth: str = option(None, "depth maps of the photos, matched by name, for haze", metavar="DIR")
    leaves: int = option(None, "how many dead leaves (default: by preset; with --data, none)")
    order: str = option(None, "sequential order, letters of s b n j r h d (default: the paper's)")
    period: int = option(None, "iterations of a cosine period (default: by preset)")
    seed: int = option(0, "of weights, images, crops and degradations")
    out: str = option(None, "where results go (default: runs/ARCH-SCHEDULE-PROMPT-PRESET)")
    resume: bool = option(False, "go on from OUT/last.pt")
    print_plan: bool = option(False, "print the schedule and stop")
    precision: str = option("fp32", "fp32, tf32 or bf16: numbers to compute in; tf32conv: TF32 for "
                            "convolutions alone, as the paper's torch 1.12 did on newer GPUs")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "channels-last memory format")
    checkpointing: bool = option(False, "recompute activations going back: less memory, more time")
    accumulate: int = option(1, "split each batch into N parts, one after another: less memory")
    workers: int = option(None, "processes that prepare samples (default: 8 with a GPU, else 0)")
    cache: str = option(None, "where decoded images go (default: OUT/cache); none: decode anew")
    save_every: int = option(None, "iterations between checkpoints (default: by preset)")
    val_every: int = option(0, "iterations between validations (default: at a stage's end only)")
    device: str = option(None, "cuda or cpu (default: cuda if there is one)")

    @property
    def recipe(self):
        """The arch's recipe with the preset's changes."""
        changes = {**PRESETS[self.preset], **SPECIAL.get((self.preset, self.arch), {})}
        sizes = {} if self.preset == "paper" else SMALL[self.arch]
        period = {"period": self.period} if self.period else {}
        return {**RECIPES[self.arch], "sizes": sizes, **changes, **period}

    @property
    def name(self):
        kind = ("seq" if self.seq else "mixed", self.prompt or "plain")
        return "-".join((self.arch, *(() if self.arch == "classifier" else kind), self.preset))


def parse(argv):
    """The command line as Args. Exits with one line where flags are unknown or contradict."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.error = lambda message: sys.exit(f"train.py: {message} (see python train.py --help)")
    for f in dataclasses.fields(Args):
        kind = (dict(action="store_true") if f.type is bool else
                dict(type=int if f.type is int else str, default=f.default))
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind, **f.metadata)
    args = Args(**vars(parser.parse_args(argv)))
    if args.arch == "promptir" and args.prompt:
        parser.error("--arch promptir has prompts of its own; leave --prompt out")
    if args.arch == "classifier" and (args.prompt or args.seq or args.order):
        parser.error("--arch classifier sees all tasks; leave --seq, --order and --prompt out")
    if args.precision not in ("fp32", "tf32conv", "tf32", "bf16"):
        parser.error(f"--precision {args.precision}: choose fp32, tf32conv, tf32 or bf16; fp16 is "
                     "not offered, as SwinIR's activations overflow it")
    least = dict(accumulate=1, leaves=1, period=1, workers=0, save_every=1, val_every=0)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    args.out = args.out or f"runs/{args.name}"
    return args


def print_plan(args):
    """The whole schedule as a table: what --print-plan shows."""
    r, loss = args.recipe, "cross-entropy" if args.arch == "classifier" else "L1 loss"
    print(f"{args.name}: {r['optimizer']}, lr {r['lr']:g}, betas {r['betas']}, "
          f"weight decay {r['weight_decay']:g}, eta_min {r['eta_min']:g}, {loss}, "
          f"EMA {r['ema']:g}, total batch {r['batch']}, crop {r['crop']}, seed {args.seed}\n")
    rows = []
    for k, stage in enumerate(stages(args.arch, args.seq, args.order, r["period"]), 1):
        rates = [lr_at(t, stage.periods, r["lr"], r["eta_min"])
                 for t in (1, stage.iterations // 2, stage.iterations)]
        rows.append([k, " ".join(stage.tasks), stage.iterations,
                     f"{len(stage.periods)} x {stage.periods[0]}", *(f"{lr:.3e}" for lr in rates)])
    print(markdown(["stage", "tasks, equally often", "iterations", "periods", "lr first",
                    "lr middle", "lr last"], rows))
    print(f"\ntotal: {sum(row[2] for row in rows)} iterations; each stage has a fresh optimiser")


# ---- The state of a run, and its files -----------------------------------------------------------

class Run:
    """Everything that a checkpoint holds: the weights, where the run stands, and what it is."""

    def __init__(self, args, device):
        self.args, self.recipe, self.out = args, args.recipe, Path(args.out)
        self.stages = stages(args.arch, args.seq, args.order, self.recipe["period"])
        with torch.random.fork_rng(devices=[]):                # leaves the caller's generator alone
            torch.manual_seed(args.seed)
            self.model = (TaskClassifier(**self.recipe["sizes"]) if args.arch == "classifier" else
                          build_model(args.arch, args.prompt, **self.recipe["sizes"])).to(device)
        if args.prompt == "ep":
            self.model.prompts.copy_(self.recipe.get("prompts", random_prompts)())
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.stage, self.iteration = 0, 0                    # this stage, and iterations done in it
        self.table = []                                         # [(name, {task: PSNR}), ...]
        self.new_optimizer()

    def new_optimizer(self):
        """Fresh for each stage: what Adam has learned about earlier gradients is forgotten."""
        recipe, parameters = self.recipe, list(self.model.parameters())
        self.optimizer = getattr(torch.optim, recipe["optimizer"])(
            parameters, recipe["lr"], recipe["betas"], weight_decay=recipe["weight_decay"],
            fused=not parameters[0].is_meta)                     # one kernel for all parameters

    def identify(self, data):
        """Notes what must stay the same when the run goes on; data: ImageCache.identity."""
        kept = ("optimizer", "weight_decay", "lr", "eta_min", "ema", "crop", "batch")
        self.facts = {"arch": self.args.arch, "prompt": self.args.prompt, "seed": self.args.seed,
                      "order": [list(stage.tasks) for stage in self.stages],
                      "periods": [list(stage.periods) for stage in self.stages],
                      "data": data, **{key: self.recipe[key] for key in kept}}

    def save(self, keep=None):
        """Writes last.pt whole or not at all; the one before becomes previous.pt. keep: a name."""
        last, unfinished = self.out / "last.pt", self.out / "last.pt.tmp"
        state = {"mioir": 1, "arch": self.args.arch, "prompt": self.args.prompt,
                 "sizes": self.recipe["sizes"], "facts": self.facts, "table": self.table,
                 "raw": self.model.state_dict(), "ema": self.ema.state_dict(),
                 "optimizer": self.optimizer.state_dict(),
                 "stage": self.stage, "iteration": self.iteration}
        try:
            with open(unfinished, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if last.exists():                           # last.pt never lacks, not even for a moment
                copy_or_link(last, self.out / "previous.pt")
            os.replace(unfinished, last)
            if keep:
                copy_or_link(last, self.out / keep)
        except (OSError, RuntimeError) as error:         # torch reports a full disk as RuntimeError
            unfinished.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"{last}: not saved ({reason}); {self.last_good()}") from None

    def last_good(self):
        """What to go on from after a fault, in words."""
        found = checkpoints(self.out)
        return (f"{found[0]} is unharmed; make room and add --resume" if found else
                "no checkpoint was written yet")

    def load(self, say):
        """Goes on from last.pt, or previous.pt if the newest is torn. Refuses another recipe."""
        for path in checkpoints(self.out):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                facts = saved["facts"]
                break
            except Exception as error:                   # torch raises a dozen kinds for torn files
                say(f"{path} is torn ({str(error).splitlines()[0][:80]}); trying the one before")
        else:
            raise ValueError(f"--resume: there is no readable {self.out / 'last.pt'} to go on from")
        changed = [f"{key}: {facts.get(key)} then, {value} now" for key, value in self.facts.items()
                   if facts.get(key) != value]
        if changed:
            raise ValueError(f"--resume: {path} is of another run; {'; '.join(changed)}")
        self.model.load_state_dict(saved["raw"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.stage, self.iteration = saved["stage"], saved["iteration"]
        self.table = [tuple(row) for row in saved["table"]]
        say(f"goes on from {path}: stage {self.stage + 1}, iteration {self.iteration}")


def checkpoints(out):
    """What a run can go on from, newest first; previous.pt is for a torn last.pt."""
    return [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]


def copy_or_link(source, target):
    """A second name for a file; a copy where the file system has no hard links. Never torn."""
    unfinished = Path(f"{target}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


# ---- Training batches ----------------------------------------------------------------------------

# The published data degrade whole images and crop afterwards. A crop degraded alone would differ:
# JPEG's grid would start at its corner, blur and rain would see its border, haze its own depth. So
# each sample is cut from the middle of a larger canvas: 16 pixels or more of margin, and 0 to 15
# more, so that all 16 phases of JPEG's chroma grid occur equally often.
MARGIN = 48
RAIN_FIELD = 512    # edge of the field from which a training crop's rain is cut, and the brightness
RAIN_PEAK = 0.88       # of its brightest spot, which in a whole 2040 x 1356 image is 1 (measured)


def task_of(tasks, iteration, i, batch):
    """Tasks take turns over all samples of all iterations, so that each is seen equally often."""
    return tasks[(iteration * batch + i) % len(tasks)]


def sample(source, tasks, crop, seed, stage, iteration, i, batch):
    """Sample i of an iteration's batch, before degradation: a dict of CPU tensors.

    It depends on (seed, stage, iteration, i) alone, whoever computes it.
    """
    g = seeded(seed, stage, iteration, i)
    def below(n):
        return int(torch.randint(n, (1,), generator=g))
    task = task_of(tasks, iteration, i, batch)
    chooser = seeded(seed, stage, "image", (iteration * batch + i) // source.share)
    k, edge = int(torch.randint(len(source), (1,), generator=chooser)), crop + MARGIN
    h, w = source.size(k)
    top, left = below(max(h - edge, 0) + 1), below(max(w - edge, 0) + 1)
    item = {"task": task, "canvas": source.crop(k, top, left, edge),
            "offset": (16 + below(16), 16 + below(16)), "turn": below(8),
            "drawn": draw(task, (edge, edge), "in", g, rain_field=(RAIN_FIELD,) * 2)}
    if task == "haze":
        depth = source.depth(k)
        depth = (depth_prior(h, w, g) if depth is None
                 else F.interpolate(depth, (h, w), mode="bilinear"))
        item["depth_max"] = depth.amax()[None]
        item["depth"] = reflect_pad(depth[:, :, top:top + edge, left:left + edge],
                                    0, max(edge - w, 0), 0, max(edge - h, 0))
    return item


def make_batch(samples, crop, device):
    """Degrades samples on the device. Returns lq, gt: (N,3,crop,crop); task: (N,) rows of TASKS."""
    canvas = torch.stack([s["canvas"] for s in samples]).to(device, non_blocking=True).float() / 255
    degraded = torch.empty_like(canvas)
    for task in {s["task"]: None for s in samples}:                            # in order, once each
        rows = [i for i, s in enumerate(samples) if s["task"] == task]
        group = [samples[i] for i in rows]
        def join(key):
            return torch.cat([s[key] for s in group]).to(device) if key in group[0] else None
        drawn = {name: torch.cat([s["drawn"][name] for s in group]) for name in group[0]["drawn"]}
        depth, depth_max = join("depth"), join("depth_max")
        degraded[rows] = apply(canvas[rows], task, drawn, depth, depth_max, RAIN_PEAK)
    pairs = torch.cat((degraded, canvas), 1)                                      # (N,6,edge,edge)
    pairs = torch.stack([_turn(pair[:, y:y + crop, x:x + crop], s["turn"])
                         for pair, s in zip(pairs, samples) for y, x in [s["offset"]]])
    task = torch.tensor([TASKS.index(s["task"]) for s in samples], device=device)
    return pairs[:, :3].contiguous(), pairs[:, 3:].contiguous(), task


def _turn(x, turn):
    """One of the eight flips and quarter turns of (C,H,H)."""
    x = x.mT if turn & 1 else x
    return x.flip([axis for axis, bit in ((1, 2), (2, 4)) if turn & bit])


def recompute_blocks(model):
    """Activation checkpointing: a block keeps its input alone and is run again going backward.
    SRResNet's are small, and modulated one by one: of four, the first one's input alone is kept."""
    for module in model.modules():
        if isinstance(module, (ResidualBlock, WindowBlock, RestormerBlock)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        if isinstance(module, SRResNet):
            module.four_blocks = functools.partial(checkpoint, module.four_blocks,
                                                   use_reentrant=False)


def lay_channels_last(model):
    """Convolutions' weights in torch.channels_last; `model.to` refuses PromptIR's 5-D prompts."""
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


# ---- One iteration -------------------------------------------------------------------------------

class Machine:
    """Where a run computes: the device, this process's rank among `world`, and how fast a way it
    takes. None of it changes what is computed, but for rounding."""

    def __init__(self, args):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        cuda = torch.cuda.is_available()
        kind = args.device or ("cuda" if cuda else "cpu")
        if kind not in ("cpu", "cuda") or kind == "cuda" and not cuda:
            raise ValueError(f"--device {kind}: this machine has {'cuda and ' * cuda}cpu")
        number = os.environ.get("LOCAL_RANK", 0)
        self.device = torch.device(f"cuda:{number}" if kind == "cuda" else "cpu")
        self.parts, self.args = args.accumulate, args
        self.channels_last = args.channels_last or args.recipe.get("channels_last", False)
        if args.recipe["batch"] % (self.world * self.parts):
            raise ValueError(f"a total batch of {args.recipe['batch']} can't be split among "
                             f"{self.world} processes x --accumulate {self.parts}; "
                             "choose numbers that divide it")
        if self.world > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        torch.backends.cudnn.allow_tf32 = args.precision in ("tf32", "tf32conv")
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
        torch.backends.cudnn.deterministic = True               # the same bits every time

    def share(self, batch):
        """Which samples of a batch are this process's: a list of parts, each a range."""
        size = batch // (self.world * self.parts)
        first = self.rank * self.parts
        return [range(size * k, size * (k + 1)) for k in range(first, first + self.parts)]

    def wrap(self, model):
        """The model as it is called in training."""
        if self.args.checkpointing:
            recompute_blocks(model)
        if self.channels_last:
            lay_channels_last(model)
        if self.world > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if self.args.compile else model

    def autocast(self):
        if self.args.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def loss_per_image(net, lq, gt, task):
    """(N,): L1, the paper's only loss; for the classifier, cross-entropy."""
    if gt is None:
        return F.cross_entropy(net(lq), task, reduction="none")
    return (net(lq, task) - gt).abs().mean((1, 2, 3))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def step(run, net, parts, lr, machine, stop=False):
    """One iteration over this process's parts of the batch, [(lq, gt, task), ...].

    Returns the losses of the whole batch (N,), the gradient's norm, and whether a process wants to
    stop. Raises FloatingPointError, before the weights change, where a loss is not finite.
    """
    batch = run.recipe["batch"]
    net.train()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    losses = torch.zeros(batch + 1, device=machine.device)
    losses[-1] = float(stop)                              # rides along: all processes stop together
    for k, (rows, (lq, gt, task)) in enumerate(zip(machine.share(batch), parts)):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last or machine.world == 1 else net.no_sync():
            with machine.autocast():
                loss = loss_per_image(net, lq, gt, task)
            # Processes average their gradients, so each divides by its own share of the batch.
            (loss.sum() * machine.world / batch).backward()
        losses[rows.start:rows.stop] = loss.detach()
    if machine.world > 1:
        dist.all_reduce(losses)
    if not losses.is_meta and not losses.isfinite().all():
        raise FloatingPointError(int((~losses.isfinite()).nonzero()[0]))
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    run.optimizer.step()
    update_ema(run.ema, run.model, run.recipe["ema"])
    return losses[:-1], norm, losses[-1] > 0


# ---- The loop ------------------------------------------------------------------------------------

class Stream(torch.utils.data.Dataset):
    """Iteration t -> this process's samples. What they are depends on (seed, stage, t) alone, so
    any worker may make them, and a resumed run sees what the uninterrupted one would have seen."""

    def __init__(self, run, source, machine):
        self.source, self.shares = source, machine.share(run.recipe["batch"])
        self.tasks, self.seed, self.stage = run.stages[run.stage].tasks, run.args.seed, run.stage
        self.crop, self.batch = run.recipe["crop"], run.recipe["batch"]

    def __getitem__(self, t):
        try:
            return [[sample(self.source, self.tasks, self.crop, self.seed, self.stage, t, i,
                            self.batch) for i in share] for share in self.shares]
        except (ValueError, OSError) as error:            # a worker's traceback would hide the file
            return str(error)


def train_stage(run, net, source, machine, log, validate):
    """Trains run.stage from run.iteration to its end; True if asked to stop before."""
    stage, recipe, device = run.stages[run.stage], run.recipe, machine.device
    workers, on_gpu, batch = run.args.workers, device.type == "cuda", recipe["batch"]
    ahead = range(run.iteration, stage.iterations)
    loader = torch.utils.data.DataLoader(
        Stream(run, source, machine), batch_size=None, sampler=ahead, pin_memory=on_gpu,
        num_workers=workers if workers is not None else 8 * on_gpu)
    for t, parts in zip(ahead, loader):
        where = f"stage {run.stage + 1}, iteration {t + 1}"
        if isinstance(parts, str):
            raise ValueError(f"{where}: {parts}; {run.last_good()}")
        drop_path = seeded(run.args.seed, run.stage, t, machine.rank)
        torch.manual_seed(drop_path.initial_seed())
        parts = [prepare_batch(part, recipe["crop"], machine, run.args) for part in parts]
        lr = lr_at(t + 1, stage.periods, recipe["lr"], recipe["eta_min"])
        tasks = [task_of(stage.tasks, t, i, batch) for i in range(batch)]
        try:
            losses, norm, stop = step(run, net, parts, lr, machine, log.stop is not None)
        except FloatingPointError as fault:
            raise ValueError(f"{where}: the loss of {tasks[int(str(fault))]} is not finite; the "
                             f"weights were left as they were before; {run.last_good()}") from None
        run.iteration = t + 1
        log.add(run, losses.cpu(), tasks, norm, lr)
        if run.iteration % (run.args.save_every or recipe["save_every"]) == 0 and machine.rank == 0:
            run.save()
        every = run.args.val_every
        if every and run.iteration % every == 0 and run.iteration < stage.iterations:
            log.write(stage=run.stage + 1, iteration=run.iteration, psnr=validate())
        if stop:
            return True
    return False


def prepare_batch(samples, crop, machine, args):
    """Degrades on the training device; the classifier sees degraded images alone."""
    lq, gt, task = make_batch(samples, crop, machine.device)
    if machine.channels_last:
        lq = lq.contiguous(memory_format=torch.channels_last)
    return lq, None if args.arch == "classifier" else gt, task


class Log:
    """Progress on the screen and in log.jsonl; one process of many speaks."""

    def __init__(self, run, machine):
        self.speaks = machine.rank == 0
        self.file = open(run.out / "log.jsonl", "a", buffering=1) if self.speaks else None
        self.total = sum(stage.iterations for stage in run.stages)
        self.iterations, self.start, self.idle = 0, time.monotonic(), 0.0  # idle: when validating
        self.sums, self.counts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
        self.stop = None                                             # the signal that asked to stop
        self.handlers = {number: signal.signal(number, self.ask_to_stop)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(self, number, frame):
        self.stop = number

    def close(self):
        """Gives the signals back to whom they belonged."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def say(self, text):
        if self.speaks:
            print(text, flush=True)

    def write(self, **fields):
        if self.speaks:
            self.file.write(json.dumps(fields) + "\n")

    def rate(self):
        """Iterations per second of training in this session."""
        return self.iterations / max(time.monotonic() - self.start - self.idle, 1e-9)

    def left(self, run):
        done = sum(stage.iterations for stage in run.stages[:run.stage]) + run.iteration
        return (self.total - done) / self.rate()

    def add(self, run, losses, tasks, norm, lr):
        """Counts an iteration; speaks every log_every iterations."""
        rows = torch.tensor([TASKS.index(task) for task in tasks])
        self.sums.index_add_(0, rows, losses)
        self.counts += rows.bincount(minlength=len(TASKS))
        self.iterations += 1
        stage, batch = run.stages[run.stage], run.recipe["batch"]
        if self.iterations == 20:
            self.say(f"at this rate the run takes {clock(self.left(run))} more, plus validation")
        if run.iteration % run.recipe["log_every"] and run.iteration != stage.iterations:
            return
        means = {task: round((total / count).item(), 5)
                 for task, total, count in zip(TASKS, self.sums, self.counts) if count}
        self.sums.zero_(), self.counts.zero_()
        losses, rate = " ".join(f"{task} {loss:.4f}" for task, loss in means.items()), self.rate()
        self.say(f"stage {run.stage + 1}/{len(run.stages)} {run.iteration}/{stage.iterations} | "
                 f"loss {losses} | lr {lr:.1e} | {rate * batch:.1f} images/s | "
                 f"{clock(self.left(run))} left")
        self.write(stage=run.stage + 1, iteration=run.iteration, tasks=stage.tasks, loss=means,
                   lr=lr, gradient_norm=round(norm.item(), 5),
                   images_per_second=round(rate * batch, 2), seconds_left=round(self.left(run)))


def clock(seconds):
    """Seconds in words."""
    minutes = int(seconds + 30) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes >= 2 else f"{int(seconds)} s"


def peak_memory(device):
    """GB: of the GPU if one is used, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- A whole run ---------------------------------------------------------------------------------

def open_images(args, say):
    """The images to train on. Refuses what would lose an earlier run."""
    out, recipe = Path(args.out), args.recipe
    begun = checkpoints(out)
    if begun and not args.resume:
        raise ValueError(f"--out {out} holds another run; add --resume to go on with it, or choose "
                         "another --out")
    if args.resume and not begun:
        raise ValueError(f"--resume: there is no {out / 'last.pt'} to go on from")
    count, edge = recipe["leaves"]
    items = photo_items(args.data, args.depth) if args.data else []
    if args.leaves or not args.data:
        items += leaf_items(args.leaves or count, edge, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    if args.cache == "none":
        return ImageFiles(out, items, recipe["crop"], say)
    return ImageCache(args.cache or out / "cache", items, recipe["crop"], say)


def show_table(run, say):
    """The stage x task table: printed, and written as table.md and table.png."""
    unit = "accuracy (%)" if run.args.arch == "classifier" else "PSNR (dB)"
    rows = [[name, *(psnrs[task] for task in TASKS), float(np.mean(list(psnrs.values())))]
            for name, psnrs in run.table]
    text = markdown([f"{unit} after", *TASKS, "mean"], rows)
    (run.out / "table.md").write_text(text + "\n")
    trained = {(i, TASKS.index(task)) for i, stage in enumerate(run.stages, 1)
               for task in stage.tasks}
    title = f"{run.args.name}: {unit} after each stage (framed: trained in it)"
    matrix_picture(run.out / "table.png", title, [*TASKS, "mean"],
                   [(row[0], row[1:]) for row in rows], trained)
    curves_picture(run.out / "curves.png", run.args.name, run.out / "log.jsonl")
    say(text)


def announce(run, source, machine, say):
    """The first line: where and what will run; then the stages."""
    crop, on_gpu = run.recipe["crop"], machine.device.type == "cuda"
    where = (torch.cuda.get_device_name(machine.device) if on_gpu else
             f"cpu, {torch.get_num_threads()} threads")
    where += f", {machine.world} processes" if machine.world > 1 else ""
    say(f"on {where}: {run.args.name}, "
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"{sum(stage.iterations for stage in run.stages):,} iterations of {run.recipe['batch']} "
        f"crops of {crop} x {crop} from {len(source)} images, {run.args.precision}")
    for k, stage in enumerate(run.stages, 1):
        say(f"  stage {k}: {', '.join(stage.tasks)}; {stage.iterations:,} iterations")


def train(args):
    """A whole run, from Args to the last picture."""
    if args.print_plan:
        return print_plan(args)
    machine = Machine(args)
    source = open_images(args, print) if machine.rank == 0 else None  # one decodes, others wait
    if machine.world > 1:
        dist.barrier()
        source = source or open_images(args, lambda text: None)
    run = Run(args, machine.device)
    run.identify(source.identity)
    net = machine.wrap(run.model)
    log = Log(run, machine)
    try:
        announce(run, source, machine, log.say)
        if args.resume:
            run.load(log.say)
        run_stages(run, net, source, machine, log)
    finally:
        log.close()


def run_stages(run, net, source, machine, log):
    """The whole schedule, from where the run stands to its end."""
    classify = run.args.arch == "classifier"
    pairs = validation_pairs(builtin_images(*run.recipe["validate"]))

    def validate():
        started, scores = time.monotonic(), None
        if machine.rank == 0:
            scores = (confusion(run.model, pairs, machine.device)[0] if classify else
                      mean_psnr(run.model, pairs, machine.device))
        if machine.world > 1:
            dist.barrier()
        log.idle += time.monotonic() - started
        return scores
    if not run.table:
        run.table = [("chance", dict.fromkeys(TASKS, 100 / 7)) if classify else
                     ("input", input_psnr(pairs))]
    while run.stage < len(run.stages):
        stage = run.stages[run.stage]
        if run.iteration == 0:
            run.new_optimizer()
        log.say(f"stage {run.stage + 1}/{len(run.stages)}: {', '.join(stage.tasks)}")
        if train_stage(run, net, source, machine, log, validate):
            return stopped(run, log, machine)
        name = f"stage {run.stage + 1} (+{stage.tasks[-1]})" if run.args.seq else "mixed"
        run.table.append((name, validate()))
        run.stage, run.iteration = run.stage + 1, 0
        if machine.rank == 0:
            run.save(keep=f"stage{run.stage}.pt")
            log.write(stage=run.stage, psnr=run.table[-1][1])
            show_table(run, log.say)
    if machine.rank == 0:
        finish(run, pairs, log, machine)


def stopped(run, log, machine):
    """After SIGINT or SIGTERM: everything is saved, and the command that goes on is shown."""
    if machine.rank == 0:
        run.save()
        again = " ".join([arg for arg in sys.argv if arg != "--resume"] + ["--resume"])
        log.say(f"stopped by signal at stage {run.stage + 1}, iteration {run.iteration}; saved. "
                f"To go on:\n  python {again}")
    sys.exit(128 + (log.stop or signal.SIGTERM))


def finish(run, pairs, log, machine):
    """The last words: a classifier's confusion matrix or the strips, and what the run took."""
    if run.args.arch == "classifier":
        log.say(f"\n{confusion_text(*confusion(run.model, pairs, machine.device))}")
    else:
        task_strips(run.out / "strips.png", run.model, pairs, machine.device)
    log.say(f"done in {clock(time.monotonic() - log.start)}, "
            f"{log.rate() * run.recipe['batch']:.1f} images/s, peak memory "
            f"{peak_memory(machine.device):.1f} GB; {run.out} holds last.pt, log and pictures\n"
            f"next: python eval.py {run.out}/last.pt")


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit."""
    args = parse(argv)
    tune_cpu()
    try:
        train(args)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
