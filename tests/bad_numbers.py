"Bad numbers for every argument of a public function that is guarded, made from the range that it states itself"
import importlib, inspect, math, pkgutil
from numbers import Integral
from typing import get_args, get_origin
import numpy as np
import leverplus
from leverplus.settings import Guard, has_numbers, is_number

LARGEST_FLOAT = 1.7976931348623157e308
HUGE = 10.**30 # nobody means it where there is an upper bound

def modules():
    "(name, module) of this package, programs left out"
    for info in pkgutil.iter_modules(leverplus.__path__):
        if info.name not in ("__main__", "all"): yield info.name, importlib.import_module(f"leverplus.{info.name}")

def callables():
    "(module, name, function) of public functions, constructors and methods, patched ones too, each once"
    seen = set()
    for module, holder in modules():
        for name, f in own_functions(holder):
            if id(f) not in seen: yield module, name, f
            seen.add(id(f))

def own_functions(holder):
    "(name, function) that a module defines, and what it patched into classes of others"
    here = holder.__name__
    for name, thing in vars(holder).items():
        if name.startswith("_"): continue
        if inspect.isclass(thing): yield from methods(thing, here)
        elif inspect.isfunction(thing) and thing.__module__ == here: yield name, thing

def methods(cls, here):
    "Public methods of a class that stand in a module; nbdev's `patch` puts them into classes of other modules"
    for name, thing in vars(cls).items():
        if isinstance(thing, (staticmethod, classmethod)): thing = thing.__func__
        if isinstance(thing, property): continue
        shown = not name.startswith("_") or name in ("__init__", "__call__")
        if shown and inspect.isfunction(thing) and thing.__module__ == here: yield f"{cls.__name__}.{name}", thing

def guarded_arguments():
    "(name of the callable, function, argument, its annotation)"
    for module, name, f in callables():
        for argument in getattr(f, "guards", {}):
            hint = inspect.signature(inspect.unwrap(f)).parameters[argument].annotation
            yield f"{module}.{name}", f, argument, hint

def kinds(hint):
    "What `|` stands between"
    return [part for part in get_args(hint)] if get_origin(hint) is not None and not direct(hint) else [hint]

def direct(hint): return is_number(hint) or get_origin(hint) in (tuple, list, dict)

def number_of(hint):
    "(int or float, interval) of a number type"
    base, *extras = get_args(hint)
    return base, next(m for m in extras if hasattr(m, "ge") and hasattr(m, "lt"))

def good_values(hint):
    "Values that an annotation with number types must let pass"
    for kind in kinds(hint):
        if is_number(kind):
            base, wanted = number_of(kind)
            yield from inside(base, wanted)
        elif direct(kind) and has_numbers(kind):
            yield from (holding(kind, value) for value in good_values(part_of(kind)))

def part_of(kind): return get_args(kind)[1 if get_origin(kind) is dict else 0]
def holding(kind, value): return {"gtprob": value} if get_origin(kind) is dict else (value,)

def inside(base, wanted):
    "Numbers of a range, as Python and as numpy have them"
    low = next((bound for bound in (wanted.ge, wanted.gt) if bound is not None and abs(bound) < 1e6), -1e6)
    high = next((bound for bound in (wanted.le, wanted.lt) if bound is not None and abs(bound) < 1e6), 1e6)
    middle = low + (min(high, low + 10) - low) / 2
    if base is int: yield from (int(middle), np.int64(int(middle)), float(int(middle)))
    else: yield from (middle, np.float32(middle))
    if wanted.ge is not None: yield base(wanted.ge)
    if wanted.le is not None: yield base(wanted.le) if math.isfinite(wanted.le) else math.inf

def bad_values(hint):
    "Numbers that an annotation must refuse, and what is no number at all"
    ranges = [number_of(kind) for kind in kinds(hint) if is_number(kind)]
    for value in (*candidates(ranges), -math.inf, math.inf, math.nan, np.float64("nan"), 10**400):
        if not any(fits(value, *number) for number in ranges): yield value
    yield True
    if not any(kind is str or kind not in (type(None),) and takes_text(kind) for kind in kinds(hint)): yield "3"

def takes_text(kind): return isinstance(kind, type) and issubclass(kind, str)

def candidates(ranges):
    "Numbers around the edges of ranges, and between whole numbers"
    for base, wanted in ranges:
        if base is int: yield from (2.5, np.float32(1.25), 2.**70)
        if wanted.ge is not None: yield from (wanted.ge - 1, wanted.ge - (1 if base is int else 1e-6))
        if wanted.gt is not None: yield from (wanted.gt, wanted.gt - 1e-6, wanted.gt - 1)
        if wanted.le is not None and math.isfinite(wanted.le): yield from (wanted.le * 1.001 + 1, HUGE)
        if wanted.lt is not None: yield from (wanted.lt, wanted.lt + .5, HUGE)

def fits(value, base, wanted):
    "The reference: said as plainly as it can be"
    value = int(value) if isinstance(value, Integral) else float(value)
    if value != value: return False
    if abs(value) > LARGEST_FLOAT and value != wanted.le: return False
    if base is int and value % 1: return False
    above = (wanted.ge is None or value >= wanted.ge) and (wanted.gt is None or value > wanted.gt)
    below = (wanted.le is None or value <= wanted.le) and (wanted.lt is None or value < wanted.lt)
    return above and below

def bad_numbers():
    "(name of a callable, argument, value, call): each call must be a ValueError that names argument and value"
    for name, f, argument, hint in guarded_arguments():
        for value in bad_values(hint): yield name, argument, value, call_with(f, argument, value)
        for kind in kinds(hint):
            if is_number(kind) or not has_numbers(kind): continue
            for value in bad_values(part_of(kind)):
                held = holding(kind, value)
                yield name, argument, held, call_with(f, argument, held)

def call_with(f, argument, value):
    "A call with nothing but this argument: the body would be a TypeError for what is missing, and must not begin"
    def call(): return f(**{argument: value})
    return call
