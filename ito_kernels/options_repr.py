"""What does a loss module print? All its options, also those at their defaults."""

from __future__ import annotations

import inspect

from torch import Tensor

NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


class PrintsOptions:
    """A mixin for `torch.nn.Module`s whose `extra_repr` lists the arguments of their constructors.

    An argument is read from the attribute of its name. Arguments without an attribute are left out,
    for subclasses that keep theirs elsewhere.
    """

    def printed_options(self) -> dict[str, object]:
        names = []
        for cls in type(self).__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = inspect.signature(cls.__init__).parameters.values()
            names += [x.name for x in parameters if x.kind in NAMED]
            if not any(x.kind is x.VAR_KEYWORD for x in parameters):
                break  # its base classes get no arguments that it does not name
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_text(x)}" for name, x in self.printed_options().items())


def _text(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() != 1:
        return f"tensor of shape {tuple(value.shape)}"
    return repr(value.detach())  # repr of a Parameter takes two lines
