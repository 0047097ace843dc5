"""The paper's Table 3 in miniature: mixed or sequential, without a prompt, with "ep" or "ap".

    python tests/bench.py study --images DIR --jobs 1        # hours; stopped, it goes on
    python tests/bench.py study --report                     # the tables of what is there

Small networks of three demos' length, trained on the photos in DIR and on dead leaves. Each variant is
trained from several seeds. Variants of one seed begin with the same weights (but for the prompt
path's) and see the same images, so what is compared is a pair: the gain of S on M is a mean over
seeds of S's gain on the M of the same seed, and its spread is that of these differences.

What has been trained stands in tests/study.json, and is not trained again: to repeat it all, remove
that file. It grows by a training at a time, and so do study.md and study.png in --out.
"""
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval import markdown, matrix_picture
from mioir import TASKS
from train import LETTERS, RECIPES

RESULTS = Path(__file__).parent / "study.json"

# {arch: (seeds, {variant: the paper's gain on M in dB, or None})}. The paper's are of Table 3: the
# full-size SRResNet, mean PSNR of its seven In-Dis sets.
STUDY = {
    "srresnet": ((0, 1, 2), {"M": 0.0, "S": 0.29, "M+EP": 0.74, "S+EP": 0.84, "M+AP": 0.08,
                             "S+AP": 0.24}),
    "restormer": ((0, 1), {"M": None, "S": None, "M+EP": None, "S+EP": None}),
}
# What the paper says of two variants: the first is the better one.
CLAIMS = (("S", "M"), ("S+EP", "M+EP"), ("S+AP", "M+AP"), ("M+EP", "M"), ("S+EP", "S"),
          ("M+AP", "M"), ("S+AP", "S"), ("S+EP", "M"))


# Half an hour a training on one core.
LENGTH = ["--preset", "demo", "--period", "600", "--lr", "1e-3"]


def flags_of(arch, variant, seed):
    """A training as flags of train.py: S+EP is --seq --prompt ep."""
    schedule, _, prompt = variant.partition("+")
    flags = ["--arch", arch, *LENGTH, "--seed", str(seed)]
    flags += ["--seq"] if schedule == "S" else []
    return flags + (["--prompt", prompt.lower()] if prompt else [])


def jobs():
    """[(arch, variant, seed), ...], all variants of a seed together: pairs are complete early."""
    most = max(len(seeds) for seeds, _ in STUDY.values())
    return [(arch, variant, seed) for seed in range(most) for arch, (seeds, variants) in
            STUDY.items() if seed in seeds for variant in variants]


def train_one(arch, variant, seed, photos, out):
    """One training, to its end, in a process of one thread; goes on where it was. Returns its
    table, [[stage, {task: PSNR}], ...], the input first."""
    folder = out / f"{arch}-{variant}-{seed}"
    command = [sys.executable, "train.py", *flags_of(arch, variant, seed), "--data", str(photos),
               "--leaves", "64", "--precision", "bf16", "--workers", "0", "--out", str(folder),
               "--cache", str(out / f"cache-{seed}")]
    if (folder / "last.pt").exists():
        command.append("--resume")
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=RESULTS.parent.parent,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"{folder.name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
    import torch                                           # the others of this file need none
    return torch.load(folder / "last.pt", weights_only=True)["table"]


def finals(results, arch, variant):
    """{seed: {task: PSNR at the end}} of what has been trained."""
    tables = {seed: results.get(f"{arch} {variant} {seed}") for seed in STUDY[arch][0]}
    return {seed: table[-1][1] for seed, table in tables.items() if table}


def paired_gains(results, arch, variant, base):
    """[gain of the mean over tasks, dB], one for each seed of which both variants are there."""
    ours, theirs = finals(results, arch, variant), finals(results, arch, base)
    return [float(np.mean([ours[seed][task] - theirs[seed][task] for task in TASKS]))
            for seed in ours if seed in theirs]


def verdict(gains):
    """("+0.31 +- 0.05", "held", "reversed" or "undecided"): the mean of paired differences and its
    standard error, s / sqrt(n). Two errors from 0 are asked for, and that all seeds agree."""
    if len(gains) < 2:
        return f"{gains[0]:+.2f}", "one seed"
    mean, error = np.mean(gains), np.std(gains, ddof=1) / math.sqrt(len(gains))
    clear = abs(mean) > 2 * error and len(set(np.sign(gains))) == 1
    said = "undecided" if not clear else "held" if mean > 0 else "reversed"
    return f"{mean:+.2f} ± {error:.2f}", said


def report(results):
    """The tables of what has been trained, as Markdown."""
    text = []
    for arch, (_, variants) in STUDY.items():
        rows = []
        for variant in variants:
            ends = finals(results, arch, variant)
            if ends and not rows:
                _, before = results[f"{arch} {variant} {next(iter(ends))}"][0]
                rows.append(["input", "", *[before[task] for task in TASKS],
                             float(np.mean([before[task] for task in TASKS]))])
            if ends:
                means = [float(np.mean([end[task] for end in ends.values()])) for task in TASKS]
                rows.append([variant, len(ends), *means, float(np.mean(means))])
        claims = []
        for better, base in CLAIMS:
            if better in variants and base in variants:
                gains = paired_gains(results, arch, better, base)
                papers = ""
                if variants[better] is not None:
                    papers = f"{variants[better] - variants[base]:+.2f}"
                if gains:
                    each = ", ".join(f"{gain:+.2f}" for gain in gains)
                    claims.append([f"{better} above {base}", *verdict(gains), each, papers])
        if rows:
            text.append(markdown([f"{arch}, PSNR in dB", "seeds", *TASKS, "mean"], rows))
        if claims:
            text.append(markdown(["claim", "gain", "is", "each seed", "the paper's gain"], claims))
    return "\n\n".join(text)


def picture(path, results):
    """Gains on M, a row a variant: a dot for each seed, a bar at their mean; the paper's as a
    diamond."""
    rows = [(arch, variant) for arch, (_, variants) in STUDY.items() for variant in variants
            if variant != "M" and paired_gains(results, arch, variant, "M")]
    if not rows:
        return
    gains = {row: paired_gains(results, *row, "M") for row in rows}
    papers = {(arch, variant): STUDY[arch][1][variant] for arch, variant in rows}
    everything = [g for each in gains.values() for g in each]
    everything += [0.0, *(paper for paper in papers.values() if paper is not None)]
    unit = 0.25 if max(everything) - min(everything) <= 2.5 else 0.5         # so that 0 gets a line
    low, high = math.floor(min(everything) / unit) * unit, math.ceil(max(everything) / unit) * unit
    left, right, top, step = 190, 860, 70, 40
    sheet = Image.new("RGB", (right + 40, top + step * len(rows) + 50), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    pen.text((12, 10), "Gain on M in dB, mean of seven tasks: seeds (dots), their mean (bar), "
             "the paper's (diamond)", "black", ImageFont.load_default(17))
    bottom = top + step * len(rows)

    def column(gain):
        return float(np.interp(gain, (low, high), (left, right)))
    for tick in np.arange(low, high + 0.01, unit):
        x = column(tick)
        pen.line((x, top - 12, x, bottom), "#888888" if tick == 0 else "#dddddd")
        pen.text((x, bottom + 14), f"{tick:+.2f}", "black", font, "mm")
    for i, row in enumerate(rows):
        y = top + step * i + 14
        pen.text((left - 16, y), " ".join(row), "black", font, "rm")
        x = column(np.mean(gains[row]))
        pen.line((x, y - 12, x, y + 12), "#1f77b4", 3)
        for gain in gains[row]:
            x = column(gain)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), "#1f77b4")
        if papers[row] is not None:
            x = column(papers[row])
            pen.polygon([(x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y)], None, "#d62728", 2)
    sheet.save(path)


def forgetting(path, results, key):
    """The stage x task table of a sequential training as a picture, the trained tasks framed."""
    if key in results:
        order = [LETTERS[letter] for letter in RECIPES[key.split()[0]]["order"]]
        rows = [(name, list(scores.values())) for name, scores in results[key]]
        trained = {(k, TASKS.index(task)) for k in range(1, len(rows)) for task in order[:k]}
        matrix_picture(path, f"{key}: PSNR (dB) after each stage", TASKS, rows, trained)


def run(args, device):
    """Trains what is missing, --jobs at a time, and writes the tables as they grow."""
    out = Path(args.out or "runs/study").resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [job for job in jobs() if "{} {} {}".format(*job) not in results]
    if missing and not args.report and not args.images:
        sys.exit("bench.py: study trains on photos: --images DIR; --report: what is there")
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {} if args.report else {
            pool.submit(train_one, *job, Path(args.images).resolve(), out): job for job in missing}
        for training in as_completed(started):
            results["{} {} {}".format(*started[training])] = training.result()
            RESULTS.write_text(json.dumps(results, indent=1))
            (out / "study.md").write_text(report(results) + "\n")
            picture(out / "study.png", results)
    print(report(results))
    picture(out / "study.png", results)
    for variant in ("S", "S+EP"):                          # what later tasks do to earlier ones
        forgetting(out / f"study_{variant}.png", results, f"srresnet {variant} 0")
