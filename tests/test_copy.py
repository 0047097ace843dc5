"""README's "What to copy": each symbol, lifted with what it needs into an empty file, runs with torch alone.

    python tests/test_copy.py        # prints the README's table
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADER = ("import functools, hashlib, math, re\nimport torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"
          "from torch.utils.checkpoint import checkpoint\n")
BACKBONE = ["Extractor", "PromptPath", "unmodulated", "random_prompts", "reflect_pad", "TASKS", "Backbone"]
WINDOW = ["to_windows", "from_windows", "relative_position_index", "shift_mask", "attend", "WindowAttention", "DropPath", "WindowBlock",
          "WindowStage", "init_linears"]
RESTORMER = ["conv3x3", "LayerNorm2d", "ChannelAttention", "GatedFeedForward", "RestormerBlock", "half", "double"]
# symbol: (file, what else it needs, a line that must run)
COPY = {
    "PromptPath": ("mioir.py", ["Extractor"],
                   "m = PromptPath(1, {'a': (0, 8)}, 64)(torch.rand(2, 1, 64, 64)); assert m('a', torch.rand(2, 8, 4, 4)).shape == (2, 8, 4, 4)"),
    "SRResNet": ("mioir.py", [*BACKBONE, "conv3x3", "ResidualBlock"],
                 "assert SRResNet('ep', 8, 2)(torch.rand(1, 3, 9, 9), torch.tensor([3])).shape == (1, 3, 9, 9)"),
    "SwinIR": ("mioir.py", [*BACKBONE, *WINDOW, "conv3x3", "LayerNorm2d", "Mlp", "SwinGroup"],
               "assert SwinIR('ap', 12, (2,), 2)(torch.rand(1, 3, 16, 24)).shape == (1, 3, 16, 24)"),
    "Restormer": ("mioir.py", [*BACKBONE, *RESTORMER],
                  "assert Restormer('ep', 8, (1, 1, 1, 1), 1, (1, 1, 2, 2))(torch.rand(1, 3, 16, 24), torch.tensor([0])).shape == (1, 3, 16, 24)"),
    "Uformer": ("mioir.py", [*BACKBONE, *WINDOW, "conv3x3", "LeFF"],
                "assert Uformer(None, 8, (1,) * 9)(torch.rand(1, 3, 128, 256)).shape == (1, 3, 128, 256)"),
    "PromptIR": ("mioir.py", [*BACKBONE, *RESTORMER, "Restormer", "PromptGenerator", "PromptInteraction"],
                 "assert PromptIR(None, 8, (1, 1, 1, 1), 1, (1, 1, 2, 2), prompt_dims=(8, 8, 8))(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)"),
    "TaskClassifier": ("mioir.py", ["TASKS"], "assert TaskClassifier(8)(torch.rand(2, 3, 32, 32)).shape == (2, 7)"),
    "restore": ("mioir.py", ["reflect_pad", "pad_for", "_restore_tiled", "_starts", "_trapezoid"],
                "m = nn.Identity(); m.multiple, m.square, m.overlap, m.context = 8, False, 40, 16\n"
                "m.modulation = lambda x, task: None; m.forward = lambda x, modulate: x\n"
                "x = torch.rand(1, 3, 70, 90); assert torch.allclose(restore(m, x, tile=64), x, atol=1e-6)"),
    "gaussian_blur": ("degrade.py", ["quantize", "per_image", "reflect_pad"],
                      "assert gaussian_blur(torch.rand(2, 3, 30, 30), 9, torch.tensor([1.0, 2.0])).shape == (2, 3, 30, 30)"),
    "jpeg": ("degrade.py", ["quantize", "per_image", "_LUMA", "_CHROMA", "_jpeg_block"],
             "assert jpeg(torch.rand(2, 3, 30, 30), 40).shape == (2, 3, 30, 30)"),
    "rain_streaks": ("degrade.py", ["per_image", "reflect_pad", "_SIGMA_11", "_WIDTH_TAPS", "_width_taps", "streak_kernels", "_rain_layer",
                                    "_fast_size"],
                     "assert rain_streaks(torch.rand(2, 1, 64, 64) * 256, 90, 5, 30, 10).max() == 1"),
    "add_haze": ("degrade.py", ["quantize", "per_image"],
                 "assert add_haze(torch.rand(1, 3, 16, 16), torch.rand(1, 1, 4, 4), 0.9, 1.5).shape == (1, 3, 16, 16)"),
    "lr_at": ("train.py", [], "assert lr_at(1, (10, 10), 2e-4, 1e-7) == 2e-4 and lr_at(11, (10, 10), 2e-4, 1e-7) == 1e-7"),
}


def definitions():
    """{symbol: (file, first line, last line, source)} of everything at the top level of the modules."""
    found = {}
    for name in ("train.py", "degrade.py", "mioir.py"):
        source = (ROOT / name).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            names = [node.name] if hasattr(node, "name") else [
                t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for symbol in names:
                found[symbol] = (name, first, node.end_lineno, "\n".join(lines[first - 1:node.end_lineno]))
    return found


def table():
    found = definitions()
    rows = ["| symbol | file, lines | needs besides torch |", "|---|---|---|"]
    for symbol, (_, needs, _) in COPY.items():
        name, first, last, _ = found[symbol]
        rows.append(f"| `{symbol}` | {name} {first}-{last} | {', '.join(f'`{n}`' for n in needs) or 'nothing'} |")
    return "\n".join(rows)


@pytest.mark.parametrize("symbol", COPY)
def test_a_lifted_symbol_runs_with_torch_alone(symbol, tmp_path):
    found = definitions()
    wanted = sorted((found[name] for name in [*COPY[symbol][1], symbol]), key=lambda d: (d[0] == "degrade.py", d[1]))
    (tmp_path / "lifted.py").write_text(HEADER + "\n\n".join(source for *_, source in wanted) + "\n\n" + COPY[symbol][2] + "\n")
    code = (tmp_path / "lifted.py").read_text()
    exec(compile(code, f"{symbol}, lifted", "exec"), {"__name__": "lifted"})


def test_the_readmes_table_is_current():
    assert table() in (ROOT / "README.md").read_text()


def test_mioir_imports_torch_alone():
    modules = {m for node in ast.walk(ast.parse((ROOT / "mioir.py").read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
               for m in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) == {"torch"}


if __name__ == "__main__":
    print(table())
