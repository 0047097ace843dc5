"""torch.export and torch.compile: one graph for every height and width."""
import pytest
import torch

import mioir
from bench import VARIANTS, error_elsewhere, export_free
from reference import VARIANTS as PUBLISHED

# Few blocks, but of every kind: shifted and not, with modulator, at the finest and the coarsest level.
FEW = {"srresnet": dict(width=8, blocks=3),
       "swinir": dict(dim=8, depths=(2,), heads=2, width=8),
       "restormer": dict(dim=8, blocks=(1, 0, 0, 1), refinement=0, heads=(1, 2, 2, 4)),
       "uformer": dict(dim=8, depths=(2, 0, 0, 0, 1, 0, 0, 0, 1), heads=(2,) * 9),
       "promptir": dict(dim=8, blocks=(1, 0, 0, 0), refinement=0, heads=(1, 2, 2, 4), prompt_dims=(4, 4, 8),
                        prompt_sizes=(8, 8, 4))}


def tiny(arch, prompt):
    torch.manual_seed(0)
    return mioir.build_model(arch, prompt, **FEW[arch]).eval()


@pytest.mark.parametrize("arch, prompt, multiple", [
    ("srresnet", "ep", 1), ("swinir", "ap", 8), ("restormer", "ap", 8), ("uformer", None, 128),
    ("promptir", None, 8)])
def test_an_exported_graph_is_right_on_another_size(arch, prompt, multiple):
    """Each backbone and each kind of prompt; all fourteen: python tests/bench.py graphs."""
    model, task = tiny(arch, prompt), torch.tensor([3]) if prompt == "ep" else None
    graph = export_free(model, (task,), multiple)
    assert error_elsewhere(graph.module(), model, (task,), multiple) < 1e-5


def test_an_exported_classifier_is_right_on_another_size():
    model = mioir.TaskClassifier(8).eval()
    assert error_elsewhere(export_free(model, (), 1).module(), model, (), 1) < 1e-5


def test_the_bench_exports_all_fourteen_variants():
    assert {f"{arch}-{prompt or 'none'}" for arch, prompt in VARIANTS} == set(PUBLISHED)


def test_a_compiled_swinir_is_one_graph_of_free_size_without_a_loop_over_windows():
    """80 windows, but fewer than 300 operations. The backend only counts them."""
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward
    model, x = tiny("swinir", None), torch.rand(1, 3, 64, 80)
    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert len(sizes) == 1 and sizes[0] < 300
