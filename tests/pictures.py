"""Makes the pictures in assets/ anew, from the weights that ship and the photographs beside them.

    python tests/pictures.py                                 # box_row, box_worst, box_strips, box_prompts
    python tests/pictures.py runs/restormer-seq-ep-demo      # demo_table, demo_strips, demo_run, of that run

Prints the PSNR of what it shows. Not collected by pytest.
"""
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation                                                                       # noqa: E402
from degrade import degrade, read_image, seeded, to_image, to_tensor                            # noqa: E402
from mioir import load_model, restore                                                    # noqa: E402

ASSETS = ROOT / "assets"
# Of each task a photograph, the number of its draw, and the part that is shown: centre (y, x) and edge, in pixels.
SHOWN = {"sr": ("citrus", 3, (110, 165), 110), "blur": ("bridge", 2, (120, 130), 110), "noise": ("coffee", 1, (120, 160), 150),
         "jpeg": ("tulips", 19, (100, 160), 74), "rain": ("blossom", 1, (120, 160), 150), "haze": ("cliff", 1, (130, 150), 150),
         "dark": ("coffee", 7, (120, 160), 180)}
ROWS = ("degraded", "restored", "truth")


def versions(model, task, lq, gt):
    """[degraded, restored, truth] as pictures; prints what the model gains."""
    pictures = [to_image(lq), to_image(restore(model, lq, task)), to_image(gt)]
    before, after = evaluation.psnr(pictures[0], pictures[2]), evaluation.psnr(pictures[1], pictures[2])
    print(f"{task:5} {before:.2f} -> {after:.2f} dB ({after - before:+.2f})")
    return pictures, after - before


def row(model, edge=150):
    """One column for each task: the picture at the top of README."""
    sheet, _ = evaluation.grid(list(SHOWN), ROWS, (edge + 6, edge + 6), (110, 30))
    for column, (task, (name, draw, (y, x), part)) in enumerate(SHOWN.items()):
        gt = to_tensor(read_image(ASSETS / "photos" / f"{name}.png"))
        pictures, _ = versions(model, task, degrade(gt, task, generator=seeded("row", task, draw)), gt)
        for k, picture in enumerate(pictures):
            cut = Image.fromarray(picture[y - part // 2:y + part // 2, x - part // 2:x + part // 2])
            sheet.paste(cut.resize((edge, edge), Image.Resampling.NEAREST), (110 + column * (edge + 6), 30 + k * (edge + 6)))
    evaluation.save_sheet(sheet, ASSETS / "box_row.jpg")


def worst(model):
    """For each task the one of the six photographs that gains least."""
    photos = [(to_tensor(read_image(path)), None) for path in sorted((ASSETS / "photos").glob("*.png"))]
    least = {}
    for task, examples in evaluation.validation_pairs(photos).items():
        least[task] = [min(examples, key=lambda pair: versions(model, task, *pair)[1])]
    evaluation.task_strips(ASSETS / "box_worst.jpg", model, least, "cpu")


def demo(run):
    """table.png, curves.png and strips.png of a run: two of them alone, and all three side by side."""
    table, curves, strips = (Image.open(run / f"{name}.png").convert("RGB") for name in ("table", "curves", "strips"))
    table.save(ASSETS / "demo_table.png")
    strips.save(ASSETS / "demo_strips.jpg", quality=88)
    width = max(table.width, curves.width)
    height = table.height + curves.height
    strips = strips.resize((round(strips.width * height / strips.height), height), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (width + strips.width, height), "white")
    for picture, place in ((table, (0, 0)), (curves, (0, table.height)), (strips, (width, 0))):
        sheet.paste(picture, place)
    sheet.thumbnail((1500, 1500), Image.Resampling.LANCZOS)
    sheet.save(ASSETS / "demo_run.jpg", quality=88)


def main():
    if sys.argv[1:]:
        return demo(Path(sys.argv[1]))
    model, _ = load_model(evaluation.MODEL)
    row(model)
    worst(model)
    photos = str(ASSETS / "photos")
    for flags in (["--output", str(ASSETS / "box_strips.jpg")],
                  ["--prompt-matrix", "--output", str(ASSETS / "box_prompts.png")]):
        evaluation.main(["--images", photos, "--overwrite", *flags])


if __name__ == "__main__":
    main()
