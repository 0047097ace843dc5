"""What tests/bench.py compares with must be right too: swaps, counters, classical methods."""
import json

import pytest
import torch
from PIL import Image

import bench
import classical
import degrade
import mioir
import study
import train
from eval import psnr, validation_pairs
from test_models import small


# ---- Ours against the published layers -----------------------------------------------------------

def test_networks_compares_at_equal_outputs(capsys, monkeypatch):
    monkeypatch.setattr(bench, "PHOTO", 64)
    bench.main("networks --small --size 32 --repeat 1 --arch srresnet --device cpu".split())
    first, *_, row = capsys.readouterr().out.strip().splitlines()
    assert "matrix units" in first and f"torch {torch.__version__}" in first
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "srresnet" and float(cells[1]) < 1e-4
    assert all(float(cell) > 0 for cell in cells[2:])


def test_networks_refuses_to_time_what_computes_something_else():
    ours, theirs = bench.pair("srresnet", torch.device("cpu"), small=True)
    theirs.w["prompt_shift3.bias"].data.add_(1)
    difference = bench.agreement(ours, theirs, torch.rand(1, 3, 16, 16), torch.tensor([2]))
    with pytest.raises(SystemExit, match="other outputs"):
        bench.refuse_disagreement("srresnet", difference)


def test_medians_interleave_and_leave_out_the_first_turn():
    calls = []
    times = bench.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2,
                          torch.device("cpu"))
    assert calls == ["a", "b"] * 3 and times.keys() == {"a", "b"}


@pytest.mark.parametrize("arch, plain", [("restormer", bench.NormalisedBefore),
                                         ("restormer", bench.NormByHand),
                                         ("swinir", bench.NormByHand),
                                         ("swinir", bench.AllWindowsAtOnce)])
def test_a_plain_form_changes_one_piece_and_no_output(arch, plain):
    ours = small(arch)
    changed = bench.with_plain(ours, plain)
    kinds = [(type(a), type(b)) for a, b in zip(ours.modules(), changed.modules())]
    assert (plain.__base__, plain) in kinds
    assert all(b in (a, plain) for a, b in kinds) and plain not in {a for a, _ in kinds}
    difference = bench.agreement(changed, ours, torch.rand(1, 3, 32, 32), None)
    assert difference < 1e-5


def test_a_trick_that_a_network_lacks_is_left_out():
    assert bench.with_plain(small("srresnet"), bench.NormByHand) is None


def test_ablation_has_a_row_for_every_trick_of_a_network(capsys, monkeypatch):
    monkeypatch.setattr(bench, "PHOTO", 64)
    bench.main("ablation --small --size 16 --repeat 1 --arch srresnet --device cpu".split())
    table = capsys.readouterr().out
    for trick in ("--checkpointing", "denormals become zeros"):
        assert f" {trick} |" in table
    assert "window chunks |" not in table


# ---- Memory --------------------------------------------------------------------------------------

def test_live_tensors_counts_what_lives_at_the_same_time():
    x = torch.zeros(1000, device="meta")
    with bench.LiveTensors([x]) as tensors:
        a = x + 1                                      # one tensor of 4000 bytes
        a.view(10, 100).mul_(2)                        # none: a view, in place
        b = a + 1                                      # two
        del a
        b.sin().cos()                                  # three at once, were a still there
    assert tensors.peak == 3 * 4000 and tensors.bytes == 4000


@pytest.mark.parametrize("arch, least, most", [("restormer", 0.7, 0.25), ("uformer", 0.9, 0.25),
                                               ("srresnet", 0.9, 0.25)])
def test_checkpointing_leaves_a_fraction_of_the_memory(arch, least, most):
    meta = torch.device("meta")
    ours, theirs = bench.pair(arch, meta)
    published = bench.step_memory(theirs, 1, 128, meta)
    plain = bench.step_memory(ours, 1, 128, meta)
    train.recompute_blocks(ours)
    recomputed = bench.step_memory(ours, 1, 128, meta)
    assert least * published < plain < 1.01 * published
    assert recomputed < most * published


# ---- One command for a GPU, tried on the processor -----------------------------------------------

def test_the_gpu_table_is_written_on_a_cpu_too(tmp_path, capsys, tiny):
    """Two networks of train.py's small sizes: what a GPU alone can do is said to be not run."""
    out = tmp_path / "gpu.md"
    bench.main(["gpu", "--small", "--size", "32", "--batch", "1", "--device", "cpu",
                "--arch", "srresnet", "restormer", "--iterations", "10", "--out", str(out)])
    text = out.read_text()
    assert text in capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[first] = cells
    for arch in ("srresnet", "restormer"):
        published, fp32, tf32, bf16, compiled = rows[arch]
        assert all("images/s" in cell for cell in (published, fp32, bf16))
        assert tf32 == compiled == "not run"
    assert float(rows["crops of 32 prepared by the loader"][0]) > 0
    assert float(rows["degraded on the device"][0]) > 0
    assert all(10 < float(value) < 40 for value in rows["fp32"] + rows["bf16"])


def test_a_cell_that_fails_or_takes_too_long_leaves_the_others_their_turn():
    def never_ends():
        while True:
            pass

    def fails():
        raise RuntimeError("no such kernel\nlong story")

    def needs_more():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert bench.attempt(never_ends, 0.2) == "not run: over 0 s"
    assert bench.attempt(fails, 60) == "not run: no such kernel"
    assert bench.attempt(needs_more, 60) == "out of memory"
    assert bench.attempt(lambda: 7, 60) == 7


def test_all_cells_together_stay_within_the_minutes():
    """However long each of them would like to take."""
    clock, minutes = [0.0], 7

    def now():
        return clock[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.time, "monotonic", now)
        for remaining in range(25, 0, -1):
            clock[0] += bench.seconds_for(remaining, 60 * minutes)
    assert clock[0] <= 60 * minutes + 25


def test_uformer_gets_crops_that_it_can_take():
    args = bench.parse(["gpu", "--size", "32"])
    _, batch, crop = bench.settings_of("uformer", [], args, torch.device("cpu"))
    assert (batch, crop) == (8, 128)
    assert bench.settings_of("srresnet", [], args, torch.device("cpu"))[1:] == (16, 32)


# ---- Data ----------------------------------------------------------------------------------------

def test_data_times_every_task_and_all_of_them(capsys, monkeypatch):
    def two_small_photos(folder):
        folder.mkdir()
        files = [folder / f"{k}.png" for k in range(4)]
        for path in files:
            noise = torch.randint(256, (240, 240, 3), generator=degrade.seeded("photo"))
            bench.Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
        return files
    monkeypatch.setattr(bench, "write_photos", two_small_photos)
    monkeypatch.setattr(bench, "crops_from_cache", lambda cache, count: cache.crop(0, 0, 0, 176))
    bench.main("data --crops 7 --device cpu".split())
    table = capsys.readouterr().out
    assert all(f"| {name} " in table for name in (*mioir.TASKS, "all seven"))


# ---- Classical methods ---------------------------------------------------------------------------

def test_classical_methods_do_what_they_are_for():
    """On a picture of smooth shapes each beats its input."""
    scene = degrade.dead_leaves(96, 128, degrade.seeded("bench", 0))
    truth = (degrade.gaussian_blur(scene[0], 7, 1.0), scene[1])
    pairs, noise = validation_pairs([truth]), classical.sigmas([truth])
    for task in ("noise", "rain", "haze", "dark"):
        _, method, settings = classical.CLASSICAL[task]
        middle = settings[len(settings) // 2]
        before = psnr(*map(degrade.to_image, pairs[task][0]))
        after, = classical.apply_classical(task, method, middle, pairs[task], noise)
        assert after > before + 0.5, task


def test_a_wiener_filter_undoes_its_own_blur():
    sharp = torch.rand(1, 3, 64, 64, generator=degrade.seeded("wiener"))
    smooth = degrade.gaussian_blur(sharp, 21, 2.0)
    inverted = classical.wiener(smooth, 1.0, 0.0)      # without noise: the inverse, then blurred
    kernel = torch.exp(-0.5 * torch.arange(-10, 11.0) ** 2)
    kernel = kernel / kernel.sum()
    kernel = (kernel[:, None] * kernel[None])[None, None]
    again = torch.nn.functional.conv2d(inverted.transpose(0, 1), kernel, padding=10).transpose(0, 1)
    assert (again - smooth)[..., 16:-16, 16:-16].abs().max() < 2e-2


def test_a_bilateral_and_a_guided_filter_keep_edges():
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1
    noisy = step + 0.05 * torch.randn(step.shape, generator=degrade.seeded("edge"))
    for smoothed in (classical.bilateral(noisy, 2.0, 0.2),
                     classical.guided(noisy, noisy, 4, 0.02)):
        error = (smoothed - step).abs()
        assert error.mean() < 0.6 * (noisy - step).abs().mean()
        assert error[..., 14:18].mean() < 0.08


def test_the_classical_table_has_a_row_for_every_task(tmp_path, capsys, monkeypatch):
    for k in range(2):
        image, _ = degrade.dead_leaves(48, 56, degrade.seeded("classical", k))
        bench.Image.fromarray(degrade.to_image(image)).save(tmp_path / f"{k}.png")
    first_setting = {task: (name, method, settings[:1])
                     for task, (name, method, settings) in classical.CLASSICAL.items()}
    monkeypatch.setattr(classical, "CLASSICAL", first_setting)
    bench.main(["classical", "--tune", str(tmp_path), "--images", str(tmp_path)])
    table = capsys.readouterr().out
    assert all(f"| {task} " in table for task in mioir.TASKS) and "over 2 photos" in table


# ---- The study -----------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, variant, seed", study.jobs())
def test_the_studys_trainings_are_what_their_names_say_and_equally_long(arch, variant, seed):
    args = train.parse(study.flags_of(arch, variant, seed))
    assert (args.arch, args.seed, args.prompt or "") == (arch, seed, variant[2:].lower())
    schedule = train.schedule_of(args)
    assert sum(stage.iterations for stage in schedule) == 6000 and args.recipe["lr"] == 1e-3
    assert len(schedule) == (7 if variant[0] == "S" else 1)


def made_up(variant, seed):
    """A training's table: seed 1 starts 2 dB higher than seed 0, and S gains 0.5, 0.6 and 0.7 dB,
    M+EP one or loses one."""
    end = 20.0 + 2 * seed + (0.5 + 0.1 * seed) * (variant == "S")
    end += (-1) ** seed * (variant == "M+EP")
    return [[name, dict.fromkeys(mioir.TASKS, psnr)] for name, psnr in (("input", 19.5), ("end", end))]


def test_the_study_pairs_the_seeds_and_calls_each_claim(tmp_path, capsys, monkeypatch):
    """It trains what is missing alone, and its tables and picture are there."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")
    monkeypatch.setattr(study, "STUDY", {"srresnet": ((0, 1, 2), {"M": 0.0, "S": 0.29, "M+EP": 0.74})})
    (tmp_path / "study.json").write_text(json.dumps({"srresnet M 0": made_up("M", 0)}))
    trained = []

    def pretend(arch, variant, seed, photos, out):
        trained.append((variant, seed))
        return made_up(variant, seed)
    monkeypatch.setattr(study, "train_one", pretend)
    bench.main(["study", "--images", str(tmp_path), "--out", str(tmp_path), "--jobs", "1"])
    text = capsys.readouterr().out
    rows = {row[1].strip(): [cell.strip() for cell in row[2:-1]]
            for row in (line.split("|") for line in text.splitlines()) if len(row) > 2}
    assert rows["S above M"] == ["+0.60 ± 0.06", "held", "+0.50, +0.60, +0.70", "+0.29"]
    assert rows["M+EP above M"][1] == "undecided" and rows["input"][-1] == "19.50"
    assert len(trained) == 8 and ("M", 0) not in trained                       # it was there
    assert len(json.loads((tmp_path / "study.json").read_text())) == 9
    assert Image.open(tmp_path / "study.png").width > 500
    bench.main(["study", "--report", "--out", str(tmp_path)])
    assert len(trained) == 8 and "S above M" in capsys.readouterr().out
