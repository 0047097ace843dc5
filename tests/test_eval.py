"""Metrics equal to the published ones, and the real command."""
import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import degrade
import eval as evaluation
import mioir
from degrade import TASKS
from reference import CASES, DEGRADED, published_prompts, published_state

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", [case for case in CASES if "psnr_crop4" in CASES[case]])
def test_psnr_and_ssim_equal_the_published_ones(case):
    assert abs(evaluation.psnr(DEGRADED[case], DEGRADED["gt"]) - CASES[case]["psnr_crop4"]) < 1e-4
    assert abs(evaluation.ssim(DEGRADED[case], DEGRADED["gt"]) - CASES[case]["ssim_crop4"]) < 1e-4


def test_metrics_of_equal_images_and_of_unfit_ones():
    a = DEGRADED["gt"]
    assert evaluation.psnr(a, a) == float("inf") and evaluation.ssim(a, a) == pytest.approx(1)
    for b in (a[:50], a.astype(np.float32), a[:, :, 0]):
        with pytest.raises(ValueError, match="uint8"):
            evaluation.psnr(a, b)
    with pytest.raises(ValueError, match="nothing left"):
        evaluation.psnr(a[:8], a[:8])


def test_numbers_too_small_to_matter_become_zeros():
    torch.set_flush_denormal(False)
    assert (torch.tensor([1e-30]) * 1e-10).item() > 0
    evaluation.tune_cpu()
    assert (torch.tensor([1e-30]) * 1e-10).item() == 0


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished / "last.pt"


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (67, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*argv):
    evaluation.main([str(a) for a in argv])


def test_the_table_has_every_task_both_splits_and_a_strip(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "builtin_images", functools.partial(evaluation.builtin_images, 2, 64))
    run(checkpoint, "--output", tmp_path / "strips.png")
    said = capsys.readouterr().out
    in_dis, out_dis = said.split("Out-Dis")
    assert all(f"| {task} " in in_dis for task in TASKS) and "| mean" in in_dis
    assert all(f"| {task} " in out_dis for task in TASKS if task != "sr") and "| sr " not in out_dis
    assert Image.open(tmp_path / "strips.png").size[1] > 7 * 190
    model, _ = mioir.load_model(checkpoint)                    # the table's PSNR is the model's
    pairs = evaluation.validation_pairs(evaluation.builtin_images())
    row = [cell.strip() for cell in next(line for line in in_dis.splitlines() if "| rain" in line).split("|")]
    assert float(row[3]) == pytest.approx(evaluation.mean_psnr(model, {"rain": pairs["rain"]}, "cpu")["rain"], abs=0.006)


def test_a_photo_is_restored_at_its_size_by_the_real_command(checkpoint, picture):
    output, task = picture.with_name("restored.png"), "noise:0.7,jpeg:0.3"
    done = subprocess.run([sys.executable, "-W", "error", str(ROOT / "eval.py"), str(checkpoint), "--input", str(picture),
                           "--output", str(output), "--task", task], capture_output=True, text=True, cwd=picture.parent)
    assert done.returncode == 0 and done.stderr == ""
    assert Image.open(output).size == (90, 67)
    model, _ = mioir.load_model(checkpoint)
    x = evaluation.to_tensor(degrade.read_image(picture))
    expected = evaluation.restored(model, x, evaluation.parse_task(task), "cpu")
    assert np.abs(np.asarray(Image.open(output)).astype(int) - expected).max() <= 1


def test_a_classifiers_table_counts_what_it_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "builtin_images", functools.partial(evaluation.builtin_images, 2, 64))
    classifier = mioir.TaskClassifier()
    with torch.no_grad():
        classifier.head.bias.zero_()[TASKS.index("rain")] = 100.0          # says rain, whatever it sees
    torch.save({"mioir": 1, "arch": "classifier", "prompt": None, "sizes": {}, "raw": classifier.state_dict(),
                "ema": classifier.state_dict(), "facts": {"order": [list(TASKS)], "periods": [[1]]}, "stage": 1, "iteration": 0, "table": []}, tmp_path / "classifier.pt")
    run(tmp_path / "classifier.pt")
    said = capsys.readouterr().out
    assert "accuracy 14.3 %" in said and "accuracy 16.7 %" in said      # one of seven; Out-Dis lacks sr
    row = next(line for line in said.splitlines() if line.startswith("| haze"))
    assert [int(n) for n in row.split("|")[2:-1]] == [2 * (task == "rain") for task in TASKS]


def test_published_checkpoints_work_with_no_flag_but_their_prompts(tmp_path, picture):
    """The picture is that of the published weights with the published image of "haze", and of no other."""
    torch.save({"params": published_state("srresnet-ep")}, tmp_path / "SRResNet_S_EP.pth")
    np.save(tmp_path / "type7.npy", published_prompts())
    run(tmp_path / "SRResNet_S_EP.pth", "--prompts", tmp_path / "type7.npy", "--input", picture,
        "--output", tmp_path / "r.png", "--task", "haze")
    model, x = mioir.build_model("srresnet", "ep"), degrade.to_tensor(degrade.read_image(picture))
    mioir.load_official(model, published_state("srresnet-ep"), published_prompts())
    with torch.no_grad():
        haze, rain = (degrade.to_image(model.eval()(x, torch.tensor([TASKS.index(task)]))) for task in ("haze", "rain"))
    assert np.array_equal(degrade.read_image(tmp_path / "r.png"), haze) and not np.array_equal(rain, haze)


def test_the_matrix_picture_paints_gains_green_and_losses_red(tmp_path):
    evaluation.matrix_picture(tmp_path / "m.png", "title", ["a", "b"], [("input", [20.0, 20.0]), ("1", [25.0, 15.0])])
    pixels = np.asarray(Image.open(tmp_path / "m.png")).astype(int)
    better, worse = pixels[66 + 34 + 6, 190 + 8], pixels[66 + 34 + 6, 190 + 78 + 8]
    assert better[1] > better[0] + 30 and worse[0] > worse[1] + 30


def test_curves_count_iterations_over_all_stages_and_pass_over_torn_lines(tmp_path):
    lines = [{"stage": 1, "iteration": 20, "loss": {"rain": 0.1}}, {"stage": 1, "psnr": {}}, [1], {"stage": 9, "iteration": 1, "loss": {"rain": 1}},
             {"stage": 1, "iteration": 30, "loss": {"rain": 1.0}}, {"stage": 1, "iteration": 30, "loss": {"rain": 0.01}},
             {"stage": 2, "iteration": 20, "loss": {"rain": 0.01, "jpeg": 0.0}}, {"stage": 2, "iteration": 30, "loss": {"rain": float("nan")}}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"stage": 2, "itera'
    (tmp_path / "log.jsonl").write_bytes(text.encode() + bytes(64) + b"\xff\n")
    begins, rates = {"a": 0, "b": 40}, [(1, 2e-4), (40, 0.0), (41, 2e-4), (80, 0.0)]
    losses = evaluation.read_curves(tmp_path / "log.jsonl", begins)
    assert losses == {"rain": [(20, -1), (30, -2), (60, -2)], "jpeg": [(60, -12)]}
    for log in ("log.jsonl", "no log"):
        evaluation.curves_picture(tmp_path / "c.png", "title", tmp_path / log, rates, begins)
    evaluation.curves_picture(tmp_path / "c.png", "title", tmp_path / "log.jsonl", rates, begins)
    pixels = np.asarray(Image.open(tmp_path / "c.png"))
    colours = {"#%02x%02x%02x" % tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert set(evaluation._COLOURS[:2]) <= colours
    middle = 80 + 900 * 40 // 80                         # where the second stage begins, a line from top to bottom
    assert (pixels[70:370, middle] == 0x88).all() or (pixels[70:370, middle] != 255).all()


def test_cells_without_a_number_are_grey_and_names_that_no_font_knows_pass(tmp_path):
    rows = [("input", [20.0, None]), ("a\udce9", [None, 15.0])]
    evaluation.matrix_picture(tmp_path / "m.png", "caf\udce9", ["a", "b"], rows, {(1, 1)})
    pixels = np.asarray(Image.open(tmp_path / "m.png"))
    assert (pixels[66 + 34 + 6, 190 + 8] == 225).all() and (pixels[66 + 6, 190 + 8] == 255).all()
    assert evaluation.markdown(["a", "b"], [["x", None]]).splitlines()[-1] == "| x | - |"


def test_scores_are_of_fp32_unless_asked_otherwise():
    flags = {}
    for precision in ("tf32", "tf32conv", "bf16", "fp32"):
        evaluation.set_precision(precision)
        flags[precision] = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert flags == {"tf32": (True, True), "tf32conv": (True, False), "bf16": (False, False), "fp32": (False, False)}


def test_eval_sets_fp32_before_anything_is_computed(checkpoint, monkeypatch):
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setattr(evaluation, "table", None)
    monkeypatch.setitem(evaluation.COMMANDS, "table", (lambda *more: None, ()))
    run(checkpoint)
    assert not torch.backends.cudnn.allow_tf32


# Scores: means, own truths, who tells the task -------------------------------------------------------

class Adds(torch.nn.Module):
    """A "model" that adds so many grey levels: its scores can be computed by hand."""
    prompt, multiple, square, overlap, context = None, 1, False, 8, 1

    def __init__(self, levels):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.tensor(levels / 255))

    def forward(self, x, task=None):
        return x + self.levels


def grey(*levels):
    """[(lq, gt), ...]: flat pairs; levels: (lq, gt) in grey levels."""
    return [tuple(torch.full((1, 3, 24, 24), level / 255) for level in pair) for pair in levels]


def db(levels):
    return 20 * np.log10(255 / levels)


def test_a_pair_that_is_its_own_truth_counts_in_no_mean_and_is_reported(capsys):
    pairs = {"dark": grey((10, 20), (0, 0), (30, 40)), "rain": grey((7, 7))}
    numbers, own = evaluation.score(Adds(6), pairs["dark"], lambda lq: None, "cpu")
    assert own == 1 and numbers[:3] == pytest.approx([db(10), db(4), db(4) - db(10)])
    numbers, own = evaluation.score(Adds(10), pairs["dark"], lambda lq: None, "cpu")       # restored to the last level
    assert own == 3 and numbers == [None] * 6
    assert evaluation.mean_psnr(Adds(6), pairs, "cpu") == {"dark": pytest.approx(db(4)), "rain": None}
    assert evaluation.input_psnr(pairs) == {"dark": pytest.approx(db(10)), "rain": None}
    assert "dark: 3 images; 1 of 3 is its own truth" in capsys.readouterr().err
    rows = evaluation.evaluate(Adds(6), pairs, "cpu", print, ["dark", "rain"])
    assert rows[1] == ["rain"] + [None] * 6 and rows[2][2] == pytest.approx(db(4)) and "1 of 3" in capsys.readouterr().out


def test_the_mean_of_the_table_is_over_what_was_trained():
    rows = evaluation.evaluate(Adds(0), {"rain": grey((0, 10)), "haze": grey((0, 20)), "sr": grey((0, 100))}, "cpu", lambda text: None, {"rain", "haze"})
    assert [row[0] for row in rows] == ["rain", "haze", "sr", "mean"] and rows[-1][1] == pytest.approx((db(10) + db(20)) / 2)


def test_a_groups_mean_counts_each_set_once(monkeypatch):
    """One image at 20 dB and three at 30: 25, not 27.5."""
    sets = {"rain": grey((0, 25.5)), "haze": grey(*[(0, 255 / 10 ** 1.5)] * 3)}
    monkeypatch.setattr(evaluation, "read_pairs", lambda files: files)
    monkeypatch.setattr(evaluation, "to_image", lambda x: (x * 255).expand(1, 3, 24, 24)[0].permute(1, 2, 0).numpy())
    monkeypatch.setattr(evaluation, "psnr", lambda a, b: db(np.abs(a - b).mean()))
    monkeypatch.setattr(evaluation, "ssim", lambda a, b: 0.5)
    scores, own = evaluation.score_sets(sets, Adds(0), None, "cpu", 0)
    assert scores["In-Dis"][1] == pytest.approx(25, abs=1e-4) and own == {"rain": 0, "haze": 0}


def test_out_dis_is_drawn_from_its_own_ranges():
    """A grey image: noise deviates by more than In-Dis's 50 levels, clipping aside, and dark comes below half to the third."""
    images = [(torch.full((1, 3, 96, 96), 0.5), None)] * 12
    pairs = evaluation.validation_pairs(images, "out")
    deviations = [(lq * 255).std().item() for lq, _ in pairs["noise"]]
    assert 44 < min(deviations) and max(deviations) < 72 and max(lq.max().item() for lq, _ in pairs["dark"]) < 0.135
    assert max((lq * 255).std().item() for lq, _ in evaluation.validation_pairs(images)["noise"]) < 51


def test_two_seeds_are_two_sets_of_pairs():
    images = evaluation.builtin_images(1, 64)
    one, other, again = (evaluation.validation_pairs(images, seed=seed)["noise"][0][0] for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_papers_figures_are_typed_as_published():
    """Sums over each column and each row of the paper's Tables 3 and 4, in hundredths of a dB, taken from a copy of them."""
    hundredths = np.array([[round(100 * (figure or 0)) for figure in figures] for figures in evaluation.PAPER.values()])
    assert hundredths.sum(0).tolist() == [30901, 37085, 37042, 39575, 41753, 32885, 38851, 36872, 15511, 11098]
    assert hundredths.sum(1).tolist() == [27905, 23846, 24209, 28615, 23677, 28200, 29288, 25517, 25403, 30374, 24359, 30180]
    assert list(evaluation.PAPER)[3] == ("srresnet", "S", "ep") and list(evaluation.PAPER)[10] == ("swinir", "M", "ap")


@pytest.mark.parametrize("name, schedule", [("SRResNet_S_EP.pth", "S"), ("SwinIR-M.pth", "M"), ("weights.pth", None), ("MyModel_Small.pth", None)])
def test_a_published_files_name_tells_its_schedule_or_nothing(name, schedule):
    args = argparse.Namespace(checkpoint=name)
    assert evaluation.schedule_of(args, {}) == schedule
    assert evaluation.schedule_of(args, {"facts": {"periods": [[1]]}}) == "M" and evaluation.schedule_of(args, {"facts": {"periods": [[1]] * 7}}) == "S"


@pytest.mark.parametrize("found, fits", [(30.30, False), (30.32, True), (30.40, True), (30.42, False), (None, False)])
def test_an_expectation_is_checked_on_both_sides(found, fits, monkeypatch, capsys):
    args = evaluation.arguments(["--testsets", ".", "--expect", "30.36"])
    monkeypatch.setattr(evaluation, "find_sets", lambda *more: {"rain": [1]})
    monkeypatch.setattr(evaluation, "score_sets", lambda *more: ({"rain": [1.0] * 6, "In-Dis": [1.0, found] + [1.0] * 4}, {"rain": 0}))
    model, info = Adds(0), {"published": False, "prompt": None, "sizes": {"a": 1}}
    if fits:
        return evaluation.testsets(args, model, info, "cpu")
    with pytest.raises(ValueError, match="expected an In-Dis average of 30.36"):
        evaluation.testsets(args, model, info, "cpu")


def test_the_19_sets_lie_where_the_published_archive_has_them():
    sets = evaluation.TESTSETS
    assert len(sets) == 19 and [sum(group == g for g, *_ in sets.values()) for group in ("In-Dis", "Out-Dis", "Unknown")] == [7, 7, 5]
    assert sets["rain"] == ("In-Dis", "rain", "single_indis/rain", "original/GT")
    assert sets["sr_outbig"] == ("Out-Dis", "sr", "single_outbig/sr_outbig", "original/GT")
    assert sets["DIV2K_valid_LR_mild"] == ("Unknown", None, "unknow/LQ_LR/DIV2K_valid_LR_mild", "unknow/DIV2K_valid_HR_toLR")
    assert sets["Toled_val"] == ("Unknown", None, "unknow/Toled_val/LQ", "unknow/Toled_val/HQ")


def test_a_stage_is_learned_from_its_first_iteration_on():
    def learned(stage, iteration):
        return evaluation.learned({"facts": {"order": [["rain"], ["rain", "jpeg"]]}, "stage": stage, "iteration": iteration})
    assert learned(0, 5) == learned(1, 0) == {"rain"} and learned(1, 1) == learned(2, 0) == {"rain", "jpeg"}
    assert evaluation.learned({}) == set(TASKS)


def test_tables_read_as_markdown_and_tell_the_difference_to_the_paper():
    assert evaluation.markdown(["task", "PSNR"], [["rain", 26.456], ["b", "x"]]) == (
        "| task |  PSNR |\n|------|------:|\n| rain | 26.46 |\n| b    |     x |")
    row = evaluation.score_table("set", {"rain": [20.0, 30.0, 10.0, 0.8, 0.9, 0.1]}, {"rain": 31.0}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["rain", "20.00", "30.00", "10.00", "0.8000", "0.9000", "0.1000", "31.00", "-1.00"]


def test_strips_show_the_middle_of_a_picture_as_it_is(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (301, 400, 3), np.uint8)
    x = degrade.to_tensor(picture)
    monkeypatch.setattr(evaluation, "restored", lambda *more: picture)
    evaluation.task_strips(tmp_path / "s.png", None, {"noise": [(x, x)]}, "cpu")
    sheet = degrade.read_image(tmp_path / "s.png")
    assert np.array_equal(sheet[30:222, 110:302], picture[54:246, 104:296])


@pytest.mark.parametrize("less, fits", [(8, True), (9, False)])
def test_an_lq_may_lack_its_gts_last_rows_but_not_many(tmp_path, less, fits):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "gt.png")
    Image.fromarray(picture[:40 - less]).save(tmp_path / "lq.png")
    if not fits:
        with pytest.raises(ValueError, match="lq.png and .*gt.png are not of one size"):
            next(evaluation.read_pairs([(tmp_path / "lq.png", tmp_path / "gt.png")]))
        return
    lq, gt = next(evaluation.read_pairs([(tmp_path / "lq.png", tmp_path / "gt.png")]))
    assert torch.equal(lq, gt) and lq.shape == (1, 3, 32, 50)


def test_pairs_are_restored_in_tiles_where_asked_for(checkpoint, picture, monkeypatch):
    tiles, real = [], evaluation.restore
    monkeypatch.setattr(evaluation, "restore", lambda model, x, task, tile, **more: tiles.append(tile) or real(model, x, task, 0))
    for tile in ("0", "160"):
        run(checkpoint, "--pairs", picture.parent, picture.parent, "--task", "noise", "--tile", tile)
    assert tiles == [0, 160]
