import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = 'timm_supertickets'
ROOT = Path(__file__).parents[1]

# module (below the package) -> level; 'name.*' stands for every module of that subpackage
LEVELS = {
    'arch': 0,
    'channels': 0,
    'compiled': 0,
    'files': 0,
    'sparsity': 0,
    'sparsity.schedule': 0,
    'packing': 1,
    'attention': 1,
    'layers': 1,
    'sparsity.mask': 1,
    'sparsity.scores': 1,
    'models': 2,
    'models.*': 2,
    'sparsity.prune': 2,
    'sparsity.reactivate': 2,
    'sparsity.keep': 2,
    'pictures': 2,
    'bake': 3,
    'cost': 3,
    'inference': 4,
    'search': 4,
    'search.*': 4,
    'ticket': 5,
    'bench': 6,
    'hub': 6,
    'card': 6,
    'export': 6,
    'show': 6,
    'cli': 7,
    '': 8,  # __init__: the public names
}
APART = [{'search', 'sparsity'}]


def read(root: Path) -> dict[str, str]:
    """Sources by dotted name below `root`; a package's `__init__` has the package's name, the root's is ''."""
    found = {}
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text()
    return found


def imports(source: str, where: str, is_package: bool, known: set[str]) -> set[str]:
    """Absolute dotted names that a source imports, those of the package below `timm_supertickets`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = [PACKAGE, *(where.split('.') if where else [])]
                up = node.level - is_package
                base = '.'.join([*parts[: len(parts) - up], *([node.module] if node.module else [])])
            for alias in node.names:
                below = f'{base}.{alias.name}'
                found.add(below if below.removeprefix(f'{PACKAGE}.') in known else base)
    return found


def inside(names: set[str]) -> set[str]:
    """Of imported names, the package's own, by their dotted name below it."""
    return {name.removeprefix(PACKAGE).removeprefix('.') for name in names if f'{name}.'.startswith(f'{PACKAGE}.')}


def package_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    known = set(sources)
    packages = {name.rpartition('.')[0] for name in known}
    return {name: inside(imports(text, name, name in packages, known)) for name, text in sources.items()}


def level(module: str) -> int | None:
    return LEVELS.get(module, LEVELS.get(f'{module.split(".")[0]}.*'))


def problems(sources: Mapping[str, str]) -> list[str]:
    found = [
        f'module {name!r} has no level: add it to LEVELS in {Path(__file__).name}'
        for name in sources
        if level(name) is None
    ]
    graph = package_graph(sources)
    for name, targets in graph.items():
        for target in sorted(targets):
            if target not in sources:
                found.append(f'{name} imports {target}, which is not there')
            elif level(name) is not None and level(target) is not None and level(target) > level(name):
                found.append(f'{name} (level {level(name)}) imports {target} (level {level(target)})')
            for pair in APART:
                if name.split('.')[0] != target.split('.')[0] and {name.split('.')[0], target.split('.')[0]} == pair:
                    found.append(f'{name} imports {target}, which must stay apart')
    return found + cycles(graph)


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f'imports go in a circle: {" -> ".join(error.args[1])}']
    return []


def test_imports_of_the_package_only_go_down():
    sources = read(ROOT / PACKAGE)
    assert {'', 'arch', 'models.mbv2', 'search.shrink'} <= set(sources)
    assert problems(sources) == []


def test_the_package_never_imports_recipes():
    recipes = {name.split('.')[0] for name in read(ROOT / 'recipes')} | {'recipes'}
    sources = read(ROOT / PACKAGE)
    for name, text in sources.items():
        found = {target.split('.')[0] for target in imports(text, name, name == '', set(sources))}
        assert not found & recipes, f'{name} imports {found & recipes} of recipes/'


def test_recipes_import_what_is_there_and_in_no_circle():
    sources, package = read(ROOT / 'recipes'), set(read(ROOT / PACKAGE))
    graph = {}
    for name, text in sources.items():
        found = imports(text, name, False, package)
        assert inside(found) <= package, f'recipes/{name}.py imports {inside(found) - package} of the package'
        graph[name] = {target.removeprefix('recipes.') for target in found} & set(sources)
    assert cycles(graph) == []
    for name, found in graph.items():
        what_is_run = {target for target in found if not target.startswith('parts.')}
        assert not (name.startswith('parts.') and what_is_run), f'{name} imports {what_is_run}, which is run'


def test_every_level_names_a_module_that_is_there():
    there = set(read(ROOT / PACKAGE))
    for name in LEVELS:
        assert name.removesuffix('.*') in there, f'LEVELS names {name!r}, which is gone'


@pytest.mark.parametrize(
    ('sources', 'expected'),
    [
        ({'arch': 'from .ticket import Ticket', 'ticket': ''}, 'arch (level 0) imports ticket (level 5)'),
        ({'arch': 'from . import ticket', 'ticket': ''}, 'arch (level 0) imports ticket (level 5)'),
        ({'arch': 'import timm_supertickets.ticket', 'ticket': ''}, 'arch (level 0) imports ticket (level 5)'),
        ({'arch': 'def f():\n    from .cost import Cost', 'cost': ''}, 'arch (level 0) imports cost (level 3)'),
        ({'cost': 'from timm_supertickets import Arch', '': ''}, 'cost (level 3) imports  (level 8)'),
        (
            {'cost': 'from .search.select import x', 'search.select': ''},
            'cost (level 3) imports search.select (level 4)',
        ),
        (
            {'search.shrink': 'from ..sparsity.mask import Mask', 'sparsity.mask': ''},
            'search.shrink imports sparsity.mask, which must stay apart',
        ),
        (
            {'sparsity.keep': 'from ..search import shrink', 'search.shrink': '', 'search': ''},
            'sparsity.keep imports search.shrink, which must stay apart',
        ),
        ({'arch': 'from .channels import a', 'channels': 'from .arch import b'}, 'imports go in a circle'),
        ({'arch': 'from .gone import a'}, 'arch imports gone, which is not there'),
        ({'novel': ''}, "module 'novel' has no level: add it to LEVELS in test_layering.py"),
    ],
)
def test_the_check_sees(sources, expected):
    assert any(problem.startswith(expected) for problem in problems(sources)), problems(sources)
