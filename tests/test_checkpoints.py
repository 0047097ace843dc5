"""Files: ours and published ones are read; torn, foreign and hostile ones are refused in one line that names them."""
import time

import numpy as np
import pytest
import torch

import mioir
from mioir import ARCHS, TaskClassifier, build_model, load_model, read_checkpoint, recognise
from reference import published_state
from test_models import KINDS, SMALL, small


def checkpoint(arch="srresnet", prompt="ep", **changes):
    """As train.py writes it, but without its optimiser."""
    model = small(arch, prompt)
    raw, ema = model.state_dict(), {name: value / 2 for name, value in model.state_dict().items()}
    return {"mioir": 1, "arch": arch, "prompt": prompt, "sizes": dict(SMALL[arch]), "raw": raw, "ema": ema, "stage": 1, "iteration": 3,
            "facts": {"order": [["noise"], ["noise", "jpeg"]], "periods": [[4], [4, 4]]}, "table": [("input", {"noise": 20.0})], **changes}


def refused(path, load=read_checkpoint):
    """The one line of the error, which names the file."""
    with pytest.raises(ValueError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("arch, prompt", KINDS)
def test_a_checkpoint_rebuilds_its_model_raw_and_average(tmp_path, arch, prompt):
    saved, path = checkpoint(arch, prompt), tmp_path / "last.pt"
    torch.save(saved, path)
    for given in (path, tmp_path):                         # a run's folder stands for its last.pt
        for weights in ("raw", "ema"):
            model, info = load_model(given, weights)
            assert all(torch.equal(value, saved[weights][name]) for name, value in model.state_dict().items())
            assert (info["arch"], info["prompt"], info["published"], info["stage"]) == (arch, prompt, False, 1)
            assert not any(module.training for module in model.modules())      # drop path would damage pictures


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_kinds_of_floats_load_into_a_model_of_the_usual_kind(tmp_path, dtype):
    saved = checkpoint()
    for weights in ("raw", "ema"):
        saved[weights] = {name: value.to(dtype) for name, value in saved[weights].items()}
    torch.save(saved, tmp_path / "m.pt")
    model, _ = load_model(tmp_path / "m.pt")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.conv_first.weight, saved["raw"]["conv_first.weight"].float())


@pytest.mark.parametrize("default", (torch.float64, "meta"))
def test_what_a_caller_set_as_default_type_or_device_changes_no_weights_and_no_result(tmp_path, default):
    torch.save(checkpoint(), tmp_path / "m.pt")
    x = torch.rand(1, 3, 20, 24)
    expected = mioir.restore(load_model(tmp_path / "m.pt")[0], x, "noise")
    images = build_model("srresnet", "ep", **SMALL["srresnet"]).prompts
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        model, _ = load_model(tmp_path / "m.pt")
        for task in ("noise", 1, "noise:1", torch.tensor([1], device="cpu")):
            y = mioir.restore(model, x, task, tile=0)
            assert y.dtype == torch.float32 and (y - expected).abs().max() < 1e-5, task
        grey = mioir.restore(model, x[0, 0].numpy(), "noise")
        tiled = mioir.restore(build_model("srresnet", width=8, blocks=1).to_empty(device="cpu"), x.repeat(1, 1, 5, 5), tile=96)
        if default != "meta":
            assert torch.equal(build_model("srresnet", "ep", **SMALL["srresnet"]).prompts.float(), images)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert grey.shape == (20, 24) and tiled.shape == (1, 3, 100, 120)


def changed(weights, name, change):
    """A checkpoint one tensor of which is changed."""
    saved = checkpoint()
    saved[weights] = dict(saved[weights])
    saved[weights][name] = change(saved[weights][name])
    return saved


def without(key):
    saved = checkpoint()
    del saved[key]
    return saved


def consistent():
    """A megabyte whose sizes fit it, but whose windows of 300 x 300 pixels need an index of 65 gigabytes."""
    sizes = SMALL["swinir"] | {"depths": (1,), "heads": 1, "window": 300}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model("swinir", **sizes).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return checkpoint("swinir", None) | {"sizes": sizes, "raw": state, "ema": state}


NAN = torch.tensor(float("nan"))
SIZES = SMALL["srresnet"]
BAD = {
    **{f"no {key}": (lambda key=key: without(key), f"key '{key}' is missing") for key in
       ("arch", "prompt", "sizes", "raw", "ema", "facts", "stage", "iteration", "table")},
    "arch": (lambda: checkpoint() | {"arch": "vgg"}, "vgg"), "arch 3": (lambda: checkpoint() | {"arch": 3}, "arch"),
    "prompt": (lambda: checkpoint(prompt=None) | {"prompt": "both"}, "both"), "prompt []": (lambda: checkpoint() | {"prompt": []}, "prompt"),
    "another prompt": (lambda: checkpoint(prompt=None) | {"prompt": "ap"}, "missing path"),
    "facts": (lambda: checkpoint(facts=None), "facts"), "facts {}": (lambda: checkpoint(facts={}), "'order' is missing"),
    "order": (lambda: checkpoint(facts={"order": 3, "periods": [[1]]}), "order"),
    "stage x": (lambda: checkpoint(stage="x"), "stage"), "stage 7": (lambda: checkpoint(stage=7), "stage 7 of 2"),
    "stage -1": (lambda: checkpoint(stage=-1), "stage -1"), "stage True": (lambda: checkpoint(stage=True), "stage"),
    "iteration": (lambda: checkpoint(iteration=-5), "iteration -5"), "half an iteration": (lambda: checkpoint(iteration=1.5), "iteration"),
    "table": (lambda: checkpoint(table=3), "table"), "table's row": (lambda: checkpoint(table=[({}, "a")]), "table"),
    "table's number": (lambda: checkpoint(table=[("a", {"noise": "x"})]), "table"), "short row": (lambda: checkpoint(table=[("a",)]), "table"),
    "optimizer": (lambda: checkpoint(optimizer=3), "optimizer"),
    "raw {}": (lambda: checkpoint(raw={}), "does not fit the weights"), "raw 3": (lambda: checkpoint(raw=3), "raw"), "ema of numbers": (lambda: checkpoint(ema={"a": 3}), "a is not a tensor"),
    "one lacks": (lambda: checkpoint(ema=dict(list(small("srresnet", "ep").state_dict().items())[1:])), "missing"),
    "NaN": (lambda: changed("raw", "conv_last.bias", lambda v: v * NAN), "conv_last.bias holds numbers that are not finite"),
    "NaN average": (lambda: changed("ema", "conv_last.bias", lambda v: v * NAN), "not finite"),
    "too large": (lambda: changed("raw", "conv_last.bias", lambda v: v.double() + 1e200), "not finite"),
    "whole numbers": (lambda: changed("raw", "conv_last.bias", lambda v: v.long()), "conv_last.bias is not a tensor of floats"),
    "complex": (lambda: changed("raw", "conv_last.bias", lambda v: v * 1j), "not a tensor of floats"),
    "sparse": (lambda: changed("raw", "conv_last.bias", lambda v: v.to_sparse()), "not a tensor of floats"),
    "prompts": (lambda: changed("raw", "prompts", lambda v: v[:, :64]), "mis-shaped prompts: (7, 64, 128)"),
    "prompts of eight": (lambda: changed("raw", "prompts", lambda v: torch.cat((v, v[:1]))), "trained on 8 tasks, and this program knows 7"),
    "views": (lambda: changed("raw", "blocks.0.conv1.weight", lambda v: torch.zeros(1).expand(10 ** 6, 10 ** 6)), "larger than what is stored"),
    "large windows": (consistent, "tables far larger than its weights"),
    "fewer blocks": (lambda: checkpoint(sizes=SIZES | {"blocks": 2}), "unexpected path.scale.block3.weight"),
    **{f"sizes {value}": (lambda value=value: checkpoint(sizes=value if isinstance(value, list) else SIZES | value), "size") for value in (
        [], {"x": 1}, {"blocks": 10 ** 6}, {"width": 10 ** 9}, {"width": -1}, {"width": "16"}, {"width": None}, {"blocks": 3.5},
        {"width": float("nan")}, {"prompt_width": 20000}, {"blocks": [3]}, {"width": [16]}, {"width": {"a": 1}})},
    **{f"{arch} {str(value)[:40]}": (lambda arch=arch, value=value: (c := checkpoint(arch, None)) | {"sizes": c["sizes"] | value}, "size") for arch, value in (
        ("restormer", {"dim": 20000}), ("restormer", {"heads": ()}), ("restormer", {"expansion": float("inf")}), ("restormer", {"heads": (3, 3, 3, 3)}),
        ("restormer", {"blocks": (10 ** 6,) * 4}), ("restormer", {"heads": (0, 1, 1, 1)}), ("swinir", {"window": 10 ** 4}), ("swinir", {"depths": (0,) * 10 ** 5}),
        ("swinir", {"heads": 0}), ("uformer", {"depths": ()}), ("promptir", {"prompt_sizes": (10 ** 6,) * 3}), ("promptir", {"up3_from": 9}))},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_checkpoint_that_train_did_not_write_so_is_refused_at_once(tmp_path, kind):
    make, words = BAD[kind]
    torch.save(make(), tmp_path / "m.pt")
    start = time.process_time()                            # not what the machine does besides
    for load in (read_checkpoint, load_model):             # --resume's, and everybody's
        assert words in refused(tmp_path / "m.pt", load)
    assert time.process_time() - start < 20        # 10 ** 6 blocks would take minutes, 10 ** 9 channels all memory


class Trap:
    def __reduce__(self):
        return print, ("the checkpoint ran code",)


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "No such file or directory"), (lambda p: p.write_bytes(b""), "not a checkpoint"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a checkpoint"),
    (lambda p: torch.save({"mioir": Trap()}, p), "not a checkpoint"), (lambda p: torch.save([1], p), "it holds a list"),
    (lambda p: torch.save({"fc.weight": torch.zeros(2)}, p), "none of the published models: its keys begin with fc.weight"),
    (lambda p: torch.save({"conv_hr.weight": 3}, p), "conv_hr.weight is not a tensor of floats"),
    (lambda p: torch.save({"params": 3}, p), "params holds no weights"), (lambda p: torch.save({}, p), "none of the published models"),
    (lambda p: torch.save({3: torch.zeros(2)}, p), "its keys begin with 3"),
    (lambda p: torch.save({"conv_hr.weight": torch.zeros(2)}, p), "missing"),
    (lambda p: torch.save(published_state("srresnet-ep"), p), "type7.npy")])
def test_foreign_files_are_refused_and_run_nothing(tmp_path, make, words, capsys):
    make(tmp_path / "m.pt")
    assert words in refused(tmp_path / "m.pt", load_model)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("prompts", (np.zeros((7, 128, 127), np.float32), np.full((7, 128, 128), np.nan), np.zeros((7, 128, 128), int),
                                     np.zeros((7, 128, 128), complex), np.array(["a"]), np.array({}), 3, None))
def test_prompt_images_of_another_shape_or_kind_are_refused(tmp_path, prompts):
    torch.save(published_state("srresnet-ep"), tmp_path / "m.pth")
    assert "prompt" in refused(tmp_path / "m.pth", lambda path: load_model(path, prompts=prompts))


def test_damaged_files_load_or_are_refused_in_one_line(tmp_path):
    path, random = tmp_path / "m.pt", np.random.default_rng(0)
    torch.save(checkpoint("srresnet", None), path)
    whole, refusals = path.read_bytes(), 0
    for _ in range(150):
        torn = bytearray(whole)
        head = random.random() < 0.7                       # where the pickle lies: numbers make up most of the rest
        for at in random.integers(0, 3000 if head else len(torn), random.integers(1, 6)):
            torn[at] = random.integers(256)
        path.write_bytes(torn[:random.integers(len(torn))] if random.random() < 0.2 else torn)
        try:
            load_model(path)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refusals > 30


PUBLISHED_CLASSIFIER = mioir.by_published_names("classifier", None, TaskClassifier().state_dict())
WRAPPERS = {"bare": lambda s: s, "state_dict": lambda s: {"state_dict": s, "epoch": 3}, "model": lambda s: {"model": s},
            "module.": lambda s: {f"module.{k}": v for k, v in s.items()}, "params": lambda s: {"params": s},
            "net.": lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
            "_orig_mod.": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_read_out_of_wrappers_by_our_names_and_the_published(tmp_path, wrapper):
    for name, state in (("ours", mioir.build_classifier(none=True).state_dict()), ("theirs", PUBLISHED_CLASSIFIER),
                        ("net", build_model("srresnet", "ap").state_dict())):
        torch.save(WRAPPERS[wrapper](state), tmp_path / f"{name}.pt")
        model, info = load_model(tmp_path / f"{name}.pt")
        assert info["published"] == (name == "theirs") and info["prompt"] == ("ap" if name == "net" else None)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
        with pytest.raises(ValueError, match="EMA"):
            load_model(tmp_path / f"{name}.pt", "ema")


def test_a_bare_state_dict_of_ours_tells_its_network():
    with torch.device("meta"):
        told = [recognise(build_model(arch).state_dict()) for arch in ARCHS]
    assert [(info["arch"], info["published"]) for info in told] == [(arch, False) for arch in ARCHS]
