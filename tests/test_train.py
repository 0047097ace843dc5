"""Recipes, schedule, the training loop, and the real command at smoke size."""
import json
import os
import signal
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import mioir
import train
from degrade import TASKS, ImageCache, leaf_items, seeded
from reference import CASES
from test_batches import Flat
from train import LETTERS, RECIPES, lr_at, stages


def run(*argv):
    train.main([str(a) for a in argv])


def smoke(out, *more, arch="restormer"):
    run("--arch", arch, "--seq", "--prompt", "--preset", "smoke", "--out", out, *more)


# The schedule ---------------------------------------------------------------------------------------

def test_learning_rates_equal_the_published_schedules():
    case = CASES["lr_cosine_restarts"]
    ours = [lr_at(t, case["periods"], case["base_lr"], case["eta_min"]) for t in range(1, 26)]
    assert np.abs(np.array(ours) - case["lr_at_iteration_1_to_25"]).max() < 1e-12


@pytest.mark.parametrize("arch, period, order", [
    ("srresnet", 250_000, "sbnjrhd"), ("swinir", 100_000, "sbnjrhd"), ("restormer", 100_000, "rjbsnhd"),
    ("uformer", 100_000, "rjbsnhd"), ("promptir", 100_000, "rjbsnhd")])
def test_the_papers_stages(arch, period, order):
    plan = stages(arch, seq=True)
    assert [len(s.tasks) for s in plan] == [1, 2, 3, 4, 5, 6, 7]
    assert [LETTERS[c] for c in order] == list(plan[-1].tasks)
    assert all(s.tasks == plan[-1].tasks[:k + 1] for k, s in enumerate(plan))
    assert [s.periods for s in plan] == [(period,)] * 6 + [(period,) * 4]
    mixed, = stages(arch, seq=False)
    assert set(mixed.tasks) == set(TASKS) and mixed.periods == (period,) * 10
    assert mixed.iterations == sum(s.iterations for s in plan)


def test_recipes_are_the_papers():
    rows = {arch: (r["optimizer"], r["weight_decay"], r["batch"], r["crop"], r["eta_min"], r["lr"], r["betas"], r["ema"])
            for arch, r in RECIPES.items()}
    common = (2e-4, (0.9, 0.99), 0.999)
    assert rows == {"srresnet": ("Adam", 0.0, 16, 128, 1e-7, *common), "swinir": ("Adam", 0.0, 8, 128, 1e-7, *common),
                    "restormer": ("AdamW", 0.0, 8, 128, 1e-7, *common),
                    "uformer": ("AdamW", 0.02, 8, 128, 1e-6, *common),
                    "promptir": ("AdamW", 0.0, 8, 128, 1e-7, *common),
                    "classifier": ("Adam", 0.0, 32, 256, 1e-7, *common)}
    assert stages("classifier")[0].periods == (250_000,) * 4


def test_ema_moves_by_one_minus_decay():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.999 * a.weight + 0.001 * b.weight
    train.update_ema(a.requires_grad_(False), b, 0.999)
    assert torch.allclose(a.weight, expected, atol=1e-7)


class Copies(TorchDispatchMode):
    """Counts what comes from the processor to the meta device, which stands for a GPU here."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copied = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.lift_fresh)
        if copied and out.is_meta:
            fresh = function.overloadpacket is torch.ops.aten.lift_fresh                 # torch.tensor([...], device=...)
            self.count += fresh or not args[function.overloadpacket is torch.ops.aten.copy_].is_meta
        return out


@pytest.mark.parametrize("arch", RECIPES)
def test_an_iteration_copies_once_to_the_device_and_reads_once_from_it(arch, monkeypatch, tmp_path):
    """Three iterations, and one before, of all tasks on torch's meta device, which holds no numbers: whatever reads one off it, or mixes
    it with the processor's by mistake, raises an error. Drop path's draws come with the rest."""
    prompt = [] if arch in ("promptir", "classifier") else ["--prompt"]
    args = train.parse(["--arch", arch, "--preset", "smoke", "--out", str(tmp_path), "--accumulate", "2", *prompt])
    machine, reads = train.Machine(args), []

    def told(machine, x):
        assert x.is_meta and x.shape == (10,)
        reads.append(x)
        return [0.1] * 8 + [1.0, 0.0]
    monkeypatch.setattr(train.Machine, "sums", told)
    machine.device = torch.device("meta")
    with torch.device("meta"):
        run = train.Run(args, machine.device)
    source = {"photos": ImageCache(tmp_path, leaf_items(1, 176, 0), 48)}
    stream, tasks = train.Stream(run, source, train.Machine(args)), set()
    run.model.train()
    for t in range(4):
        parts = list(zip(machine.rows_of(8), stream[t]))
        tasks.update(*(part.places for _, part in parts))
        with Copies() as copies:
            losses, norm, stop = train.iterate(run, run.model, parts, machine, 1e-4, False)
        # Two parts; in the first iteration, JPEG's and rain's tables come, too, once for the device.
        assert (t == 0 or copies.count == 2) and len(reads) == t + 1
        assert len(losses) == 8 and norm == 1 and not stop
    assert tasks == set(mioir.ANSWERS if arch == "classifier" else TASKS)


def test_striped_prompts_are_told_apart_by_a_new_extractor_and_random_ones_hardly():
    def closest(prompts):
        z = extract(prompts[:, None])
        return (torch.cdist(z, z) + 9 * torch.eye(7)).min() / z.norm(dim=1).mean()
    striped = train.striped_prompts()
    assert striped.shape == (7, 128, 128) and set(striped.unique().tolist()) == {0.0, 1.0}
    for seed in range(5):
        torch.manual_seed(seed)
        extract = mioir.Extractor(1, 64)
        with torch.no_grad():
            assert closest(striped) > 0.2 > 5 * closest(mioir.build_model("srresnet", "ep", width=4, blocks=1).prompts)


# The command ----------------------------------------------------------------------------------------

def test_a_smoke_run_leaves_checkpoint_log_table_and_pictures(finished):
    saved = torch.load(finished / "last.pt", weights_only=True)
    assert saved["stage"] == 7 and saved["arch"] == "restormer" and saved["prompt"] == "ep"
    assert set(saved["raw"]) == set(saved["ema"]) and "prompts" in saved["raw"]
    assert any(not torch.equal(saved["raw"][k], saved["ema"][k]) for k in saved["raw"])
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert {entry["stage"] for entry in steps} == set(range(1, 8))
    assert all(set(entry["loss"]) == set(entry["tasks"]) for entry in steps if len(entry["tasks"]) < 7)
    assert [set(entry["scores"]) for entry in log if "scores" in entry] == [set(TASKS)] * 7
    table = (finished / "table.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 7 and "input" in table[2] and "+dark" in table[9]
    assert Image.open(finished / "table.png").size[0] > 500
    assert Image.open(finished / "strips.png").size[1] > 7 * 190


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, tiny):
    smoke(tmp_path / "whole", "--order", "rj", arch="swinir")
    real, calls = train.update_ema, []                    # called once an iteration

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:                       # in the last stage, past its checkpoint at 4
            raise OSError("pulled the plug")
        return real(*args)
    monkeypatch.setattr(train, "update_ema", interrupted)
    with pytest.raises(SystemExit, match="pulled the plug"):
        smoke(tmp_path / "run", "--order", "rj", arch="swinir")
    smoke(tmp_path / "run", "--order", "rj", "--resume", arch="swinir")
    whole, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "run"))
    for part in ("raw", "ema"):
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part])
    assert whole["table"] == resumed["table"] and len(calls) < 2 * 8


@pytest.mark.parametrize("arch, flags", [
    ("srresnet", ["--prompt", "ap", "--seq"]), ("restormer", []), ("swinir", ["--prompt"]),
    ("uformer", ["--seq", "--order", "r"]),
    ("promptir", []), ("classifier", [])])
def test_other_variants_train(tmp_path, arch, flags, monkeypatch, tiny):
    monkeypatch.setitem(train.PRESETS["smoke"], "period", 1)
    run("--arch", arch, *flags, "--preset", "smoke", "--out", tmp_path / "out")
    _, info = mioir.load_model(tmp_path / "out" / "last.pt")                # which takes plain numbers alone
    learned = mioir.ANSWERS if arch == "classifier" else mioir.TASKS
    assert info["arch"] == arch and set(info["table"][-1][1]) == set(learned)


def test_training_on_a_folder_of_photos(tmp_path, capsys, tiny):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "torn.png").write_bytes((tmp_path / "photos" / "a.png").read_bytes()[:2000])
    run("--arch", "srresnet", "--preset", "smoke", "--data", tmp_path / "photos", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "torn.png" in said and "from 3 images" in said


@pytest.mark.parametrize("argv, words", [
    (["--arch", "resnet"], ["resnet", "srresnet"]),
    (["--prompt", "both"], ["both", "ep"]),
    (["--arch", "promptir", "--prompt"], ["promptir", "prompts of its own"]),
    (["--seq", "--order", "rjx"], ["'x'", "r (rain)"]),
    (["--seq", "--order", "rr"], ["repeated"]),
    (["--preset", "huge"], ["huge", "demo"]),
    (["--data", "nowhere"], ["nowhere", "no such folder"]), (["--depth", "nowhere"], ["--depth nowhere", "--data"]), (["--prompts", "x.npy"], ["--prompts x.npy", "--init"]),
    (["--data", ".", "--depth", "nowhere"], ["nowhere", "no such folder"]), (["--data", __file__], [__file__, "folder"]),
    (["--order", "n", "--pairs", "nowhere", ".", "noise"], ["nowhere", "no such folder"]),
    (["--pairs", "a", "b"], ["--pairs", "3 arguments"]),
    (["--pairs", "a", "b", "fog"], ["fog", "sr, blur, noise"]),
    (["--pairs", "a", "b", "rain", "--order", "nj"], ["GT rain", "noise, jpeg"]),
    (["--data", "EMPTY"], ["no images"]),
    (["--data", "CORRUPT"], ["no usable image", "a.png"]),
    (["--data", "SMALL"], ["smaller than the crop"]),
    (["--resume"], ["last.pt", "go on from"]),
    (["--seed", "x"], ["seed", "x"]),
])
def test_bad_input_gets_one_clear_line_and_leaves_nothing(tmp_path, argv, words, capsys):
    for name in ("EMPTY", "CORRUPT", "SMALL"):
        (tmp_path / name).mkdir()
    (tmp_path / "CORRUPT" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    Image.new("RGB", (40, 40)).save(tmp_path / "SMALL" / "a.png")
    argv = [str(tmp_path / a) if a in ("EMPTY", "CORRUPT", "SMALL") else a for a in argv]
    with pytest.raises(SystemExit) as stopped:
        run("--preset", "smoke", "--out", tmp_path / "out", *argv)
    line = str(stopped.value.code)
    assert line.startswith("train.py: ") and "\n" not in line and all(word in line for word in words)
    assert not (tmp_path / "out" / "last.pt").exists()
    if "no such folder" in words:                          # known before the plan and before the run's folder
        assert not capsys.readouterr().out and not (tmp_path / "out").exists()


def test_files_that_are_wrong_are_refused_before_images_are_decoded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_images", lambda *a: pytest.fail("too late"))
    for argv, words in ((["--init", "nosuch.pt"], "nosuch.pt"), (["--init", finished / "last.pt"], "holds another model"),
                        (["--init", finished / "last.pt", "--prompts", "nosuch.npy"], "nosuch.npy")):
        with pytest.raises(SystemExit, match=words):
            run("--arch", "srresnet", "--preset", "smoke", "--out", tmp_path / "out", *argv)


def test_a_job_that_ends_while_images_are_prepared_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_images", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run("--preset", "smoke", "--out", tmp_path / "out")
    assert stopped.value.code == 143 and capsys.readouterr().err == "train.py: stopped by SIGTERM\n"


def test_an_output_folder_with_another_run_is_refused(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="--resume"):
        smoke(finished)
    with pytest.raises(SystemExit, match="arch: restormer then, srresnet now"):
        run("--arch", "srresnet", "--preset", "smoke", "--out", finished, "--resume")
    with pytest.raises(SystemExit, match="seed: 0 then, 3 now"):
        smoke(finished, "--resume", "--seed", 3)
    assert (finished / "last.pt").read_bytes() == before


def test_a_run_goes_on_when_its_photos_have_moved_but_not_when_they_have_changed(tmp_path, tiny):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in "ab":
        Image.fromarray(pixels).save(here / f"{name}.png")
    argv = ("--arch", "srresnet", "--preset", "smoke", "--order", "n", "--out", tmp_path / "out", "--data")
    run(*argv, here)
    here.rename(there)
    run(*argv, there, "--resume")
    Image.fromarray(pixels // 2).save(there / "b.png")
    with pytest.raises(SystemExit, match="data: 2 images, fingerprint .* then, 2 images"):
        run(*argv, there, "--resume")


# A run of one's own ---------------------------------------------------------------------------------

def test_own_numbers_override_the_recipe_are_shown_stored_and_checked(tmp_path, capsys, tiny):
    argv = ["--arch", "srresnet", "--order", "nj", "--preset", "smoke", "--lr", "0.003", "--batch", "6", "--crop", "40"]
    run(*argv, "--print-plan")
    said = capsys.readouterr().out
    assert "lr 0.003" in said and "total batch 6, crop 40" in said and "srresnet-mixed-nj-plain-smoke" in said
    run(*argv, "--out", tmp_path / "out")
    facts = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["facts"]
    assert (facts["lr"], facts["batch"], facts["crop"]) == (0.003, 6, 40)
    with pytest.raises(SystemExit, match="lr: 0.003 then, 0.0002 now"):
        run(*argv[:6], "--batch", 6, "--crop", 40, "--out", tmp_path / "out", "--resume")


def test_fine_tuning_starts_from_the_weights_and_sizes_of_a_checkpoint(finished, tmp_path, tiny):
    saved = torch.load(finished / "last.pt", weights_only=True)
    for which in ("raw", "ema"):
        args = train.parse(["--arch", "restormer", "--prompt", "--preset", "demo", "--init", str(finished / "last.pt"),
                            "--init-weights", which, "--out", str(tmp_path)])
        begun = train.Run(args, torch.device("cpu"))
        for model in (begun.model, begun.ema):
            assert all(torch.equal(value, saved[which][name]) for name, value in model.state_dict().items())
    for argv in (["--arch", "srresnet", "--prompt"], ["--arch", "restormer"]):
        with pytest.raises(SystemExit, match="holds another model; train it with --arch restormer --prompt ep"):
            run(*argv, "--preset", "smoke", "--init", finished / "last.pt", "--out", tmp_path / "out")


def test_a_fine_tuning_has_a_row_of_what_it_starts_from_and_goes_on_without_the_file(finished, tmp_path, monkeypatch, capsys, tiny):
    """The checkpoint's network is not the preset's: its sizes come from --init, then from last.pt."""
    base = tmp_path / "base.pt"
    state = torch.load(finished / "last.pt", weights_only=True)
    model = mioir.build_model("restormer", "ep", **dict(state["sizes"], dim=8))
    state.update(raw=model.state_dict(), ema=model.state_dict(), sizes=dict(state["sizes"], dim=8))
    torch.save(state, base)
    argv = ["--arch", "restormer", "--prompt", "--order", "nj", "--preset", "smoke", "--out", tmp_path / "out"]
    real, calls = train.update_ema, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            raise OSError("pulled the plug")
        return real(*args)
    monkeypatch.setattr(train, "update_ema", interrupted)
    with pytest.raises(SystemExit, match="pulled the plug"):
        run(*argv, "--init", base)
    said = capsys.readouterr().out
    assert said.index("total: 10 iterations") < said.index("blur, rain, haze, dark, sr are not rehearsed and get worse")
    base.unlink()
    run(*argv, "--resume")
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    images = evaluation.builtin_images(1, 64)
    at_first = evaluation.mean_psnr(model, evaluation.validation_pairs(images), torch.device("cpu"))
    assert [row[0] for row in saved["table"]] == ["input", "--init", "mixed"] and saved["table"][1][1] == pytest.approx(at_first, abs=1e-3)
    assert saved["sizes"]["dim"] == 8 and saved["stage"] == 1 and len(calls) == 7 + 6


@pytest.fixture
def pairs(tmp_path):
    """Folders LQ and GT of three pictures each; an LQ is its GT, darker by 4, and says so in its name."""
    random = np.random.default_rng(0)
    for name in "abc":
        gt = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        for folder, pixels, suffix in (("GT", gt, ""), ("LQ", gt // 4, "_bad")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}{suffix}.png")
    return tmp_path / "LQ", tmp_path / "GT"


def test_ones_own_pairs_take_the_place_of_a_task(pairs, tmp_path, tiny, capsys):
    alone = ["--arch", "srresnet", "--preset", "smoke", "--order", "n", "--pairs", *pairs, "noise", "--out",
             tmp_path / "alone"]
    source = train.open_images(train.parse([str(a) for a in alone]), print)
    assert set(source) == {"noise"} and len(source["noise"]) == 3
    samples = [train.sample(source, ("noise",), 32, 8, (0, 0, 0, i)) for i in range(8)]
    lq, gt, task, _ = train.make_batch(train.Part(samples), 32, "cpu")
    assert torch.equal((lq * 255).round(), (gt * 255).round() // 4) and gt.std() > 0.2 and (task == 1).all()
    run(*alone)
    said = capsys.readouterr().out                 # a plain model is told nothing, and the table is of other images
    assert "of the built-in images, held out; not of yours" in said and str(pairs[0]) not in said.splitlines()[-1]
    table = (tmp_path / "alone" / "table.md").read_text()
    (tmp_path / "alone" / "table.md").unlink()     # as where a run was killed before it was written
    run(*alone, "--resume")
    assert "last.pt: this run is finished" in capsys.readouterr().out and (tmp_path / "alone" / "table.md").read_text() == table
    run("--arch", "srresnet", "--preset", "smoke", "--order", "nj", "--seq", "--pairs", *pairs, "noise", "--out", tmp_path / "mixed")


def test_pairs_of_two_sizes_are_named_with_the_mend(pairs, tmp_path):
    for path in pairs[0].iterdir():
        Image.open(path).resize((22, 17)).save(path)
    with pytest.raises(SystemExit, match=r"no usable image among 3: .*_bad.png has 22 x 17 pixels, .*/GT/.* 90 x 70; enlarge"):
        run("--arch", "srresnet", "--preset", "smoke", "--order", "n", "--pairs", *pairs, "noise", "--out", tmp_path / "out")


@pytest.mark.parametrize("argv, preset", [([], "demo"), (["--data", "x"], "paper"), (["--pairs", "a", "b", "rain"], "paper"),
                                          (["--preset", "smoke", "--data", "x"], "smoke")])
def test_the_papers_recipe_is_for_photographs(argv, preset):
    assert train.parse(argv).preset == preset and train.parse(argv).out.endswith(preset)


def test_the_papers_recipe_on_a_cpu_says_at_once_what_it_takes(tmp_path, monkeypatch, capsys):
    def not_yet(*a):
        raise ValueError("images come later")
    monkeypatch.setattr(train, "open_images", not_yet)
    with pytest.raises(SystemExit):
        run("--device", "cpu", "--preset", "paper", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "total: 1000000 iterations" in said and "on a CPU it takes months" in said and "--preset demo" in said


def test_clean_samples_of_the_classifier_are_kept_as_they_are_or_nearly_so():
    """As they are, as JPEG of high quality, reduced in size, grey; never as bad as the task jpeg."""
    samples = [train.sample_as_kept({"photos": Flat()}, ("none",), 64, 30, (0, 0, 0, i)) for i in range(30)]
    lq, gt, task = train.make_batch(train.Part(samples), 64, "cpu")[:3]
    assert (task == len(TASKS)).all() and lq.shape == (30, 3, 64, 64)
    untouched = (lq == gt).flatten(1).all(1)
    assert 10 <= untouched.sum() < 30 and (lq - gt).abs().mean() < 0.01
    assert any(s["canvas"].shape[1] == 112 and s["saved"] for s in samples)


def test_the_classifier_sees_noise_in_grey_and_noise_saved_as_jpeg_and_backbones_do_not():
    """A grey file has one channel of noise, of full strength; the 8 x 8 grid of a JPEG lies over the noise."""
    middle = {"photos": Flat(value=128)}                                       # so that nothing is clipped
    samples = [train.sample_as_kept(middle, ("noise", "none"), 64, 60, (0, 0, 0, 2 * i)) for i in range(60)]
    lq, gt, _ = train.make_batch(train.Part(samples), 64, "cpu")[:3]
    grey, saved = (torch.tensor([bool(s[name]) for s in samples]) for name in ("grey", "saved"))
    assert 5 < grey.sum() < 30 and 10 < saved.sum() < 35 and all(85 <= s["saved"] <= 98 for s in samples if s["saved"])
    spread = (lq.amax(1) - lq.amin(1)).flatten(1).amax(1)                      # between the channels
    assert (spread[grey & ~saved] == 0).all() and (spread[~grey] > 0.05).all()
    sigma = torch.tensor([float(s["sigma"]) for s in samples]) / 255
    measured = (lq - gt).flatten(1).std(1)
    plain = grey & ~saved
    assert (measured[plain] > 0.8 * sigma[plain]).all()
    assert "saved" not in train.sample({"photos": Flat()}, ("noise",), 64, 60, (0, 0, 0, 0))


@pytest.mark.parametrize("arch, multiple", train.CROP_MULTIPLE.items())
def test_a_crop_that_a_network_cannot_divide_is_refused_in_a_line(arch, multiple):
    """The number said is the least: the network takes it, and fails on half of it."""
    with pytest.raises(SystemExit) as caught:
        train.parse(["--arch", arch, "--crop", str(multiple + multiple // 2)])
    assert f"{arch} needs a multiple of {multiple}" in str(caught.value)
    assert train.parse(["--arch", arch, "--crop", str(2 * multiple)]).recipe["crop"] == 2 * multiple
    args = train.parse(["--arch", arch, "--preset", "smoke"])
    model = train.new_model(args, args.recipe["sizes"])
    with torch.no_grad():
        assert model(torch.rand(1, 3, multiple, multiple)).shape[2] == multiple
        with pytest.raises((RuntimeError, ValueError)):
            model(torch.rand(1, 3, multiple // 2, multiple // 2))


# Two tasks, and what is said ------------------------------------------------------------------------

@pytest.mark.parametrize("order", ("n", "nj", "rjb", "rjbsnhd"))
def test_a_mixed_run_is_as_long_as_the_sequential_one_of_the_same_tasks(order):
    mixed, = stages("restormer", order=order, period=7)
    assert mixed.iterations == sum(s.iterations for s in stages("restormer", True, order, 7)) == 7 * (len(order) + 3)


def test_validation_says_its_results_as_they_come(tmp_path, capsys, monkeypatch, tiny):
    seen = []

    def shown(model, pairs, device):
        seen.append(capsys.readouterr().out.rpartition("\n")[2])           # what the line holds so far
        return dict.fromkeys(pairs, 20.0 + len(seen))
    monkeypatch.setattr(train, "mean_psnr", shown)
    run("--arch", "srresnet", "--order", "n", "--preset", "smoke", "--out", tmp_path / "out")
    assert seen == ["validation:", " blur 21.00", " noise 22.00", " jpeg 23.00", " rain 24.00", " haze 25.00", " dark 26.00"]
    assert capsys.readouterr().out.startswith(" sr 27.00\n")


# The wiring: each value comes from outside the code that is tested ---------------------------------

def small_run(tmp_path, *argv, arch="srresnet"):
    args = train.parse(["--arch", arch, "--preset", "smoke", "--out", str(tmp_path), *argv])
    return train.Run(args, torch.device("cpu")), train.Machine(args)


def test_letters_stand_for_these_tasks():
    assert LETTERS == {"s": "sr", "b": "blur", "n": "noise", "j": "jpeg", "r": "rain", "h": "haze", "d": "dark"}


def test_the_raw_weights_are_scored(tmp_path, monkeypatch):
    run, machine = small_run(tmp_path)
    seen = []
    monkeypatch.setattr(train, "mean_psnr", lambda model, pairs, device: seen.append(model) or dict.fromkeys(pairs, 1.0))
    log = types.SimpleNamespace(say=lambda *a, **k: None, write=lambda **k: None, idle=0)
    train.validate(run, {"blur": []}, machine, log)
    assert len(seen) == 1 and seen[0] is run.model and run.model is not run.ema


def test_first_weights_depend_on_the_seed_alone(tmp_path):
    torch.manual_seed(3)
    first = [list(small_run(tmp_path, "--seed", seed)[0].model.parameters()) for seed in "001"]
    assert all(map(torch.equal, first[0], first[1])) and not any(map(torch.equal, first[0][:1], first[2]))


def test_striped_prompts_reach_the_small_model_and_random_ones_the_papers(tmp_path):
    demo = train.Run(train.parse(["--arch", "srresnet", "--prompt", "--out", str(tmp_path)]), torch.device("cpu"))
    assert torch.equal(demo.model.prompts, train.striped_prompts()) and torch.equal(demo.ema.prompts, demo.model.prompts)
    smoke, _ = small_run(tmp_path, "--prompt")
    assert torch.equal(smoke.model.prompts, mioir.build_model("srresnet", "ep", width=4, blocks=1).prompts)


@pytest.mark.parametrize("arch, kind, decay", [("srresnet", torch.optim.Adam, 0), ("swinir", torch.optim.Adam, 0),
                                               ("restormer", torch.optim.AdamW, 0), ("uformer", torch.optim.AdamW, .02)])
def test_only_uformers_weights_decay(arch, kind, decay, tmp_path):
    run, _ = small_run(tmp_path, arch=arch)
    group, = run.optimizer.param_groups
    assert type(run.optimizer) is kind and (group["weight_decay"], group["betas"], group["lr"]) == (decay, (.9, .99), 2e-4)
    assert all(a.stride() == b.stride() for a, b in zip(run.model.parameters(), run.ema.parameters()))   # foreach is fast so


def test_drop_path_draws_by_seed_stage_iteration_and_place(tmp_path):
    run, machine = small_run(tmp_path, "--seed", "5", arch="swinir")
    stream = train.Stream(run, {"photos": Flat()}, machine)
    for t in (0, 1, 2):
        part, = stream[t]
        for i, draws in enumerate(part.to("cpu")["all"]["draws"]):
            assert torch.equal(draws, torch.rand(len(draws), generator=seeded(5, 0, t, i, "drop path"))) and len(draws) >= 3


def test_all_modules_train_and_losses_are_logged_for_their_own_tasks(tmp_path, monkeypatch, tiny, finished):
    """Also from --init. The loss stands for the row of its task."""
    modes = []

    def row_of_the_task(net, lq, gt, task):
        modes.append(all(module.training for module in net.modules()))
        return 0 * net(lq, task).mean() + task.float()
    monkeypatch.setattr(train, "loss_per_image", row_of_the_task)
    run("--arch", "restormer", "--prompt", "--init", finished / "last.pt", "--preset", "smoke", "--out", tmp_path / "out")
    assert len(modes) == 20 and all(modes)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {(task, loss) for entry in log if "loss" in entry for task, loss in entry["loss"].items()} == {
        ("blur", 0), ("noise", 1), ("jpeg", 2), ("rain", 3), ("haze", 4), ("dark", 5), ("sr", 6)}
    assert [entry["iteration"] for entry in log if "scores" in entry] == [0, 20]


@pytest.mark.parametrize("precision, kind, convolutions, products", [
    ("fp32", None, False, False), ("tf32conv", None, True, False), ("tf32", None, True, True), ("bf16", torch.bfloat16, False, False)])
def test_precision_is_what_it_says_for_the_network_and_fp32_for_the_data(tmp_path, monkeypatch, precision, kind, convolutions, products):
    torch.backends.cudnn.deterministic, seen = False, []
    run, machine = small_run(tmp_path, "--precision", precision)

    def look(*what):
        layer = torch.nn.Conv2d(3, 3, 1)(torch.rand(1, 3, 4, 4))
        seen.append((layer.dtype, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    for name in ("loss_per_image", "make_batch"):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *what, real=real: look() or real(*what))
    part = train.Part([train.sample({"photos": Flat()}, ("noise",), 48, 8, (0, 0, 0, i)) for i in range(8)])
    train.iterate(run, run.model, [(range(8), part)], machine, 1e-4, False)
    look()
    outside = (torch.float32, False, False)
    assert seen == [outside, (kind or torch.float32, convolutions, products), outside] and torch.backends.cudnn.deterministic


def test_depth_maps_and_leaves_beside_photos_reach_the_samples(tmp_path):
    (tmp_path / "photos").mkdir(), (tmp_path / "maps").mkdir()
    Image.new("RGB", (120, 110), (90, 80, 70)).save(tmp_path / "photos" / "a.png")
    np.save(tmp_path / "maps" / "a.npy", np.full((30, 30), 7.0))
    flags = ["--data", str(tmp_path / "photos"), "--depth", str(tmp_path / "maps"), "--preset", "smoke"]
    source = train.open_images(train.parse([*flags, "--out", str(tmp_path / "one")]), print)["photos"]
    assert len(source) == 1 and (source.depth_crop(0, 3, 5, 64, seeded(1)) > 0.999).all()      # all as far as the farthest
    both = train.open_images(train.parse([*flags, "--leaves", "3", "--out", str(tmp_path / "two")]), print)["photos"]
    assert len(both) == 4 and sorted(both.size(k) for k in range(4)) == [(110, 120)] + 3 * [(192, 192)]


def test_images_per_second_leave_validations_out_and_the_rest_is_told_by_them(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    run, machine = small_run(tmp_path, "--period", "10", "--order", "n")
    log = train.Log(run)
    for iteration in (1, 2):                                                  # 8 images in 2 s each
        now[0] += 2.0
        run.iteration = iteration
        if iteration == 1:
            monkeypatch.setattr(train, "mean_psnr", lambda *a: now.__setitem__(0, now[0] + 100) or {"noise": None})
            train.validate(run, {"noise": []}, machine, log)
        log.add(run, [0.5] * 8, 1.0, 1e-4)
    log.close()
    said = capsys.readouterr().out
    assert "validation: noise -" in said and "2/40 | loss noise 0.5000 | lr 1.0e-04 | 4.0 images/s | 0:01:16 left" in said
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["seconds_left"] == 76


def test_the_table_frames_what_a_stage_trained_and_averages_what_the_run_trains(tmp_path, monkeypatch):
    run, _ = small_run(tmp_path, "--seq", "--order", "rj")
    scores = dict(zip(TASKS, (10.0, 20.0, 30.0, 44.0, 50.0, 60.0, None)))
    run.table, run.stage, drawn = [("input", scores), ("stage 1 (+rain)", scores), ("stage 2 (+jpeg)", scores)], 2, []
    monkeypatch.setattr(train, "matrix_picture", lambda *what: drawn.append(what))
    monkeypatch.setattr(train, "curves_picture", lambda *what: drawn.append(what))
    said = []
    train.show_table(run, types.SimpleNamespace(say=said.append))
    (_, _, columns, rows, framed), (_, _, _, rates, begins) = drawn
    rain, jpeg = TASKS.index("rain"), TASKS.index("jpeg")
    assert framed == {(1, rain), (2, rain), (2, jpeg)} and all(row[-1] == 37.0 for _, row in rows)
    assert columns == ["(blur)", "(noise)", "jpeg", "rain", "(haze)", "(dark)", "(sr)", "mean"]
    assert (tmp_path / "table.md").read_text() == said[0] + "\n" and said[0].count("37.00") == 3
    assert begins == {"stage 1": 0, "stage 2": 1} and rates == [(1, 2e-4), (2, 2e-4), (3, 1e-7), (4, 1e-7), (5, 1e-7)]


def test_a_picture_that_fails_does_not_end_a_training_and_strips_show_what_was_trained(tmp_path, monkeypatch, capsys, tiny):
    shown = []
    monkeypatch.setattr(train, "task_strips", lambda path, model, pairs, device: shown.append(list(pairs)))

    def no_fonts(*what):
        raise ImportError("no FreeType\nhere")
    monkeypatch.setattr(train, "matrix_picture", no_fonts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("of a run that died before its first checkpoint\n")
    run("--arch", "srresnet", "--preset", "smoke", "--order", "jn", "--out", tmp_path / "out")
    assert f"{tmp_path}/out/table.png: not drawn (no FreeType here)" in capsys.readouterr().out
    assert shown == [["jpeg", "noise"]] and json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])["stage"] == 1


@pytest.mark.parametrize("cores, beside, flags, workers", [(64, 1, [], 8), (3, 1, [], 3), (16, 4, [], 4), (64, 1, ["--workers", "2"], 2)])
def test_loader_processes_are_no_more_than_cores(tmp_path, monkeypatch, cores, beside, flags, workers):
    run, machine = small_run(tmp_path, *flags)
    machine.device, machine.local_world, asked = torch.device("cuda"), beside, []
    monkeypatch.setattr(train, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: asked.append(k) or iter([]))
    with pytest.raises((StopIteration, RuntimeError)):
        next(train.batches(run, {"photos": Flat()}, machine))
    assert asked[0]["num_workers"] == workers and asked[0]["pin_memory"]


@pytest.mark.parametrize("device, backend, at", [("cpu", "gloo", None), ("cuda", "nccl", torch.device("cuda", 1))])
def test_processes_wait_for_the_first_one_for_hours_each_on_a_gpu_of_its_own(tmp_path, monkeypatch, device, backend, at):
    """The first may be decoding DF2K; NCCL's own limit is ten minutes. All would open a context on GPU 0."""
    asked, taken = [], []
    monkeypatch.setattr(train.dist, "init_process_group", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in dict(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    args = train.parse(["--preset", "smoke", "--device", device, "--out", str(tmp_path)])
    machine = train.Machine(args)
    (group,), options = asked[0]
    assert group == backend and options["timeout"].total_seconds() > 12 * 3600 and options["device_id"] == at
    assert taken == [at] * (device == "cuda") and machine.device == (at or torch.device("cpu")) and machine.rank == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    if at:
        with pytest.raises(ValueError, match="torch finds 2 GPUs"):
            train.Machine(args)


def test_a_run_behind_a_web_pages_button_works_and_two_of_them_do_not_share_a_folder(tmp_path, tiny):
    argv = ["--arch", "srresnet", "--preset", "smoke", "--order", "n", "--out", str(tmp_path / "out")]
    with ThreadPoolExecutor(1) as pool:                                       # handlers are the main thread's alone
        with train.one_run_in(train.parse(argv)):
            with pytest.raises(SystemExit, match="another run is writing there"):
                pool.submit(train.main, argv).result()
        pool.submit(train.main, argv).result()
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["stage"] == 1


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    run, _ = small_run(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        log = train.Log(run)
        inside = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)]
        log.close()
        assert inside == [signal.SIG_IGN, log.ask_to_stop, log.ask_to_stop] and signal.getsignal(signal.SIGTERM) != log.ask_to_stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_optimiser_that_does_not_fit_is_one_line(finished, tmp_path):
    for spoil in (lambda state: state.clear(), lambda state: state["param_groups"][0].update(params=[0]),
                  lambda state: state["state"][0].update(exp_avg=torch.zeros(3)), lambda state: state["state"][0].pop("exp_avg_sq")):
        saved = torch.load(finished / "last.pt", weights_only=True)
        spoil(saved["optimizer"])
        torch.save(saved, tmp_path / "last.pt")
        args = train.parse(["--prompt", "--seq", "--preset", "smoke", "--out", str(tmp_path), "--resume"])
        with pytest.raises(ValueError, match="the optimiser's numbers do not fit the weights"):
            train.Run(args, torch.device("cpu"), data=saved["facts"]["data"])
