"""Training equals the published training: losses, gradients, weights and their averages, in float64.

golden/training.npz holds what the published model classes gave for two networks from equal weights and
equal batches (reference.py has the rules): 6 iterations of one stage, whose cosine periods of 4 make the
rate restart at the sixth, then a stage of 2 with a fresh optimiser. Here train.py's own loop sees the same
batches; nothing of it is replaced but where batches come from and what is only looked at.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mioir
import train
from reference import TRAINED, training_batches, training_places, training_start

STAGES = (SimpleNamespace(tasks=mioir.TASKS, periods=(4, 4), iterations=6),
          SimpleNamespace(tasks=mioir.TASKS, periods=(4,), iterations=2))
CROP = {"srresnet": 32, "restormer": 16}


class Numbers(torch.utils.data.Dataset):
    """Stands where the stream of samples stands: which of all batches comes next."""

    def __init__(self, run, source, machine):
        self.first = sum(stage.iterations for stage in run.schedule[:run.stage])

    def __getitem__(self, t):
        return [self.first + t]


def our_names(model, published):
    """{published name: our name}: load_official is given a number for each tensor, and finds its place."""
    numbers = {name: torch.full_like(value, k) for k, (name, value) in enumerate(published.items())}
    mioir.load_official(model, numbers)
    places = {int(value.flatten()[0]): name for name, value in model.state_dict().items()}
    return {name: places[k] for k, name in enumerate(published)}


@pytest.fixture(scope="module", params=("srresnet-ap", "restormer-none"))
def trained(request, tmp_path_factory):
    """(variant, what our training gave): losses, rates, the first gradient's norm, weights after each stage."""
    variant, arch, prompt = request.param, *request.param.split("-")
    batches = training_batches(CROP[arch], sum(stage.iterations for stage in STAGES))
    start, seen = training_start(variant), {"loss": [], "lr": []}
    out = tmp_path_factory.mktemp("training") / "out"
    argv = ["--arch", arch, "--preset", "paper", "--device", "cpu", "--out", str(out), *(["--prompt", prompt] if prompt == "ap" else [])]
    out.mkdir()

    def prepared(k, *more):
        lq, gt, task = (torch.from_numpy(array) for array in batches[k])
        return lq.double(), gt.double(), task, torch.empty(2, 0)             # no drop path

    def seen_by_the_log(log, run, losses, norm, lr):
        seen["loss"].append(np.mean(losses)), seen["lr"].append(lr)
        seen.setdefault("norm", norm)

    def seen_save(run, keep=None):
        if keep:                                                          # a stage has ended
            for kind, model in (("raw", run.model), ("ema", run.ema)):
                state = model.state_dict()
                seen[f"{kind}{run.stage - 1}"] = {name: state[names[name]].flatten().clone() for name in start}

    zero = dict.fromkeys(mioir.TASKS, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in dict(Stream=Numbers, make_batch=prepared, finish=lambda *a: None,
                                   builtin_images=lambda *a: [], validation_pairs=lambda *a: {}, show_table=lambda *a: None,
                                   mean_psnr=lambda *a: zero, input_psnr=lambda *a: zero).items():
            patch.setattr(train, name, stand_in)
        patch.setattr(train.Run, "save", seen_save)
        patch.setattr(train.Log, "add", seen_by_the_log)
        args = train.parse(argv)
        machine = train.Machine(args)
        run = train.Run(args, machine.device)
        run.schedule, run.recipe["batch"] = STAGES, 2
        names = our_names(run.model, start)
        mioir.load_official(run.model, start)
        run.model.double(), run.ema.double()
        run.ema.load_state_dict(run.model.state_dict())
        torch.set_default_dtype(torch.float64)
        log = train.Log(run)
        try:
            train.run_stages(run, machine.wrap(run.model), [None], machine, log)
        finally:
            torch.set_default_dtype(torch.float32)
            log.close()
    return variant, seen, start


def test_losses_rates_and_the_gradients_norm_equal_the_published(trained):
    variant, ours, _ = trained
    for what, bound in (("loss", 1e-9), ("lr", 1e-12), ("norm", 1e-9)):
        assert np.array(ours[what]) == pytest.approx(TRAINED[f"{variant}/{what}"], rel=bound), what


@pytest.mark.parametrize("kind", ("raw0", "ema0", "raw1", "ema1"))
def test_every_tensor_has_moved_as_the_published_one(trained, kind):
    """Raw and averaged, after each stage; differences relative to how far all weights moved: 1e-7 of that."""
    variant, ours, start = trained
    golden, moved, apart = TRAINED[f"{variant}/{kind}"], [], []
    for (name, before), theirs in zip(start.items(), golden):
        at = training_places(name, before.numel())[:len(theirs)]
        mine, before = ours[kind][name].numpy()[at], before.flatten().double().numpy()[at]
        moved.append(theirs - before), apart.append(mine - theirs)
    moved, apart = np.array(moved), np.array(apart)
    assert np.linalg.norm(apart) <= 1e-7 * np.linalg.norm(moved)
    assert (np.abs(apart).max(1) <= 1e-4 * np.linalg.norm(moved, axis=1).clip(np.median(np.abs(moved)))).all()
