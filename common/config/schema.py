"""A constructor's keys and types, read from its source with `ast`: nothing is imported, so nothing is executed.

That makes a wrong config an error within milliseconds, before torch is imported, and lets a config out of a stranger's
checkpoint be judged before any of its targets runs.
"""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, Union

import common.types
from common.errors import UserError

WINGS = ("detr", "vit", "seq2seq")
_PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple, "dict": dict}
_TYPING = {"Literal": Literal, "Optional": Optional, "Union": Union, "Annotated": Annotated}


class Field(NamedTuple):
    """One argument of a constructor."""

    annotation: Any  # None: not made of plain types, so no config key but handed in by the program
    required: bool
    source: str  # the annotation as written


class Options:
    """A class that was read and not imported; a type, so that `Options | None` and `list[Options]` can be formed."""

    path: ClassVar[str]  # package.module.Class
    fields: ClassVar[dict[str, Field]]
    handed_on: ClassVar[tuple[str, ...]]  # of a task: the arguments that each model must take
    offered: ClassVar[tuple[str, ...]]  # and those that a model gets if its constructor names them


def module_file(module: str) -> Path | None:
    """The file of a module on sys.path, without importing it or the packages around it."""
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
    """One module's file: the classes that it defines, and what the names in it mean."""

    def __init__(self, module: str, file: Path):
        self.module, self.is_package = module, file.name == "__init__.py"
        self.classes: dict[str, ast.ClassDef] = {}
        self._imports: dict[str, str] = {}  # what an imported name stands for, in full
        self._aliases: dict[str, ast.expr] = {}
        for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                package = f"{self._absolute(node)}." if isinstance(node, ast.ImportFrom) else ""
                self._imports |= {name.asname or name.name: package + name.name for name in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._aliases[node.targets[0].id] = node.value

    def options(self, name: str) -> type[Options]:
        """The class `name` of this file: a dataclass's fields, or the keyword-only arguments of its `__init__`."""
        lineage = self.lineage(name)
        offered = _names(lineage, "offered")
        handed_on = tuple(key for key in _names(lineage, "handed_on") if key not in offered)
        attributes = {"fields": _fields(lineage), "handed_on": handed_on, "offered": offered}
        return type(name, (Options,), {"path": f"{self.module}.{name}", **attributes})

    def lineage(self, name: str) -> "list[ClassSource]":
        """The class `name`, defined or imported here, and its bases in Python's order; foreign ones are left out."""
        if name in self.classes:
            node = self.classes[name]
            classes = [ClassSource(f"{self.module}.{name}", node, self)]
            for base in node.bases:
                classes += self.lineage(ast.unparse(base).partition("[")[0])
            return [cls for n, cls in enumerate(classes) if cls.path not in [base.path for base in classes[n + 1 :]]]
        source, original = self._imported_from(name)
        return source.lineage(original) if source else []

    def init(self, node: ast.FunctionDef, path: str) -> dict[str, Field]:
        """The keyword-only arguments of an `__init__`."""
        args = node.args
        if len(args.posonlyargs + args.args) != 1 or args.vararg or args.kwarg:
            raise UserError(f"{path}.__init__ must read (self, *, ...) without **: its arguments are the config keys.")
        pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        return {argument.arg: self._field(argument.annotation, default is None) for argument, default in pairs}

    def dataclass(self, node: ast.ClassDef) -> dict[str, Field]:
        """The fields that a dataclass states itself."""
        items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        items = [item for item in items if "ClassVar" not in ast.unparse(item.annotation)]
        return {ast.unparse(item.target): self._field(item.annotation, item.value is None) for item in items}

    def _field(self, node: ast.expr | None, required: bool) -> Field:
        return Field(self._evaluate(node), required, ast.unparse(node) if node else "an argument without a type")

    def _evaluate(self, node: ast.expr | None) -> Any:
        """An annotation as a type, in a closed namespace of plain ones; None when it says anything else."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if node is None or any(isinstance(part, ast.Attribute) for part in ast.walk(node)):
            return None
        names = {part.id: self._resolve(part.id) for part in ast.walk(node) if isinstance(part, ast.Name)}
        if None in names.values():
            return None
        return eval(compile(ast.Expression(node), self.module, "eval"), {"__builtins__": {}, **names})

    def _resolve(self, name: str) -> Any:
        if name in self.classes:
            return self.options(name) if any(_is_dataclass(part.node) for part in self.lineage(name)) else None
        if name in self._aliases:
            return self._evaluate(self._aliases[name])
        if name not in self._imports:
            return _PLAIN.get(name)
        module, _, original = self._imports[name].rpartition(".")
        if module == "typing":
            return _TYPING.get(original)
        if module == common.types.__name__:
            return getattr(common.types, original, None)
        source, original = self._imported_from(name)
        return source._resolve(original) if source else None

    def _imported_from(self, name: str) -> "tuple[ModuleSource | None, str]":
        """The file that `name`, also as module.name, comes from, and the name there; None for another's package."""
        head, _, last = name.rpartition(".")
        full = f"{self._imports.get(head)}.{last}" if head else self._imports.get(name, "")
        module, _, original = full.rpartition(".")
        near = module.split(".")[0] in (self.module.split(".")[0], "common", *WINGS)
        file = module_file(module) if near else None
        return (ModuleSource(module, file) if file else None), original

    def _absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import names, relative ones (`from .blocks import X`) included."""
        around = self.module.split(".")
        around = around[: len(around) - node.level + self.is_package] if node.level else []
        return ".".join([*around, *filter(None, [node.module])])


class ClassSource(NamedTuple):
    """A class and the file that defines it."""

    path: str  # package.module.Class
    node: ast.ClassDef
    source: ModuleSource


def _fields(lineage: list[ClassSource]) -> dict[str, Field]:
    """The arguments of the constructor, which is the class's own or that of its nearest base."""
    for n, (path, node, source) in enumerate(lineage):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return source.init(item, path)
        if _is_dataclass(node):
            parts = [base for base in reversed(lineage[n:]) if _is_dataclass(base.node)]
            return {key: field for base in parts for key, field in base.source.dataclass(base.node).items()}
    raise UserError(f"{lineage[0].path} has no __init__, nor has a base; write one: its arguments are the config keys.")


def _names(lineage: list[ClassSource], attribute: str) -> tuple[str, ...]:
    """The names in a class attribute, which is the class's own or that of its nearest base.

    What is no plain name (*Parent.handed_on, **super().model_arguments()) stands for the names of the next base.
    """
    for n, (path, node, _) in enumerate(lineage):
        names = _names_stated(node, attribute, path)
        if names is not None:
            plain = [str(name.value) for name in names if isinstance(name, ast.Constant)]
            inherited = _names(lineage[n + 1 :], attribute) if len(plain) < len(names) else ()
            return (*inherited, *plain)
    return ()


def _names_stated(node: ast.ClassDef, attribute: str, path: str) -> Sequence[ast.expr | None] | None:
    """What one class states; in place of `handed_on` a task of an earlier version has the dict of `model_arguments`."""
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", item)
        if isinstance(item, ast.Assign | ast.AnnAssign) and item.value and ast.unparse(target) == attribute:
            if not isinstance(item.value, ast.Tuple):
                raise UserError(f'{path}.{attribute} must be a tuple of names, such as ("classes",).')
            return item.value.elts
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "model_arguments"]
    parts = [part for method in methods if attribute == "handed_on" for part in ast.walk(method)]
    returned = [part.value for part in parts if isinstance(part, ast.Return)]
    return [key for value in returned if isinstance(value, ast.Dict) for key in value.keys] or None


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    return "dataclass" in names or "dataclasses.dataclass" in names
