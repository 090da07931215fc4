"""Ablations: which cells a plan has, that nothing is done twice, and what the table says."""

import csv
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelclip.ablation.plan import make_cells, parse_vary, plan_names, read_plan
from pixelclip.ablation.plot import LONGEST_LABEL, _axis_title, _short
from pixelclip.ablation.table import Result, Table, markdown, panels, write_table
from pixelclip.ablation.work import ablate
from pixelclip.backbones import load_backbone, save_backbone
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError, MissingExtra
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.segmenter import Segmenter
from tests.tiny import photo, tiny_vit
from tests.training import SMALL, read_rows, run, write_photos


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, object]:
    """A plan without a grid: photos, masks, a model and two data sets."""
    folder = tmp_path_factory.mktemp("given")
    photos, masks = write_photos(folder)
    for number, name in enumerate(("garden", "street")):
        data = folder / name
        for part in ("images", "labels"):
            (data / part).mkdir(parents=True)
        (data / "classes.txt").write_text("cat\ndog\nsky\n")
        for index in range(2):
            photo(60, 48, 10 * number + index).save(data / f"images/{index}.png")
            labels = np.random.default_rng(index).integers(0, 3, (48, 60))
            Image.fromarray(labels.astype(np.uint8)).save(data / f"labels/{index}.png")
    weights = save_backbone(tiny_vit(), folder / "vit.safetensors")
    return {
        "images": (str(photos),),
        "masks": str(masks),
        "model": str(weights),
        "data": (str(folder / "garden"), str(folder / "street")),
        "settings": {key: value for key, value in SMALL.items() if key != "num_clusters"},
        "evaluation": {"templates": "name"},
    }


@pytest.fixture(scope="module")
def made(given, tmp_path_factory) -> Path:
    """The grid k=3,4 with its baseline, finished."""
    out = tmp_path_factory.mktemp("made")
    ablate(make_plan(given, "k=3,4"), out, device="cpu")
    return out


def make_plan(given, *vary, **changes):
    return read_plan("mini", {**given, "vary": parse_vary(vary), **changes})


def command(given, out, *vary, **settings):
    options = ["--masks", given["masks"], "-m", given["model"], "-o", str(out), "--device", "cpu"]
    for name in ("images", "data"):
        options += [part for path in given[name] for part in (f"--{name}", path)]
    for name, value in {**given["settings"], **settings}.items():
        options += ["--set", f"{name}={str(value).lower()}"]
    return ["ablate", "mini", *options, *(part for text in vary for part in ("--vary", text))]


def rows(out):
    return {row["label"]: row for row in json.loads((out / "table.json").read_text())["rows"]}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# Cells


def test_cells_are_all_combinations_and_a_baseline(given, tmp_path):
    cells = make_cells(make_plan(given, "k=3,4", "momentum=0,0.9"), tmp_path)
    assert [cell.label for cell in cells] == [
        "not adapted",
        "num_clusters=3, momentum=0",
        "num_clusters=3, momentum=0.9",
        "num_clusters=4, momentum=0",
        "num_clusters=4, momentum=0.9",
    ]
    assert [(c.config.num_clusters, c.config.momentum) for c in cells[1:]] == [
        (3, 0), (3, 0.9), (4, 0), (4, 0.9)
    ]  # fmt: skip
    assert len({cell.run for cell in cells}) == 5


def test_rows_are_combined_with_what_varies(given, tmp_path):
    plan = make_plan(given, "seed=0,1", rows={"full": {}, "free": {"class_vectors": "free"}})
    cells = make_cells(plan, tmp_path)[1:]
    assert [cell.label for cell in cells] == [
        "full, seed=0", "full, seed=1", "free, seed=0", "free, seed=1"
    ]  # fmt: skip
    assert [cell.config.class_vectors for cell in cells] == ["prompts", "prompts", "free", "free"]


def test_cells_that_differ_in_the_evaluation_share_a_run(given, tmp_path):
    cells = make_cells(make_plan(given, "templates=single,name"), tmp_path)
    assert [(cell.run, cell.templates) for cell in cells] == [
        ("not-adapted", "single"), ("not-adapted", "name"), ("base", "single"), ("base", "name")
    ]  # fmt: skip


@pytest.mark.parametrize("name", plan_names())
def test_every_plan_of_the_package_has_cells(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("sa1b", "train2017"):
        shutil.copytree(given["images"][0], folder)
    changes = {"images": given["images"], "model": given["model"]}
    if name in ("mini", "vit"):
        changes["vary"] = parse_vary(["k=3,4"])
    cells = make_cells(read_plan(name, changes), tmp_path / "out")
    assert cells[0].job is None
    assert len(cells) >= 3


def test_the_papers_components_are_rows_in_both_sizes(given, tmp_path):
    for size in ("mini", "vit"):
        plan = read_plan(f"{size}-components", {"masks": given["masks"], "images": given["images"],
                                                "model": given["model"]})  # fmt: skip
        cells = {cell.label: cell.config for cell in make_cells(plan, tmp_path)}
        assert cells.pop("not adapted") is None
        assert cells["without semantic clustering"].assigner == "none"
        assert cells["without CLIP's text encoder"].class_vectors == "free"
        assert cells["without learnable class prompts"].class_vectors == "words"
        assert cells["without momentum encoder"].momentum == 0
        assert len(cells) == 5


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("zz=3", r"known: k \(num_clusters\), gamma \(momentum\), eps \(temperature\), steps,"),
        ("clusters=3,4", "cannot vary clusters: no such setting; did you mean num_clusters?"),
        ("momentum=0.9,fast", r"momentum=fast: --set momentum: .*got 'fast'"),
        ("k=3,0", "num_clusters=0: --set num_clusters"),
        ("k=3,3", "are the same; leave one out"),
        ("k=3,", "--vary k=3,: write name=value,value"),
        ("k", "write name=value,value"),
        ("masks=sam,nowhere", "no masks at nowhere; give a path or one of superpixels"),
        ("images=nowhere", "no such photo or folder: nowhere"),
        ("templates=name,nowhere", "templates=nowhere: .*nowhere"),
        ("train_templates=nowhere", "nowhere"),
        ("momentum=" + ",".join(f"0.{i}" for i in range(501)), "1002 runs; the limit is 1000"),
        ("class_vectors=words", None),
    ],
)
def test_wrong_names_and_values_are_told_before_any_training(given, tmp_path, vary, message):
    settings = {**given["settings"], "num_clusters": 9999}
    plan = {**given, "settings": settings} if message is None else given
    with pytest.raises((ConfigError, DataError), match=message or "holds 256 names"):
        ablate(make_plan(plan, "seed=0,1", vary), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match="num_clusters is given twice"):
        parse_vary(["k=3", "num_clusters=4"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "no data sets to evaluate on; give --data"),
        ({"photos": 0}, "photos: input should be greater than or equal to 1"),
        ({"images": ()}, "no photos to train on; give --images"),
        ({"vary": {}}, "nothing is varied; give --vary"),
        ({"protocol": "mine"}, "mine"),
        ({"evaluation": {"short": 3}}, "short"),
        ({"mask_settings": {"superpixels": {"size": 3}}, "masks": "superpixels"}, "size"),
    ],
)
def test_what_a_plan_lacks_is_told(given, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):  # noqa: PT012 - either may tell
        plan = make_plan(given, **({"vary": {"num_clusters": (3,)}} | changes))
        ablate(plan, tmp_path / "out", device="cpu")


def test_results_among_the_photos_are_refused(given, tmp_path):
    photos = shutil.copytree(given["images"][0], tmp_path / "photos")
    with pytest.raises(ConfigError, match="lies in the photos"):
        ablate(make_plan(given, "k=3", images=(str(photos),)), photos / "out", device="cpu")


def test_two_data_sets_of_one_name_are_refused(given, tmp_path):
    other = shutil.copytree(given["data"][0], tmp_path / "garden")
    plan = make_plan(given, "k=3", data=(given["data"][0], str(other)))
    with pytest.raises(ConfigError, match="two data sets are called garden"):
        ablate(plan, tmp_path / "out", device="cpu")


def test_a_plan_file_extends_another_one(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('extends = "mini"\nprotocol = "authors"\n[settings]\nseed = 3\n'
                    '[vary]\nk = [3, 4]\n')  # fmt: skip
    plan = read_plan(str(path), {"vary": {"momentum": (0.9,)}})
    assert plan.settings == {"steps": 100, "picture_every": 0, "seed": 3}
    assert plan.vary == {"num_clusters": (3, 4), "momentum": (0.9,)}
    assert plan.protocol == "authors"


def test_short_names_replace_what_a_plan_varies(tmp_path):
    plan = read_plan("mini-clusters", {"vary": {"k": [3, 4]}})
    assert plan.vary == {"num_clusters": (3, 4)}


def test_plans_that_are_none_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read plan nowhere: .*mini-components"):
        read_plan("nowhere")
    path = tmp_path / "own.toml"
    path.write_text("vary = 3\n")
    with pytest.raises(ConfigError, match="vary of a plan is a table"):
        read_plan(str(path))
    path.write_text("model = 3\n")
    with pytest.raises(ConfigError, match=r"plan .*own.toml: model"):
        read_plan(str(path))


# Table


def test_figures_are_those_of_eval(given, made):
    models = {"num_clusters=4": made / "runs/num_clusters=4", "not adapted": given["model"]}
    for label, model in models.items():
        for folder in given["data"]:
            dataset = load_folder(Path(folder))
            config = SegmentConfig(**given["evaluation"])
            segmenter = Segmenter(load_backbone(str(model)), dataset.classes, config=config)
            expected = evaluate(segmenter, dataset)["miou"]
            assert rows(made)[label]["figures"][dataset.name]["miou"] == expected


def test_table_is_the_same_in_three_formats(made):
    table = rows(made)
    assert list(table) == ["not adapted", "num_clusters=3", "num_clusters=4"]
    with (made / "table.csv").open() as file:
        for line, row in zip(csv.DictReader(file), table.values(), strict=True):
            mious = [row["figures"][name]["miou"] for name in ("garden", "street")]
            assert float(line["garden_miou"]) == mious[0]
            assert float(line["mean_miou"]) == row["mean_miou"]
            assert row["mean_miou"] == pytest.approx(sum(mious) / 2, abs=1e-3)
            text = [f"{value:.2f}" for value in (*mious, sum(mious) / 2)]
            line = f"| {row['label']} | {' | '.join(text)} |"
            assert line in (made / "table.md").read_text().splitlines()


def test_trained_rows_differ_from_the_baseline(made):
    table = rows(made)
    assert table["num_clusters=3"]["training"]["steps"] == SMALL["steps"]
    assert "steps" not in table["not adapted"]["training"]
    weights = [row["training"]["weights"] for row in table.values()]
    assert len(set(weights)) == 3


def test_plot_is_a_png_and_an_svg(made):
    with Image.open(made / "plot.png") as picture:
        assert min(picture.size) > 300
    text = (made / "plot.svg").read_text()
    assert "<svg" in text


def test_numbers_are_a_line_and_named_rows_are_bars(given, tmp_path):
    figures = {"garden": {"miou": 3.0}}
    base = Result("not adapted", "not adapted", {}, is_baseline=True, figures=figures)
    runs = [
        Result(f"k={k}, seed={seed}", "", {"k": k, "seed": seed}, figures=figures)
        for k in (3, 4)
        for seed in (0, 1)
    ]
    drawn = panels(Table("t", ("garden",), (2,), (base, *runs), {}))
    assert (drawn.axis, drawn.is_line, drawn.panels) == ("k", True, ["garden (2 photos)"])
    assert [(bar.label, bar.values) for bar in drawn.bars] == [
        ("not adapted", [[3.0]]), ("3", [[3.0, 3.0]]), ("4", [[3.0, 3.0]])
    ]  # fmt: skip
    named = [Result("full", "full", {}, figures=figures), Result("free", "free", {"a": 1})]
    drawn = panels(Table("t", ("garden",), (2,), (base, *named), {}))
    assert not drawn.is_line
    assert [bar.values for bar in drawn.bars] == [[[3.0]], [[3.0]], [[]]]


def test_nothing_is_drawn_before_there_is_a_row_beside_the_baseline(tmp_path):
    figures = {"garden": dict.fromkeys(
        ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"), 3.0)}  # fmt: skip
    base = Result("not adapted", "not adapted", {}, is_baseline=True, figures=figures)
    todo = [Result(f"num_clusters={k}", "", {"num_clusters": k}) for k in (3, 4)]
    plan = {"model": "mini", "protocol": "default"}
    table = Table("t", ("garden",), (2,), (base, *todo), plan)
    write_table(table, tmp_path)
    assert not (tmp_path / "plot.png").exists()
    table = table._replace(rows=(base, todo[0]._replace(figures=figures), todo[1]))
    write_table(table, tmp_path)
    assert (tmp_path / "plot.png").exists()
    assert panels(table).title == "t (1 of 3 rows to do)"
    assert panels(table._replace(rows=table.rows[:2])).title == "t"


def test_the_axis_has_the_short_name_too():
    assert _axis_title("num_clusters") == "k (num_clusters)"
    assert _axis_title("steps") == "steps"


def test_without_matplotlib_one_line_says_what_to_install(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pixelclip\[plots\]'; or give --no-plot"):
        ablate(make_plan(given, "k=3"), tmp_path / "out", device="cpu")


def seeded(label, value, mious, seeds=(0, 1)):
    """Rows of one value that differ in their seed."""
    return [
        Result(f"{label}={str(value).lower()}, seed={seed}", "", {label: value, "seed": seed},
               figures={"garden": {"miou": miou}})
        for seed, miou in zip(seeds, mious, strict=True)
    ]  # fmt: skip


def test_a_line_goes_from_the_lowest_number_to_the_highest():
    rows = [
        *seeded("k", 256, (1.0, 2.0)),
        *seeded("k", 16, (3.0, 4.0)),
        *seeded("k", 64, (5.0, 6.0)),
    ]
    drawn = panels(Table("t", ("garden",), (2,), tuple(rows), {}))
    assert [bar.label for bar in drawn.bars] == ["16", "64", "256"]
    assert [bar.values for bar in drawn.bars] == [[[3.0, 4.0]], [[5.0, 6.0]], [[1.0, 2.0]]]


def test_bars_say_what_is_varied():
    rows = [*seeded("fix", True, (1.0, 2.0)), *seeded("fix", False, (3.0, 4.0))]
    drawn = panels(Table("t", ("garden",), (2,), tuple(rows), {}))
    assert [bar.label for bar in drawn.bars] == ["fix=true", "fix=false"]


def test_the_table_has_means_and_deviations_over_seeds():
    base = Result("not adapted", "not adapted", {}, is_baseline=True,
                  figures={"garden": {"miou": 2.5}})  # fmt: skip
    rows = (base, *seeded("k", 16, (3.0, 5.0)), *seeded("k", 64, (6.0,), (0,)))
    text = markdown(Table("t", ("garden",), (2,), rows, {"model": "mini", "protocol": "default"}))
    for line in ("| not adapted | 2.50 |", "| k=16 | 4.00 ± 1.41 (2) |", "| k=64 | 6.00 |"):
        assert line in text.splitlines()
    one = markdown(Table("t", ("garden",), (2,), (base,), {"model": "mini", "protocol": "d"}))
    assert "over seeds" not in one


def test_long_names_are_cut_where_they_do_not_differ():
    one, other = (_short(f"masks=/a/long/way/through/many/folders/to/{n}") for n in ("one", "two"))
    assert one != other
    assert one.endswith("/one")
    assert len(one) <= LONGEST_LABEL


# Resuming


def test_what_is_finished_is_not_touched(given, made):
    before = times(made / "runs") | times(made / "evaluations")
    table = ablate(make_plan(given, "k=3,4"), made, device="cpu")
    assert times(made / "runs") | times(made / "evaluations") == before
    assert not any(row.is_new for row in table.rows)


def test_a_grid_grows_by_new_cells_only(given, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    before = times(out / "runs")
    ablate(make_plan(given, "k=3,4,5"), out, device="cpu")
    assert list(rows(out)) == [
        "not adapted", "num_clusters=3", "num_clusters=4", "num_clusters=5"
    ]  # fmt: skip
    after = times(out / "runs")
    assert {path: after[path] for path in before} == before


def test_a_killed_grid_goes_on_to_the_same_table(given, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = command(given, out, "k=3,4")
    at = (signal.SIGKILL, str(out / "runs/num_clusters=4/metrics.jsonl"), 2)
    code, text = run(arguments, log, signal_at=at)
    assert code == -signal.SIGKILL, text
    assert (out / "runs/num_clusters=3.json").exists()
    assert "trained" not in json.loads((out / "runs/num_clusters=4.json").read_text())
    before = times(out / "runs/num_clusters=3")
    code, text = run(arguments, log)
    assert code == 0, text
    assert times(out / "runs/num_clusters=3") == before
    assert len(read_rows(out / "runs/num_clusters=4")) == SMALL["steps"]
    weights = [
        {label: row["training"]["weights"] for label, row in rows(folder).items()}
        for folder in (out, made)
    ]
    hashes = [w.pop("not adapted") for w in weights]
    assert hashes[0] == hashes[1]


def test_an_interrupt_ends_the_step_and_the_same_command_goes_on(given, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = command(given, out, "k=3")
    at = (signal.SIGINT, str(out / "runs/num_clusters=3/metrics.jsonl"), 3)
    code, text = run(arguments, log, signal_at=at)
    assert code == 130, text
    assert "Still to do" in (out / "table.md").read_text()
    code, text = run(arguments, log)
    assert code == 0, text
    assert rows(out)["num_clusters=3"]["figures"].keys() == {"garden", "street"}


def test_a_grid_killed_in_an_evaluation_or_between_goes_on_to_the_same_figures(
    given, made, tmp_path
):
    places = [("evaluations/num_clusters=3/", 6), ("runs/num_clusters=4/", 1)]
    for number, (part, count) in enumerate(places):
        out, log = tmp_path / f"out{number}", tmp_path / "log"
        arguments = command(given, out, "k=3,4")
        code, text = run(arguments, log, signal_at=(signal.SIGKILL, f"{out}/{part}", count))
        assert code == -signal.SIGKILL, text
        plan = make_plan(given, "k=3,4")
        ablate(plan, out, device="cpu", plot=False)
        expected = {label: row["figures"] for label, row in rows(made).items()}
        assert {label: row["figures"] for label, row in rows(out).items()} == expected


def test_an_unfinished_run_of_other_settings_is_refused_before_any_training(given, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    path = out / "runs/num_clusters=3.json"
    document = json.loads(path.read_text())
    del document["trained"]
    path.write_text(json.dumps(document))
    plan = make_plan(given, "k=3,4,5", settings={**given["settings"], "steps": 3})
    for name in ("num_clusters=4.json", "num_clusters=4"):
        gone = out / "runs" / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ConfigError, match="holds another ablation: steps was 2, now 3"):
        ablate(plan, out, device="cpu")
    assert not (out / "runs/num_clusters=5").exists()


def test_other_settings_are_refused_and_the_table_stays(given, made):
    before = (made / "table.json").read_bytes()
    plan = make_plan(given, "k=3,4", settings={**given["settings"], "steps": 3})
    with pytest.raises(ConfigError, match="holds another ablation: steps was 2, now 3"):
        ablate(plan, made, device="cpu")
    assert (made / "table.json").read_bytes() == before


def test_evaluations_of_other_weights_are_done_again(given, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    path = out / "evaluations/num_clusters=3/garden.json"
    document = json.loads(path.read_text())
    document["asked"]["weights"] = "0"
    document["report"]["miou"] = 99.0
    path.write_text(json.dumps(document))
    ablate(make_plan(given, "k=3,4"), out, device="cpu")
    assert rows(out) == rows(made)


def test_some_photos_of_each_data_set_are_evaluated_evenly_spaced(given, made, tmp_path):
    out, log = shutil.copytree(made, tmp_path / "out"), tmp_path / "log"
    code, text = run([*command(given, out, "k=3,4"), "--photos", "1"], log)
    assert code == 0, text
    table = json.loads((out / "table.json").read_text())
    assert table["photos"] == {"garden": 1, "street": 1}
    assert "garden (1 photos, evenly spaced)" in (out / "table.md").read_text()
    stored = json.loads((out / "evaluations/num_clusters=3/garden.json").read_text())
    assert stored["report"]["photos"] == 1
    assert "at most 1 photos, evenly spaced" in stored["departures"]
    before = times(made / "runs")
    assert {path.relative_to(out): time for path, time in times(out / "runs").items()}.keys() == {
        path.relative_to(made) for path in before
    }
    assert not any(line.strip() == "" for line in text.split("# ")[0].splitlines())
    ablate(make_plan(given, "k=3,4"), out, device="cpu")
    assert rows(out) == rows(made)


# Failures


def test_a_failing_cell_is_listed_and_the_others_go_on(given, tmp_path):
    out, log, others = tmp_path / "out", tmp_path / "log", tmp_path / "others"
    others.mkdir()
    Image.new("L", (9, 9)).save(others / "of-another-photo.png")
    vary = f"masks={others},{given['masks']}"
    code, text = run([*command(given, out, vary), "--no-plot"], log)
    assert code == 1, text
    assert "Traceback" not in text
    baseline, broken, whole = rows(out).values()
    assert "none of the photos has masks" in broken["error"]
    assert broken["figures"] == {}
    assert baseline["figures"].keys() == whole["figures"].keys() == {"garden", "street"}
    assert f"Failed: masks={others}: none of the photos" in (out / "table.md").read_text()
    assert not (out / "plot.png").exists()


def test_photos_that_cannot_be_evaluated_are_noted(given, tmp_path):
    data = shutil.copytree(given["data"][0], tmp_path / "garden")
    (data / "images/0.png").write_bytes(b"broken")
    table = ablate(make_plan(given, "k=3", data=(str(data),)), tmp_path / "out", device="cpu")
    assert [row.note for row in table.failed] == ["1 photos of garden were not used"] * 2


# Masks


def test_masks_are_made_once_for_all_cells(given, tmp_path):
    plan = make_plan(given, "k=3", masks="superpixels", data=given["data"][:1])
    assert not ablate(plan, tmp_path, device="cpu").failed
    (store,) = (tmp_path / "masks").iterdir()
    assert store.name.startswith("superpixels-")
    before = times(store)
    plan = plan.model_copy(update={"vary": {"num_clusters": (3, 4)}})
    assert not ablate(plan, tmp_path, device="cpu").failed
    assert times(tmp_path / "masks") == before


def test_mask_sources_are_varied(given, tmp_path):
    vary = f"masks=superpixels,{given['masks']}"
    table = ablate(make_plan(given, vary, data=given["data"][:1]), tmp_path, device="cpu")
    assert not table.failed
    weights = {row.training["weights"] for row in table.rows}
    assert len(weights) == 3


def test_evaluations_by_a_file_of_other_templates_are_done_again(given, made, tmp_path):
    out, words = shutil.copytree(made, tmp_path / "out"), tmp_path / "words.txt"
    plan = make_plan(given, "k=3,4", evaluation={**given["evaluation"], "templates": str(words)})
    prompts = []
    for text in ("a {}", "the {}"):
        words.write_text(text)
        ablate(plan, out, device="cpu")
        stored = json.loads((out / "evaluations/num_clusters=3/garden.json").read_text())
        prompts.append(stored["report"]["settings"]["templates"])
    assert prompts == [["a {}"], ["the {}"]]
