"""Recipes: strict, whole, and the same after a round trip."""

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.config import dump_toml, from_dict, load_attribute, load_recipe, to_dict
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 2
    rate: float = 0.5
    kind: Literal["a", "bb"] = "a"

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth is {self.depth}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    flag: bool = False
    size: int | None = None
    text_or_number: int | float | str | bool = 1
    widths: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    layers: tuple[Inner, ...] = ()
    options: dict[str, int | float | str | bool | tuple[int, ...]] = field(default_factory=dict)


inners = st.builds(
    Inner,
    depth=st.integers(0, 2**62),
    rate=st.floats(allow_nan=False),
    kind=st.sampled_from(["a", "bb"]),
)
# TOML is UTF-8: every text but lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
recipes = st.builds(
    Recipe,
    name=texts,
    flag=st.booleans(),
    size=st.none() | st.integers(-(2**62), 2**62),
    text_or_number=numbers | texts | st.booleans(),
    widths=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    inner=inners,
    maybe=st.none() | inners,
    layers=st.lists(inners, max_size=3).map(tuple),
    options=st.dictionaries(
        texts, numbers | texts | st.booleans() | st.lists(st.integers(0, 9)).map(tuple), max_size=3
    ),
)


@given(recipes)
def test_a_recipe_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(dump_toml(recipe).encode())  # write_text would turn a line break in a text into another
    found = load_recipe(Recipe, path)
    assert found == recipe
    assert type(found.text_or_number) is type(recipe.text_or_number)
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('nam = "x"', ["unknown key 'nam'", "nearest is 'name'"]),
        ('name = "x"\n[inner]\ndept = 3', ["unknown key 'inner.dept'", "nearest is 'inner.depth'", "known: depth"]),
        ('name = "x"\n[[layers]]\n[[layers]]\nrat = 1.0', ["unknown key 'layers[1].rat'", "'layers[1].rate'"]),
        ("flag = true", ["key 'name' is missing"]),
        ("name = 3", ["'name' is 3", "a text in quotes"]),
        ('name = "x"\nflag = 1', ["'flag' is 1", "true or false"]),
        ('name = "x"\nsize = true', ["'size' is True", "a whole number"]),
        ('name = "x"\nsize = 1.0', ["'size' is 1.0", "a whole number"]),
        ('name = "x"\n[inner]\nrate = true', ["'inner.rate' is True", "a number"]),
        ('name = "x"\n[inner]\nrate = "0.1"', ["'inner.rate' is '0.1'", "a number"]),
        ('name = "x"\n[inner]\nkind = "b"', ["'inner.kind' is 'b'", "one of 'a', 'bb'", "nearest: 'bb'"]),
        ('name = "x"\n[inner]\nkind = [1]', ["'inner.kind' is [1]", "one of 'a', 'bb'"]),
        ('name = "x"\n[inner]\ndepth = -1', ["section 'inner'", "depth is -1, expected 0 or more"]),
        ('name = "x"\ninner = 3', ["'inner' is 3, expected a section"]),
        ('name = "x"\nwidths = 3', ["'widths' is 3, expected a list"]),
        ('name = "x"\nwidths = [1, true]', ["'widths[1]' is True", "a whole number"]),
        ('name = "x"\noptions = [1]', ["'options' is [1], expected a section"]),
        ('name = "x"\n[options]\na = 2024-01-01', ["'options.a'", "a whole number or a number or a text"]),
        ('name = "x"\n[options.deep]\na = 1', ["'options.deep'"]),
        ("name = \n", ["cannot be read as TOML", "line 1"]),
        ('name = "x"\nname = "y"', ["cannot be read as TOML"]),
        ("a = " + "[" * 100_000, ["cannot be read as TOML"]),
    ],
)
def test_wrong_recipes_are_refused_with_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_recipe(Recipe, path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe .*missing\.toml does not exist"):
        load_recipe(Recipe, tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_recipe(Recipe, tmp_path)
    (tmp_path / "latin").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_recipe(Recipe, tmp_path / "latin")


def test_every_type_can_be_set_from_outside(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "x"\n[inner]\ndepth = 3')
    found = load_recipe(
        Recipe,
        path,
        [
            "name=a bare = word",
            "flag=true",
            "size=7",
            "text_or_number=1.5",
            "widths=[1, 2]",
            "inner.rate=1e-3",
            "inner.kind=bb",
            "maybe.depth = 9",
            "options.width=16",
            "options.name=run#2",
            "options.hidden=[8, 4]",
            "options.quoted='7'",
        ],
    )
    assert found == Recipe(
        name="a bare = word",
        flag=True,
        size=7,
        text_or_number=1.5,
        widths=(1, 2),
        inner=Inner(depth=3, rate=1e-3, kind="bb"),
        maybe=Inner(depth=9),
        options={"width": 16, "name": "run#2", "hidden": (8, 4), "quoted": "7"},
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.depht=1", r"unknown key 'inner\.depht'; nearest is 'inner\.depth'"),
        ("inner.depth", "is not of the form section.key=value"),
        ("=1", "is not of the form section.key=value"),
        ("inner..depth=1", "is not of the form section.key=value"),
        ("name.x=1", "'name' is a value, not a section"),
        ("inner.depth=one", r"'inner\.depth' is 'one', expected a whole number"),
        ("size=1\nflag=true", r"'size' is '1\\nflag=true', expected a whole number"),
        ("size=", "'size' is '', expected a whole number"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, write(tmp_path, 'name = "x"'), [override])


@given(st.text(string.ascii_lowercase + ".=[]{}'\"\n #1", max_size=12))
def test_any_override_is_taken_or_refused(override: str) -> None:
    path = Path(__file__).parent / "does_not_matter.toml"
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(Recipe, path, [override])
    from efftrain.config.load import _apply_override

    table: dict[str, object] = {"name": "x", "inner": {"depth": 1}}
    try:
        _apply_override(table, override)
        from_dict(Recipe, table)
    except ConfigError:
        pass


# A user's own file


def test_a_users_file_may_hold_dataclasses_with_lazy_annotations(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Mine:\n"
        "    size: int = 3\n"
        "made = Mine()\n"
    )
    assert getattr(load_attribute(f"{path}:made", "Model"), "size", None) == 3
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text("made = 4")
    assert load_attribute(f"{other}:made", "Model") == 4, "equal names of files do not mix"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(3)", r"running .* failed \(SystemExit: 3\)"),
        ("def f(:", r"running .* failed \(SyntaxError"),
        ("import no_such_module", r"running .* failed \(ModuleNotFoundError"),
        ("other = 1", r"has no 'name'\. It has: other"),
        ("", r"has no 'name'\. It has: nothing"),
    ],
)
def test_a_users_file_that_fails_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"Model '.*mine.py:name': .*{message}"):
        load_attribute(f"{path}:name", "Model")
