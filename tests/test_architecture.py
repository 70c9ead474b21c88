"""The house as pyproject.toml describes it to import-linter: its rooms are all there, and nothing goes in a circle.

`lint-imports` checks that arrows point downwards; here is what it does not see.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
ROOMS = [room.strip() for layer in CONTRACTS["layers"]["layers"] for room in layer.split(":")]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("rebasin", exclude_type_checking_imports=True, cache_dir=None)


def test_at_most_ten_modules_lie_at_the_top() -> None:
    modules = {path.name for path in (ROOT / "rebasin").glob("*.py")} - {"__init__.py"}
    assert len(modules) <= 10, sorted(modules)


def test_every_room_has_its_layer() -> None:
    there = {
        path.stem
        for path in (ROOT / "rebasin").iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").is_file())
    }
    assert set(ROOMS) == there - {"__init__"}
    assert len(ROOMS) == len(set(ROOMS))


def test_no_module_imports_itself_through_others(graph: grimp.ImportGraph) -> None:
    """Late imports count: a cycle that is only hidden in functions is still one."""
    modules = sorted(graph.modules)
    number = {module: i for i, module in enumerate(modules)}
    arrows = [(i, number[to]) for m, i in number.items() for to in graph.find_modules_directly_imported_by(m)]
    rows, columns = zip(*arrows, strict=True)
    matrix = coo_array(([True] * len(arrows), (rows, columns)), shape=(len(modules), len(modules)))
    _, label = connected_components(matrix, directed=True, connection="strong")
    cycles: dict[int, list[str]] = {}
    for module, component in zip(modules, label.tolist(), strict=True):
        cycles.setdefault(component, []).append(module)
    assert not [cycle for cycle in cycles.values() if len(cycle) > 1]
