"""Random valid recipes, drawn from the classes of the recipe and not from the form's own reading of them."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from lab_utils.recipe import Recipe
from lab_utils.recipe.base import Section

# Without the line breaks of Unicode, which PyYAML itself does not bring back (U+0085, U+2028, U+2029).
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
WORDS = st.one_of(
    st.sampled_from(["base:tiny", "a b", " x ", "null", "'", '"q"', "1e-4", "7", "é｜", "", "a\nb\t"]),
    st.text(LETTERS, max_size=8),
)
FREE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e6, 1e6) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def values(annotation: Any, limits: dict[str, Any]) -> st.SearchStrategy:
    """Values of a field of a section, as JSON has them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(inner[0], limits)
    if origin in (Union, UnionType):
        return st.one_of([values(each, limits) for each in inner])
    if origin is Literal:
        return st.sampled_from(inner)
    if annotation is Any:
        return FREE
    if annotation is NoneType:
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.from_regex(limits["pattern"], fullmatch=True) if "pattern" in limits else WORDS
    if annotation is int:
        low = limits.get("ge", limits.get("gt", 0))
        return st.integers(low, low + 70_000)
    if annotation is float:
        low, high = limits.get("ge", limits.get("gt", -9.0)), limits.get("le", limits.get("lt", 1e4))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if origin is tuple and len(inner) == 2 and inner[1] is not Ellipsis:
        return st.tuples(*(values(each, {}) for each in inner)).map(list)
    if origin is tuple:
        return st.lists(values(inner[0], {}), min_size=limits.get("min_length", 0), max_size=3)
    if origin is dict:
        return st.dictionaries(values(inner[0], {}), values(inner[1], {}), max_size=2)
    if issubclass(annotation, Section):
        return sections(annotation)
    raise TypeError(annotation)


def sections(section: type[Section]) -> st.SearchStrategy:
    """Dictionaries with some keys of a section."""
    required, others = {}, {}
    for name, field in section.model_fields.items():
        limits = {
            k: v
            for m in field.metadata
            for k in ("ge", "gt", "le", "lt", "min_length", "pattern")
            if (v := getattr(m, k, None)) is not None
        }
        (required if field.is_required() else others)[name] = values(field.annotation, limits)
    return st.fixed_dictionaries(required, optional=others)


@st.composite
def recipes(draw: Any) -> Recipe:
    """Any recipe: what doesn't go together is left out, key by key."""
    tree = draw(sections(Recipe))
    if "rollout" in tree and tree["rollout"] is None:
        del tree["rollout"]
    while problems := Recipe.problems(tree):
        drop(tree, *problems[0])
    return Recipe.parse(tree)


def drop(tree: dict[str, Any], key: str, text: str) -> None:
    """The key that a problem is about, or that its sentence begins with, out of the tree."""
    *sections, leaf = key.split(".") if key else text.split("=")[0].split(" ")[0].split(".")
    node: Any = tree
    for part in sections:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if isinstance(node, dict) and isinstance(node.get(leaf), dict):
        named = text.removeprefix(f"{key}: ").split("=")[0].split(" ")[0].rpartition(".")[2]
        node = node[leaf] if named in node[leaf] else node
        leaf = named if named in node else leaf
    del node[leaf]
