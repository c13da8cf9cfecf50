"""The command line: what it tells, what it refuses, and what it does not load."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from fewstep import __version__
from fewstep.cli import COMMANDS, main
from fewstep.cli.extras import EXTRAS, missing_extra
from fewstep.errors import UserError

ROOT = Path(__file__).parents[2]
FEWSTEP = Path(sys.executable).parent / "fewstep"
BLOCKER = """
import sys

class Without:
    # A finder that does not find some modules, so that they are as good as not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        found = name.partition(".")[0] not in {blocked}
        return self.finder.find_spec(name, path, target) if found else None

    def __getattr__(self, name):  # finders also find packages' versions
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def fewstep(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The console script, as users start it."""
    return subprocess.run([str(FEWSTEP), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def without(blocked: set[str], code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python code in a process where some modules can't be imported."""
    script = BLOCKER.format(blocked=sorted(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # as argparse ends after a help page
        assert main([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: fewstep {command} ")
    assert page.count("\nexamples\n") == 1
    examples = page.partition("\nexamples\n")[2]
    assert f"fewstep {command}" in examples
    assert "{program}" not in page


def test_the_first_help_page_lists_every_command() -> None:
    page = fewstep("--help").stdout
    for name, command in COMMANDS.items():
        assert f"  {name}  " in page
        assert command.summary in page


def test_a_group_has_a_help_page_of_its_own() -> None:
    for arguments in (["benchmark", "--help"], ["benchmark", "-h"]):
        page = fewstep(*arguments).stdout
        assert "benchmark rollout" in page
        assert "benchmark soak" in page
        assert "prepare-data" not in page


def test_the_first_help_page_is_fast_and_loads_nothing_heavy() -> None:
    def seconds(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    page = "from fewstep.cli import main; main(['--help'])"
    # The fastest of several: what else this machine does must not count.
    assert min(seconds(page) for _ in range(5)) - min(seconds("pass") for _ in range(5)) < 0.3
    heavy = {"torch", "ray", "mlflow", "pydantic", "numpy", "yaml"}
    done = without(heavy, page)
    assert done.returncode == 0, done.stderr
    assert "usage: fewstep COMMAND" in done.stdout


def test_no_command_is_a_help_page_and_status_2() -> None:
    for arguments in ([], ["benchmark"]):
        done = fewstep(*arguments)
        assert done.returncode == 2
        assert "COMMAND [OPTIONS]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "there is no command 'genrate'; did you mean 'generate'?"),
        (["prepare_data"], "there is no command 'prepare_data'; did you mean 'prepare-data'?"),
        (
            ["benchmark", "roll-out"],
            "there is no command 'benchmark roll-out'; did you mean 'benchmark rollout'?",
        ),
        (["xyz"], "there is no command 'xyz'; `fewstep --help` lists them."),
    ],
)
def test_an_unknown_command_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}\n"
    assert printed.out == ""


def test_a_user_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = fewstep("generate", "--prompt", "x", "--model", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "is no exported student" in line


def test_the_version_is_told() -> None:
    assert fewstep("--version").stdout == f"fewstep {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "blocked", "message"),
    [
        (["distill"], {"ray", "mlflow"}, "fewstep distill needs Ray and MLflow: pip install 'fewstep[train]'"),
        (["distill"], {"mlflow"}, "fewstep distill needs MLflow: pip install 'fewstep[train]'"),
        (
            ["evaluate"], {"efficientnet_lite_pytorch"},
            "fewstep evaluate needs efficientnet-lite-pytorch: pip install 'fewstep[train]'",
        ),
        (["serve"], {"ray", "fastapi"}, "fewstep serve needs Ray and FastAPI: pip install 'fewstep[serve]'"),
        (["resend", "x"], {"mlflow"}, "fewstep resend needs MLflow: pip install 'fewstep[train]'"),
        (["benchmark", "soak"], {"aiohttp"}, "fewstep benchmark soak needs aiohttp: pip install 'fewstep[serve]'"),
        (
            ["generate", "--prompt", "x", "--model", "models:/a@b"], {"mlflow", "ray"},
            "fewstep generate needs MLflow: pip install 'fewstep[train]'",
        ),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_sentence_with_the_remedy(
    arguments: list[str], blocked: set[str], message: str
) -> None:
    done = without(blocked, f"from fewstep.cli import main\nsys.exit(main({arguments!r}))")
    assert done.returncode == 2
    assert done.stderr == f"error: {message}\n"


def test_another_missing_module_is_not_blamed_on_an_extra() -> None:
    for error in (
        ModuleNotFoundError("No module named 'argon'", name="argon"),
        ModuleNotFoundError("a finder's own"),
    ):
        assert missing_extra("fewstep distill", "train", error) is None


def test_the_extras_are_those_of_the_package() -> None:
    """What is said to be missing must be what `pip install 'fewstep[…]'` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = project["tool"]["deptry"]["package_module_name_map"]
    for extra, modules in EXTRAS.items():
        packages = {Requirement(line).name for line in project["project"]["optional-dependencies"][extra]}
        assert {names.get(package, package) for package in packages} == set(modules)


def test_generate_and_a_dry_run_load_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    # Those three the core's own dependencies bring: transformers' and pydantic's.
    extras = {module for modules in EXTRAS.values() for module in modules} - {"tqdm", "yaml", "pydantic_core"}
    picture = tmp_path / "red.png"
    arguments = ["generate", "--prompt", "red heart, noto style", "--scale", "2", "--out", str(picture)]
    done = without(extras, f"from fewstep.cli import main\nsys.exit(main({arguments!r}))", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert len(image.getcolors(1 << 16)) > 10
    for command, said in (("distill", "memory"), ("serve", "evaluation"), ("generate", "evaluation")):
        planned = f"from fewstep.cli import main\nsys.exit(main([{command!r}, '--dry-run']))"
        plan = without({"ray", "mlflow"}, planned)
        assert plan.returncode == 0, plan.stderr
        assert said in plan.stdout


def test_help_pages_need_no_extra(tmp_path: Path) -> None:
    """`fewstep --help` of a core installation says that every command explains itself."""
    code = f"""
from fewstep.cli import main
for command in {list(COMMANDS)!r}:
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as end:  # as argparse does after a help page
        status = end.code
    assert status == 0, command
"""
    extras = {module for modules in EXTRAS.values() for module in modules} - {"tqdm", "yaml", "pydantic_core"}
    done = without(extras, code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: fewstep ") == len(COMMANDS)


def test_old_names_of_options_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the scripts before there was a console script."""
    monkeypatch.chdir(tmp_path)
    for name in ("--steps", "--nfe"):
        assert main(["generate", "--prompt", "owl, noto style", name, "2", "--out", f"{name[2:]}.png"]) == 0
    assert Path("steps.png").read_bytes() == Path("nfe.png").read_bytes()
    usage = fewstep("evaluate", "--help").stdout
    assert "--criteria" in usage
    assert "--promise" in usage


@pytest.mark.parametrize(
    ("command", "unread"),
    [
        ("generate --prompt owl", "--batch 4"),
        ("generate --prompt owl", "--cpu"),
        ("generate --prompt owl", "--recipe qwen_image_4nfe"),
        ("generate --prompt owl", "--set train.steps=3"),
        ("serve", "--gpu-memory 24"),
        ("serve", "--encoder-precision int8"),
        ("distill", "--gpus 8"),
        ("distill", "--infiniband 25"),
    ],
)
def test_options_of_dry_runs_are_not_ignored_without_one(
    command: str, unread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), *unread.split()])
    option = unread.split()[0]
    assert f"{option} is of dry runs: add --dry-run, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "serve", "distill"])
@pytest.mark.parametrize(
    "option",
    ["--gpu-memory 0", "--gpu-memory nan", "--gpu-tflops 0", "--utilisation 3", "--utilisation 0", "--tokens 0",
     "--latent-size 0", "--gpu-bandwidth 0"],
)  # fmt: skip
def test_dry_runs_refuse_numbers_that_can_not_be(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "--dry-run", *option.split()])
    name, value = option.split()
    assert f"argument {name}: {value!r} is not a" in capsys.readouterr().err


def test_a_dry_run_refuses_settings_of_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--dry-run", "--set", "train.steps=3"])
    assert "--set changes a recipe: name it with --recipe" in capsys.readouterr().err


def test_generate_takes_precisions_of_the_parts(tmp_path: Path) -> None:
    pictures = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.png"
        arguments = ["--prompt", "owl, noto style", "--out", str(out), "--encoder-precision", precision]
        assert main(["generate", *arguments]) == 0
        pictures.append(Image.open(out).convert("RGB").tobytes())
    different = sum(a != b for a, b in zip(*pictures, strict=True))
    assert 0 < different < len(pictures[0]), "another precision of the same picture"
    assert max(abs(a - b) for a, b in zip(*pictures, strict=True)) < 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nfe", "0"], "argument --nfe/--steps: '0' is not a whole number of at least 1"),
        (["--count", "0"], "argument --count: '0' is not a whole number of at least 1"),
        (["--teacher-steps", "-1"], "argument --teacher-steps: '-1' is not a whole number of at least 1"),
        (["--out", "x.gif"], "its name must end in .png, .jpg or .webp"),
    ],
)
def test_generate_refuses_before_it_loads(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--prompt", "x", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--device", "cuda:99"], "device cuda:99 can't be used here"),
        (
            ["generate", "--prompt", "x", "--device", "nonsense"],
            "device nonsense is not known: give cpu, cuda",
        ),
        (["generate", "--prompt", "x", "--out", "file/x.png"], "--out: can't write to the folder file"),
        (["export", "--out", "file"], "--out: can't write to the folder file"),
        (["generate", "--prompt", "x", "--model", "pipeline"], "pipeline is a diffusers pipeline"),
    ],
)
def test_what_would_fail_late_is_refused_at_once(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))
    Path("file").touch()
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text("{}")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("sampler", [[], ["--teacher-steps", "2"]])
def test_a_prompt_of_bytes_that_are_no_text_is_one_line_and_status_2(
    sampler: list[str], tmp_path: Path
) -> None:
    # As a shell passes $'owl \\xed\\xa0\\xbd': half a surrogate pair, in what would be its UTF-8.
    arguments = [
        os.fsencode(FEWSTEP),
        b"generate",
        b"--prompt",
        b"owl \xed\xa0\xbd",
        *map(os.fsencode, sampler),
    ]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(r"error: the caption 'owl \udced\udca0\udcbd' holds half a surrogate pair")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where the dataset goes with --out"),
        (["--out", "x", "--bundle"], "say where the dataset goes with --out"),
        (["--out", "x", "photos"], "--source emoji takes no PATH"),
        (["--out", "x", "--source", "folder"], "--source folder takes one PATH"),
        (["--out", "x", "--source", "prompts"], "--source prompts takes a PATH"),
        (["--out", "x", "--source", "webdataset"], "--source webdataset takes a PATH"),
        (["--out", "x", "--source", "mix", "a.yaml", "b.yaml"], "--source mix takes one PATH"),
        (["--out", "x", "--caption-column", "title"], "--caption-column is for --source folder, parquet, "),
        (
            ["--out", "x", "--source", "parquet", "p", "--captions", "t.csv"],
            "--captions is for --source folder,",
        ),
        (["--out", "x", "--buckets", "64", "--size", "64"], "--buckets stands in place of --size"),
    ],
)
def test_prepare_data_refuses_what_does_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare-data", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values", "wanted"),
    [
        ("--shard-rows", ["0", "-1", "1.5", "many"], "a whole number of at least 1"),
        ("--encoders", ["0", "-1", "nan", ""], "a whole number of at least 1"),
        ("--max-tokens", ["0", "-5"], "a whole number of at least 1"),
        ("--max-pixels", ["0", "1e6"], "a whole number of at least 1"),
        ("--min-size", ["0", "x"], "a whole number of at least 1"),
        ("--buckets", ["0", "512x512"], "a whole number of at least 1"),
        ("--held-out", ["1.5", "-1", "nan", "inf", "half"], "a number from 0 to 1"),
        ("--gpus", ["-1", "nan", "inf", "all"], "a number of at least 0"),
    ],
)
def test_prepare_data_refuses_numbers_that_can_not_be(
    option: str, values: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        with pytest.raises(SystemExit, match="2"):
            main(["prepare-data", "--out", "x", "--source", "prompts", "no-such.txt", f"{option}={value}"])
        assert f"argument {option}: {value!r} is not {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_options: 8000\napplications: []", "http_options: Input should be a valid dictionary"),
        ("http_options: [8000]\napplications: []", "http_options: Input should be a valid dictionary"),
        (
            "http_options: {port: here}\napplications: []",
            "http_options.port: Input should be a valid integer",
        ),
        ("http_options: {host: 5}\napplications: []", "http_options.host: Input should be a valid string"),
        ("grpc_options: 9000\napplications: []", "grpc_options: Input should be a valid dictionary"),
        (
            "applications: [{import_path: a:b, route_prefix: 5}]",
            "applications.0.route_prefix: Input should be a valid s",
        ),
        (
            "applications: [{import_path: a:b, name: [x]}]",
            "applications.0.name: Input should be a valid string",
        ),
        (
            "applications: [{import_path: 'fewstep_serve.app:build', args: {engine: {precison: int8}}}]",
            "default: args: unknown key 'engine.precison'; did you mean 'engine.precision'?",
        ),
        (
            "applications: [{import_path: 'fewstep_serve.app:build', "
            "deployments: [{name: Generator, user_config: {models: []}}]}]",
            "default: user_config: models: Tuple should have at least 1 item",
        ),
        ("applications: []", "lists no application: add one"),
        (None, "can't be read: No such file"),
        ("a: [", "is not valid YAML"),
        ("http_options: {port: 1}", "is no Ray Serve configuration: it has no list of applications"),
    ],
)
def test_serve_refuses_a_configuration_that_is_none(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["serve", "--config", str(file)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert str(file) in printed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_serve_reads_a_configuration_by_its_byte_order_mark(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = tmp_path / "config.yaml", "# für alle\napplications: []\n"
    file.write_bytes(text.encode(encoding))
    assert main(["serve", "--print-config", "--config", str(file)]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_serve_refuses_a_configuration_that_is_no_text(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes("# für alle\napplications: []\n".encode(encoding))
    assert main(["serve", "--config", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config: {file} holds ")
    assert "UTF-" in line


def _serve_address(asked: dict[str, object], running: dict[str, object]) -> str:
    from ray.serve.schema import ServeDeploySchema

    from fewstep.cli.serve import _address

    return _address(ServeDeploySchema.model_validate({"applications": []} | asked), running)


@pytest.mark.parametrize(
    ("http", "address"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 81}, "http://127.0.0.1:81"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "::1", "port": "81"}, "http://[::1]:81"),
        ({"host": "fe80::2"}, "http://[fe80::2]:8000"),
        ({"host": "example.org"}, "http://example.org:8000"),
    ],
)
def test_the_address_of_a_service_is_one_that_answers(http: dict[str, object], address: str) -> None:
    assert _serve_address({"http_options": http}, {}) == address
    running = {"http_options": {"host": "127.0.0.1", "port": 8000} | http}
    running["http_options"]["port"] = int(running["http_options"]["port"])
    assert _serve_address({}, running) == address


def test_options_of_a_running_serve_are_compared_by_value() -> None:
    from ray.serve.schema import HTTPOptionsSchema, gRPCOptionsSchema

    running = {
        "http_options": HTTPOptionsSchema(host="127.0.0.1").model_dump(mode="json"),
        "grpc_options": gRPCOptionsSchema().model_dump(mode="json"),
        "proxy_location": "EveryNode",
    }
    same = {
        "http_options": {"port": "8000", "host": "127.0.0.1", "keep_alive_timeout_s": "90"},
        "grpc_options": {"port": "9000", "grpc_servicer_functions": []},
        "proxy_location": "EveryNode",
    }
    same["http_options"]["keep_alive_timeout_s"] = str(running["http_options"]["keep_alive_timeout_s"])
    assert _serve_address(same, running) == "http://127.0.0.1:8000"
    for section, name, value in (
        ("http_options", "port", "81"), ("grpc_options", "port", 9001), ("grpc_options", "request_timeout_s", 5),
        ("grpc_options", "grpc_servicer_functions", ["a.b"]),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=f"{section}.{name}: .*is asked for, but Serve already runs here with"
        ):
            _serve_address({section: {name: value}}, running)
    with pytest.raises(UserError, match="proxy_location: HeadOnly is asked for"):
        _serve_address({"proxy_location": "HeadOnly"}, running)


def test_serve_prints_the_bundled_configuration() -> None:
    import yaml

    done = without({"ray"}, "from fewstep.cli import main\nsys.exit(main(['serve', '--print-config']))")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())


def test_every_job_is_a_command_and_every_command_has_its_job() -> None:
    called = {}
    for script in (ROOT / "jobs").glob("*.py"):
        [call] = [
            node
            for node in ast.walk(ast.parse(script.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_job"
        ]
        called[script.stem] = ast.literal_eval(call.args[0])
    assert set(called.values()) <= set(COMMANDS)
    # These two came with the console script; `make serve` and `python -m fewstep.tracking.resend` were there before.
    assert set(COMMANDS) - set(called.values()) == {"serve", "resend"}


def test_a_job_runs_without_the_console_script(tmp_path: Path) -> None:
    """All that a script needs is that `fewstep` can be imported."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "distill_flux.py"), "--help"], cwd=tmp_path, capture_output=True,
        text=True, env=os.environ | {"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ray job submit jobs/distill_flux.py" in done.stdout
    assert "default: emoji_flux_4nfe" in " ".join(done.stdout.split())
    module = subprocess.run(
        [sys.executable, "-m", "fewstep.cli", "--version"], capture_output=True, text=True
    )
    assert module.stdout == f"fewstep {__version__}\n"
