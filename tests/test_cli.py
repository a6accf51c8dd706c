"""Promise: help and mistakes on the command line are answered at once, and shown defaults are those that act."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from segcn import cli
from segcn.models.segmenter import SegmenterConfig
from segcn.samples.config import MeasureConfig
from segcn.samples.recognizer import RecognizerRecipe
from segcn.utils.args import check_values, flag, make, parse
from segcn.utils.errors import UserError
from segcn.utils.paths import ROOT

WITH_FLAGS = {name: command for name, command in cli.COMMANDS.items() if command.config}
LIMIT = 1.5  # seconds of CPU, user and system, of a fresh process


def ran(module, *words, **environment):
    """(seconds of CPU, exit code, standard output, standard error) of python -m module."""
    words = [sys.executable, "-m", module, *words]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)
    out, error = process.stdout.read().decode(), process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode, out, error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_and_mistakes_are_answered_at_once(name):
    seconds, code, out, error = ran("segcn.cli", *name.split(), "--help")
    assert code == 0 and f"segcn {name}" in out and not error and seconds < LIMIT
    seconds, code, out, error = ran("segcn.cli", *name.split(), "--no_such_flag", "3")
    assert code == 2 and re.fullmatch(r"Error: segcn.*no_such_flag.*\n", error) and not out and seconds < LIMIT


@pytest.mark.parametrize(("module", "words", "said"), [
    ("cli", "--help", "segcn evaluate "), ("cli", "", "Usage: segcn COMMAND"),
    ("cli", "--version", f"segcn {version('segcn')}\n"),
    ("train", "--help", "--learning_rate"), ("generate", "--help", "--min_miou"),
    ("train", "--resolution many", "--resolution: expected a whole number, found 'many'"),
    ("generate", "--min_miou 3", "--min_miou: expected 0 to 1, found 3.0"),
    ("cli", "evalaute", "no command 'evalaute'. Did you mean evaluate?"),
    ("cli", "bench trian", "no command 'trian'. Did you mean train?"),
    ("cli", "evaluate comapre a b", "no command 'comapre'. Did you mean compare?"),
    ("cli", "infer --num-inference-setps 3", "Did you mean --num_inference_steps?"),
    ("cli", "infer --preset tinny", "--preset: expected one of sd15, tiny, found 'tinny'. Did you mean"),
    ("cli", "train --fit corp", "--fit: expected one of crop, pad, stretch, found 'corp'. Did you mean"),
    ("cli", "import a b c", "unexpected word 'c'"),
    ("cli", "samples earth", "segcn samples earth needs OUT: data set folder to write"),
    ("cli", "run --max_train_stepz 3", "unknown flag --max_train_stepz. Did you mean --max_train_steps"),
    ("cli", "run --limit three", "--limit: expected a whole number, found 'three'"),
])  # fmt: skip
def test_what_is_said(module, words, said):
    seconds, code, out, error = ran(f"segcn.{module}", *words.split())
    assert said in (error if code else out) and "Traceback" not in error and seconds < LIMIT
    assert code == (2 if error else 0)


def typed(value):
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return " ".join(map(typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value).replace(f"{ROOT}/", "")


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_the_help_shows_the_defaults_that_act(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # no default is broken over two lines
    kind = cli.find(WITH_FLAGS[name].config)
    required = {field.name for field in dataclasses.fields(kind) if field.metadata.get("required")}
    for preset in getattr(kind, "PRESETS", {"": {}}):
        words = ["--preset", preset] if preset else []
        acting = parse(kind, [*words, *(f"--{name}=x" for name in required)], "segcn")
        with pytest.raises(SystemExit):
            parse(kind, ["--help", *words], "segcn")
        shown = re.split(r"^  --", capsys.readouterr().out, flags=re.MULTILINE)[1:]
        texts = {re.match(r"\w+", text)[0]: " ".join(text.split()) for text in shown}
        hidden = set(getattr(kind, "HIDDEN", ()))
        assert set(texts) >= {field.name for field in dataclasses.fields(kind)} - hidden and not set(texts) & hidden
        for name, value in ((name, value) for name, value in vars(acting).items() if name not in hidden):
            default = re.search(r"default: ([^;)]+)", texts[name])
            if default:
                assert default[1] == (f"--{name}" if value is True else typed(value)), name
            else:
                assert value in (None, "", False, []) or name in required, name


def test_the_help_says_what_a_preset_changes(capsys):
    with pytest.raises(SystemExit):
        cli.run_command(["infer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "denoising steps (default: 10; --preset sd15: 20)" in text and "--scheduler" in text
    assert "(default: 3.5; --preset sd15: 7.5)" in text and "DPM-Solver++), unipc or ddim (default: unipc)" in text


def test_a_value_outside_of_its_range_is_named():
    @dataclasses.dataclass(frozen=True)
    class Toy:
        share: float = flag(0.5, "a share", low=0, high=1)
        count: int | None = flag(None, "a count", low=1)
        rates: list[float] = flag([1.0], "rates", above=0)
        sort: str = flag("a", "a choice", ("a", "bcd"))

    assert make(Toy, share=1, count=1, rates=[0.1]) == Toy(1, 1, [0.1])
    for values, message in (
        ({"share": 1.5}, "--share: expected 0 to 1, found 1.5"),
        ({"share": float("nan")}, "--share: expected 0 to 1, found nan"),
        ({"count": 0}, "--count: expected 1 or more, found 0"),
        ({"rates": [1, 0]}, "--rates: expected more than 0, found 0"),
        ({"sort": "bdc"}, r"--sort: expected one of a, bcd, found 'bdc'\. Did you mean bcd\?"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            make(Toy, **values)
        with pytest.raises(UserError, match=f"^{message}$"):
            check_values(dataclasses.replace(Toy(), **values))


def test_words_without_a_flag_are_taken_in_order_wherever_they_are():
    for words in (["a", "b", "--test", "3"], ["--test", "3", "a", "b"], ["b", "--source", "a", "--test=3"]):
        config = parse(cli.find("segcn.data.config:ImportConfig"), words, "segcn import", ("source", "out"))
        assert (config.source, config.out, config.test) == ("a", "b", 3)


def completed(line, folder):
    answer = folder / "answer"
    where = {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    how = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_TYPE": "9"}
    code = ran("segcn.cli", **where, **how)[1]
    return [word.strip() for word in answer.read_text().splitlines()] if code == 0 else []


@pytest.mark.parametrize(("line", "found"), [
    ("tr", "train"), ("samples ea", "earth"), ("evaluate co", "compare"), ("train --learning_r", "--learning_rate"),
    ("generate --scheduler u", "unipc"),
])  # fmt: skip
def test_the_shell_completes_commands_flags_and_choices(line, found, tmp_path):
    assert completed(f"segcn {line}", tmp_path) == [found]
    assert (ROOT / "segcn" / "cli.py").read_text().startswith("# PYTHON_ARGCOMPLETE_OK")


def test_defaults_that_are_written_twice_agree():
    config = MeasureConfig()
    assert (config.segmenter_steps, config.recognizer_steps) == (SegmenterConfig.steps, RecognizerRecipe.steps)
