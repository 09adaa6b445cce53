"""The `rigl` command: `rigl train RECIPE`, `rigl recipes`, `rigl summary RECIPE`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union

if TYPE_CHECKING:
    from .recipes import Recipe

_ABOUT = """Train networks that store and multiply only the weights they use.

Start with `rigl train digits`: a minute on a laptop, and a table of what sparsity saved.
Settings: `rigl train digits --help`."""

# What the command needs beyond torch -> the distribution that has it.
_NEEDED = {
    "matplotlib": "matplotlib",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "tyro": "tyro",
}


def _parse(arguments: Sequence[str] | None, recipes: dict[str, Recipe]) -> tuple[str, Any]:
    """Command line -> ("train" | "recipes" | "summary", config or None). Exits on `--help` and on errors."""
    import tyro

    configs: Any = tyro.extras.subcommand_type_from_defaults(
        {name: recipe.config for name, recipe in recipes.items()},
        {name: recipe.about for name, recipe in recipes.items()},
        prefix_names=False,
    )
    taking = [("recipe", Annotated[configs, tyro.conf.arg(name="")])]
    commands = {
        "train": ("Train a recipe; writes a table, report.json and report.png.", taking),
        "recipes": ("List the recipes.", []),
        "summary": ("Show the layers of a recipe's network after it was made sparse.", taking),
    }
    types = {name: make_dataclass(name, fields, frozen=True) for name, (_, fields) in commands.items()}
    union: Any = Union[  # noqa: UP007  (built at run time)
        tuple(
            Annotated[types[name], tyro.conf.subcommand(name, description=about)]
            for name, (about, _) in commands.items()
        )
    ]
    chosen = tyro.cli(
        union, args=arguments, prog="rigl", description=_ABOUT, config=(tyro.conf.OmitSubcommandPrefixes,)
    )
    return type(chosen).__name__, getattr(chosen, "recipe", None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; the process's own by default.

    Returns:
        The exit code: 0, or 1 with a sentence on stderr.
    """
    missing = [dist for module, dist in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"rigl: the command line needs {', '.join(missing)}; "
            "install with `pip install --no-build-isolation 'sparse-kernels[train]'`",
            file=sys.stderr,
        )
        return 1
    from .recipes import RECIPES

    command, config = _parse(arguments, RECIPES)
    if command == "recipes":
        for name, recipe in RECIPES.items():
            print(f"{name}   {recipe.about}")
        return 0
    recipe = next(r for r in RECIPES.values() if type(r.config) is type(config))
    try:
        if command == "train":
            recipe.train(config)
        else:
            print(recipe.summary(config))
    except ValueError as error:  # a setting that does not fit; anything else is a bug and keeps its traceback
        print(f"rigl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rigl: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0
