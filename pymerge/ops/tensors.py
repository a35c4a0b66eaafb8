"""Checks that the ops share: which tensors and state dicts can be merged with each other (E1 to
E5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pymerge.dtypes import MERGEABLE, name_of, torch_dtype
from pymerge.errors import MismatchError
from pymerge.messages.arguments import argument, of_model
from pymerge.messages.words import some_names, type_of
from pymerge.ops.differences import differences
from pymerge.ops.memory import check_readable, span, why_unreadable
from pymerge.ops.sharded.layout import is_dtensor, local, why_otherwise
from pymerge.ops.weights import codes_in, quantised, why_adapter, why_codes

FLOATS = tuple(map(torch_dtype, MERGEABLE))


def check_list(
    models: object, base: object = None, what: str = "models", shards: bool = False
) -> None:
    """`models` is a list, or a tensor of stacked models. TypeError for a single state dict, module
    or model (as the base's shape tells), and for a generator.

    what: the argument's name. shards: whether the base may be a DTensor.
    """
    check_readable(argument(what), models)
    check_readable(argument("base"), base, shards)
    hint = f"several {what} in a list, [first, second]"
    if isinstance(models, torch.Tensor):
        alone = isinstance(base, torch.Tensor) and base.shape == models.shape
        if models.dim() > 0 and not alone:
            return
        hint = f"{what} in a list, [tensor] where there is one"
    elif isinstance(models, Sequence) and not isinstance(models, (str, bytes)):
        return
    elif isinstance(models, Mapping):
        hint = "a list of state dicts, [model1, model2]"
    raise TypeError(f"{argument(what)} is {type_of(models)}; pass {hint}")


def check_floats(
    name: str, value: object, op: str, readable: bool = False, shards: bool = False
) -> None:
    """One tensor with values in memory (E5) and a floating-point dtype of the spec (E1); TypeError
    that names the argument.

    op: names the operation in messages. readable: the values are known to be in memory. shards:
        whether a DTensor passes.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type_of(value)}; pass a torch.Tensor{_way_out(value)}")
    if not readable:
        check_readable(name, value, shards)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {str(value.dtype).removeprefix('torch.')}; {op} takes float32, float16,"
            f" bfloat16 and float64 (convert it with .to(), or leave it out)"
        )


def check_numbers(name: str, value: object, op: str) -> None:
    """As `check_floats`, but integers and bool pass too; complex and 8-bit floating-point tensors
    are a TypeError.
    """
    check_readable(name, value)  # before anything is asked of it
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        check_floats(name, value, op, readable=True)


def check_tensors(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    what: str = "models",
    op: str = "ties",
    readable: bool = False,
    shards: bool = False,
) -> None:
    """Values in memory, one shape, one device, floating-point dtypes of the spec; TypeError or
    ValueError that names the first exception.

    what: the argument's name. op: names the operation in messages. readable: the values are known
        to be in memory (E5). shards: DTensors of one mesh and equal placements pass too.
    """
    if len(models) == 0:
        raise ValueError(f"{argument(what)} is empty; pass at least one model")
    inputs = [*models] if base is None else [base, *models]

    def name(place: int) -> str:  # asked for in messages alone: there are many small tensors
        of_base = base is not None
        return argument("base") if of_base and place == 0 else of_model(what, place - of_base)

    shape: torch.Size | None = None
    device: torch.device | None = None
    for place, tensor in enumerate(inputs):
        if not (readable and isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS):
            check_floats(name(place), tensor, op, readable, shards)
        if shape is None:  # only now: some kinds of refused tensors have no shape
            shape, device = tensor.shape, tensor.device
        if tensor.shape != shape:
            raise ValueError(
                f"{name(place)} has shape {tuple(tensor.shape)}, {name(0)} {tuple(shape)}; all must"
                " be equal"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name(place)} is on {tensor.device}, {name(0)} on {device}; move all to one"
                " device"
            )
        if shards:
            check_spread(name(place), tensor, name(0), inputs[0])


def check_spread(name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Both are plain tensors, or DTensors of one mesh and of equal placements. TypeError where one
    is a DTensor alone, ValueError for other differences.
    """
    why = why_otherwise(tensor, first)
    if why:
        kind = TypeError if is_dtensor(tensor) != is_dtensor(first) else ValueError
        if kind is TypeError and not is_dtensor(tensor):
            name, first_name = first_name, name
            why = why_otherwise(first, tensor)
        raise kind(f"{name} {why.format(first_name)}")


def check_spreads(
    models: Sequence[Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor] | None
) -> None:
    """`check_spread` for every name that state dicts share with the first of them."""
    labels = [of_model("models", k) for k in range(len(models))]
    named = [*zip(labels, models, strict=True)]
    if base is not None:
        named.insert(0, (argument("base"), base))
    first_name, first = named[0]
    for label, state in named[1:]:
        for name, tensor in state.items():
            if name in first and not _are_plain(tensor, first[name]):
                where = f"[{name!r}]"
                check_spread(label + where, tensor, first_name + where, first[name])


def _are_plain(one: torch.Tensor, other: torch.Tensor) -> bool:
    return type(one) is torch.Tensor and type(other) is torch.Tensor


@contextmanager
def of_tensor(name: str) -> Iterator[None]:
    """Inside, errors are about a state dict's tensor, whose name then begins the message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        where = f"tensor {name!r}: " if name else ""
        raise type(error)(f"{where}{error}") from None


def _way_out(value: object) -> str:
    return " or the state_dict() of the module" if isinstance(value, torch.nn.Module) else ""


def check_out(out: torch.Tensor, models: Sequence[torch.Tensor], base: torch.Tensor | None) -> None:
    """`out` is contiguous, has the inputs' shape and device, and overlaps none of them (E2)."""
    like = models[0] if base is None else base
    check_floats("out", out, "ties", shards=is_dtensor(like))
    if out.shape != like.shape or out.device != like.device:
        raise ValueError(
            f"out has shape {tuple(out.shape)} on {out.device}, the inputs {tuple(like.shape)} on"
            f" {like.device}"
        )
    check_spread("out", out, "the inputs", like)
    out = local(out)
    if not out.is_contiguous():
        raise ValueError(
            "out is not contiguous; pass out=torch.empty(shape, ...) and copy it into the view"
        )
    start, end = out.data_ptr(), out.data_ptr() + out.numel() * out.element_size()
    labels = [(of_model("models", k), x) for k, x in enumerate(models)]
    for name, tensor in [(argument("base"), base), *labels]:
        if tensor is None or local(tensor).numel() == 0:
            continue
        low, high = _extent(local(tensor))
        if start < high and low < end:
            raise ValueError(
                f"out overlaps {name}; the inputs are read while out is written, pass a fresh"
                " tensor"
            )


def check_out_dict(
    out: Mapping[str, torch.Tensor],
    like: Mapping[str, torch.Tensor],
    models: Sequence[Mapping[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor] | None,
    owners_of: Callable[[], Mapping[str, str]] | None = None,
) -> dict[str, str]:
    """`out` has a tensor for every name of `like`, and no memory that is written is read or written
    elsewhere (E2).

    Returns the owner of each name, as `tied_names` gives it with `out` among the dicts, or as
    `owners_of` does. Checks of single tensors are left to `check_out`.
    """
    if not isinstance(out, Mapping):
        raise TypeError(
            f"out is {type_of(out)}, the models are state dicts; pass a mapping of tensors by name"
        )
    missing = [name for name in like if name not in out]
    if missing:
        raise ValueError(
            f"out lacks {some_names(missing)}; pass a tensor for every name, or out=None for new"
            " ones"
        )
    for name in like:
        if not isinstance(out[name], torch.Tensor):
            raise TypeError(f"out[{name!r}] is {type_of(out[name])}; pass a torch.Tensor")
        check_readable(f"out[{name!r}]", out[name], is_dtensor(like[name]))
        if out[name].shape != like[name].shape:
            raise ValueError(
                f"out[{name!r}] has shape {tuple(out[name].shape)}, the inputs"
                f" {tuple(like[name].shape)}"
            )
    inputs = [("base", base or {}), *((f"models[{k}]", model) for k, model in enumerate(models))]
    if owners_of is None:
        owners = dict(tied_names(like, [out, *(each for _, each in inputs if each)]))
    else:
        owners = dict(owners_of())
    spans = [
        (str(tensor.device), *_extent(local(tensor)), f"{where}[{name!r}]", where == "out")
        for where, tensors, names in (
            ("out", out, {name for name in like if owners[name] == name}),
            *((where, tensors, set(tensors)) for where, tensors in inputs),
        )
        for name, tensor in tensors.items()
        if name in names and tensor.dtype in FLOATS and local(tensor).numel()
    ]
    spans.sort()
    device = ""
    # Furthest end of all tensors and of written ones, and whose it is
    furthest: tuple[int, str] = (0, "")
    written: tuple[int, str] = (0, "")
    for where, start, end, label, is_out in spans:
        if where != device:
            device, furthest, written = where, (0, ""), (0, "")
        other_end, other = furthest if is_out else written
        if start < other_end:
            mine, its = (label, other) if is_out else (other, label)
            raise ValueError(
                f"{mine} overlaps {its}; the inputs are read while out is written, pass fresh"
                " tensors"
            )
        furthest = max(furthest, (end, label))
        if is_out:
            written = max(written, (end, label))
    return owners


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the end of what a view can touch."""
    return tensor.data_ptr(), tensor.data_ptr() + span(tensor)


def check_state_dicts(
    models: Sequence[Mapping[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor] | None,
    shards: bool = False,
) -> Mapping[str, torch.Tensor]:
    """Same names and shapes everywhere; one MismatchError reports all differences, with a few of
    many names. shards: whether DTensors pass.

    Returns the mapping that sets the order.
    """
    for _ in checked_tensors(models, base, shards):
        pass
    check_differences(models, base)
    return models[0] if base is None else base


def checked_tensors(
    models: Sequence[Mapping[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor] | None,
    shards: bool = False,
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Every tensor, model by model, the base last: (place, name, tensor). ValueError and TypeError
    for anything but state dicts of readable tensors, or with `shards` of DTensors.
    """
    if len(models) == 0:
        raise ValueError(f"{argument('models')} is empty; pass at least one state dict")
    if base is not None and not isinstance(base, Mapping):
        raise TypeError(
            f"{argument('base')} is {type_of(base)}, the models are state dicts; pass one kind"
        )
    labels = [of_model("models", k) for k in range(len(models))]
    for label, model in zip(labels, models, strict=True):
        if not isinstance(model, Mapping):
            raise TypeError(f"{label} is {type_of(model)}, others are state dicts; pass one kind")
    named = [*zip(labels, models, strict=True), (argument("base"), base or {})]
    for place, (where, model) in enumerate(named):
        for name, value in model.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"{where}[{name!r}] is {type_of(value)}; leave out what is not a torch.Tensor"
                )
            reason = why_unreadable(value, shards)
            if reason:
                raise TypeError(f"{where}[{name!r}] {reason}")
            yield place, name, value


def check_differences(
    models: Sequence[Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor] | None
) -> None:
    """MismatchError where names or shapes are not the same everywhere."""
    labels = [of_model("models", k) for k in range(len(models))]
    like = models[0] if base is None else base
    like_name = labels[0] if base is None else argument("base")
    problems = differences(labels, models, like, like_name)
    if problems:
        raise MismatchError("the state dicts do not match:\n  " + "\n  ".join(problems))


def tied_names(
    like: Mapping[str, torch.Tensor], dicts: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[str, str]]:
    """(name, owner): owner is the first name whose tensor is the same memory in every dict."""

    def places(name: str) -> tuple[tuple[object, ...], list[torch.Tensor]]:
        tensors = [local(d[name]) for d in dicts]
        return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors), tensors

    owners: dict[tuple[object, ...], str] = {}
    for name in like:
        key, tensors = places(name)
        owner = name if tensors[0].numel() == 0 else owners.setdefault(key, name)
        # A mapping that reads tensors on access may reuse an earlier tensor's memory, so only
        # tensors that are alive at the same time can be compared.
        if owner != name and places(owner)[0] != key:
            owners[key] = owner = name
        yield name, owner


@dataclass(frozen=True)
class _Described:
    dtype: str
    shape: tuple[int, ...]


def check_weights(
    models: Sequence[Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor] | None
) -> None:
    """MismatchError where state dicts hold quantised weights or adapters."""
    named = [(of_model("models", k), model) for k, model in enumerate(models)]
    if base is not None:
        named.insert(0, (argument("base"), base))
    problems = []
    for label, tensors in named:
        why = why_adapter(tensors)
        if why is None:
            plain = {torch.float32, torch.bfloat16, torch.float16}  # of most models, all tensors
            others = {name: x for name, x in tensors.items() if x.dtype not in plain}
            infos = {n: _Described(name_of(x.dtype), tuple(x.shape)) for n, x in others.items()}
            codes = codes_in(infos)
            found = why_codes(codes, tensors) if codes else None
            why = None if found is None else quantised(found)
        if why is not None:
            problems.append(f"{label} {why}")
    if problems:
        raise MismatchError(problems)
