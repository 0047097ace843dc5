"""tests/published.py is the published code, as far as outputs, gradients and drop path can tell."""
import ast
from pathlib import Path

import pytest
import torch

import mioir
import published
from bench import by_published_names
from reference import OUTPUTS, VARIANTS, published_input, published_prompts, published_state
from test_models import small

@pytest.mark.parametrize("variant", ("srresnet-none", "swinir-ap", "uformer-ep"))     # test_models has all, of ours
@torch.no_grad()
def test_the_transcription_gives_the_golden_outputs(variant):
    arch, prompt = variant.split("-")
    x, rows = published_input(variant), VARIANTS[variant]["rows"]
    p = x if prompt == "ap" else None
    if prompt == "ep":
        p = torch.from_numpy(published_prompts())[rows][:, None]
    y = published.FORWARD[arch](published_state(variant), x, p)[:, :, ::4, ::4]
    golden = torch.from_numpy(OUTPUTS[variant])
    error = (y - golden).abs().max() / golden.abs().max()
    print(f"{variant}: {error:.1e}")
    assert error < 1e-5


def test_the_transcription_shares_nothing_with_ours():
    source = Path(published.__file__).read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"functools", "torch", "torch.nn"}


@pytest.mark.parametrize("arch", mioir.ARCHS)
def test_a_training_step_has_the_gradients_of_ours(arch):
    """In evaluation mode, where drop path is off; every parameter, brought to the same names."""
    ours = small(arch, None if arch == "promptir" else "ep")
    theirs = published.Published(arch, by_published_names(arch, ours, ours.state_dict()), getattr(ours, "prompts", None))
    size = 128 if arch == "uformer" else 32
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        y = model.eval()(x, torch.tensor([3, 5]))
        (y - x.flip(0)).abs().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = by_published_names(arch, ours, gradients)
    assert expected.keys() == theirs.w.keys()
    for name, parameter in theirs.w.items():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-3 * scale + 1e-7, name


@pytest.mark.parametrize("arch", ["swinir", "uformer"])
def test_drop_path_has_the_probabilities_of_ours(arch):
    """At the paper's sizes. Both were written from the published code."""
    with torch.device("meta"):
        ours = mioir.build_model(arch)
    in_ours = [module.probability for module in ours.modules()
               if isinstance(module, mioir.DropPath)]
    assert in_ours[::2] == in_ours[1::2]                    # a block's two branches have one probability
    state = by_published_names(arch, ours, ours.state_dict())
    if arch == "uformer":
        in_theirs = published.uformer_drops(state)
    else:
        in_theirs = published.rising(36)
    assert in_ours[::2] == pytest.approx(in_theirs, abs=1e-7)
