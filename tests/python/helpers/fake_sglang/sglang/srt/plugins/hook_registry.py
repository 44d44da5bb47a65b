"""The parts of SGLang 0.5's hooks that weightlift uses, for tests without SGLang."""

import enum
import functools
import pkgutil
import typing


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    hooks: typing.ClassVar[list] = []

    @classmethod
    def register(cls, target, hook, hook_type):
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls):
        for target, hook, hook_type in cls.hooks:
            assert hook_type is HookType.AROUND
            path, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(path)
            held = owner.__dict__[name]
            static = isinstance(held, staticmethod)
            around = functools.partial(hook, held.__func__ if static else held)

            def method(*args, _around=around, **kwargs):
                return _around(*args, **kwargs)

            setattr(owner, name, staticmethod(method) if static else method)
