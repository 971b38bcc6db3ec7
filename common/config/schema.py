"""Read a constructor's parameters and types from its source with `ast`, without importing or executing the module.

A wrong config is thus reported within milliseconds, before torch is imported, and the config of an untrusted checkpoint
is checked before any class that it names is imported.
"""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, Union

import common.types
from common.errors import UserError

WINGS = ("detr", "vit", "seq2seq")
_PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple, "dict": dict}
_TYPING_NAMES = {"Literal": Literal, "Optional": Optional, "Union": Union, "Annotated": Annotated}


class Field(NamedTuple):
    """One argument of a constructor."""

    annotation: Any  # its type; None if a config cannot hold such values: the program then passes the argument itself
    required: bool  # whether the argument has no default
    source: str  # the annotation as text, for messages


class Options:
    """Base class of types that represent classes read from source.

    A class is represented by a type, not by an instance, so that an annotation such as `X | None` can be evaluated.
    """

    path: ClassVar[str]  # package.module.Class
    fields: ClassVar[dict[str, Field]]
    handed_on: ClassVar[tuple[str, ...]]  # of a task: names of arguments that every model's constructor must accept
    offered: ClassVar[tuple[str, ...]]  # of a task: names of arguments that are passed to a model if it accepts them


def module_file(module: str) -> Path | None:
    """Find the file of a module on sys.path without importing the module or its parent packages.

    Returns None if there is no such file.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if all(part.isidentifier() for part in (top, *rest)) else None
    if spec is None:
        return None
    if not rest and spec.origin and Path(spec.origin).suffix == ".py":
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None


class ModuleSource:
    """The source of one module: the classes that the module defines, and the names that it imports or assigns."""

    def __init__(self, module: str, file: Path):
        self.module, self.is_package = module, file.name == "__init__.py"
        self.classes: dict[str, ast.ClassDef] = {}
        self._imports: dict[str, str] = {}  # an imported name -> its full path
        self._aliases: dict[str, ast.expr] = {}  # an assigned name -> the expression
        for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                package = f"{self._absolute(node)}." if isinstance(node, ast.ImportFrom) else ""
                self._imports |= {name.asname or name.name: package + name.name for name in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._aliases[node.targets[0].id] = node.value

    def options(self, name: str) -> type[Options]:
        """Return a type that describes the class `name` and its constructor.

        The type's `fields` are the keyword-only arguments of `__init__` or, for a dataclass, the dataclass's fields.
        """
        lineage = self.lineage(name)
        offered = _names(lineage, "offered")
        handed_on = tuple(key for key in _names(lineage, "handed_on") if key not in offered)
        attributes = {"fields": _fields(lineage), "handed_on": handed_on, "offered": offered}
        return type(name, (Options,), {"path": f"{self.module}.{name}", **attributes})

    def lineage(self, name: str) -> "list[ClassSource]":
        """The class `name`, defined or imported in this module, and its bases in method resolution order.

        Only classes in this module's top-level package, or in common, detr, vit or seq2seq, are read; others are left
        out.
        """
        if name in self.classes:
            node = self.classes[name]
            classes = [ClassSource(f"{self.module}.{name}", node, self)]
            for base in node.bases:
                classes += self.lineage(ast.unparse(base).partition("[")[0])
            return [cls for i, cls in enumerate(classes) if cls.path not in [base.path for base in classes[i + 1 :]]]
        source, original = self._imported_from(name)
        return source.lineage(original) if source else []

    def init(self, node: ast.FunctionDef, path: str) -> dict[str, Field]:
        """Read the keyword-only arguments of an `__init__`; raises UserError if it has any others except `self`."""
        arguments = node.args
        if len(arguments.posonlyargs + arguments.args) != 1 or arguments.vararg or arguments.kwarg:
            raise UserError(f"{path}.__init__ must be (self, *, ...) without **: its arguments are the config keys.")
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return {argument.arg: self._field(argument.annotation, default is None) for argument, default in pairs}

    def dataclass(self, node: ast.ClassDef) -> dict[str, Field]:
        """Read the fields that a dataclass defines itself, without those of its bases."""
        items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        items = [item for item in items if "ClassVar" not in ast.unparse(item.annotation)]
        return {ast.unparse(item.target): self._field(item.annotation, item.value is None) for item in items}

    def _field(self, node: ast.expr | None, required: bool) -> Field:
        return Field(self._evaluate(node), required, ast.unparse(node) if node else "an argument without a type")

    def _evaluate(self, node: ast.expr | None) -> Any:
        """Return the type that an annotation stands for.

        The annotation may consist of plain types, dataclasses, types of common/types.py, and Literal, Optional, Union
        and Annotated of `typing`. Returns None if it contains anything else, or if `node` is None.
        """
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if node is None or any(isinstance(part, ast.Attribute) for part in ast.walk(node)):
            return None
        types = {part.id: self._resolve(part.id) for part in ast.walk(node) if isinstance(part, ast.Name)}
        if None in types.values():
            return None
        return eval(compile(ast.Expression(node), self.module, "eval"), {"__builtins__": {}, **types})

    def _resolve(self, name: str) -> Any:
        """The type that a name in this module stands for; None if a config cannot hold values of this type."""
        if name in self.classes:
            return self.options(name) if any(_is_dataclass(cls.node) for cls in self.lineage(name)) else None
        if name in self._aliases:
            return self._evaluate(self._aliases[name])
        if name not in self._imports:
            return _PLAIN_TYPES.get(name)
        module, _, original = self._imports[name].rpartition(".")
        if module == "typing":
            return _TYPING_NAMES.get(original)
        if module == common.types.__name__:
            return getattr(common.types, original, None)
        source, original = self._imported_from(name)
        return source._resolve(original) if source else None

    def _imported_from(self, name: str) -> "tuple[ModuleSource | None, str]":
        """Find the module from which `name` is imported, and the name of the class in that module.

        `name` may be dotted, such as `blocks.Block` after `from common.nn import blocks`. The module is None if it has
        no source file, or if it lies in none of the packages that are read (see `lineage`).
        """
        prefix, _, last = name.rpartition(".")
        path = f"{self._imports.get(prefix)}.{last}" if prefix else self._imports.get(name, "")
        module, _, original = path.rpartition(".")
        is_readable = module.split(".")[0] in (self.module.split(".")[0], "common", *WINGS)
        file = module_file(module) if is_readable else None
        return (ModuleSource(module, file) if file else None), original

    def _absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module in `from ... import`, also for a relative import (`from .blocks import X`)."""
        parents = self.module.split(".")
        parents = parents[: len(parents) - node.level + self.is_package] if node.level else []
        return ".".join([*parents, *filter(None, [node.module])])


class ClassSource(NamedTuple):
    """A class definition and the module that contains it."""

    path: str  # package.module.Class
    node: ast.ClassDef
    source: ModuleSource


def _fields(lineage: list[ClassSource]) -> dict[str, Field]:
    """The arguments of a class's own or inherited constructor.

    `lineage` holds the class and its bases, nearest first. Raises UserError if none of them has an `__init__` or is a
    dataclass.
    """
    for i, (path, node, source) in enumerate(lineage):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return source.init(item, path)
        if _is_dataclass(node):
            bases = [base for base in reversed(lineage[i:]) if _is_dataclass(base.node)]
            return {key: field for base in bases for key, field in base.source.dataclass(base.node).items()}
    raise UserError(f"{lineage[0].path} has no __init__, nor has a base; write one: its arguments are the config keys.")


def _names(lineage: list[ClassSource], attribute: str) -> tuple[str, ...]:
    """The names in the tuple `attribute` of a class. A class without this tuple inherits that of its nearest base.

    An element that is not a string stands for all names that the class would inherit. Examples are *Parent.handed_on in
    a tuple, and **super().model_arguments() in the dict of a task of an earlier version (see `_elements`).
    """
    for i, (path, node, _) in enumerate(lineage):
        elements = _elements(node, attribute, path)
        if elements is not None:
            own = [str(element.value) for element in elements if isinstance(element, ast.Constant)]
            inherited = _names(lineage[i + 1 :], attribute) if len(own) < len(elements) else ()
            return (*inherited, *own)
    return ()


def _elements(node: ast.ClassDef, attribute: str, path: str) -> Sequence[ast.expr | None] | None:
    """The elements of the tuple `attribute` that this class itself defines; None if it does not define one.

    A task that was written for an earlier version has no `handed_on`. The keys of the dict that its `model_arguments`
    returns are used instead. Raises UserError if `attribute` is not a tuple.
    """
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", item)
        if isinstance(item, ast.Assign | ast.AnnAssign) and item.value and ast.unparse(target) == attribute:
            if not isinstance(item.value, ast.Tuple):
                raise UserError(f'{path}.{attribute} must be a tuple of names, such as ("classes",).')
            return item.value.elts
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "model_arguments"]
    nodes = [part for method in methods if attribute == "handed_on" for part in ast.walk(method)]
    returned = [part.value for part in nodes if isinstance(part, ast.Return)]
    return [key for value in returned if isinstance(value, ast.Dict) for key in value.keys] or None


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    return "dataclass" in names or "dataclasses.dataclass" in names
