"""README's "What to copy": each symbol, lifted with what README says that it needs into an empty file, runs with torch alone."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
ORDER = ("mioir.py", "degrade.py", "eval.py", "train.py")                # what each may need stands before it
README = (ROOT / "README.md").read_text()
SECTION = re.search(r"## What to copy\n(.*?)\n## ", README, re.DOTALL)[1]
HEADER = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]         # the imports that all share
ROWS = {symbol: (file, needs) for symbol, file, needs in re.findall(r"^\| `(\w+)` \| (\w+\.py) \| (.*) \|$", SECTION, re.MULTILINE)}
GROUPS = {group: re.findall(r"`(\w+)`", names) for group, names in re.findall(r"(\*\w+\*): ([^;.]*)[;.]", SECTION)}
# {symbol: lines that must run}
COPY = {
    "PromptPath": ("prompt = PromptPath(1, {'a': (0, 8)}, 64)(torch.rand(2, 1, 64, 64))\n"
                   "assert modulate(torch.rand(2, 8, 4, 4), prompt, 'a').shape == (2, 8, 4, 4)"),
    "SRResNet": ("assert SRResNet('ep', 8, 2)(torch.rand(1, 3, 9, 9), torch.tensor([3])).shape == (1, 3, 9, 9)"),
    "Restormer": ("assert Restormer('ep', 8, (1, 1, 1, 1), 1, (1, 1, 2, 2))(torch.rand(1, 3, 16, 24), torch.tensor([0])).shape == (1, 3, 16, 24)"),
    "PromptIR": ("assert PromptIR(None, 8, (1, 1, 1, 1), 1, (1, 1, 2, 2), prompt_dims=(8, 8, 8))(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)"),
    "SwinIR": ("assert SwinIR('ap', 12, (2,), 2)(torch.rand(1, 3, 16, 24)).shape == (1, 3, 16, 24)"),
    "Uformer": ("assert Uformer(None, 8, (1,) * 9)(torch.rand(1, 3, 128, 256)).shape == (1, 3, 128, 256)"),
    "TaskClassifier": ("assert TaskClassifier(8)(torch.rand(2, 3, 32, 32)).shape == (2, 7)"),
    "restore": ("class Same(nn.Module):\n    multiple, overlap, context = 8, 40, 16\n"
                "    def forward(self, x, task):\n        return x\n"
                "x = torch.rand(1, 3, 70, 90); assert torch.allclose(restore(Same(), x, tile=64), x, atol=1e-6)\n"
                "class Prompted(Same):\n    prompt = 'ep'\n    def read_prompt(self, x, task):\n        return task\n"
                "    def forward(self, x, prompt):\n        return x\n"
                "assert restore(Prompted(), x, 'noise', tile=64).shape == x.shape"),
    "gaussian_blur": ("assert gaussian_blur(torch.rand(2, 3, 30, 30), 9, torch.tensor([1.0, 2.0])).shape == (2, 3, 30, 30)"),
    "jpeg": ("assert jpeg(torch.rand(2, 3, 30, 30), 40).shape == (2, 3, 30, 30)"),
    "rain_streaks": ("assert rain_streaks(torch.rand(2, 1, 64, 64) * 256, 90, 5, 30, 10).max() == 1"),
    "add_haze": ("assert add_haze(torch.rand(1, 3, 16, 16), torch.rand(1, 1, 4, 4), 0.9, 1.5).shape == (1, 3, 16, 16)"),
    "dead_leaves": ("image, depth = dead_leaves(40, 50, torch.Generator().manual_seed(1))\n"
                    "assert image.shape == (1, 3, 40, 50) and depth.shape == (1, 1, 40, 50)"),
    "psnr": ("a = np.zeros((20, 30, 3), np.uint8); assert round(psnr(a, a + 16), 2) == 24.05"),
    "ssim": ("a = np.zeros((20, 30, 3), np.uint8); assert ssim(a, a) == 1"),
    "lr_at": ("assert lr_at(1, (10, 10), 2e-4, 1e-7) == 2e-4 and lr_at(11, (10, 10), 2e-4, 1e-7) == 1e-7"),
}


def definitions():
    """{(file, symbol): (its place, source)} of everything at the top level of the modules."""
    found = {}
    for name in ORDER:
        source = (ROOT / name).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            names = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for symbol in names:
                found[name, symbol] = ((ORDER.index(name), first), "\n".join(lines[first - 1:node.end_lineno]))
    return found


def test_the_readmes_table_lists_what_is_lifted_here():
    assert ROWS.keys() == COPY.keys()


@pytest.mark.parametrize("symbol", COPY)
def test_a_lifted_symbol_runs_with_what_the_readme_says_it_needs(symbol):
    file, needs = ROWS[symbol]
    for group, names in GROUPS.items():
        needs = needs.replace(group, " ".join(f"`{name}`" for name in names))
    found, wanted = definitions(), []
    for name in [*re.findall(r"`(\w+)`", needs), symbol]:      # from its own file, or one that this may import from
        wanted.append(next(found[other, name] for other in ORDER[ORDER.index(file)::-1] if (other, name) in found))
    code = HEADER + "\n\n".join(source for _, source in sorted(wanted)) + "\n\n" + COPY[symbol]
    exec(compile(code, f"{symbol}, lifted", "exec"), {"__name__": "lifted"})


def test_the_readmes_network_of_ones_own_runs_and_is_restored():
    """PromptPath in a reader's own U-Net, as the README shows it; whole and in tiles, at any size."""
    code = re.search(r"```python\n(import torch, torch.nn as nn.*?)```", README, re.DOTALL)[1]
    space = {}
    exec(code, space)
    assert space["y"].shape == (1, 3, 201, 93)
    tiled = space["restore"](space["model"], space["photo"], 2, tile=160)
    assert tiled.shape == (1, 3, 201, 93) and (tiled - space["y"]).abs().max() < 1e-5


def test_the_readmes_eighth_task_is_trained_and_evaluated(tmp_path):
    """Snow in a dozen lines of a script of one's own: prompt, order letter, ranges, table, curves."""
    code = re.search(r"```python\n(import sys, torch, mioir.*?)```", README, re.DOTALL)[1]
    (tmp_path / "snow.py").write_text(code)
    import mioir
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def snow(*argv, code=0):
        done = subprocess.run([sys.executable, "snow.py", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr
    said = snow("--arch", "srresnet", "--seq", "--prompt", "--order", "nw", "--preset", "smoke", "--out", "out")
    assert said.endswith("next: python snow.py out/last.pt\n")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| snow |" in " ".join(table.split()) and "+snow" in table
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert saved["raw"]["prompts"].shape == (8, 128, 128)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), (90, 120, 60)).save(tmp_path / "photos" / "a.png")
    assert "| snow " in snow("out", "--images", "photos", "--output", "strips.png")        # a run's folder, too
    # The shipped classifier has not met snow.
    assert "or name the task" in snow("out/last.pt", "--input", "photos/a.png", "--output", "b.png", code=1)
    with pytest.raises(ValueError, match="trained on 8 tasks, and this program knows 7; run it by the script"):
        mioir.load_model(tmp_path / "out" / "last.pt")
    # A checkpoint of seven tasks loads beside eight, too.
    snow(str(ROOT / "assets" / "restormer.pt"), "--input", "photos/a.png", "--output", "b.png", "--task", "noise")


def test_mioir_imports_torch_alone():
    """At its top; restore imports numpy and pillow for who hands it pictures that are no tensors."""
    modules = {m for node in ast.parse((ROOT / "mioir.py").read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
               for m in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) == {"torch"}

