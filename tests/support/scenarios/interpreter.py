"""Triton's interpreter in half of its time."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Leave out what the interpreter does again at every call within a kernel: it replaces the functions of `tl`.

    A launch replaces those of `triton.language`, and puts them back at its end. A call from within finds them replaced;
    the first one from a module that has `triton.language.core` replaces that module's, which stay so.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version, which may need it
    replaced = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        module = self.fn.__globals__.get("core", interpreter.tl)
        if module is not interpreter.tl and module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        function = self.rewrite()
        try:
            return function(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
