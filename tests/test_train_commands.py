"""The command lines of training: their options, their mistakes, and unfolded, pretrain and evaluate end to end."""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from train_cases import FILES, TINY, names, network, options, rows, table, tiny

import flowkern
from train import baselines, config, data, denoise, evaluate, extras, figures, likelihood, pretrain, run, unfolded
from train import command as command_module
from train.config import Config

TRAINING = ["unfolded", "pretrain", "table1", "ablations", "inverse"]


def main(command):
    return importlib.import_module(f"train.{command}").main


def told(capsys):
    """The one sentence on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def words(pictures, tmp_path_factory):
    """A function from further settings to a command line with tiny ones."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return lambda **settings: options(preset="paper", config=path, data=pictures, **settings)


# Options


@pytest.mark.parametrize(
    ("command", "hidden"),
    [
        ("unfolded", {"comparison", "problems"}),
        ("pretrain", {"measurement", "unfolded", "start", "denoising", "evaluation", "comparison", "problems"}),
        ("table1", {"start", "measurement", "problems", "prox", "seed"}),
        ("ablations", {"start", "comparison", "problems", "prox"}),
        ("inverse", {"start", "measurement", "comparison", "prox"}),
        ("evaluate", set()),
    ],
)
def test_help_documents_every_option(command, hidden, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(evaluate.Settings if command == "evaluate" else Config):
        shown = bool(re.search(rf"\n  --{field.name.replace('_', '-')}\b(?!-)", text))
        assert shown == (not hidden & {field.metadata["group"], field.name}), field.name
        assert not shown or field.metadata["help"].split()[0] in text
    assert text.startswith(f"usage: python -m train.{command}")


def test_options_override_files_which_override_presets(tmp_path):
    parse = config.Command("unfolded", "").parse
    path = tmp_path / "mine.yaml"
    path.write_text("batch: 5\nlr: 0.5\n")
    demo = parse([])
    mine = parse(["--config", str(path), "--lr", "0.25", "--depth", "[1, 2, 3]", "--tied", "--no-pretrain"])
    assert (mine.batch, mine.lr, mine.depth, mine.hidden) == (5, 0.25, [1, 2, 3], demo.hidden)
    assert (mine.tied, demo.tied, mine.pretrain, demo.pretrain) == (True, False, False, True)
    assert parse(["--preset", "paper"]).levels != demo.levels
    config.save(mine, tmp_path / "saved.yaml")
    assert parse(["--config", str(tmp_path / "saved.yaml")]) == mine
    unused = config.Command("pretrain", "", hidden=("training", "tied"))
    for given, option in ((["--batch", "7"], "batch"), (["--batch=7"], "batch"), (["--no-tied"], "tied")):
        with pytest.raises(ValueError, match=f"^train.pretrain does not use --{option}$"):
            unused.parse(given)
    assert unused.parse(["--config", str(tmp_path / "saved.yaml")]).batch == 5


def commands_in_pages():
    """Every `python -m train...` of the README and the how-tos, as (command, its words)."""
    root = Path(config.__file__).parents[1]
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = re.sub(r" *\\\n *", " ", page.read_text())
        for command, rest in re.findall(r"-m train\.(\w+)([^`\n]*)", text):
            # Of alternatives, a|b|c, the first.
            yield command, [word.split("|")[0] for word in shlex.split(rest, comments=True)]


def test_commands_in_pages_are_understood(monkeypatch):
    """As far as their options go: folders are placeholders there."""

    class Understood(ValueError):
        pass

    def stop(*_):
        raise Understood

    parse = config.Command.parse
    monkeypatch.setattr(config.Command, "parse", lambda self, words: stop(parse(self, words)))
    monkeypatch.setattr(evaluate, "prepare", stop)
    monkeypatch.setattr(command_module, "MISTAKES", ())
    found = [(command, words) for command, words in commands_in_pages() if words]
    for command, words in found:
        if command == "denoise":
            assert denoise.parse(words).image
            continue
        with pytest.raises(Understood):
            main(command)(words)
    assert len(found) >= 15 and {command for command, _ in found} >= {*TRAINING, "evaluate", "denoise"}


@pytest.mark.parametrize("preset", config.presets())
def test_presets_are_valid_and_only_set_known_options(preset):
    parsed = config.Command("unfolded", "").parse(["--preset", preset])
    assert set(yaml.safe_load((config.PRESETS / f"{preset}.yaml").read_text())) <= {f.name for f in fields(Config)}
    if preset == "inverse":
        assert parsed.eval_sigmas == [parsed.sigma] == [0.02] and parsed.sigma_max is None
    else:
        assert parsed.sigma <= 0.2 <= (parsed.sigma_max or parsed.sigma)
        assert parsed.eval_sigmas == [0.1, 0.15, 0.2, 0.25]
    assert parsed.memory == "recompute"
    parsed.check_schedule("prior", "unfolded")


def test_the_paper_preset_is_the_paper():
    paper = config.Command("unfolded", "").parse(["--preset", "paper"])
    assert (paper.size, paper.folds, paper.patience) == (64, 4, 5)
    assert (paper.sigma, paper.sigma_max) == (0.2, None)
    assert (paper.lr, paper.lr_steps, paper.schedule) == (1e-5, 1e-2, "constant")
    assert (paper.resnet_width, paper.resnet_blocks, paper.unet_width) == (128, 2, 64)
    assert not paper.tied and paper.pretrain


@pytest.mark.parametrize("command", [*TRAINING, "evaluate"])
def test_missing_packages_are_one_sentence_that_names_the_extra(command, monkeypatch, capsys):
    monkeypatch.setattr(extras.require, "__defaults__", (lambda name: None if name == "lightning" else object(),))
    assert main(command)([]) == 2
    assert "training needs lightning: install the extra with `pip install -e \".[train]\"`" in told(capsys)
    with pytest.raises(ModuleNotFoundError, match=r"training needs lightning, rich: "):
        extras.require(find=lambda name: None if name in ("lightning", "rich") else object())


def test_commands_start_without_the_extra_and_say_so():
    """In a process of its own, where nothing is imported yet."""
    code = (
        f"import sys; sys.modules |= dict.fromkeys({sorted(extras.PACKAGES)})\n"
        "from importlib import import_module as get\n"
        f"print([get('train.' + name).main([]) for name in {[*TRAINING, 'evaluate']}])\n"
        "print(get('train.denoise').main(['run', 'picture.png']))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout == "[2, 2, 2, 2, 2, 2]\n2\n", done.stderr
    assert done.stderr.count("training needs ") == 7 and "Traceback" not in done.stderr


# Mistakes


@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--preset", "huge"], "unknown preset 'huge'; choose one of cpu, demo, "),
        (["--size", "20"], "size must be a positive multiple of 2^levels = 8, got 20"),
        (["--eval-size", "20"], "eval_size must be a positive multiple of 2^levels = 8, got 20"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--ema", "1"], "ema must be between 0 and 1, got 1.0"),
        (["--prior-noise", "-1"], "prior_noise must be 0 or more, got -1.0"),
        (["--alpha", "0"], "alpha must be positive, got 0.0"),
        (["--levels", "1", "--size", "4"], "size must be at least 6, as SSIM wants it, got 4"),
        (["--prior-seconds", "null", "--prior-steps", "null"], "schedule='cosine' needs prior_steps or prior_seconds"),
        (["--resume", "--out", "nowhere"], "nothing to resume: nowhere holds no run"),
    ],
)
def test_mistakes_end_in_one_sentence(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command)(arguments) == 2
    assert message in told(capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("unfolded", ["--steps", "0"], "steps must be positive, got 0"),
        ("unfolded", ["--sigma", "-1"], "sigma must be positive, got -1.0"),
        ("unfolded", ["--sigma-max", "0.1"], "sigma_max must be at least sigma = 0.15, got 0.1"),
        ("unfolded", ["--eval-sigmas", "[]"], "eval_sigmas must be one or more positive numbers, got []"),
        ("unfolded", ["--eval-sigmas", "[0.1,.nan]"], "eval_sigmas must be one or more positive numbers, got [0.1, n"),
        ("unfolded", ["--seed", "99999999999999999999"], "seed must be less than 2^63, got 99999999999999999999"),
        ("unfolded", ["--backend", "abacus"], "unknown backend 'abacus'"),
        ("unfolded", ["--depth", "[1,2]"], "depth wants one int, or one per level (3), got 2"),
        ("unfolded", ["--seconds", "null", "--steps", "null"], "schedule='cosine' needs steps or seconds"),
        ("unfolded", ["--prior-checkpoint", "nowhere"], "nowhere is not a saved Glow"),
        ("unfolded", ["--prox", "unet", "--prior-checkpoint", "x"], "is a Glow to start from; --prox is unet"),
        ("unfolded", ["--accumulate", "5"], "a batch of 16 can't be divided among 1 processes in 5 parts each"),
        ("unfolded", ["--prox", "resnet", "--noise-aware"], "noise_aware scales the lambda of a Glow; prox is"),
        (
            "table1",
            ["--warmup", "9", "--trial-steps", "9", "--trial-lrs", "[0.1,0.2]", "--steps", "20"],
            "a trial of 9 steps ends within a warm-up of 9: set --trial-steps",
        ),
        ("table1", ["--noise-aware"], "noise_aware scales the lambda of a Glow; prox is 'resnet'"),
        ("unfolded", ["--prox", "unet", "--init", "mode"], "init='mode' needs the most likely image of a Glow"),
        ("unfolded", ["--prox", "unet", "--references", "[map]"], "the reference 'map' needs a run with a Glow"),
        ("pretrain", ["--prox", "resnet"], "train.pretrain starts from a Glow; --prox resnet is for train.unfolded"),
        ("table1", ["--prox", "unet"], "train.table1 starts from a Glow; --prox unet is for train.unfolded"),
        ("inverse", ["--prox", "unet"], "train.inverse starts from a Glow; --prox unet is for train.unfolded"),
        ("ablations", ["--prox", "unet"], "train.ablations starts from a Glow; --prox unet is for train.unfolded"),
        ("table1", ["--seeds", "[]"], "seeds must be different numbers, 0 or more, got []"),
        ("table1", ["--seeds", "[1,1]"], "seeds must be different numbers, 0 or more, got [1, 1]"),
        ("table1", ["--trial-lrs", "[0.1,0]"], "trial_lrs must be one or more positive numbers, got [0.1, 0.0]"),
        ("table1", ["--seconds", "null"], "schedule='cosine' needs steps or seconds"),
        ("unfolded", ["--operator", "inpaint", "--inpaint-keep", "0"], "inpaint_keep must be in (0, 1], got 0.0"),
        ("unfolded", ["--operator", "inpaint", "--inpaint-hole", "0"], "inpaint_hole must be at least 1, got 0"),
        ("unfolded", ["--operator", "inpaint", "--inpaint-hole", "32"], "must be smaller than the images of 32x32"),
        ("unfolded", ["--operator", "inpaint", "--inpaint-seed", "-1"], "inpaint_seed must be 0 or more, got -1"),
        ("unfolded", ["--operator", "blur", "--blur-sigma", "0"], "blur_sigma must be positive, got 0.0"),
        ("unfolded", ["--operator", "blur", "--blur-sigma", "6"], "blur_sigma 6.0 needs 37 pixels, more than"),
        ("unfolded", ["--operator", "sr", "--sr-factor", "1"], "sr_factor must be at least 2, got 1"),
        ("unfolded", ["--operator", "sr", "--sr-factor", "3"], "sr_factor 3 does not divide the side of images"),
        ("unfolded", ["--operator", "cs", "--cs-ratio", "1.5"], "cs_ratio must be in (0, 1], got 1.5"),
        ("unfolded", ["--operator", "cs", "--cs-seed", "-2"], "cs_seed must be 0 or more, got -2"),
        (
            "unfolded",
            ["--operator", "blur", "--sr-factor", "2"],
            "sr_factor is a setting of operator 'sr'; the operator is 'blur'",
        ),
        ("unfolded", ["--cs-ratio", "0.5"], "cs_ratio is a setting of operator 'cs'; the operator is 'identity'"),
        (
            "unfolded",
            ["--operator", "sr", "--references", "[denoiser]"],
            "the reference 'denoiser' only denoises; the operator is 'sr'",
        ),
        ("unfolded", ["--consistency", "exact", "--mu", "0.5"], "consistency='exact' learns rho and has no"),
        (
            "unfolded",
            ["--operator", "blur", "--blur-boundary", "reflect", "--consistency", "exact"],
            "consistency='exact' needs an exact inverse; a Gaussian blur of 1.5 pixels (reflect) has none",
        ),
        ("table1", ["--operator", "sr"], "train.table1 does not use --operator"),
        ("inverse", ["--operator", "sr"], "train.inverse does not use --operator"),
        ("inverse", ["--denoise-size", "24"], "denoise_size must be a multiple of 8 that divides size = 64, got 24"),
        ("inverse", ["--size", "16"], "inpaint_hole must be smaller than the images of 16x16, got 20"),
        ("inverse", ["--references", "[denoiser]"], "the reference 'denoiser' only denoises"),
        ("ablations", ["--references", "[map]"], "the reference 'map' belongs to one prior; ablations have several"),
    ],
)
def test_mistakes_of_one_command(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command)(arguments) == 2
    assert message in told(capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*TRAINING, "evaluate"])
@pytest.mark.parametrize(
    "arguments", [["--sizes", "3"], ["--eval-size", "big"], ["--config", "nowhere.yaml"], ["--operator", "radon"]]
)
def test_unknown_options_exit_as_argparse_does(command, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)(arguments)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_options_are_whole_words_and_a_preset_is_chosen_on_the_command_line(tmp_path, capsys):
    for command, words in (("unfolded", ["--pres", "cpu"]), ("pretrain", ["--fold", "7"])):
        with pytest.raises(SystemExit):
            main(command)(words)
        assert words[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--fig", "2"])
    assert "--fig" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("preset: paper\n")
    assert main("unfolded")(["--config", str(tmp_path / "mine.yaml")]) == 2
    assert "a preset is chosen on the command line, --preset paper, not in --config" in told(capsys)


def test_noise_levels_are_told_apart():
    assert [config.noise(sigma) for sigma in (0.1, 0.012, 0.014, 25 / 255)] == ["0.10", "0.012", "0.014", "0.0980392"]
    assert tiny("photos", None, sigma=0.004, sigma_max=0.15).trained_at() == "0.004 to 0.15"


def test_an_interruption_is_one_sentence(capsys):
    def interrupted():
        raise KeyboardInterrupt

    for prepare in (interrupted, lambda: interrupted):
        assert command_module.run(prepare) == 130
        assert capsys.readouterr().err == "interrupted; what has begun is continued by the same command\n"


def test_an_interruption_while_a_command_imports_is_a_word():
    command = [sys.executable, "-c", "import train; raise KeyboardInterrupt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode and done.stderr == "interrupted\n"


def test_a_file_that_cannot_be_written_is_one_sentence(capsys):
    def full():
        raise OSError(28, "No space left on device", "table.md")

    assert command_module.run(lambda: full) == 4
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 28] No space left on device: 'table.md': make room") and said.count("\n") == 1


def test_a_stage_that_ends_within_its_warm_up_is_warned_of():
    settings = Config(warmup=9, prior_steps=10, steps=9)
    with pytest.warns(UserWarning, match="^steps = 9 end within the warm-up of 9 steps"):
        settings.check_schedule("prior", "unfolded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings.check_schedule("prior")


def test_a_stage_without_a_schedule_s_limit_is_none_of_a_network_without_a_flow():
    """Without a prior there is no stage of pre-training to limit."""
    Config(prox="unet", schedule="cosine", steps=3).check_schedule("unfolded")
    assert not Config(prox="unet").has_prior_stage and not Config(pretrain=False).has_prior_stage
    assert Config(prox="unet", levels=4, size=20).size == 20


@pytest.mark.parametrize(("command", "stage"), [("unfolded", "prior"), ("pretrain", "prior"), ("unfolded", "unfolded")])
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    command, stage, words, tmp_path, monkeypatch, capsys
):
    if stage == "prior":
        monkeypatch.setattr(flowkern.Glow, "bits_per_dim", lambda self, x, bits: x.sum(dim=(1, 2, 3)) * math.nan)
    else:
        monkeypatch.setattr(torch.nn.functional, "mse_loss", lambda estimate, clean: estimate.sum() * math.inf)
    assert main(command)(words(out=tmp_path / "run", prior_steps=1)) == 3
    error = capsys.readouterr().err
    assert f"error: the {stage} loss became {'nan' if stage == 'prior' else 'inf'} at step 0: lower the" in error


# End to end


def test_unfolded_from_its_options_to_its_folder(words, tmp_path, capsys):
    line = words(out=tmp_path / "run", steps=2, tensorboard=True)
    done = subprocess.run(
        [sys.executable, "-m", "train.unfolded", *line], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "run") == FILES | {"tensorboard"}
    assert "prior  epoch   1  step     5" in done.stdout and "images/s" in done.stdout and "MiB" in done.stdout
    assert "Unfolded Glow" in done.stdout and "Unfolded Glow − Total variation" in done.stdout
    assert len(rows(tmp_path / "run", "unfolded")) == 1
    assert unfolded.main(line) == 2
    assert "holds a finished run: pass --resume to report again" in told(capsys)


@pytest.fixture(scope="module")
def pretrained(words, tmp_path_factory):
    """The folder that `train.pretrain` leaves, of a flow for images of five bits, trained with noise."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain.main(words(out=out, bits=5, prior_noise=0.3)) == 0
    return out


@pytest.mark.parametrize("bits", [5, 8])
def test_pretrain_reports_the_bits_of_quantised_held_out_images(bits, pretrained, words, pictures, tmp_path):
    path = pretrained
    if bits == 8:
        path = tmp_path / "run"
        assert pretrain.main(words(out=path)) == 0
    assert names(path) == (FILES - {"denoised.png"}) | {"samples.png"} and names(path / "checkpoints") == {"prior"}
    results = json.loads((path / "results.json").read_text())
    assert results["bits"] == bits and results["training"]["prior"]["steps"] == 5
    glow = flowkern.Glow.from_pretrained(path / "checkpoints" / "prior")
    assert results["parameters"] == sum(p.numel() for p in glow.parameters())
    # Held-out images are dequantised as everywhere, but without the noise of training.
    images = data.prepare(tiny(pictures, "", bits=bits, prior_noise=0.0))
    for split, found in (("val", images.val), ("test", images.test)):
        x = torch.stack([found[i]["prior"] for i in range(len(found))])
        with torch.no_grad():
            wanted = glow.bits_per_dim(x, bits=bits).mean().item()
            from_density = (-glow.log_prob(x) / (x[0].numel() * math.log(2)) + bits).mean().item()
        assert results["bits_per_dim"][split] == pytest.approx(wanted, rel=1e-6)
        assert results["bits_per_dim"][split] == pytest.approx(from_density, rel=1e-5)
    header, *cells = table(path)
    assert header == ["", f"bits per dimension ({bits}-bit images)"]
    assert cells == [[t, f"{results['bits_per_dim'][s]:.3f}"] for t, s in (("Validation", "val"), ("Test", "test"))]
    said = "noise of sigma up to 0.3 added" if bits == 5 else "clean images"
    assert results["protocol"]["training"] == said


def test_pretrain_shows_samples_at_each_temperature(pretrained):
    with Image.open(pretrained / "samples.png") as image:
        image.load()
        assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 50


def test_a_pretrain_folder_serves_as_prior(pretrained, pictures, tmp_path):
    made = run.prepare(tiny(pictures, tmp_path / "run", steps=2, prior_checkpoint=str(pretrained)))
    made.trained_network()
    assert {row["stage"] for row in rows(tmp_path / "run")} == {"unfolded"}
    given, kept = (flowkern.Glow.from_pretrained(p / "checkpoints" / "prior") for p in (pretrained, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(given.state_dict().values(), kept.state_dict().values(), strict=True))


def test_a_finished_pretrain_is_refused_or_reports_again(pretrained, words, monkeypatch, capsys):
    line = words(out=pretrained, bits=5, prior_noise=0.3)
    assert pretrain.main(line) == 2
    assert "holds a finished run" in told(capsys)
    monkeypatch.setattr(run, "fit", None)
    (pretrained / "samples.png").unlink()
    before = json.loads((pretrained / "results.json").read_text())["bits_per_dim"]
    assert pretrain.main([*line, "--resume"]) == 0
    assert json.loads((pretrained / "results.json").read_text())["bits_per_dim"] == before
    assert (pretrained / "samples.png").exists()


# Evaluating runs together


@pytest.fixture(scope="module")
def resnet(pictures, tmp_path_factory):
    """A finished run with a ResNet."""
    return run.prepare(tiny(pictures, tmp_path_factory.mktemp("resnet") / "net", prox="resnet", steps=3)).train()


def test_evaluate_puts_runs_and_references_into_one_table(finished, resnet, tmp_path, monkeypatch):
    shown = []
    draw = figures.denoised
    monkeypatch.setattr(figures, "denoised", lambda path, found, *rest: (shown.append(found), draw(path, found, *rest)))
    # The methods are tested on their own; here they need not get anywhere.
    monkeypatch.setattr(baselines, "bm3d_available", lambda: False)
    monkeypatch.setattr(baselines.MapPrior.__init__, "__defaults__", ((1, 3), 2, "adam", 0.1, 2, 16))
    words = options(out=tmp_path / "out", eval_sigmas=[0.2], references="[tv,denoiser,map]", figure_images=2)
    assert evaluate.main([str(resnet), str(finished), str(finished), *words]) == 0
    assert names(tmp_path / "out") == {"table.md", "results.json", "denoised.png"}
    header, *cells = table(tmp_path / "out")
    titles = [row[0] for row in cells]
    denoiser = baselines.reference_denoiser().title
    assert titles[:7] == [
        "Noisy", "Total variation", denoiser, "MAP over z", "Unfolded ResNet", "Unfolded Glow (whole)",
        "Unfolded Glow (whole)",
    ]  # fmt: skip
    assert titles[7:] == [f"{title} − Total variation" for title in titles[2:7]]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"])[4:] == ["resnet-0", "glow-1", "glow-2"]
    assert results["runs"] == [str(resnet), str(finished), str(finished)]
    assert {"Total variation", denoiser, "MAP over z", "Unfolded ResNet"} <= set(results["protocol"])
    # The same figures as each run has in its own folder.
    for key, path in (("resnet-0", resnet), ("glow-1", finished), ("glow-2", finished)):
        own = json.loads((path / "results.json").read_text())["methods"]["unfolded"]
        (level,) = results["methods"][key]["levels"]
        assert level["psnr"] == pytest.approx(own["levels"][1]["psnr"], abs=1e-4)
        assert results["methods"][key]["training_mib"] == pytest.approx(own["training_mib"])
        assert results["methods"][key]["training_minutes"] == own["training_minutes"]
        assert results["methods"][key]["parameters"] == sum(p.numel() for p in network(path).parameters())
    (found,) = shown
    assert found.images == 5 and len(found.clean) == 2


def test_runs_in_folders_of_one_name_are_told_apart():
    folders = [Path("a/net"), Path("b/net"), Path("c/other"), Path("a/net")]
    titles = [title for _, title in evaluate._names(["glow"] * 4, folders)]
    assert titles == [f"Unfolded Glow ({name})" for name in ("a/net", "b/net", "other", "a/net")]


def test_runs_on_other_test_images_are_refused_by_name_unless_it_is_said_which(
    finished, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    other = run.prepare(tiny(pictures, tmp_path / "fewer", prox="resnet", steps=1, test_images=2, eval_size=24))
    other.holding(other.trained_network)
    words = [str(finished), str(other.folder.path), *options(references=["tv"], eval_sigmas=[0.2])]
    assert evaluate.main(words) == 2
    assert "whole has eval_size = 16 and " in (message := told(capsys))
    assert "fewer 24: say which with --eval-size" in message
    assert evaluate.main([*words, "--eval-size", "16"]) == 2
    assert "has test_images = None and " in (message := told(capsys)) and "2: say which with --test-images" in message
    assert not (tmp_path / "runs").exists()
    assert evaluate.main([*words, "--eval-size", "16", "--test-images", "3"]) == 0
    results = json.loads((tmp_path / "runs" / "evaluate-001" / "results.json").read_text())
    assert results["protocol"]["data"] == "3 validation and 3 test images of 16x16"


@pytest.mark.parametrize(
    ("which", "words", "message"),
    [
        ("nowhere", [], "nowhere holds no trained network: pass the folder of a finished run"),
        ("resnet", ["--references", "[map]"], "the reference 'map' needs the prior of a Glow; none of the runs has"),
        ("finished", ["--eval-size", "17"], "eval_size must be a positive multiple of 2^levels = 2, got 17"),
        ("both", ["--eval-size", "17"], "eval_size must be a positive multiple of 2^levels = 2, got 17"),
        ("finished", ["--data", "nowhere"], "--data nowhere does not exist"),
        ("finished", ["--eval-sigmas", "[-1]"], "eval_sigmas must be one or more positive numbers, got [-1.0]"),
        ("finished", ["--out", "."], "is not empty and holds no unfinished run"),
    ],
)
def test_mistakes_of_evaluate(which, words, message, finished, resnet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    runs = {"nowhere": ["nowhere"], "resnet": [str(resnet)], "finished": [str(finished)]}
    runs["both"] = [str(resnet), str(finished)]
    assert evaluate.main([*runs[which], *words]) == 2
    assert message in told(capsys)
    assert names(tmp_path) == {"mine"}


def test_rows_of_samples_are_of_the_same_latents(pictures):
    class Linear:
        def sample(self, n, temperature):
            return temperature * torch.randn(n, 3, 2, 2)

    first, *others = [row / t for t, row in likelihood.samples(Linear(), tiny(pictures, "")).items()]
    for other in others:
        torch.testing.assert_close(other, first)
