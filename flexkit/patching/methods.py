"""Functions that stand for methods of a model while it is patched, and what becomes of them in its copies."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from flexkit.errors import PatchError
from flexkit.patching.state import Patch

__all__ = ["METHODS", "Method", "of_class"]

METHODS: dict[str, Callable[..., Any]] = {}
"""Those of every patched model, by name; the modules that define them add them."""


class Method:
    """A function that stands for a method of a module while the model around it is patched.

    Unlike a bound method it can be pickled, and its copy belongs to the copy of the module.

    Parameters
    ----------
    name : str
        Of the method, whose signature it has; if the function has an attribute ``signature_of``, from the module to a
        signature, it has that.
    function : callable
        Takes the module first.
    module : torch.nn.Module
        Whose method it is.
    patch : Patch
        Of the model.
    is_shared : bool
        Whether it stands in a shallow copy of the module, and so belongs to another.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], module: nn.Module, patch: Patch, *, is_shared: bool = False
    ) -> None:
        self.name, self.__func__, self.__self__ = name, function, module
        self.patch, self.is_shared = patch, is_shared

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"is_shared": False}  # what is made of it by deepcopy or pickle shares nothing

    def check(self) -> None:
        """Raise :class:`~flexkit.errors.PatchError` in a shallow copy."""
        if self.is_shared:
            refuse_sharing(self.__self__)

    def __getattr__(self, name: str) -> Any:
        # As bound methods do: torch.export asks for the code. Copies and pickles ask before there is a function.
        if "__func__" not in vars(self):
            raise AttributeError(name)
        return getattr(self.__func__, name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature_of: Callable[[nn.Module], inspect.Signature] | None = getattr(self.__func__, "signature_of", None)
        return signature_of(self.__self__) if signature_of else inspect.signature(of_class(self.__self__, self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.__func__(self.__self__, *args, **kwargs)
        self.check()
        with self.patch.counted("running"):
            return self.__func__(self.__self__, *args, **kwargs)


def of_class(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of a module's class, static or not, whatever is set on the module."""
    method: Callable[..., Any] = inspect.getattr_static(type(module), name).__get__(module, type(module))
    return method


def state_of_copies(self: nn.Module) -> dict[str, Any]:
    """``__getstate__`` of a patched model, which all its copies and pickles are made of."""
    state: dict[str, Any] = of_class(self, "__getstate__")()
    shared = {
        name: Method(name, method.__func__, method.__self__, method.patch, is_shared=True)
        for name, method in state.items()
        if isinstance(method, Method)
    }
    return state | shared


def refuse_sharing(self: nn.Module, *args: object) -> NoReturn:
    """Raise :class:`~flexkit.errors.PatchError`: something would run a patched model with another one's parts.

    It stands for ``_replicate_for_data_parallel``, by which DataParallel makes shallow copies.
    """
    raise PatchError(
        f"a shallow copy of a patched {type(self).__name__} cannot be used, since it shares its layers with the "
        "original: make a deep one (copy.deepcopy), and use DistributedDataParallel in the place of DataParallel."
    )


METHODS.update(__getstate__=state_of_copies, _replicate_for_data_parallel=refuse_sharing)
