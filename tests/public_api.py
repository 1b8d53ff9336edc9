"""What users may rely on: every public name with its signature. ``python tests/public_api.py`` writes it down anew."""

import inspect
import re
from pathlib import Path

import srd_lightning
from srd_lightning.command.subcommands import OF_RUNS, SUBCOMMANDS

GOLDEN = Path(__file__).parent / "golden" / "public_api.txt"


def public_api():
    """Return a line for each subcommand, public name and public method of a class."""
    lines = [f"srd {name}" for name in (*SUBCOMMANDS, *OF_RUNS)]
    for name in sorted(srd_lightning.__all__):
        lines.extend(described(name, getattr(srd_lightning, name)))
    return "".join(f"{line}\n" for line in lines)


def described(name, thing):
    if inspect.isclass(thing):
        yield f"class {name}{signature(thing)}"
        # Without hooks of Lightning and torch.
        of_others = {method for base in thing.__mro__ if not is_ours(base) for method in dir(base)}
        for method, found in inspect.getmembers(thing, inspect.isroutine):
            if not method.startswith("_") and method not in of_others:
                yield f"    {method}{signature(found)}"
    elif callable(thing) and is_ours(thing):
        yield f"{name}{signature(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def signature(thing):
    return re.sub(r"<function \S+ at \w+>", "<function>", str(inspect.signature(thing)).replace("'", ""))


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("srd_lightning")


if __name__ == "__main__":
    GOLDEN.write_text(public_api())
