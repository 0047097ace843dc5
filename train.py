"""Train one network for seven restoration tasks: mixed or sequential, with or without a prompt.

    python train.py --arch restormer --seq --prompt --preset demo     # minutes on two CPU cores
    python train.py --arch restormer --seq --prompt --data DF2K       # the paper's recipe, on a GPU
    python train.py --arch srresnet --prompt ap --data DF2K --depth DF2K_depth
    python train.py --arch restormer --seq --prompt --preset demo --resume      # go on after an interruption

One command runs the whole schedule. OUT receives last.pt (the newest state), log.jsonl (one JSON object
a line), table.md and table.png (PSNR on a fixed validation set: stage x task) and strips.png.
Source: paper, Section 3.2 and 4.1; published options/*.yml; BasicSR's training loop.
"""
import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from degrade import (ImageCache, builtin_images, leaf_items, make_batch, photo_items, sample, seeded, to_image,
                     validation_pairs)
from eval import markdown, matrix_picture, mean_psnr, psnr, task_strips
from mioir import ARCHS, TASKS, build_model

# ---------------------------------------------------------------------------------------------------
# Recipes (paper, Section 4.1) and presets
# ---------------------------------------------------------------------------------------------------

LETTERS = {"s": "sr", "b": "blur", "n": "noise", "j": "jpeg", "r": "rain", "h": "haze", "d": "dark"}
_ADAM = dict(optimizer="Adam", weight_decay=0.0, lr=2e-4, betas=(0.9, 0.99), eta_min=1e-7, ema=0.999, crop=128)
RECIPES = {
    "srresnet": dict(_ADAM, batch=16, period=250_000, order="sbnjrhd"),
    "swinir": dict(_ADAM, batch=8, period=100_000, order="sbnjrhd"),
    "restormer": dict(_ADAM, optimizer="AdamW", batch=8, period=100_000, order="rjbsnhd"),
    "uformer": dict(_ADAM, optimizer="AdamW", weight_decay=0.02, eta_min=1e-6, batch=8, period=100_000,
                    order="rjbsnhd"),
    "promptir": dict(_ADAM, optimizer="AdamW", batch=8, period=100_000, order="rjbsnhd"),
}
LAST_STAGE = 4      # periods of the last sequential stage, all tasks; earlier stages last one
MIXED = 10          # periods of a mixed run: as many as a sequential one, 6 + 4

# Presets change the recipe; "sizes" shrink the model. leaves: (how many, edge) images if there is no --data.
SMALL = {
    "srresnet": dict(width=32, blocks=8),
    "swinir": dict(dim=24, depths=(2, 2), heads=2, width=24),
    "restormer": dict(dim=12, blocks=(1, 1, 1, 1), refinement=1),
    "uformer": dict(dim=8, depths=(1,) * 9),
    "promptir": dict(dim=16, blocks=(1, 1, 1, 2), refinement=1, prompt_dims=(16, 16, 32)),
}
PRESETS = {
    "paper": dict(leaves=(800, 512), log_every=100, save_every=1000),
    "demo": dict(leaves=(64, 256), log_every=20, save_every=100, lr=1e-3, eta_min=1e-5, batch=14, crop=48,
                 period=80, ema=0.99),
    "smoke": dict(leaves=(4, 128), log_every=2, save_every=4, batch=7, crop=64, period=2, ema=0.9),
}


class Stage(NamedTuple):
    tasks: tuple        # trained together, every one equally often
    periods: tuple      # iterations of each cosine period; the learning rate restarts at each

    @property
    def iterations(self):
        return sum(self.periods)


def stages(arch, seq=False, order=None, period=None):
    """The schedule as a list. Mixed: one stage with all tasks. Sequential: stage k trains the first k tasks.

    order: letters of LETTERS, each at most once; the default is the paper's. period: iterations.
    Raises ValueError for letters that are unknown or repeated.
    """
    order = order or RECIPES[arch]["order"]
    period = period or RECIPES[arch]["period"]
    unknown = [letter for letter in order if letter not in LETTERS]
    if unknown or len(set(order)) != len(order):
        raise ValueError(f"--order {order}: {repr(unknown[0]) + ' is no task' if unknown else 'a task is repeated'};"
                         f" use each of {', '.join(f'{k} ({v})' for k, v in LETTERS.items())} at most once")
    tasks = tuple(LETTERS[letter] for letter in order)
    if not seq:
        return [Stage(tasks, (period,) * MIXED)]
    return [*(Stage(tasks[:k], (period,)) for k in range(1, len(tasks))), Stage(tasks, (period,) * LAST_STAGE)]


def lr_at(iteration, periods, base_lr, eta_min):
    """Learning rate of the 1-based iteration: cosine from base_lr to eta_min, restarting with each period.

    As published, the restart comes one iteration late: the first iteration of a later period still has
    eta_min (BasicSR's CosineAnnealingRestartLR counts a period's end to the period itself).
    """
    done, start = iteration - 1, 0
    for period in periods:
        if done <= start + period:
            break
        start += period
    return eta_min + 0.5 * (base_lr - eta_min) * (1 + math.cos(math.pi * (done - start) / period))


# ---------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------

def option(default, text, **more):
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


@dataclasses.dataclass
class Args:
    arch: str = option("restormer", f"backbone: {', '.join(ARCHS)}", choices=ARCHS)
    seq: bool = option(False, "sequential: add the tasks one after another (default: mixed, all at once)")
    prompt: str = option(None, "tell the network the task: ep (explicit, the default of --prompt) or ap (adaptive)",
                         nargs="?", const="ep", choices=("ep", "ap"))
    preset: str = option("paper", "paper; demo: minutes on 2 CPU cores; smoke: seconds", choices=tuple(PRESETS))
    data: list = option(None, "folders of photos; none: dead leaves, made from the seed", nargs="+", metavar="DIR")
    depth: str = option(None, "folder of depth maps for the photos, matched by name, for haze", metavar="DIR")
    order: str = option(None, "sequential order, letters of s b n j r h d (default: the paper's)")
    seed: int = option(0, "of weights, images, crops and degradations")
    out: str = option(None, "where results go (default: runs/ARCH-SCHEDULE-PROMPT-PRESET)", metavar="DIR")
    resume: bool = option(False, "go on from OUT/last.pt")
    cache: str = option(None, "where decoded images go (default: OUT/cache)", metavar="DIR")
    device: str = option(None, "cuda or cpu (default: cuda if there is one)")

    @property
    def recipe(self):
        """The arch's recipe with the preset's changes."""
        return {**RECIPES[self.arch], **PRESETS[self.preset], "sizes": {} if self.preset == "paper" else SMALL[self.arch]}

    @property
    def name(self):
        parts = (self.arch, "seq" if self.seq else "mixed", self.prompt or "plain", self.preset)
        return "-".join(parts)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message} (see python train.py --help)")
    for f in dataclasses.fields(Args):
        kind = dict(action="store_true") if f.type == "bool" or f.type is bool else dict(
            type=int if f.type is int else str, default=f.default)
        parser.add_argument(f"--{f.name}", **kind, **f.metadata)
    args = Args(**vars(parser.parse_args(argv)))
    if args.arch == "promptir" and args.prompt:
        parser.error("--arch promptir has prompts of its own; leave --prompt out")
    args.out = args.out or f"runs/{args.name}"
    return args


# ---------------------------------------------------------------------------------------------------
# The state of a run, and its file
# ---------------------------------------------------------------------------------------------------

class Run:
    """Everything that a checkpoint holds: the weights, where the run stands, and what it is."""

    def __init__(self, args, device):
        self.args, self.recipe = args, args.recipe
        self.stages = stages(args.arch, args.seq, args.order, self.recipe["period"])
        with torch.random.fork_rng(devices=[]):                 # leaves the caller's generator alone
            torch.manual_seed(args.seed)
            self.model = build_model(args.arch, args.prompt, **self.recipe["sizes"]).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.stage, self.iteration = 0, 0                       # in this stage, iterations done
        self.table = []                                         # [(name, {task: PSNR}), ...]
        self.new_optimizer()

    def new_optimizer(self):
        """Fresh for each stage: what Adam has learned about old tasks' gradients is forgotten."""
        self.optimizer = getattr(torch.optim, self.recipe["optimizer"])(
            self.model.parameters(), lr=self.recipe["lr"], betas=self.recipe["betas"],
            weight_decay=self.recipe["weight_decay"])

    def facts(self, source_names):
        """What must be the same for a run to go on."""
        kept = {k: self.recipe[k] for k in ("optimizer", "weight_decay", "lr", "eta_min", "ema", "crop", "batch")}
        digest = "-".join(map(str, (len(source_names), seeded(*source_names).initial_seed())))
        return {"arch": self.args.arch, "prompt": self.args.prompt, "seed": self.args.seed, "data": digest,
                "stages": [[list(s.tasks), list(s.periods)] for s in self.stages], **kept}

    def save(self, path, facts):
        """Writes the whole state beside the file and puts it in place: a torn file never has the name."""
        unfinished = Path(f"{path}.tmp")
        torch.save({"mioir": 1, "arch": self.args.arch, "prompt": self.args.prompt, "sizes": self.recipe["sizes"],
                    "raw": self.model.state_dict(), "ema": self.ema.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "stage": self.stage, "iteration": self.iteration,
                    "table": self.table, "facts": facts}, unfinished)
        os.replace(unfinished, path)

    def load(self, path, facts):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        changed = [f"{k}: {saved['facts'].get(k)} then, {v} now" for k, v in facts.items()
                   if saved["facts"].get(k) != v]
        if changed:
            raise ValueError(f"--resume: {path} is of another run; {'; '.join(changed)}")
        self.model.load_state_dict(saved["raw"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.stage, self.iteration = saved["stage"], saved["iteration"]
        self.table = [tuple(row) for row in saved["table"]]


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------

def loss_per_image(model, lq, gt, task):
    """L1, the paper's only loss: (N,)."""
    return (model(lq, task) - gt).abs().mean((1, 2, 3))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def step(run, lq, gt, task, lr):
    """One iteration. Returns the loss of each image, (N,). Raises FloatingPointError before the weights
    change if a loss is not finite."""
    run.model.train()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    losses = loss_per_image(run.model, lq, gt, task)
    losses.mean().backward()
    values = losses.detach()
    run.optimizer.step()
    update_ema(run.ema, run.model, run.recipe["ema"])
    return values


def train_stage(run, source, device, log, save):
    """Trains stage run.stage from iteration run.iteration to its end."""
    stage, recipe = run.stages[run.stage], run.recipe
    sums, counts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    for t in range(run.iteration, stage.iterations):
        torch.manual_seed(seeded(run.args.seed, run.stage, t).initial_seed())     # drop path's randomness
        batch = [sample(source, stage.tasks, recipe["crop"], run.args.seed, run.stage, t, i, recipe["batch"])
                 for i in range(recipe["batch"])]
        lq, gt, task = make_batch(batch, recipe["crop"], device)
        lr = lr_at(t + 1, stage.periods, recipe["lr"], recipe["eta_min"])
        losses = step(run, lq, gt, task, lr).cpu()
        sums.index_add_(0, task.cpu(), losses)
        counts += task.cpu().bincount(minlength=len(TASKS))
        run.iteration = t + 1
        log.tick(recipe["batch"])
        if run.iteration % recipe["log_every"] == 0 or run.iteration == stage.iterations:
            means = {name: round((sums[i] / counts[i]).item(), 5) for i, name in enumerate(TASKS) if counts[i]}
            log.progress(run, means, lr)
            sums.zero_(), counts.zero_()
        if run.iteration % recipe["save_every"] == 0:
            save()


class Log:
    """Progress on the screen and in log.jsonl."""

    def __init__(self, out, total):
        self.file = open(out / "log.jsonl", "a", buffering=1)
        self.total, self.done, self.images = total, 0, 0
        self.before = None                    # iterations that an earlier session did
        self.start = time.monotonic()
        self.idle = 0.0                       # seconds not spent training

    def tick(self, images):
        self.done += 1
        self.images += images

    def left(self, run):
        """Seconds to the end of the run at the rate so far."""
        done = sum(s.iterations for s in run.stages[:run.stage]) + run.iteration
        return (self.total - done) * self.seconds() / max(self.done, 1)

    def seconds(self):
        return time.monotonic() - self.start - self.idle

    def progress(self, run, losses, lr):
        stage = run.stages[run.stage]
        rate = self.images / self.seconds()
        shown = " ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        print(f"stage {run.stage + 1}/{len(run.stages)} {run.iteration}/{stage.iterations} | loss {shown} | "
              f"lr {lr:.1e} | {rate:.1f} images/s | {clock(self.left(run))} left", flush=True)
        self.write(stage=run.stage + 1, iteration=run.iteration, tasks=stage.tasks, loss=losses, lr=lr,
                   images_per_second=round(rate, 2), seconds_left=round(self.left(run)))

    def write(self, **fields):
        self.file.write(json.dumps(fields) + "\n")


def clock(seconds):
    minutes = int(seconds + 30) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else (
        f"{minutes} min" if minutes >= 2 else f"{int(seconds)} s")


def show_table(run, out):
    """The stage x task table, printed, and written as table.md and table.png."""
    rows = [[name, *(values[task] for task in TASKS), float(np.mean([values[task] for task in TASKS]))]
            for name, values in run.table]
    text = markdown(["PSNR (dB) after", *TASKS, "mean"], rows)
    (out / "table.md").write_text(text + "\n")
    trained = {(i + 1, TASKS.index(task)) for i, stage in enumerate(run.stages) for task in stage.tasks}
    matrix_picture(out / "table.png", f"{run.args.name}: PSNR in dB after each stage (framed: trained in it)",
                   [*TASKS, "mean"], [(row[0], row[1:]) for row in rows], trained)
    print(text, flush=True)


def prepare(args):
    """The output folder and the images. Refuses what would lose an earlier run."""
    out = Path(args.out)
    if (out / "last.pt").exists() and not args.resume:
        raise ValueError(f"--out {out} holds another run; add --resume to go on with it, or choose another --out")
    if args.resume and not (out / "last.pt").exists():
        raise ValueError(f"--resume: there is no {out / 'last.pt'} to go on from")
    recipe = args.recipe
    items = photo_items(args.data, args.depth) if args.data else leaf_items(*recipe["leaves"], args.seed)
    out.mkdir(parents=True, exist_ok=True)
    return out, ImageCache(args.cache or out / "cache", items, recipe["crop"])


def announce(run, source, device):
    total = sum(stage.iterations for stage in run.stages)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"on {device}: {run.args.name}, {parameters:,} parameters, {total:,} iterations of {run.recipe['batch']} "
          f"crops of {run.recipe['crop']} x {run.recipe['crop']} from {len(source)} images", flush=True)
    for k, stage in enumerate(run.stages, 1):
        print(f"  stage {k}: {', '.join(stage.tasks)}; {stage.iterations:,} iterations", flush=True)
    return total


def main(argv=None):
    args = parse(argv)
    try:
        train(args)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")


def train(args):
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out, source = prepare(args)
    run = Run(args, device)
    facts = run.facts(source.names)
    if args.resume:
        run.load(out / "last.pt", facts)
    total = announce(run, source, device)
    pairs = validation_pairs(builtin_images(2 if args.preset == "smoke" else 8))
    if not run.table:
        run.table = [("input", {task: float(np.mean([psnr(to_image(lq), to_image(gt)) for lq, gt in examples]))
                                for task, examples in pairs.items()})]
    log = Log(out, total)
    while run.stage < len(run.stages):
        stage = run.stages[run.stage]
        if run.iteration == 0:
            run.new_optimizer()
            print(f"stage {run.stage + 1}/{len(run.stages)}: {', '.join(stage.tasks)}", flush=True)
        train_stage(run, source, device, log, lambda: run.save(out / "last.pt", facts))
        started = time.monotonic()
        run.table.append((f"stage {run.stage + 1} (+{stage.tasks[-1]})" if args.seq else "mixed",
                          mean_psnr(run.model, pairs, device)))
        run.stage, run.iteration = run.stage + 1, 0
        run.save(out / "last.pt", facts)
        show_table(run, out)
        log.write(stage=run.stage, psnr=run.table[-1][1])
        log.idle += time.monotonic() - started
    task_strips(out / "strips.png", run.model, pairs, device)
    print(f"done in {clock(log.seconds() + log.idle)}: {out}/last.pt, log.jsonl, table.png, strips.png\n"
          f"next: python eval.py {out}/last.pt", flush=True)


if __name__ == "__main__":
    main()
