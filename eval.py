"""Evaluate a model, or restore one's own pictures with it.

    python eval.py runs/demo/last.pt                          # seven tasks x (input, output, gain)
    python eval.py runs/demo/last.pt --images photos/         # the same on your images
    python eval.py runs/demo/last.pt --input photo.jpg --output restored.png --task noise

Metrics are the paper's: PSNR and SSIM on 8-bit RGB, output clamped and rounded, 4 border pixels cut,
averaged over the images of a set; raw weights, not EMA. Source: paper, Section 5.1, and BasicSR.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from degrade import (builtin_images, find_depths, list_images, read_depth, read_image, to_image, to_tensor,
                     validation_pairs)
from mioir import TASKS, TaskClassifier, load_model, restore


# ---- Metrics -------------------------------------------------------------------------------------

def _cut(a, b, crop):
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 3:
        raise ValueError(f"metrics take two uint8 (H,W,3) arrays of one size, not {a.shape} {a.dtype} "
                         f"and {b.shape} {b.dtype}")
    if min(a.shape[:2]) <= 2 * crop:
        raise ValueError(f"an image of {a.shape[1]} x {a.shape[0]} has nothing left after cutting {crop} "
                         "pixels off each side")
    h, w = a.shape[:2]
    return tuple(x[crop:h - crop, crop:w - crop].astype(np.float64) for x in (a, b))


def psnr(a, b, crop=4):
    """Peak signal-to-noise ratio in dB of two uint8 (H,W,3) arrays, without `crop` border pixels."""
    a, b = _cut(a, b, crop)
    mse = np.mean((a - b) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255 ** 2 / mse))


def ssim(a, b, crop=4):
    """Structural similarity of two uint8 (H,W,3) arrays: 11x11 Gaussian of sigma 1.5, no padding,
    mean over pixels and the three channels (Wang et al. 2004; `calculate_ssim` of BasicSR)."""
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[:, None] for x in _cut(a, b, crop))      # (3,1,h,w)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11 pixels in height and width after the cut, not {tuple(a.shape[2:])}")
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
    """{task: PSNR in dB} over {task: [(lq, gt), ...]}, images of one size; "ep" models are told the task."""
    scores = {}
    for task, examples in pairs.items():
        lq = torch.cat([lq for lq, _ in examples]).to(device)
        y = restore(model, lq, torch.full((len(lq),), TASKS.index(task), device=device))
        scores[task] = float(np.mean([psnr(to_image(out), to_image(gt)) for out, (_, gt) in zip(y, examples)]))
    return scores


@torch.no_grad()
def confusion(classifier, pairs, device):
    """Returns ({task: accuracy in %}, 7 rows of counts: true task x named task)."""
    classifier.eval()
    matrix = np.zeros((len(TASKS), len(TASKS)), int)
    for task, examples in pairs.items():
        for lq, _ in examples:
            matrix[TASKS.index(task), classifier(lq.to(device)).argmax().item()] += 1
    return {task: 100 * matrix[i, i] / matrix[i].sum() for i, task in enumerate(TASKS)}, matrix.tolist()


def restored(model, lq, task, device, tile=None):
    """(1,3,H,W) -> (H,W,3) uint8. task: a name or (1,7) weights; only "ep" models listen."""
    if isinstance(task, str):
        task = torch.tensor([TASKS.index(task)])
    return to_image(restore(model, lq.to(device), task.to(device), tile))


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


def matrix_picture(path, title, columns, rows, outlined=()):
    """Draws a table of numbers: each cell green by what it gains on the first row, red by what it loses.

    rows: [(name, [number, ...]), ...]; the first row is the reference of its column. outlined: set of
    (row, column) to frame, such as the tasks that a stage trains on.
    """
    cell_w, cell_h, left, top = 78, 34, 190, 66
    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    picture = Image.new("RGB", (left + cell_w * len(columns) + 16, top + cell_h * len(rows) + 16), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 10), title, "black", bold)
    for j, column in enumerate(columns):
        pen.text((left + (j + 0.5) * cell_w, top - 14), column, "black", font, anchor="mm")
    gains = np.array([values for _, values in rows]) - np.array(rows[0][1])
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


_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194))


def curves_picture(path, title, log):
    """Draws a log.jsonl: the loss of each task on a logarithmic axis, and the learning rate below."""
    entries = [entry for entry in map(json.loads, Path(log).read_text().splitlines()) if "loss" in entry]
    offset, at, last = 0, [], (1, 0)
    for entry in entries:                                       # iterations counted over all stages
        here = (entry["stage"], entry["iteration"])
        offset += last[1] if here[0] > last[0] else 0
        at.append(offset + here[1])
        last = here
    width, heights, left, top, font = 900, (320, 110), 70, 56, ImageFont.load_default(14)
    picture = Image.new("RGB", (width + left + 110, sum(heights) + top + 70), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 8), f"{title}: loss per task, and learning rate, by iteration", "black", ImageFont.load_default(18))
    curves = {task: [(x, e["loss"][task]) for x, e in zip(at, entries) if task in e["loss"]] for task in TASKS}
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
            pen.text((left - 8, place(0, value)[1]), f"{value:.1e}" if value < 1e-3 else f"{value:.3f}", "black", font, "rm")
        for x in np.linspace(0, max(at), 6)[1:]:
            pen.text((place(x, 1)[0], top + height + 12), f"{x:.0f}", "black", font, "mm")
        ends = []
        for (name, line), colour in zip(lines.items(), _COLOURS):
            if line:
                pen.line([place(*point) for point in line], colour, 2)
                ends.append((place(*line[-1])[1], name, colour))
        below = top - 20
        for y, name, colour in sorted(ends):                    # names at the curves' ends, none over another
            below = max(y, below + 16)
            pen.text((left + width + 8, below), name, colour, font, "lm")
        top += height + 40
    picture.save(path)


def strip_picture(path, header, rows, edge=192):
    """Draws rows of pictures: [(name, [(H,W,3) uint8, ...]), ...], each cut to edge x edge at its centre."""
    left, top, font = 76, 30, ImageFont.load_default(16)
    picture = Image.new("RGB", (left + (edge + 6) * len(header), top + (edge + 6) * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for j, text in enumerate(header):
        pen.text((left + j * (edge + 6) + edge / 2, top / 2), text, "black", font, anchor="mm")
    for i, (name, images) in enumerate(rows):
        pen.text((left - 10, top + i * (edge + 6) + edge / 2), name, "black", font, anchor="rm")
        for j, image in enumerate(images):
            y, x = (max(s - edge, 0) // 2 for s in image.shape[:2])
            cut = Image.fromarray(image[y:y + edge, x:x + edge])
            if max(cut.size) < edge:                        # small images are shown larger, pixel by pixel
                cut = cut.resize((edge, edge), Image.Resampling.NEAREST)
            picture.paste(cut, (left + j * (edge + 6), top + i * (edge + 6)))
    picture.save(path)


def task_strips(path, model, pairs, device):
    """degraded | restored | truth for the first image of each task."""
    rows = [(task, [to_image(lq), restored(model, lq, task, device), to_image(gt)])
            for task, ((lq, gt), *_) in pairs.items()]
    strip_picture(path, ["degraded", "restored", "truth"], rows)


# ---- The command line ----------------------------------------------------------------------------

def evaluate(model, pairs, device, say):
    """Rows (task, PSNR in, out, gain, SSIM in, out, gain) over {task: [(lq, gt), ...]}, and their mean."""
    rows = []
    for task, examples in pairs.items():
        scores = []
        for lq, gt in examples:
            y, x, truth = restored(model, lq, task, device, auto_tile(lq)), to_image(lq), to_image(gt)
            scores.append([psnr(x, truth), psnr(y, truth), ssim(x, truth), ssim(y, truth)])
        p_in, p_out, s_in, s_out = np.mean(scores, 0).tolist()
        rows.append([task, p_in, p_out, p_out - p_in, f"{s_in:.4f}", f"{s_out:.4f}", f"{s_out - s_in:+.4f}"])
        say(f"{task}: {p_in:.2f} -> {p_out:.2f} dB over {len(examples)} images")
    numbers = np.array([[float(v) for v in row[1:]] for row in rows]).mean(0).tolist()
    rows.append(["mean", *numbers[:3], f"{numbers[3]:.4f}", f"{numbers[4]:.4f}", f"{numbers[5]:+.4f}"])
    return rows


def auto_tile(x):
    """Whole up to a megapixel; above it, tiles of 512, so that memory stays bounded."""
    return 512 if x.shape[2] * x.shape[3] > 2 ** 20 else None


def parse_task(text):
    """"noise" or "noise:0.7,jpeg:0.3" -> (1,7) weights, a mixture of the tasks' prompt images."""
    weights = torch.zeros(1, len(TASKS))
    for part in text.split(","):
        name, _, weight = part.partition(":")
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}, or mix them as "
                             "noise:0.7,jpeg:0.3")
        try:
            weights[0, TASKS.index(name)] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--task {text}: {weight!r} is not a number") from None
    return weights


def load_images(folder, depth_folder):
    """[(image (1,3,H,W), depth (1,1,h,w) or None), ...] of a folder; unreadable files are named and skipped."""
    images = []
    for path, depth in find_depths(list_images([folder]), depth_folder).items():
        try:
            image = to_tensor(read_image(path))
            images.append((image, None if depth is None else torch.from_numpy(read_depth(depth))[None, None]))
        except ValueError as error:
            print(f"skipped {error}", file=sys.stderr)
    if not images:
        raise ValueError(f"{folder}: no readable image")
    return images


def restore_file(args, model, device):
    """--input FILE --output FILE."""
    if args.task is None and model.prompt == "ep":
        raise ValueError(f"this model wants to know the task: add --task with one of {', '.join(TASKS)}")
    task = parse_task(args.task or TASKS[0])
    output = Path(args.output or Path(args.input).with_name(Path(args.input).stem + "_restored.png").name)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {output}: not a picture's name; end it in .png")
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output {output} exists; choose another name or add --overwrite")
    x = to_tensor(read_image(args.input))
    y = restored(model, x, task, device, args.tile or auto_tile(x))
    unfinished = output.with_name(output.name + ".tmp")
    Image.fromarray(y).save(unfinished, format=Image.registered_extensions()[output.suffix.lower()])
    unfinished.replace(output)
    print(f"{args.input} -> {output}, {y.shape[1]} x {y.shape[0]} pixels")


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a file written by train.py, or one published with the paper")
    parser.add_argument("--images", metavar="DIR", help="evaluate on these, not on the built-in images")
    parser.add_argument("--depth", metavar="DIR", help="depth maps of --images, for haze")
    parser.add_argument("--seed", type=int, default=0, help="of the degradations")
    parser.add_argument("--input", metavar="FILE", help="a picture to restore")
    parser.add_argument("--output", metavar="PATH", help="where the restored picture, or the strips, go")
    parser.add_argument("--task", help="what is wrong with --input: a task, or a mixture noise:0.7,jpeg:0.3")
    parser.add_argument("--tile", type=int, metavar="N", help="tiles of N pixels (default: chosen by size)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="raw: as the paper does")
    parser.add_argument("--prompts", metavar="NPY", help="type7.npy, for a published 'ep' checkpoint")
    return parser.parse_args(argv)


def run(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = None if args.prompts is None else np.load(args.prompts, allow_pickle=False)
    model, info = load_model(args.checkpoint, args.weights, device, prompts)
    if isinstance(model, TaskClassifier):
        raise ValueError(f"{args.checkpoint} is a task classifier; it restores nothing")
    name = f"{info['arch']}{'-' + info['prompt'].upper() if info['prompt'] else ''}"
    print(f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, {args.weights} weights, on {device}")
    if args.input:
        return restore_file(args, model, device)
    images = load_images(args.images, args.depth) if args.images else builtin_images()
    strips = Path(args.output or Path(args.checkpoint).with_name("strips.png"))
    header = ["task", "PSNR in", "out", "gain", "SSIM in", "out", "gain"]
    for split, title in (("in", "In-Dis"), ("out", "Out-Dis")):
        pairs = validation_pairs(images, split, args.seed)
        rows = evaluate(model, pairs, device, lambda text: print("  " + text, file=sys.stderr))
        print(f"\n{title}, {len(images)} images, seed {args.seed}"
              f"{'' if split == 'in' else ' (sr: ranges not published)'}\n\n{markdown(header, rows)}")
        if split == "in":
            task_strips(strips, model, pairs, device)
    print(f"\nPSNR in dB and SSIM on 8-bit RGB, 4 border pixels cut, {args.weights} weights, true task given. "
          f"Picture: {strips}")


def main(argv=None):
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
