# SPDX-License-Identifier: Apache-2.0
"""The wheel holds the package alone, rooms keep to their floors, and the README names real tests."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from refound.ckpt.conf import PluginConfig

# Who may import whom inside the package. The root's own modules belong to the command line, which uses all.
FLOORS: dict[str, set[str]] = {
    "erasure": set(),
    "export": set(),
    "ckpt": {"erasure"},
    "distill": {"ckpt", "export"},
    "demo": {"erasure", "ckpt", "distill", "protect"},  # the root's `protect` is that of ckpt
    "adapters": {"ckpt", "distill", "export"},
    "nas": {"distill", "export", "text"},  # `text`: numbers as people read them
    "chaos": {"ckpt"},
}
NOT_PACKAGED = {"tests", "benchmarks", "examples", "docs", "build", "dist", "runs"}


def sources(root: Path) -> Iterator[Path]:
    """Yield every Python file that is written by hand, tests included."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") or part in ("build", "dist", "runs") for part in parts):
            yield path


def packaged(root: Path) -> list[Path]:
    """Return the Python files of the package, relative to the root."""
    relative = (path.relative_to(root) for path in sources(root))
    return [path for path in relative if path.parts[0] not in NOT_PACKAGED]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (level, dotted name) of every import in the file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            else:  # `from .. import erasure` names the room after the import
                yield from ((node.level, alias.name) for alias in node.names)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from the sdist, built from a copy of the tree: both are proven whole."""
    copy = tmp_path_factory.mktemp("source") / "refound"
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(root, copy, ignore=unwanted)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which only the wheel was installed."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run_installed(installed: Path, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"PYTHONPATH": str(installed), "PATH": ""},
    )


def test_wheel_holds_exactly_the_package(root: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    found = sorted(name for name in names if ".dist-info/" not in name)
    expected = sorted([f"refound/{path.as_posix()}" for path in packaged(root)] + ["refound/py.typed"])
    assert found == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_works_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, "import refound, refound.cli; print(refound.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "refound" / "__init__.py"


@pytest.mark.parametrize("room", ["adapters", "ckpt", "distill", "erasure", "export", "demo", "nas", "chaos", "cli"])
def test_rooms_have_no_bare_name(installed: Path, tmp_path: Path, room: str) -> None:
    done = run_installed(installed, f"import {room}", tmp_path)
    assert f"No module named '{room}'" in done.stderr


def test_import_is_light(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, "import refound, sys; print('torch' in sys.modules)", tmp_path)
    assert done.stdout.strip() == "False", done.stderr


def test_entry_points() -> None:
    expected = {
        "console_scripts": "refound.cli:main",
        "torchrun.handlers": "refound.ckpt.plugin:handler_factory",
        "torchrun.logs_specs": "refound.ckpt.plugin:RefoundLogsSpecs",
    }
    found = {group: {point.value for point in entry_points(group=group, name="refound")} for group in expected}
    assert found == {group: {value} for group, value in expected.items()}
    for group in expected:
        (point,) = entry_points(group=group, name="refound")
        assert callable(point.load())


def test_every_room_is_listed(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in packaged(root)}
    assert sorted(listed) == sorted(".".join(("refound", *folder.parts)) for folder in folders)


def test_no_source_imports_a_room_by_its_bare_name(root: Path) -> None:
    bare = {path.parts[0] for path in packaged(root) if len(path.parts) > 1}
    bare |= {path.stem for path in packaged(root) if len(path.parts) == 1} - {"__init__", "__main__"}
    offences = [
        f"{path.relative_to(root)}: import {name}"
        for path in sources(root)
        for level, name in imports(path)
        if level == 0 and name.split(".")[0] in bare
    ]
    assert not offences


def reaches(path: Path, level: int, name: str) -> str | None:
    """Return what an import in `path` reaches inside the package: a room or a name of the root.

    `""` is the package itself, None is something outside it.
    """
    if level == 0:
        first, _, rest = name.partition(".")
        return rest.split(".")[0] if first == "refound" else None
    # The first dot is the file's own folder; each further one goes up.
    folder = path.parts[:-1]
    return (*folder[: len(folder) - level + 1], *name.split("."))[0]


def test_reaches() -> None:
    path = Path("ckpt/smp.py")
    assert reaches(path, 2, "erasure") == "erasure"
    assert reaches(path, 1, "wire") == "ckpt"
    assert reaches(path, 2, "demo.run") == "demo"
    assert reaches(path, 0, "refound.demo") == "demo"
    assert reaches(path, 0, "refound") == ""
    assert reaches(path, 0, "demo") is None


def test_rooms_keep_to_their_floors(root: Path) -> None:
    offences = [
        f"{path}: {'.' * level}{name}"
        for path in packaged(root)
        if len(path.parts) > 1
        for level, name in imports(root / path)
        if reaches(path, level, name) not in FLOORS[path.parts[0]] | {path.parts[0], "__version__", None}
    ]
    assert not offences


def test_no_source_unpickles(root: Path) -> None:
    offences = [
        f"{path}: import {name}"
        for path in packaged(root)
        for level, name in imports(root / path)
        if level == 0 and name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle")
    ]
    assert not offences


def test_every_source_names_its_licence(root: Path) -> None:
    line = "# SPDX-License-Identifier: Apache-2.0"
    assert not [str(path) for path in sources(root) if path.read_text().split("\n", 1)[0] != line]


def test_readme_names_tests_that_exist(root: Path) -> None:
    """Each row of the README's table of what is survived names the tests that show it."""
    readme = (root / "README.md").read_text()
    rows = re.findall(r"^\|.*\| *(?:yes|no|not|partly)\b.*\|$", readme, flags=re.MULTILINE)
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"this row names no test: {row}"
        for file, test in named:
            tree = ast.parse((root / file).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert test in names, f"{file} has no {test}, which the README names"


def test_readme_lists_every_setting_with_its_default(root: Path) -> None:
    table = re.search(r"^\| key \|.*?\n\n", (root / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert table
    rows = [row.strip("|").split("|") for row in table.group().strip().splitlines()[2:]]
    told = {key: row[-1].strip() for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    settings = {field.name: field.default for field in fields(PluginConfig)}
    assert told.keys() == settings.keys()
    numbers = {key: float(text) for key, text in told.items() if re.fullmatch(r"[\d.]+", text)}
    assert numbers == {key: settings[key] for key in numbers}
