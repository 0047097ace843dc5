"""What tests/bench.py compares with must be right too: the classical methods, the study's commands."""
from types import SimpleNamespace

import pytest
import torch

import bench
import degrade
import mioir
import train
from eval import psnr, validation_pairs


def test_classical_methods_do_what_they_are_for():
    """On a picture of smooth shapes each beats its input."""
    scene = degrade.dead_leaves(96, 128, degrade.seeded("bench", 0))
    truth = (degrade.gaussian_blur(scene[0], 7, 1.0), scene[1])
    pairs = validation_pairs([truth])
    for task in ("noise", "rain", "haze", "dark"):
        _, method, settings = bench.CLASSICAL[task]
        before = psnr(*map(degrade.to_image, pairs[task][0]))
        after, = bench.apply_classical(task, method, settings[len(settings) // 2], pairs[task], bench.sigmas([truth]))
        assert after > before + 0.5, task


def test_a_wiener_filter_undoes_its_own_blur():
    smooth = degrade.gaussian_blur(torch.rand(1, 3, 64, 64, generator=degrade.seeded("wiener")), 21, 2.0)
    blurred = bench.wiener(smooth, 1.0, 0.0)                    # without noise: the inverse, then blurred again
    kernel = torch.exp(-0.5 * torch.arange(-10, 11.0) ** 2)
    kernel = (kernel / kernel.sum())[:, None] * (kernel / kernel.sum())[None]
    again = torch.nn.functional.conv2d(blurred.transpose(0, 1), kernel[None, None], padding=10).transpose(0, 1)
    assert (again - smooth)[..., 16:-16, 16:-16].abs().max() < 2e-2


def test_a_bilateral_and_a_guided_filter_keep_edges():
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1
    noisy = step + 0.05 * torch.randn(step.shape, generator=degrade.seeded("edge"))
    for smoothed in (bench.bilateral(noisy, 2.0, 0.2), bench.guided(noisy, noisy, 4, 0.02)):
        error = (smoothed - step).abs()
        assert error.mean() < 0.6 * (noisy - step).abs().mean() and error[..., 14:18].mean() < 0.08


@pytest.mark.parametrize("name", bench.STUDY)
def test_the_studys_commands_are_sequential_or_mixed_with_equal_iterations(name):
    args = train.parse(["--arch", "srresnet", "--preset", "study", *bench.STUDY[name][0].split()])
    plan = train.stages(args.arch, args.seq, args.order, args.recipe["period"])
    assert sum(stage.iterations for stage in plan) == 600 and (len(plan) == 7) == ("S" in name)
    assert (args.prompt or "").upper() == name.split(",")[0].partition("+")[2]


def test_live_tensors_counts_what_lives_at_the_same_time():
    x = torch.zeros(1000, device="meta")
    with bench.LiveTensors([x]) as tensors:
        a = x + 1                                                       # one tensor of 4000 bytes
        a.view(10, 100).mul_(2)                                         # none: a view, in place
        b = a + 1                                                       # two
        del a
        b.sin().cos()                                                   # three at once, were a still there
    assert tensors.peak == 3 * 4000 and tensors.bytes == 4000


@pytest.mark.parametrize("arch, least, most", [("restormer", 0.7, 0.25), ("uformer", 0.9, 0.25),
                                               ("srresnet", 0.9, 0.25)])
def test_checkpointing_leaves_a_fraction_of_the_memory(arch, least, most):
    args, meta = SimpleNamespace(batch=1, size=128), torch.device("meta")
    ours, theirs = bench.pair(arch, meta)
    published, plain = (bench.step_memory(model, args, meta) for model in (theirs, ours))
    train.recompute_blocks(ours)
    assert least * published < plain < 1.01 * published
    assert bench.step_memory(ours, args, meta) < most * published
