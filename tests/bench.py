"""Speed and memory, measured; not a test. What is compared is interleaved inside one run.

    python tests/bench.py networks                   # ours against the published layers, by time
    python tests/bench.py networks --arch swinir --size 128 --threads 1
    python tests/bench.py memory                     # ... by the memory of a training step
    python tests/bench.py ablation                   # what each of our tricks is worth alone
    python tests/bench.py gpu                        # it/s, memory, data, PSNR; within 8 minutes
    python tests/bench.py graphs                     # torch.export of all fourteen; ONNX
    python tests/bench.py data                       # crops/s from PNG files and from the cache
    python tests/bench.py pixels                     # seconds per megapixel of the paper's sizes
    python tests/bench.py tiles RUN/last.pt ...      # what tiles change, for trained models
    python tests/bench.py classical assets/restormer.pt --tune DIR --images DIR   # see classical.py
    python tests/bench.py study --images DIR         # the paper in miniature: see study.py

"Theirs" is tests/published.py: the published layers as they stand, sharing no code with ours.
It gets our weights by their published names, and its outputs must agree to 1e-4.
"""
import argparse
import contextlib
import copy
import functools
import gc
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import classical  # noqa: E402
import degrade  # noqa: E402
import mioir  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402
from eval import markdown, psnr, restored, tune_cpu, validation_pairs  # noqa: E402
from mioir import ARCHS, TASKS, build_model, restore  # noqa: E402
from published import Published  # noqa: E402
from train import recompute_blocks  # noqa: E402


# ---- Ours and theirs -----------------------------------------------------------------------------

def by_published_names(arch, model, tensors):
    """mioir's, without the prompt images, which have no published name."""
    renamed = mioir.by_published_names(arch, model, tensors)
    renamed.pop("prompts", None)
    return renamed


def pair(arch, device, small=False):
    """Our network and the published one with equal weights, both with explicit prompts."""
    prompt = None if arch == "promptir" else "ep"
    torch.manual_seed(0)
    ours = build_model(arch, prompt, **train.SMALL[arch] if small else {}).to(device)
    state = by_published_names(arch, ours, ours.state_dict())
    theirs = Published(arch, state, ours.prompts if prompt else None)
    return ours, theirs


def agreement(ours, theirs, x, task):
    """Largest difference of the outputs, as a share of the largest output."""
    a, b = restoring(ours, x, task), restoring(theirs, x, task)
    return ((a - b).abs().max() / b.abs().max()).item()


def refuse_disagreement(what, difference):
    """Times of networks that compute different things would mean nothing."""
    if difference > 1e-4:
        sys.exit(f"bench.py: {what} gives other outputs, by {difference:.1e} of the largest")


PHOTO = 256        # edge of the photo whose restoring is timed


# ---- Clocks --------------------------------------------------------------------------------------

def where(device):
    """The machine in words: processor, its matrix units, threads, torch."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    flags = set(text.split())
    units = [unit for unit in ("amx_tile", "avx512_bf16", "avx512_vnni") if unit in flags]
    words = [name[1] if name else "unnamed processor",
             f"matrix units: {' '.join(units) or 'none'}",
             f"{torch.get_num_threads()} of {os.cpu_count()} threads",
             f"torch {torch.__version__}"]
    if device.type == "cuda":
        words.insert(0, torch.cuda.get_device_name(device))
    return "; ".join(words)


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device):
    """How long a function takes."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def medians(works, repeat, device):
    """{name: function} -> {name: median of its seconds}. All run in turn, `repeat` times; a turn
    before that, in which libraries and caches warm up, is not counted."""
    times = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            took = seconds(work, device)
            if turn > 0:
                times[name].append(took)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def forward_backward(model, x, task):
    (model.train()(x, task) - x).abs().mean().backward()


def training_step(model, x, task):
    model.zero_grad(set_to_none=True)
    forward_backward(model, x, task)


@torch.no_grad()
def restoring(model, x, task):
    return model.eval()(x, task)


def crops_and_photo(args, device):
    """What networks are timed on: a batch of crops with their tasks, and a photo."""
    batch = args.batch or 1
    crops = torch.rand(batch, 3, args.size, args.size, device=device)
    tasks = torch.arange(batch, device=device) % len(TASKS)
    return crops, tasks, torch.rand(1, 3, PHOTO, PHOTO, device=device)


def side_by_side(a, b):
    """The three cells of a comparison: seconds of the one, of the other, their ratio."""
    return [f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}"]


# ---- networks: ours against the published layers -------------------------------------------------

def networks(args, device):
    rows = []
    for arch in args.arch:
        ours, theirs = pair(arch, device, args.small)
        crops, tasks, photo = crops_and_photo(args, device)
        difference = agreement(ours, theirs, crops, tasks)
        refuse_disagreement(arch, difference)
        row = [arch, f"{difference:.0e}"]
        for work, x, task in ((training_step, crops, tasks), (restoring, photo, tasks[:1])):
            times = medians({"ours": functools.partial(work, ours, x, task),
                             "theirs": functools.partial(work, theirs, x, task)},
                            args.repeat, device)
            row += side_by_side(times["ours"], times["theirs"])
        rows.append(row)
        print(row, flush=True)
    print(markdown(["", "differ by", "train s, ours", "theirs", "ratio",
                    f"restore {PHOTO} s, ours", "theirs", "ratio"], rows))


# ---- ablation: one piece of ours in its plain form -----------------------------------------------

class NormalisedBefore(mioir.ChannelAttention):
    """q and k get length 1 at full size, before their product, as the paper writes it."""
    def forward(self, f):
        n, c, h, w = f.shape
        qkv = self.dwconv(self.qkv(f)).reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = (q @ k.mT) * self.temperature
        return self.project((scores.softmax(-1) @ v).reshape(n, c, h, w))


class NormByHand(torch.nn.LayerNorm):
    """Mean and variance written out: some passes over the map, where torch has one kernel."""
    def forward(self, t):
        mean = t.mean(-1, keepdim=True)
        variance = t.var(-1, keepdim=True, unbiased=False)
        return (t - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


class AllWindowsAtOnce(mioir.WindowAttention):
    """The scores of all windows together, which do not fit a CPU's cache."""
    def forward(self, t, mask=None):
        return self.attend(t, self.bias_table[self.index].permute(2, 0, 1), mask)


class PointwiseAsProducts(torch.nn.Conv2d):
    """1 x 1 convolutions as matrix products over the channels."""
    def forward(self, f):
        return F.linear(f.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class HiddenPadded(mioir.GatedFeedForward):
    """Hidden channels filled up with zeros to a multiple of 8, as 127 to 128: whole vectors."""
    def forward(self, f):
        hidden = self.project_out.weight.shape[1]
        rest = -hidden % 8

        def padded(weight):                            # each half of project_in's, and of dwconv's
            return torch.cat([F.pad(half, (0, 0, 0, 0, 0, 0, 0, rest)) for half in weight.chunk(2)])
        f = F.conv2d(f, padded(self.project_in.weight))
        f = F.conv2d(f, padded(self.dwconv.weight), padding=1, groups=2 * (hidden + rest))
        gate, value = f.chunk(2, dim=1)
        return F.conv2d(F.gelu(gate) * value, F.pad(self.project_out.weight, (0, 0, 0, 0, 0, rest)))


# (the trick, the variant that has it, the variant that lacks it)
TRICKS = (
    ("late normalisation of q and k", "ours", "NormalisedBefore"),
    ("layer norm's kernel", "ours", "NormByHand"),
    ("window chunks", "ours", "AllWindowsAtOnce"),
    ("denormals become zeros", "ours", "denormals stay"),
    # Those that a run may ask for.
    ("--checkpointing", "checkpointing", "ours"),
    ("torch.compile", "compiled", "ours"),
    # Tried, and not in the code.
    ("1 x 1 convolutions as products", "PointwiseAsProducts", "ours"),
    ("hidden channels padded to 8", "HiddenPadded", "ours"),
    ("inference_mode, not no_grad", "inference mode", "ours"),
)


def with_plain(model, plain):
    """A copy of the model with plain in place of its parent class (of convolutions: where they are
    1 x 1); None if there is none of it."""
    model, found = copy.deepcopy(model), False
    for module in model.modules():
        if type(module) is plain.__base__ and getattr(module, "kernel_size", (1, 1)) == (1, 1):
            module.__class__ = plain
            found = True
    return model if found else None


def variants(ours, compiled):
    """{name: our model, changed in one thing}, as named in TRICKS."""
    made = {"ours": ours}
    for plain in (NormalisedBefore, NormByHand, AllWindowsAtOnce, PointwiseAsProducts,
                  HiddenPadded):
        changed = with_plain(ours, plain)
        if changed is not None:
            made[plain.__name__] = changed
    made["checkpointing"] = copy.deepcopy(ours)
    recompute_blocks(made["checkpointing"])
    made["denormals stay"] = made["inference mode"] = ours
    if compiled:
        made["compiled"] = torch.compile(copy.deepcopy(ours))
    return made


def run_variant(name, work, model, x, task):
    """The switch for denormals is the calling thread's alone: believe its row with --threads 1."""
    torch.set_flush_denormal(name != "denormals stay")
    with torch.inference_mode(name == "inference mode" and work is restoring):
        work(model, x, task)
    torch.set_flush_denormal(True)


def time_variants(models, work, x, task, repeat, device):
    """{variant: median seconds}, all variants of a model interleaved."""
    works = {name: functools.partial(run_variant, name, work, model, x, task)
             for name, model in models.items()}
    return medians(works, repeat, device)


def ablation(args, device):
    rows = []
    for arch in args.arch:
        ours, _ = pair(arch, device, args.small)
        crops, tasks, photo = crops_and_photo(args, device)
        models = variants(ours, args.compile)
        for name, model in models.items():
            refuse_disagreement(f"{arch}, {name}", agreement(model, ours, crops, tasks))
        training = time_variants(models, training_step, crops, tasks, args.repeat, device)
        restored_photo = time_variants(models, restoring, photo, tasks[:1], args.repeat, device)
        for trick, having, lacking in TRICKS:
            if having not in models or lacking not in models:
                continue                               # SRResNet has no layer norm, for instance
            row = [arch, trick, *side_by_side(training[having], training[lacking])]
            if having == "checkpointing":              # of training alone
                row += ["-", "-", "-"]
            else:
                row += side_by_side(restored_photo[having], restored_photo[lacking])
            rows.append(row)
            print(row, flush=True)
    print(markdown(["", "trick", "train s, with it", "without", "ratio",
                    f"restore {PHOTO} s, with it", "without", "ratio"], rows))


# ---- memory: what lives at the same time ---------------------------------------------------------

class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside `with` that live at the same time; `peak`: the
    most. known: tensors that were there before, which are not counted."""

    def __init__(self, known):
        super().__init__()
        self.live = {t.untyped_storage()._cdata: 0 for t in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.live:                       # else a view, or in place
            self.live[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.bytes -= self.live.pop(key)


def step_memory(model, batch, size, device):
    """GB per sample that a training step needs beside the model and its gradients. A GPU counts it
    itself; else it is counted on torch's meta device, where tensors have sizes but no content:
    exact, and over in seconds."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.rand(batch, 3, size, size, device=device)
    task = torch.arange(batch) % len(TASKS)            # numbers, which a meta tensor has none of
    if device.type == "cuda":
        task = task.to(device)
        forward_backward(model, x, task)               # libraries take their own share first
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(model, x, task)
        return (torch.cuda.max_memory_allocated() - before) / batch / 1e9
    known = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    with LiveTensors(known) as live:
        forward_backward(model, x, task)
    return live.peak / batch / 1e9


def memory(args, device):
    rows, batch = [], args.batch or 1
    device = device if device.type == "cuda" else torch.device("meta")
    for arch in args.arch:
        ours, theirs = pair(arch, device, args.small)
        published = step_memory(theirs, batch, args.size, device)
        plain = step_memory(ours, batch, args.size, device)
        recompute_blocks(ours)
        recomputed = step_memory(ours, batch, args.size, device)
        rows.append([arch, f"{published:.3f}", f"{plain:.3f}", f"{recomputed:.3f}",
                     plain / published, recomputed / published])
    print(markdown(["GB per sample", "theirs", "ours", "--checkpointing", "ours / theirs",
                    "checkpointing / theirs"], rows))


# ---- gpu: the whole of training on this device, in minutes ---------------------------------------

PUBLISHED = "published, fp32"
COLUMNS = {    # how a network is trained: flags of train.py; the last takes minutes to compile
    PUBLISHED: [],
    "fp32": ["--precision", "fp32"],
    "tf32": ["--precision", "tf32"],
    "bf16": ["--precision", "bf16"],
    "bf16, compiled": ["--precision", "bf16", "--compile"],
}
NOT_RUN = "not run"


class OutOfTime(Exception):
    """What is measured took longer than it may."""


def out_of_time(number, frame):
    raise OutOfTime


def attempt(work, limit):
    """What work() returns, or in words why there is nothing; interrupted after `limit` seconds."""
    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit, 5)     # and again, should someone swallow the first
    try:
        return work()
    except torch.OutOfMemoryError:
        return "out of memory"
    except (Exception, SystemExit) as error:           # the others have their turn all the same
        if isinstance(error, OutOfTime) or time.monotonic() - start > limit:
            return f"{NOT_RUN}: over {limit:.0f} s"    # a compiler may have wrapped the exception
        text = str(error).splitlines() or [type(error).__name__]
        return f"{NOT_RUN}: {text[0][:60]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seconds_for(remaining, end):
    """How long the next of `remaining` measurements may take: its share, or a minute if there is
    one, as most are done in a few seconds."""
    left = max(end - time.monotonic(), 1)
    return min(left, max(60, left / remaining))


def settings_of(arch, flags, args, device):
    """The command line of train.py for this network, and its batch and crop."""
    prompt = [] if arch == "promptir" else ["--prompt", "ep"]
    preset = "smoke" if args.small else "paper"
    settings = train.parse(["--arch", arch, "--preset", preset, "--device", device.type,
                            *prompt, *flags])
    batch = args.batch or train.RECIPES[arch]["batch"]
    multiple = 128 if arch == "uformer" else 8
    crop = -(-args.size // multiple) * multiple
    return settings, batch, crop


def random_batch(batch, crop, device):
    """lq, gt, task as train.make_batch gives them; what they show costs no time."""
    lq, gt = torch.rand(2, batch, 3, crop, crop, device=device)
    return lq, gt, torch.arange(batch, device=device) % len(TASKS)


def our_iteration(arch, flags, args, device):
    """train.iterate as a function, but for the degrading; it returns the seconds that were spent in
    waiting for the device. And the batch."""
    settings, batch, crop = settings_of(arch, flags, args, device)
    torch.backends.cudnn.benchmark = False
    machine = train.Machine(settings)
    run = train.Run(settings, machine.device)
    run.recipe.update(batch=batch, crop=crop)
    net = machine.wrap(run.model).train()
    draws = torch.rand(batch, len(train.drop_paths(run.model)), device=device)
    ready = (*random_batch(batch, crop, device), draws)
    waited = []

    def timed_sums(x):
        start = time.perf_counter()
        numbers = train.Machine.sums(machine, x)
        waited.append(time.perf_counter() - start)
        return numbers
    machine.sums = timed_sums

    def iteration():
        with mock.patch.object(train, "make_batch", lambda *what: ready):
            train.iterate(run, net, [(range(batch), None)], machine, run.recipe["lr"], False)
        return waited[-1]
    return iteration, batch


def their_iteration(arch, args, device):
    """The same with the published layers, the way BasicSR's loop does it."""
    settings, batch, crop = settings_of(arch, [], args, device)
    machine, recipe = train.Machine(settings), settings.recipe
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    _, net = pair(arch, device, args.small)
    optimizer = getattr(torch.optim, recipe["optimizer"])(
        net.parameters(), recipe["lr"], recipe["betas"], weight_decay=recipe["weight_decay"])
    ema = [p.detach().clone() for p in net.parameters()]
    lq, gt, task = random_batch(batch, crop, device)

    def iteration():
        optimizer.zero_grad(set_to_none=True)
        (net.train()(lq, task) - gt).abs().mean().backward()
        optimizer.step()
        for average, p in zip(ema, net.parameters()):
            average.mul_(recipe["ema"]).add_(p.detach(), alpha=1 - recipe["ema"])
        return float("nan")                            # it reads nothing, so waits for nothing
    return iteration, batch


def measure_cell(arch, column, args, device):
    """A cell of the table: how fast, and how much memory at most. A few seconds, no more."""
    if column == PUBLISHED:
        iteration, batch = their_iteration(arch, args, device)
    else:
        iteration, batch = our_iteration(arch, COLUMNS[column], args, device)
    on_gpu = device.type == "cuda"
    for _ in range(3 if on_gpu else 1):
        iteration()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    count, took, waits = 0, 0.0, []
    while count < (20 if on_gpu else 3) and took < 3:
        took += seconds(lambda: waits.append(iteration()), device)
        count += 1
    rate, share = count / took, sum(waits[-count:]) / took
    waiting = "" if math.isnan(share) else f", {share:.0%} of it waiting"
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if on_gpu else f"GB {NOT_RUN}"
    return f"{rate:.2f} it/s, {rate * batch:.1f} images/s, {peak}{waiting}"


def swinir_memory(args, device):
    """Rows: the peak of memory of SwinIR, the largest of the five, at the paper's batch."""
    rows = []
    for flags in ([], ["--checkpointing"]):
        iteration, batch = our_iteration("swinir", flags, args, device)
        iteration()
        torch.cuda.reset_peak_memory_stats()
        iteration()
        rows.append([f"batch {batch} {' '.join(flags)}",
                     f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"])
    return rows


def cell(arch, column, args, device, limit):
    """measure_cell, or why there is no number."""
    compiled, on_cpu = "--compile" in COLUMNS[column], device.type == "cpu"
    if on_cpu and (column == "tf32" or compiled and not args.compile):
        return NOT_RUN
    text = attempt(functools.partial(measure_cell, arch, column, args, device), limit)
    if compiled:
        torch.compiler.reset()
    gc.collect()                                       # the network, before the next one is made
    if not on_cpu:
        torch.cuda.empty_cache()
    return text


def data_rates(args, device):
    """Rows: images/s that the loader prepares (beside a GPU 8 processes), that are degraded."""
    leaves = "2" if args.small else "8"
    settings, batch, crop = settings_of("srresnet", ["--leaves", leaves], args, device)
    with tempfile.TemporaryDirectory() as folder:
        settings.out = folder
        source = train.open_images(settings, io.StringIO().write)
        machine, run = train.Machine(settings), train.Run(settings, device)
        run.recipe.update(batch=batch, crop=crop)
        loader = train.batches(run, source, machine)
        (_, part), = next(loader)[1]                   # the first one waits for the processes
        count, start = 0, time.perf_counter()
        for _, parts in loader:
            (_, part), = parts
            count += batch
            if count >= 50 * batch or time.perf_counter() - start > 5:
                break
        loaded = count / (time.perf_counter() - start)
        loader.close()
    degrading = functools.partial(train.make_batch, part, crop, device)
    took = medians({"degrade": degrading}, 10, device)["degrade"]
    return [[f"crops of {crop} prepared by the loader", f"{loaded:.0f}"],
            ["degraded on the device", f"{batch / took:.0f}"]]


def short_training(precision, args, device, folder):
    """Mean PSNR over the tasks after some iterations of train.py: a small SRResNet, dead leaves."""
    out = Path(folder) / precision
    preset, leaves = ("smoke", "2") if args.small else ("demo", "16")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--arch", "srresnet", "--prompt", "ep",
                    "--preset", preset, "--leaves", leaves,
                    "--period", str(args.iterations // 10),
                    "--precision", precision, "--device", device.type,
                    "--out", str(out), "--cache", str(Path(folder) / "cache")])
    table = torch.load(out / "last.pt", weights_only=True)["table"]
    return [float(np.mean(list(scores.values()))) for _, scores in table]


def quality_rows(args, device):
    """Rows: PSNR after the short training in each precision, beside the input's."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            before, after = short_training(precision, args, device, folder)
            rows.append([precision, before, after])
    return rows


def gpu_report(args, device, cells, rates, quality, swinir):
    """The Markdown that `gpu` writes, with what is measured so far."""
    def table(header, rows):
        if isinstance(rows, str):                      # why there are none
            rows = [["", *[rows] * (len(header) - 1)]]
        return markdown(header, rows)

    rows = []
    for arch in args.arch:
        rows.append([arch, *(cells.get((arch, column), NOT_RUN) for column in COLUMNS)])
    batch, small = args.batch or "the paper's", ", train.py's small sizes" if args.small else ""
    return "\n".join([
        "# Training on this machine", "",
        f"{where(device)}; {time.strftime('%d %B %Y')}; `python tests/bench.py {args.command}`", "",
        f"A training iteration (forward, L1, backward, optimiser, EMA): crops of {args.size} "
        f"(Uformer: a multiple of 128), batch: {batch}{small}; the peak of memory; the share of the "
        "time in which the processor waits for the device, that is, has nothing more to prepare:", "",
        table(["", *COLUMNS], rows), "",
        table(["SwinIR, fp32", "GB at most"], swinir), "",
        table(["the data path", "images/s"], rates), "",
        f"After {args.iterations} iterations of a small SRResNet with explicit prompts on dead "
        "leaves (train.py), mean over the seven tasks:", "",
        table(["", "PSNR of the input, dB", "restored"], quality), ""])


def gpu(args, device):
    """What has to be compiled comes last, and can take what time is left."""
    args.iterations -= args.iterations % 10            # the schedule has ten equal periods
    out, end = Path(args.out or "runs/gpu.md"), time.monotonic() + 60 * args.minutes
    out.parent.mkdir(parents=True, exist_ok=True)
    cells, rates, quality, swinir = {}, NOT_RUN, NOT_RUN, NOT_RUN
    *quick, compiled = COLUMNS

    def fill(columns):
        todo = [(arch, column) for column in columns for arch in args.arch]
        for done, (arch, column) in enumerate(todo):
            limit = seconds_for(len(todo) - done, end)
            cells[arch, column] = cell(arch, column, args, device, limit)
            print(f"{arch}, {column}: {cells[arch, column]}", flush=True)
            out.write_text(gpu_report(args, device, cells, rates, quality, swinir))

    fill(quick)
    if device.type == "cuda":
        swinir = attempt(functools.partial(swinir_memory, args, device), seconds_for(3, end))
    rates = attempt(functools.partial(data_rates, args, device), seconds_for(2, end))
    quality = attempt(functools.partial(quality_rows, args, device), seconds_for(1, end))
    fill([compiled])
    print(out.read_text())


# ---- graphs: torch.export with free height and width ---------------------------------------------

VARIANTS = [(arch, prompt) for arch in ARCHS if arch != "promptir" for prompt in (None, "ep", "ap")]
VARIANTS += [("promptir", None), ("classifier", None)]


def small_variant(arch, prompt):
    """(model, task, the multiple that its sides must have) of train.py's small size."""
    torch.manual_seed(0)
    if arch == "classifier":
        return mioir.TaskClassifier(16).eval(), (), 1
    model = build_model(arch, prompt, **train.SMALL[arch]).eval()
    task = torch.tensor([1]) if prompt == "ep" else None
    multiple = 8 if isinstance(model, mioir.Restormer) else model.multiple     # 64 is the protocol's
    return model, (task,), multiple


def sides(multiple, rows, columns):
    """A picture of so many multiples; where any side is right, of odd ones."""
    if multiple == 1:
        return torch.rand(1, 3, 8 * rows + 1, 8 * columns + 3)
    return torch.rand(1, 3, multiple * rows, multiple * columns)


def export_free(model, rest, multiple):
    """The model as a graph whose height and width are free, but for the multiple. A first size of
    one multiple would be taken for a constant; the classifier needs 18 pixels, two of its blocks."""
    h, w = (torch.export.Dim(name, min=18 // multiple or 1, max=4096) for name in "hw")
    free = [{2: h if multiple == 1 else multiple * h, 3: w if multiple == 1 else multiple * w}]
    free += [None for _ in rest]
    return torch.export.export(model, (sides(multiple, 3, 5), *rest), dynamic_shapes=tuple(free))


@torch.no_grad()
def error_elsewhere(graph, model, rest, multiple):
    """Largest difference on another size, as a share of the largest output."""
    x = sides(multiple, 4, 3)
    y = model(x, *rest)
    return ((graph(x, *rest) - y).abs().max() / y.abs().max()).item()


def write_onnx():
    """A file of the plainest model by torch's older exporter. (dynamo=True needs onnxscript.)"""
    model, rest, multiple = small_variant("srresnet", None)
    torch.onnx.export(model, (sides(multiple, 3, 5), *rest), io.BytesIO(), dynamo=False)
    return "yes"


def graphs(args, device):
    """All on the processor: a graph is the same for every device. Seconds are the processor's, so
    that what else runs does not count."""
    rows = []
    for arch, prompt in VARIANTS:
        if arch not in (*args.arch, "classifier"):
            continue
        model, rest, multiple = small_variant(arch, prompt)
        start = time.process_time()
        graph = attempt(functools.partial(export_free, model, rest, multiple), 300)
        took = time.process_time() - start
        right = graph                                  # the reason why there is none
        if not isinstance(graph, str):
            error = error_elsewhere(graph.module(), model, rest, multiple)
            right = "yes" if error < 1e-5 else f"differs by {error:.0e}"
        rows.append([f"{arch} {prompt or ''}", f"{took:.1f}", right])
        print(rows[-1], flush=True)
    print(markdown(["", "torch.export, s", "right on another size"], rows))
    print("ONNX by torch alone:", attempt(write_onnx, 60))


# ---- data: crops a second ------------------------------------------------------------------------

def write_photos(folder):
    """Four PNGs of 2040 x 1356, as DIV2K's: dead leaves enlarged, with a little noise."""
    folder.mkdir()
    files = []
    for k in range(4):
        image, _ = degrade.dead_leaves(678, 1020, degrade.seeded(k))
        image = degrade.add_noise(F.interpolate(image, scale_factor=2.0, mode="bicubic"), 2.0)
        files.append(folder / f"{k}.png")
        Image.fromarray(degrade.to_image(image)).save(files[-1])
    return files


def crops_from_files(files, count):
    for k in range(count):
        degrade.read_image(files[k % 4])[100:276, 200:376].copy()


def crops_from_cache(cache, count):
    for k in range(count):
        cache.crop(k % 4, (37 * k) % 1000, (53 * k) % 1800, 176)


def data(args, device):
    """How fast the cache is, then what each task costs to draw and to degrade."""
    cpu, count = torch.device("cpu"), args.crops
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder) / "photos")
        cache = degrade.ImageCache(Path(folder) / "cache", degrade.photo_items([files[0].parent]),
                                   128, io.StringIO().write)
        png = 8 / seconds(functools.partial(crops_from_files, files, 8), cpu)
        cached = 2000 / seconds(functools.partial(crops_from_cache, cache, 2000), cpu)
        print(f"crops of 176 from 2040 x 1356 images: {png:.1f}/s from PNG, "
              f"{cached:.0f}/s from the cache, {cached / png:.0f} times as many")
        rows = []
        for tasks in (*((task,) for task in TASKS), TASKS):
            start = time.perf_counter()
            part = train.Part([train.sample({"photos": cache}, tasks, 128, count, (0, 0, 0, i))
                               for i in range(count)])
            drawing = time.perf_counter() - start
            degrading = seconds(functools.partial(train.make_batch, part, 128, device), device)
            rows.append(["all seven" if len(tasks) > 1 else tasks[0], f"{count / drawing:.0f}",
                         f"{count / degrading:.0f}", f"{count / (drawing + degrading):.0f}"])
    print(markdown([f"crops/s of 128 x 128, batch of {count}", "drawn", "degraded", "both"], rows))


# ---- pixels and tiles ----------------------------------------------------------------------------

def pixels(args, device):
    """How long the paper's sizes take for a megapixel, by one of 512 x 512 (a tile of eval.py)."""
    rows = []
    for arch in args.arch:
        model = build_model(arch, None if arch == "promptir" else "ep").to(device).eval()
        task = torch.zeros(1, dtype=torch.long, device=device)
        x = torch.rand(1, 3, 512, 512, device=device)
        took = seconds(functools.partial(restore, model, x, task), device)
        rows.append([arch, f"{took * 2 ** 20 / 512 ** 2:.0f}"])
        print(rows[-1], flush=True)
    print(markdown(["paper's size", "s per megapixel"], rows))


def tiles(args, device):
    """Each model restores the same images whole and in tiles; PSNR between the two, and of each to
    the truth."""
    images = [degrade.dead_leaves(768, 1024, degrade.seeded("tiles", k)) for k in range(2)]
    rows, pairs = [], validation_pairs(images)
    for path in args.checkpoints:
        model, info = mioir.load_model(path, device=device)
        for task in ("noise", "rain", "haze"):
            scores = []
            for lq, gt in pairs[task]:
                whole, tiled = (restored(model, lq, task, device, tile) for tile in (0, 512))
                gt = degrade.to_image(gt)
                scores.append((min(psnr(tiled, whole), 99.0), psnr(whole, gt), psnr(tiled, gt)))
            between, of_whole, of_tiled = np.mean(scores, 0)
            rows.append([f"{info['arch']} {info['prompt'] or ''}", task, f"{between:.1f}",
                         f"{of_whole:.2f}", f"{of_tiled:.2f}", f"{of_tiled - of_whole:+.3f}"])
            print(rows[-1], flush=True)
    print(markdown(["1024 x 768, tiles of 512", "images", "tiled to whole, dB", "whole to truth",
                    "tiled to truth", "difference"], rows))


# ---- The command line ----------------------------------------------------------------------------

COMMANDS = {"networks": networks, "memory": memory, "ablation": ablation, "gpu": gpu,
            "graphs": graphs, "data": data, "pixels": pixels, "tiles": tiles,
            "classical": classical.compare, "study": study.run}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=tuple(COMMANDS))
    add("checkpoints", nargs="*", help="for tiles and classical")
    add("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    add("--size", type=int, default=128, help="edge of the training crop")
    add("--batch", type=int, help="default: 1; for gpu the paper's")
    add("--small", action="store_true", help="networks of train.py's small sizes: to try the bench")
    add("--repeat", type=int, default=5, help="networks, ablation: of which the median counts")
    add("--threads", type=int, help="of the processor (default: torch's choice)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="gpu: compile on a processor too; ablation: "
        "torch.compile has a row, minutes for each network")
    add("--minutes", type=float, default=7, help="gpu: when to stop, but for what has begun")
    add("--iterations", type=int, default=60, help="gpu: of the short training, a multiple of 10")
    add("--crops", type=int, default=128, help="data: crops in a batch")
    add("--tune", help="classical: photos to choose the strengths on")
    add("--images", help="classical: photos to compare on; study: to train on")
    add("--out", help="gpu: the file (runs/gpu.md); study: the folder (runs/study)")
    add("--jobs", type=int, default=os.cpu_count(), help="study: trainings at a time")
    add("--report", action="store_true", help="study: no training, the tables of what is there")
    args = parser.parse_args(argv)
    args.command = " ".join(argv or sys.argv[1:])
    return args


def main(argv=None):
    args = parse(argv)
    tune_cpu()                                         # as train.py and eval.py do: for both
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(where(device))
    COMMANDS[args.what](args, device)


if __name__ == "__main__":
    main()
