"""Long runs: killed, stopped, torn, split among processes - and always the same bits."""
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

import mioir
import train
from conftest import TINY
from degrade import TASKS, ImageCache, leaf_items
from test_models import KINDS, SMALL

# Children start from a server that has imported everything (optimisers import torch._dynamo) but has
# computed nothing: safe and fast.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])


def child(argv, preset, limit, environment, said):
    """A run in a process group of its own, with one thread and a changed smoke preset; what it says goes to a file."""
    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(environment)
    train.PRESETS["smoke"].update(preset)
    if "order" in preset:
        for recipe in train.RECIPES.values():
            recipe["order"] = preset["order"]
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv, sys.stdout = ["train.py", *argv], open(said, "w")
    sys.stderr = sys.stdout
    train.main()


def start(out, *more, preset=(), limit=None, environment=(), said=os.devnull, arch="srresnet"):
    argv = ["--arch", arch, "--seq", "--preset", "smoke", "--out", str(out), "--save-every", "1", *more]
    process = FORKS.Process(target=child, args=(argv, {**TINY, **dict(preset)}, limit, dict(environment), said))
    process.start()
    return process


def finish(out, *more, **options):
    process = start(out, *more, **options)
    process.join(120)
    return process.exitcode


def kill_after_two_stages(out):
    process = start(out)
    while not (out / "stage2.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.join()


def weights(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


def assert_same_bits(a, b):
    assert (a["stage"], a["iteration"], a["table"]) == (b["stage"], b["iteration"], b["table"])
    for part in ("raw", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finish(out) == 0
    return out


def at_once(check, *cases):
    """check(case) for all cases, a thread each: what they wait for are processes. Raises what one raised."""
    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(check, cases))


def test_killed_at_twenty_random_moments_a_run_ends_with_the_same_bits(whole, tmp_path):
    at_once(lambda seed: survive_ten_kills(whole, tmp_path / str(seed), seed), 0, 1)


def survive_ten_kills(whole, folder, seed):
    """SIGKILL, which leaves no time to tidy up; those before the first checkpoint do not count."""
    moments, kills, out = random.Random(seed), 0, folder / "out"
    while kills < 10:
        begun = (out / "last.pt").exists()
        process = start(out, *(["--resume"] if begun else []))
        while not (out / "last.pt").exists() and process.is_alive():
            time.sleep(0.01)
        process.join(moments.uniform(0.05, 0.6))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:                                                      # it got to the end: start over
            assert process.exitcode == 0
            assert_same_bits(weights(out), weights(whole))
            out = folder / f"out{kills}"
    assert finish(out, *(["--resume"] if (out / "last.pt").exists() else [])) == 0
    assert_same_bits(weights(out), weights(whole))
    assert not list(out.glob(".*.tmp")) and len(log_losses(out)) >= 1


@pytest.mark.parametrize("damage", ("half", "empty", "missing", "nan"))
def test_a_broken_last_pt_names_the_stage_to_go_on_from_and_its_copy_does(whole, tmp_path, damage):
    out, said = tmp_path / "out", tmp_path / "said.txt"
    shutil.copytree(whole, out)
    (out / "stage7.pt").unlink()
    last = out / "last.pt"
    if damage == "nan":
        state = weights(out)
        next(iter(state["raw"].values()))[0] = torch.nan
        torch.save(state, last)
    elif damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:100_000] if damage == "half" else b"")
    assert finish(out, "--resume", said=said) == 1
    line, = said.read_text().splitlines()[-1:]
    assert f"{last}: " in line and f"copy {out / 'stage6.pt'} to {last}" in line
    shutil.copy(out / "stage6.pt", last)
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40] if damage == "half" else log.read_bytes() + bytes(64))
    assert finish(out, "--resume") == 0
    assert_same_bits(weights(out), weights(whole))
    assert b"\n" in log.read_bytes() and json.loads(log.read_bytes().splitlines()[-1])["stage"] == 7
    assert (out / "curves.png").stat().st_mtime >= log.stat().st_mtime - 1


def test_the_last_state_and_each_stages_end_are_kept(whole):
    assert {path.name for path in whole.glob("*.pt")} == {"last.pt", *(f"stage{k}.pt" for k in range(1, 8))}
    assert [weights(whole, f"stage{k}.pt")["stage"] for k in (1, 4, 7)] == [1, 4, 7]


def test_a_signal_to_the_whole_group_saves_and_says_how_to_go_on(whole, tmp_path):
    """As a terminal, docker and SLURM send it: the loader's processes get it, too."""
    at_once(lambda number: stop_and_go_on(whole, tmp_path / str(int(number)), number),
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def stop_and_go_on(whole, folder, number):
    """SIGINT: goes on to the same bits. The others: in a stage so long that the loader is still at work."""
    folder.mkdir()
    out, said = folder / "out", folder / "said.txt"
    process = start(out, "--workers", "1", said=said, preset={} if number == signal.SIGINT else dict(period=300))
    while not (out / "last.pt").exists() and process.is_alive():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number and "Traceback" not in said.read_text()
    assert said.read_text().splitlines()[-1].endswith("saved. To go on: the same command with --resume")
    assert weights(out)["stage"] < 7
    all_ended(process.pid)
    if number == signal.SIGINT:
        assert finish(out, "--resume") == 0
        assert_same_bits(weights(out), weights(whole))


def all_ended(group, seconds=20):
    """Waits until no process of the group is left, loader processes neither."""
    for _ in range(10 * seconds):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a loader process outlives its parent")


def test_a_second_run_in_the_folder_is_refused_and_loaders_end_with_a_killed_parent(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said.txt"
    first = start(out, "--workers", "2", preset=dict(period=500))
    while not (out / "last.pt").exists():
        time.sleep(0.02)
    assert finish(out, "--resume", said=said) == 1
    assert said.read_text().splitlines()[-1] == (f"train.py: --out {out}: another run is writing there; wait for its end, or "
                                                 "choose another --out")
    assert first.is_alive()
    first.kill()
    first.join()
    assert finish(out, "--resume", "--order", "n", said=said) == 1 and "is of another run" in said.read_text()      # not locked
    all_ended(first.pid)


def test_a_full_disk_loses_nothing(whole, tmp_path):
    """The file-size limit makes the write fail half-way, as a full disk does."""
    out, said = tmp_path / "out", tmp_path / "said.txt"
    assert finish(out, limit=300_000, said=said) == 1
    assert not (out / "last.pt").exists() and not list(out.glob(".*.tmp"))
    assert "not saved (File too large); " in said.read_text() and "if there is one" in said.read_text()
    kill_after_two_stages(out)
    before = (out / "last.pt").read_bytes()
    assert finish(out, "--resume", limit=300_000, said=said) == 1
    assert (out / "last.pt").read_bytes() == before and f"{out / 'last.pt'}, if there is one, is unharmed" in said.read_text()
    assert finish(out, "--resume") == 0
    assert_same_bits(weights(out), weights(whole))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_task_and_checkpoint(tmp_path, monkeypatch, tiny):
    real, calls = train.loss_per_image, []

    def poisoned(net, lq, gt, task):
        calls.append(1)
        loss = real(net, lq, gt, task)
        return torch.where(task == TASKS.index("jpeg"), torch.nan, loss) if len(calls) > 2 else loss
    monkeypatch.setattr(train, "loss_per_image", poisoned)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--arch", "srresnet", "--seq", "--order", "rjb", "--preset", "smoke", "--out", str(tmp_path / "out"),
                    "--save-every", "1"])
    line = str(stopped.value.code)
    assert "stage 2, iteration 1" in line and "jpeg" in line and "last.pt" in line and "\n" not in line
    saved = weights(tmp_path / "out")
    assert all(value.isfinite().all() for value in saved["raw"].values())


def test_a_finite_loss_with_an_infinite_gradient_stops_the_run_before_the_weights_change(tmp_path, monkeypatch, tiny):
    real, calls = train.loss_per_image, []

    def steep(net, lq, gt, task):
        calls.append(1)
        first = next(net.parameters()).sum()
        edge = (first - first.detach()).abs().sqrt()                  # 0, and as steep as a wall
        return real(net, lq, gt, task) + (edge if len(calls) > 2 else 0)
    monkeypatch.setattr(train, "loss_per_image", steep)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--arch", "srresnet", "--order", "r", "--preset", "smoke", "--out", str(tmp_path / "out"), "--save-every", "1"])
    line = str(stopped.value.code)
    assert "iteration 3: gradient is not finite" in line and "last.pt" in line and "\n" not in line
    saved = weights(tmp_path / "out")
    assert saved["iteration"] == 2 and all(value.isfinite().all() for value in saved["raw"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tiny):
    run = train.Run(train.parse(["--arch", "srresnet", "--preset", "smoke", "--out", str(tmp_path)]), torch.device("cpu"))
    with torch.no_grad():
        next(run.model.parameters())[0] = torch.inf
    with pytest.raises(ValueError, match="no longer finite; not saved"):
        run.save()
    assert not list(tmp_path.iterdir())


def test_under_torchrun_the_one_line_stands_in_its_report(tmp_path):
    """torchrun writes a long report after all else; the line of who failed first ends it."""
    root = Path(train.__file__).parent
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", root / "train.py",
                           "--preset", "smoke", "--data", "nowhere", "--out", tmp_path / "out"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "[rank1]: Traceback" not in done.stderr
    report = done.stderr.partition("ChildFailedError")[2]
    assert report.rstrip(" =\n").endswith("ValueError: nowhere: no such folder")


def test_a_killed_loader_worker_is_one_line(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(train.Stream, "__getitem__", lambda stream, t: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--arch", "srresnet", "--preset", "smoke", "--out", str(tmp_path / "out"), "--workers", "1"])
    assert "stage 1, iteration 1: " in str(stopped.value.code) and "\n" not in str(stopped.value.code)


@pytest.mark.parametrize("fault, words", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["not enough memory", "--accumulate"]),
    (MemoryError(), ["not enough memory", "--accumulate"]),
    (RuntimeError("Connection closed by peer"), ["another process"]),
])
def test_what_the_machine_lacks_is_one_line(tmp_path, tiny, monkeypatch, fault, words):
    def lacking(*a):
        raise fault
    monkeypatch.setattr(train, "loss_per_image", lacking)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--arch", "srresnet", "--preset", "smoke", "--out", str(tmp_path / "out")])
    line = str(stopped.value.code)
    assert line.startswith("train.py: ") and "\n" not in line and all(word in line for word in words)


def test_the_modules_start_without_what_only_posix_has(tmp_path):
    code = ("import sys; sys.modules['resource'] = sys.modules['fcntl'] = sys.modules['pwd'] = None; sys.path.insert(0, sys.argv[1]);"
            "import train, eval; print(train.parse([]).arch)")
    root = str(Path(train.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.stdout == "restormer\n", done.stderr


def test_a_cached_image_that_vanishes_is_named(tmp_path, tiny):
    out = tmp_path / "out"
    train.main(["--arch", "srresnet", "--preset", "smoke", "--out", str(out)])
    with pytest.raises(ValueError, match="stage 1, iteration 1.*leaves3-144-0-"):
        args = train.parse(["--arch", "srresnet", "--preset", "smoke", "--out", str(out)])
        source = train.open_images(args, lambda text: None)
        for path in (out / "cache").glob("*.npy"):
            path.unlink()
        next(train.batches(train.Run(args, torch.device("cpu")), source, train.Machine(args)))


# The same run, however it is split -----------------------------------------------------------------------

def log_losses(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [dict(entry["loss"], norm=entry["gradient_norm"]) for entry in lines if "loss" in entry]


def test_two_processes_and_accumulation_repeat_the_single_process_run(tmp_path, arch="swinir"):
    """Two processes meet by the variables that torchrun sets, over gloo. SwinIR has drop path. The gradient's norm shows a
    factor that Adam, which divides it out, hides in the losses."""
    def begin(name, *more, **ranks):
        return start(tmp_path / name, *more, environment=ranks, said=tmp_path / f"{name}{ranks.get('RANK', '')}.txt", arch=arch,
                     preset=dict(batch=8, log_every=1, period=4, order="rj"))

    def two(name, *more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meet = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        return [begin(name, *more, **meet, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]

    for group in ([begin("alone"), begin("parts", "--accumulate", "2")], two("two"), two("both", "--accumulate", "2")):
        for process in group:
            process.join(120)
            assert process.exitcode == 0
    alone = log_losses(tmp_path / "alone")
    for losses in (log_losses(tmp_path / name) for name in ("two", "parts", "both")):
        assert len(losses) == len(alone) >= 20
        for a, b in zip(alone[:20], losses[:20]):
            assert a.keys() == b.keys() and all(abs(a[task] - b[task]) <= 1e-4 * abs(a[task]) + 1e-5 for task in a)


def test_batches_are_the_same_bit_for_bit_however_they_are_split(tmp_path):
    args = train.parse(["--arch", "srresnet", "--preset", "smoke", "--out", str(tmp_path)])
    cache = ImageCache(tmp_path / "cache", leaf_items(3, 128, 0), 48)
    run, machine = train.Run(args, torch.device("cpu")), train.Machine(args)

    def batch(world, parts):
        shares = []
        for machine.rank in range(world):
            machine.world, machine.parts = world, parts
            for share in train.Stream(run, {"photos": cache}, machine)[3]:
                shares.append(train.make_batch(share, 48, "cpu")[:3])
        return [torch.cat(column) for column in zip(*shares)]
    one = batch(1, 1)
    for other in (batch(2, 1), batch(1, 2), batch(2, 2)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_workers_give_the_same_bits_and_send_no_tensors(tmp_path, monkeypatch, tiny):
    """Tensors would go through shared memory one by one, of which docker has 64 MB, or a socket below TMPDIR."""
    def refused(tensor):
        raise RuntimeError("a tensor on its way between processes")
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, refused)
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.UntypedStorage, refused)
    common = ["--arch", "swinir", "--order", "rnhj", "--prompt", "--preset", "smoke", "--period", "1", "--cache", str(tmp_path / "c")]
    train.main([*common, "--out", str(tmp_path / "plain")])
    train.main([*common, "--out", str(tmp_path / "workers"), "--workers", "2"])
    assert_same_bits(weights(tmp_path / "plain"), weights(tmp_path / "workers"))


def test_ways_of_computing_change_the_numbers_little(tmp_path, tiny):
    common = ["--arch", "srresnet", "--order", "rj", "--prompt", "--preset", "smoke", "--cache", str(tmp_path / "cache")]
    train.main([*common, "--out", str(tmp_path / "plain")])
    train.main([*common, "--out", str(tmp_path / "other"), "--precision", "bf16", "--checkpointing", "--accumulate", "2"])
    a, b = (weights(tmp_path / name)["raw"] for name in ("plain", "other"))
    apart = max((a[key] - b[key]).abs().max().item() for key in a)
    assert 0 < apart < 5e-3                                        # bf16 was at work; ten steps of 2e-4


@pytest.mark.parametrize("arch, prompt", KINDS)
def test_checkpointing_gives_the_same_gradients(arch, prompt):
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = mioir.build_model(arch, prompt, **SMALL[arch]).train()
        if recompute:
            train.recompute_blocks(model)
        torch.manual_seed(1)                                       # drop path's draws
        model(torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 4])).mean().backward()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("argv, words", [
    (["--precision", "fp16"], ["fp16", "fp32", "bf16"]),
    (["--accumulate", "3"], ["3", "divide"]),
    (["--accumulate", "0"], ["--accumulate", "1"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--arch", "classifier", "--prompt"], ["classifier", "--prompt"]),
    (["--period", "0"], ["--period", "at least 1"]),
])
def test_flags_that_cannot_work_are_refused(tmp_path, argv, words):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    line = str(stopped.value.code)
    assert line.startswith("train.py: ") and "\n" not in line and all(word in line for word in words)


@pytest.mark.parametrize("arch", train.RECIPES)
@pytest.mark.parametrize("seq", ([], ["--seq"]))
def test_the_printed_plan_is_the_papers(arch, seq, capsys):
    if arch == "classifier" and seq:
        pytest.skip("the classifier sees all tasks at once")
    train.main(["--arch", arch, *seq, "--preset", "paper", "--print-plan"])
    said = capsys.readouterr().out
    recipe = train.RECIPES[arch]
    for fact in (recipe["optimizer"], f"total batch {recipe['batch']}", f"crop {recipe['crop']}", "lr 0.0002"):
        assert fact in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][1:]
    periods = {"classifier": 4}.get(arch, 10)
    assert sum(int(row[2]) for row in rows) == periods * recipe["period"]
    assert [row[3] for row in rows] == ([f"1 x {recipe['period']}"] * 6 + [f"4 x {recipe['period']}"] if seq else
                                        [f"{periods} x {recipe['period']}"])
    if seq:
        assert [row[1].split() for row in rows][-1] == [train.LETTERS[c] for c in recipe["order"]]


def test_the_period_scales_the_schedule(capsys):
    train.main(["--arch", "srresnet", "--seq", "--period", "7", "--print-plan"])                   # the demo, without data
    assert "4 x 7 |" in (said := capsys.readouterr().out) and "total: 70 iterations" in said
