"""Every public name is documented, every method fully, and every example runs."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import pytest

import gradlab
from gradlab.catalog import methods

ROOT = pathlib.Path(gradlab.__file__).parents[1]
METHODS = methods()


def _modules():
  """Modules of the core, the methods and the models, without importing them."""
  names = ["gradlab"]
  for folder, package in (
    ("gradlab", "gradlab"),
    ("transforms", "gradlab.transforms"),
    ("models", "gradlab.models"),
  ):
    for path in sorted((ROOT / folder).rglob("*.py")):
      parts = path.relative_to(ROOT / folder).with_suffix("").parts
      names.append(".".join((package, *(part for part in parts if part != "__init__"))))
  return sorted(set(names))


MODULES = _modules()


def test_module_list_is_the_package():
  """Walking the files and walking the package find the same modules."""
  walked = {
    module.name
    for module in pkgutil.walk_packages(gradlab.__path__, "gradlab.")
    if not re.match(r"gradlab\.(launch|experiments)\b", module.name)
  }
  assert walked | {"gradlab"} == set(MODULES)


# The programs themselves define flags, some of the same names.
PRIVATE = sorted(
  ".".join(("gradlab", *path.relative_to(ROOT).with_suffix("").parts))
  for path in (ROOT / "launch").glob("_*/[!_]*.py")
)


@pytest.mark.parametrize("name", MODULES + PRIVATE)
def test_examples_run(name):
  """Under jax's own settings, as a reader would run them."""
  module = importlib.import_module(name)
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    results = doctest.testmod(module)
  assert not results.failed


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
  source = inspect.getsource(importlib.import_module(name))
  module = ast.parse(source)
  bare = [
    node.name
    for node in module.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not any("overload" in ast.unparse(item) for item in node.decorator_list)
    and not node.name.startswith("_")
    and not ast.get_docstring(node)
  ]
  assert not bare
  assert ast.get_docstring(module), f"{name} has no docstring"


@pytest.mark.parametrize("name", METHODS)
def test_method_docstring_follows_the_template(name):
  method = METHODS[name]
  text = inspect.getdoc(method.factory)
  summary, _, rest = text.partition("\n\n")
  assert "\n" not in summary
  assert summary.endswith(".")
  assert ".. math::" in rest
  assert "\nReferences:\n" in rest
  assert "\nReturns:\n" in rest
  if inspect.signature(method.factory).parameters:
    assert "\nArgs:\n" in rest
  for parameter in inspect.signature(method.factory).parameters:
    assert re.search(rf"^  (?:\w+, )*{parameter}(?:, \w+)*: ", rest, re.M), parameter


@pytest.mark.parametrize("name", METHODS)
def test_method_has_an_example_that_doctest_finds(name):
  factory = METHODS[name].factory
  module = importlib.import_module(factory.__module__)
  found = doctest.DocTestFinder().find(module)
  assert any(test.name.endswith(f".{name}") and test.examples for test in found)


@pytest.mark.parametrize("name", METHODS)
def test_method_names_its_paper(name):
  method = METHODS[name]
  assert re.search(r", (?:18|19|20)\d\d$", method.paper), method.paper
  assert re.fullmatch(r"(\d{4}\.\d{4,5})?", method.arxiv)
  assert all(re.fullmatch(r"\d{3}:\d+", seed) for seed in method.seeds)
  if method.arxiv:
    assert method.arxiv in inspect.getdoc(method.factory)
