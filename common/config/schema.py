"""A constructor's keys and types, read from its source with `ast`: nothing is imported, so nothing is executed.

That makes a wrong config an error within milliseconds, before torch is imported, and lets a config out of a stranger's
checkpoint be judged before any of its targets runs.
"""

import ast
import importlib.util
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
    handed_on: ClassVar[list[str]]  # keys of the dict that its method `model_arguments` returns
    offered: ClassVar[list[str]]  # those among them that a model may do without


def find(module: str) -> Path | None:
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


class Source:
    """One module's file: the classes that it defines, and what the names in its annotations mean."""

    def __init__(self, module: str, file: Path):
        self.module, self.is_package = module, file.name == "__init__.py"
        self.classes: dict[str, ast.ClassDef] = {}
        self._imports: dict[str, tuple[str, str]] = {}
        self._aliases: dict[str, ast.expr] = {}
        for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                self._imports |= {name.asname or name.name: (self._absolute(node), name.name) for name in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._aliases[node.targets[0].id] = node.value

    def options(self, name: str) -> type[Options]:
        """The class `name` of this file: a dataclass's fields, or the keyword-only arguments of its `__init__`."""
        node, path = self.classes[name], f"{self.module}.{name}"
        fields = self._dataclass(node, path) if _is_dataclass(node) else self._init(node, path)
        handed_in = {"handed_on": _handed_on(node), "offered": _words(node, "offered") or []}
        return type(name, (Options,), {"path": path, "fields": fields, **handed_in})

    def _dataclass(self, node: ast.ClassDef, path: str) -> dict[str, Field]:
        if node.bases:
            raise UserError(f"{path} inherits; a dataclass of config keys must state all its fields itself.")
        items = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        return {item.target.id: self._field(item.annotation, item.value is None) for item in items}  # type: ignore[union-attr]

    def _init(self, node: ast.ClassDef, path: str) -> dict[str, Field]:
        init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        if init is None:
            raise UserError(f"{path} has no __init__ of its own; write one, because its arguments are the config keys.")
        args = init.args
        if len(args.posonlyargs + args.args) != 1 or args.vararg or args.kwarg:
            raise UserError(f"{path}.__init__ must read (self, *, ...) without **: its arguments are the config keys.")
        pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        return {argument.arg: self._field(argument.annotation, default is None) for argument, default in pairs}

    def _field(self, node: ast.expr | None, required: bool) -> Field:
        return Field(self._evaluate(node), required, ast.unparse(node) if node else "an argument without a type")

    def _evaluate(self, node: ast.expr | None) -> Any:
        """An annotation as a type, in a closed namespace of plain ones; None when it says anything else."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if node is None or any(isinstance(part, ast.Attribute) for part in ast.walk(node)):
            return None
        names = {part.id: self._meaning(part.id) for part in ast.walk(node) if isinstance(part, ast.Name)}
        if None in names.values():
            return None
        return eval(compile(ast.Expression(node), self.module, "eval"), {"__builtins__": {}, **names})

    def _meaning(self, name: str) -> Any:
        if name in self.classes:
            return self.options(name) if _is_dataclass(self.classes[name]) else None
        if name in self._aliases:
            return self._evaluate(self._aliases[name])
        if name not in self._imports:
            return _PLAIN.get(name)
        module, original = self._imports[name]
        if module == "typing":
            return _TYPING.get(original)
        if module == common.types.__name__:
            return getattr(common.types, original, None)
        near = module.split(".")[0] in (self.module.split(".")[0], "common", *WINGS)
        file = find(module) if near else None
        return Source(module, file)._meaning(original) if file else None

    def _absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import names, relative ones (`from .blocks import X`) included."""
        around = self.module.split(".")
        around = around[: len(around) - node.level + self.is_package] if node.level else []
        return ".".join([*around, *filter(None, [node.module])])


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    return "dataclass" in names or "dataclasses.dataclass" in names


def _words(node: ast.ClassDef, name: str) -> list[str] | None:
    """The words of a class attribute such as `offered: ClassVar[tuple[str, ...]] = ("logits",)`."""
    values = [item.value for item in node.body if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == name]
    return [str(word) for word in ast.literal_eval(values[0])] if values and values[0] else None


def _handed_on(node: ast.ClassDef) -> list[str]:
    if (words := _words(node, "handed_on")) is not None:
        return words
    method = next((item for item in node.body if getattr(item, "name", "") == "model_arguments"), node)
    returned = [part.value for part in ast.walk(method) if isinstance(part, ast.Return)] if method is not node else []
    keys = [key for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    return [str(key.value) for key in keys if isinstance(key, ast.Constant)]
