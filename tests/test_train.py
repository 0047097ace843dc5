"""Recipes, schedule, the training loop, and the real command at smoke size."""
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import mioir
import train
from degrade import TASKS, ImageCache, leaf_items
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
    """Three iterations of all tasks on torch's meta device, which holds no numbers: whatever reads one off it, or mixes
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
    for t in range(3):
        parts = list(zip(machine.rows_of(8), stream[t]))
        tasks.update(*(part.places for _, part in parts))
        with Copies() as copies:
            losses, norm, stop = train.iterate(run, run.model, parts, machine, 1e-4, False)
        assert copies.count == 2 and len(reads) == t + 1                                 # two parts
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
    assert [set(entry["psnr"]) for entry in log if "psnr" in entry] == [set(TASKS)] * 7
    table = (finished / "table.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 7 and "input" in table[2] and "+dark" in table[9]
    assert Image.open(finished / "table.png").size[0] > 500
    assert Image.open(finished / "strips.png").size[1] > 7 * 190


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(train.PRESETS["smoke"], "period", 1)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        smoke(tmp_path / name, "--order", "rj", "--seed", seed, arch="swinir")
    weights = [torch.load(tmp_path / name / "last.pt", weights_only=True)["raw"] for name in ("one", "again", "other")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert any(not torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


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
    (["--data", ".", "--depth", "nowhere"], ["nowhere", "no such folder"]),
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
    run("--arch", "restormer", "--prompt", "--order", "n", "--preset", "smoke", "--init", finished / "last.pt", "--out", tmp_path / "out")
    assert mioir.load_model(tmp_path / "out" / "last.pt")[1]["sizes"] == saved["sizes"]


@pytest.fixture
def pairs(tmp_path):
    """Folders LQ and GT of three pictures each; an LQ is its GT inverted, and says so in its name."""
    random = np.random.default_rng(0)
    for name in "abc":
        gt = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        for folder, pixels, suffix in (("GT", gt, ""), ("LQ", 255 - gt, "_bad")):
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
    assert torch.allclose(lq + gt, torch.ones_like(lq)) and gt.std() > 0.2 and (task == TASKS.index("noise")).all()
    run(*alone)
    said = capsys.readouterr().out                 # a plain model is told nothing, and the table is of other images
    assert "of the built-in images, held out; not of yours" in said and "--task" not in said.splitlines()[-1]
    (tmp_path / "alone" / "table.md").unlink()     # as where a run was killed before it was written
    run(*alone, "--resume")
    assert "last.pt: this run is finished" in capsys.readouterr().out and (tmp_path / "alone" / "table.md").exists()
    run("--arch", "srresnet", "--preset", "smoke", "--order", "nj", "--seq", "--pairs", *pairs, "noise", "--out", tmp_path / "mixed")


def test_the_papers_recipe_on_a_cpu_says_at_once_what_it_takes(tmp_path, monkeypatch, capsys):
    def not_yet(*a):
        raise ValueError("images come later")
    monkeypatch.setattr(train, "open_images", not_yet)
    with pytest.raises(SystemExit):
        run("--device", "cpu", "--preset", "paper", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "total: 1000000 iterations" in said and "on a CPU it takes months" in said and "--preset demo" in said


def test_the_command_that_goes_on_is_quoted_and_torchruns_where_it_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "my runs/one", "--resume"])
    stopping = types.SimpleNamespace(save=lambda: None, stage=0, iteration=3, args=train.parse())
    log = types.SimpleNamespace(say=print, stop=2)
    for environment, start in (({}, "python"), ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"},
                                                "torchrun --nproc_per_node 2")):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            train.stopped(stopping, log)
        assert capsys.readouterr().out.splitlines()[-1] == f"  {start} train.py --out 'my runs/one' --resume"


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


def test_fine_tuning_on_some_tasks_says_that_the_others_get_worse(finished, tmp_path, capsys, tiny):
    run("--arch", "restormer", "--prompt", "--order", "nj", "--preset", "smoke", "--init", finished / "last.pt", "--out",
        tmp_path / "out")
    said = capsys.readouterr().out
    assert said.index("total: 10 iterations") < said.index("blur, rain, haze, dark, sr are not rehearsed and get worse")
