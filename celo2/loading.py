"""Whose saved state is whose: the groups of a state dict, matched to those of an optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from celo2.groups import DERIVING, check_options, named_parameters
from celo2.matrices import MatrixView

# that compilers and wrappers put into a parameter's name
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# of an optimizer and not of what it saves
_OWN = frozenset({"params", "param_names", "kind", "lr_mult", "reasons", "state_dtype", *DERIVING})


class _Source(NamedTuple):
    group: int  # in the state dict
    key: Any  # of its state


def match(state_dict: Mapping[str, Any], groups: list[dict[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict in the order of `groups`, its parameters numbered by position.

    By name where both sides have names, wrappers' prefixes left out; by position otherwise. Groups saved before they
    were split by rule and kind are split. Raises ValueError for other parameters, names, weights, rules or views.
    """
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    found = find_sources(saved_groups, states, groups)
    merged, matched, position = [], {}, 0
    for index, (group, there) in enumerate(zip(groups, found, strict=True)):
        options = _options(index, group, [saved_groups[number] for number in dict.fromkeys(s.group for s in there)])
        check_options({**defaults, **options})
        options["params"] = []
        for source in there:
            options["params"].append(position)
            if source.key in states:
                matched[position] = states[source.key]
            position += 1
        merged.append(options)
    return {**state_dict, "state": matched, "param_groups": merged}


def find_sources(
    saved_groups: list[dict[str, Any]], states: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> list[list[_Source]]:
    """Return where the state of every parameter of every group is."""
    saved = [[_Source(index, key) for key in group["params"]] for index, group in enumerate(saved_groups)]
    keys = [source.key for members in saved for source in members]
    # torch.distributed.checkpoint has matched them by name, and calls them so
    matched = bool(keys) and all(isinstance(key, str) for key in keys)
    if not matched and all("param_names" in group for group in (*groups, *saved_groups)):
        return _by_name(saved_groups, saved, groups)
    lengths = [len(group["params"]) for group in groups]
    if [len(members) for members in saved] != lengths:
        saved = [_split(members, states) for members in saved]
    flat = [source for members in saved for source in members]
    if len(flat) != sum(lengths):
        raise ValueError(
            f"state dict of another model: it has {len(flat)} parameters in {len(saved_groups)} groups, this optimizer "
            f"{sum(lengths)} in {len(groups)}"
        )
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _split(members: list[_Source], states: Mapping[Any, Any]) -> list[_Source]:
    """Order parameters of a group as `celo2.groups.split_group` does, going by their state."""

    def place(source: _Source) -> tuple[bool, bool]:
        state = states.get(source.key, {})
        like = state.get("exp_avg", state.get("momentum_fast"))
        return "exp_avg" in state, like is not None and like.ndim < 2

    return sorted(members, key=place)


def _by_name(
    saved_groups: list[dict[str, Any]], saved: list[list[_Source]], groups: list[dict[str, Any]]
) -> list[list[_Source]]:
    own = [[name for name, _ in named_parameters(group)] for group in groups]
    theirs = [name for group in saved_groups for name in group["param_names"]]
    sources = [source for members in saved for source in members]
    # a model may use the names of wrappers for modules of its own
    same = any(
        len({_canonical(name) for name in names}) < len(names) for names in (theirs, [n for m in own for n in m])
    )
    there = {name if same else _canonical(name): source for name, source in zip(theirs, sources, strict=True)}
    here = [[name if same else _canonical(name) for name in members] for members in own]
    names = {name for members in here for name in members}
    if names != set(there):
        # a module that has become a part of another, or the other way
        stripped = {name.removeprefix(_prefix(there)): source for name, source in there.items()}
        prefix = _prefix(names)
        if {name.removeprefix(prefix) for name in names} == set(stripped):
            there, here = stripped, [[name.removeprefix(prefix) for name in members] for members in here]
        else:
            missing, unexpected = sorted(names - set(there)), sorted(set(there) - names)
            raise ValueError(
                f"state dict of another model: it lacks {_listed(missing)} and has {_listed(unexpected)}, which this "
                "optimizer does not; parameters are matched by name"
            )
    return [[there[name] for name in members] for members in here]


def _canonical(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _prefix(names: Any) -> str:
    """Return the modules that all names begin with, `""` for none."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for components in zip(*paths, strict=False):
        if len(set(components)) > 1:
            break
        common.append(components[0])
    return "".join(f"{component}." for component in common)


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _options(index: int, group: dict[str, Any], saved_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the options of a group as they were saved; what the saving version did not have keeps its value here."""
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if not saved_groups:
        return own
    found = [_modern(saved, group["rule"]) for saved in saved_groups]
    for key, value in found[0].items():
        for other, saved in zip(found, saved_groups, strict=True):
            if key not in _OWN and (key not in other or _differs(other[key], value)):
                names = _listed([str(name) for name in saved.get("param_names", ())])
                raise ValueError(
                    f"state dict of another optimizer: parameters of group {index} were saved in several groups, with "
                    f"{key}={value!r} and, for {names}, {other.get(key)!r}; construct FusedCelo2 with the same groups"
                )
    options = {**own, **{key: value for key, value in found[0].items() if key not in _OWN}}
    for key in ("weights", "rule", "split", "heads", "axis", "flatten"):
        there, here = options[key], group[key]
        if key == "weights":
            there, here = str(there).rpartition("@")[2], here.rpartition("@")[2]
        elif key == "rule" and there == "auto":
            # saved before groups were split; the state tells
            options[key] = there = here
        elif key != "rule" and group["rule"] == "adamw":
            options[key] = there = here
        elif key == "flatten":
            # what it comes to for these parameters: the default was False once
            there, here = (
                [MatrixView(flatten=value).flattens(p.ndim) for p in group["params"]] for value in (there, here)
            )
        if there != here:
            raise ValueError(
                f"state dict of another optimizer: group {index} was saved with {key}={options[key]!r}, this "
                f"optimizer has {group[key]!r}; construct FusedCelo2 with the saved value"
            )
    return options


def _modern(saved: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the options of a saved group for its part of one rule.

    Groups had the learned rule's rate once, and what AdamW's was derived from.
    """
    if "adam_lr_mult" not in saved:
        return saved
    options = dict(saved)
    if rule == "adamw":
        options.update({key: saved[key] * saved["adam_lr_mult"] for key in _RATES if key in saved})
        if saved.get("adam_weight_decay") is not None:
            options["weight_decay"] = saved["adam_weight_decay"]
    return options


def _differs(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return float(one) != float(two)
    return bool(one != two)
